"""What an engine is compared on: the sizes, how many images of each, and which."""

from __future__ import annotations

import pytest
import torch

from d2_trt.sample_images import SampleImages, images_to_compare, verified_batches
from d2_trt.shape_range import ShapeRange
from tests.d2_trt.backend_helpers import images


def test_compared_sizes_hold_the_fastest_the_largest_and_the_smallest():
    shapes = ShapeRange((1, 256, 256), (2, 800, 1088), (4, 1344, 1344))
    assert verified_batches(shapes, 32, 1, 1) == [(2, 800, 1088)]
    assert verified_batches(shapes, 32, 3, 1) == [(2, 800, 1088), (1, 1344, 1344), (4, 256, 256)]
    six = verified_batches(shapes, 32, 6, 1)
    assert len({size[1:] for size in six}) == 6
    assert any(h > w for _, h, w in six) and any(h < w for _, h, w in six)
    assert all(shapes.contains(*size) and size[1] % 32 == size[2] % 32 == 0 for size in six)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_size_gets_the_wanted_number_of_images(count):
    shapes = ShapeRange((1, 64, 64), (1, 64, 96), (2, 256, 256))
    per_size = {}
    for batch, *size in verified_batches(shapes, 32, 5, count):
        assert batch <= 2
        per_size[tuple(size)] = per_size.get(tuple(size), 0) + batch
    assert len(per_size) == 5 and min(per_size.values()) >= count


def test_range_of_one_size_is_compared_once():
    assert verified_batches(ShapeRange.fixed(2, 64, 96), 32, 5, 1) == [(2, 64, 96)]


def test_samples_are_what_was_given_and_then_scenes_none_twice():
    given = images(2, 64, 96)
    samples = SampleImages(torch.device("cpu"), given)
    first, second = samples.take((3, 64, 96)), samples.take((2, 64, 96))
    assert torch.equal(first[:2], given)
    assert first.dtype == torch.float32 and first[2].max() > 1
    assert not any(torch.equal(a, b) for a in (*given, first[2]) for b in second)
    assert not torch.equal(second[0], second[1]) and (samples.given, samples.drawn) == (2, 3)


def test_what_was_given_is_taken_again_at_another_size_and_after_a_restart():
    given = [images(1, 40, 72)[0].to(torch.uint8), images(1, 64, 96)[0], images(1, 96, 64)[0]]
    samples = SampleImages(torch.device("cpu"), given)
    assert samples.take((2, 32, 64)).shape == (2, 3, 32, 64)
    assert torch.equal(samples.take((1, 96, 64))[0], given[2])  # whose turn it is
    assert torch.equal(samples.take((2, 64, 96))[1], given[1])
    samples.restart()
    assert torch.equal(samples.take((3, 64, 96))[2], given[1])
    assert samples.describe() == "3 given images"
    samples.take((4, 64, 64))
    assert samples.describe() == "3 given images and 1 drawn scene" and len(samples) == 3


@pytest.mark.parametrize("count, drawn", [(1, 2), (2, 2), (3, 0)])
def test_fastest_shape_is_compared_on_images_that_were_not_traced(count, drawn):
    shapes = ShapeRange((1, 64, 64), (2, 64, 96), (2, 128, 128))
    samples = SampleImages(torch.device("cpu"), images(count, 64, 96))
    traced = samples.take(shapes.opt)
    compared = [x for x in images_to_compare(samples, shapes, 32, 3, 1) if x.shape == traced.shape]
    assert any(not any(torch.equal(x, y) for y in traced) for batch in compared for x in batch)
    assert any(torch.equal(x, y) for batch in compared for x in batch for y in images(count, 64, 96))
    assert samples.drawn == drawn
