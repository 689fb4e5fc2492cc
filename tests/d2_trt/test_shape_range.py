"""Ranges of shapes: what they hold, what they say, and how they follow from detectron2's resizing."""

import json

import numpy as np
import pytest
from detectron2.data import transforms as T

from d2_trt.errors import EngineShapeError, OptionsError
from d2_trt.shape_range import LONGEST_ASPECT_RATIO, ShapeRange, derive_sizes

RANGE = ShapeRange((1, 256, 256), (1, 800, 1088), (1, 1344, 1344))


@pytest.mark.parametrize("min_size", [64, 320, 800, 1024])
@pytest.mark.parametrize("max_size", [512, 1333, 2048])
@pytest.mark.parametrize("divisibility", [1, 32])
def test_derived_range_holds_what_detectron2_resizes_to(min_size, max_size, divisibility):
    low, usual, high = derive_sizes([min_size], max_size, divisibility)
    resize = T.ResizeShortestEdge([min_size, min_size], max_size)
    draw = np.random.default_rng(0)
    sizes = [
        (480, 640),
        (640, 480),
        (100, 100),
        (100, 100 * LONGEST_ASPECT_RATIO),
        (100 * LONGEST_ASPECT_RATIO, 100),
    ]
    sizes += [tuple(draw.integers(200, 1000, 2)) for _ in range(200)]
    for height, width in sizes:
        transform = resize.get_transform(np.empty((height, width, 1), np.uint8))
        padded = [-(-n // divisibility) * divisibility for n in (transform.new_h, transform.new_w)]
        assert all(a <= n <= b for a, n, b in zip(low, padded, high)), (height, width, padded, low, high)
        if (height, width) == (480, 640):
            assert tuple(padded) == usual


def test_range_contains_its_corners_and_nothing_beyond():
    shapes = ShapeRange((1, 256, 320), (2, 800, 1088), (4, 1344, 1408))
    for inside in ((1, 256, 320), (4, 1344, 1408), (2, 800, 320)):
        assert shapes.contains(*inside)
        assert shapes.explain(*inside) == ""
        shapes.check(*inside)
    for outside in (
        (0, 256, 320),
        (5, 256, 320),
        (1, 224, 320),
        (1, 1376, 320),
        (1, 256, 288),
        (1, 256, 1440),
    ):
        assert not shapes.contains(*outside)
        with pytest.raises(EngineShapeError, match="outside this engine's range"):
            shapes.check(*outside)


def test_error_of_an_image_that_is_too_large():
    with pytest.raises(EngineShapeError) as error:
        RANGE.check(1, 1408, 1344)
    assert str(error.value) == (
        "image padded to 1408x1344 is outside this engine's range 256..1344 (H) x 256..1344 (W). "
        "Lower INPUT.MAX_SIZE_TEST, or widen MODEL.TENSORRT.SHAPES and rebuild."
    )


def test_error_of_an_image_that_is_too_small():
    assert RANGE.explain(1, 224, 1344) == (
        "image padded to 224x1344 is outside this engine's range 256..1344 (H) x 256..1344 (W). "
        "Widen MODEL.TENSORRT.SHAPES and rebuild."
    )


def test_error_of_a_batch_that_is_too_large():
    assert RANGE.explain(4, 800, 1088) == (
        "a batch of 4 images is outside this engine's range 1..1. "
        "Lower TEST.BATCH_SIZE, or raise MODEL.TENSORRT.MAX_BATCH_SIZE and rebuild."
    )
    assert "1408x1344" in RANGE.explain(4, 1408, 1344)
    assert "batch of 4" in RANGE.explain(4, 1408, 1344)


def test_range_describes_itself():
    assert RANGE.describe() == "batch 1..1, 256..1344 (H) x 256..1344 (W)"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2), (1, 2), (1, 2)), r"ShapeRange\.min is \(1, 2\); allowed: \(batch, height, width\)"),
        (((0, 32, 32), (1, 32, 32), (1, 32, 32)), r"ShapeRange\.min is \(0, 32, 32\)"),
        (((1, 32, 32), (1, 32.0, 32), (1, 32, 32)), r"ShapeRange\.opt is \(1, 32\.0, 32\)"),
        (
            ((1, 32, 64), (1, 32, 32), (1, 32, 64)),
            r"the width of a shape range is 64 \(min\), 32 \(opt\), 64 \(max\)",
        ),
    ],
)
def test_impossible_range_is_refused(shapes, message):
    with pytest.raises(OptionsError, match=message):
        ShapeRange(*shapes)


def test_range_goes_through_json():
    assert ShapeRange.from_json(json.loads(json.dumps(RANGE.to_json()))) == RANGE
