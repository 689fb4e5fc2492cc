"""Arguments that the model does not use and a user's backbone may: as in PyTorch, or refused by name."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2_trt.build_spec import BuildSpec
from d2_trt.errors import ConversionError
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, Wrapped, random_images, trace
from tests.doubles.fixtures import trt_double as trt  # noqa: F401

WEIGHT = torch.linspace(-1, 1, 4 * 3 * 3 * 3).reshape(4, 3, 3, 3)
THREE = torch.tensor([1.0, 2.0, 3.0])
CHANNELS = torch.arange(1, 4)[:, None, None]

SUPPORTED = {
    "sum with integers": lambda x: x + CHANNELS,
    "quotient of integers": lambda x: CHANNELS / (x + 1),
    "quotient by an integer": lambda x: x / torch.tensor(3),
    "product with constant bool": lambda x: x * (CHANNELS > 1),
    "product with a mask": lambda x: x * (x > 100),
    "mask first": lambda x: (x > 100) + x,
    "mask in place": lambda x: (x + 1).add_(x > 100),
    "comparison with integers": lambda x: x.masked_fill(x < CHANNELS * 70, 0.0),
    "comparison of a mask": lambda x: x.masked_fill((x > 100) < 0.5, 0.0),
    "mask as float": lambda x: (x > 100).float() * x,
    "number of numpy": lambda x: x.mul(np.float32(3)),
    "operand by name": lambda x: torch.add(input=x, other=2),
    "integers in the type of the map": lambda x: x + CHANNELS.type_as(x) + CHANNELS.to(x),
    "sum of single elements": lambda x: x[0, 0, 0, 0] + 1 + x,
    "one stride for both axes": lambda x: F.conv2d(x, WEIGHT, None, (2,), [1], (2,)),
    "stride, padding and dilation by axis": lambda x: F.conv2d(x, WEIGHT, None, (2, 1), (1, 2), (1, 2)),
    "groups": lambda x: F.conv2d(x, WEIGHT[:3, :1], groups=3),
    "one window for both axes": lambda x: F.max_pool2d(x, (3,), (2,), (1,), [1, 1]),
    "window by axis": lambda x: F.max_pool2d(x, (3, 5), (2, 1), (1, 2)),
    "batch norm of pixels": lambda x: F.batch_norm(x.flatten(2), THREE, THREE * 3, THREE, THREE),
    "batch norm of vectors": lambda x: F.batch_norm(x[:, :, 0, 0], THREE, THREE * 3),
    "group norm of vectors": lambda x: F.group_norm(
        torch.cat([x[:, :, 0, 0], x[:, :, 1, 1]], 1), 3, torch.cat([THREE, THREE])
    ),
    "permutation by name": lambda x: torch.permute(x, dims=(0, 2, 3, -3)),
    "shift and a tuple of axes": lambda x: torch.roll(x, 2, dims=(2,)),
    "no shift": lambda x: torch.roll(x, (0, 3), (2, 3)),
    "last channels": lambda x: x[:, -2:],
    "last channels but one": lambda x: x[:, -3:-1],
    "index of numpy": lambda x: x[:, np.int64(1)],
    "concatenation with a mask": lambda x: torch.cat([x, x > 100], 1),
    "concatenation with an empty list": lambda x: torch.cat([torch.empty(0), x], 1),
    "concatenation with no channels": lambda x: torch.cat([x[:, 3:], x], 1),
}


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_argument_does_what_it_does_in_pytorch(trt, name, shapes, monkeypatch):  # noqa: F811
    function = SUPPORTED[name]
    network = trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        actual = network.evaluate({"images": images})["pred_masks"]
        torch.testing.assert_close(actual, function(images.clone()), rtol=1e-4, atol=1e-4)


REFUSED = {
    "product of masks": (
        lambda x: x.masked_fill((x > 9) * (x > 5), 0.0),
        "PROD of torch.bool and torch.bool",
    ),
    "mask twice": (lambda x: x.masked_fill(2 * (x > 9) > 0.5, 0.0), "PROD of torch.bool and int"),
    "one image alone": (lambda x: F.conv2d(x[0], WEIGHT), "input of 3 dimensions"),
    "window over one image": (lambda x: F.max_pool2d(x[0], 3), "input of 3 dimensions"),
    "vector": (lambda x: x.transpose(1, 3) @ THREE, "product with a vector"),
    "vector first": (lambda x: THREE @ x.flatten(2), "product with a vector"),
    "fill of a mask": (lambda x: x.masked_fill((x > 9).masked_fill(x > 20, False), 0.0), "of torch.bool"),
    "index by bool": (lambda x: x[True], "indexing with a bool"),
    "end that is traced": (lambda x: x[:, : x[0, 0, 0, 0] > -1], "a traced tensor says"),
    "other shape of nothing": (lambda x: x[:, 3:].unsqueeze(1), "empty tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_argument_without_converter_is_refused_where_it_stands(trt, name, shapes, monkeypatch):  # noqa: F811
    function, reason = REFUSED[name]
    with pytest.raises(
        ConversionError,
        match=rf"converting torch\S+ in module 'model' \(test_\w+\.py:\d+: .*{re.escape(reason)}",
    ):
        trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch)


@pytest.mark.parametrize("function", [lambda x: x[:, :, -5:], lambda x: x[..., :-1]], ids=["start", "end"])
def test_slice_from_the_end_of_an_unknown_size_is_refused(trt, function, monkeypatch):  # noqa: F811
    with pytest.raises(
        ConversionError, match=r"__getitem__ in module 'model'.*py:\d+: .*negative bounds of a dim"
    ):
        trace(trt, Wrapped(function), BuildSpec(**DYNAMIC), monkeypatch)
    network = trace(trt, Wrapped(function), BuildSpec(**STATIC), monkeypatch)
    images = random_images(TRACED)
    assert torch.equal(network.evaluate({"images": images})["pred_masks"], function(images))


LOST = {
    "quotient by a number that becomes infinite": (lambda x: x / 1e5, "DIV with 100000", "infinite"),
    "sum with one that does": (lambda x: x + 1e5, "SUM with 100000", "infinite"),
    "mask of large numbers": (
        lambda x: (x + torch.full((3, 1, 1), -1e9)).softmax(1),
        r"SUM with -1e\+09",
        "infinite",
    ),
    "product with one that becomes zero": (lambda x: x * 1e-9, "PROD with 1e-09", "zero"),
    "quotient by one that does": (lambda x: x / (THREE * 1e-9)[:, None, None], "DIV with 1e-09", "zero"),
}


@pytest.mark.parametrize("name", LOST)
def test_constant_that_half_precision_does_not_hold_is_refused(trt, name, monkeypatch):  # noqa: F811
    function, operation, becomes = LOST[name]
    half = BuildSpec(**STATIC, precision="fp16", fp32_modules=())
    with pytest.raises(ConversionError, match=rf"{operation} has no.*float16.*{becomes}.*FP32_MODULES"):
        trace(trt, Wrapped(function), half, monkeypatch)
    pinned = BuildSpec(**STATIC, precision="fp16", fp32_modules=("*",))
    network = trace(trt, Wrapped(function), pinned, monkeypatch)
    images = random_images(TRACED)
    torch.testing.assert_close(network.evaluate({"images": images})["pred_masks"], function(images))


def test_constants_that_half_precision_holds_in_effect_are_taken(trt, monkeypatch):  # noqa: F811
    """A vanishing addend, one of many factors, an infinite mask and bounds of comparisons change nothing that is seen."""
    factors, mask = torch.tensor([1.0, 1e-9, 2.0])[:, None, None], torch.tensor([0, -torch.inf, 0])

    def function(x):
        x = (x / 255 + 1e-12) * factors
        return x.masked_fill(x > 1e6, 1.0) + (x + mask[:, None, None]).softmax(1)

    half = BuildSpec(**STATIC, precision="fp16", fp32_modules=())
    network = trace(trt, Wrapped(function), half, monkeypatch)
    images = random_images(TRACED)
    actual = network.evaluate({"images": images})["pred_masks"]
    torch.testing.assert_close(actual, function(images), rtol=1e-2, atol=1e-2)
