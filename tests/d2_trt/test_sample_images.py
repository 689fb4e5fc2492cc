"""What an engine is compared on: the sizes, how many images of each, and which."""

from __future__ import annotations

import pytest
import torch

from d2_trt.sample_images import SampleImages, verified_batches
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
    first, second = samples.take((3, 64, 96)), samples.take((2, 32, 64))
    assert torch.equal(first[:2], given)
    assert first.dtype == torch.float32 and second.shape == (2, 3, 32, 64)
    assert first[2].max() > 1 and not torch.equal(second[0], second[1])
