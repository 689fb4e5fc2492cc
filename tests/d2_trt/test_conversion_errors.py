"""An error of a converter names the operation, the module and the source line, once."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2_trt.build_spec import BuildSpec
from d2_trt.errors import ConversionError
from mask2former.modeling import fused_ops
from tests.d2_trt.test_conversion import DYNAMIC, STATIC, trace
from tests.doubles.fixtures import trt_double as trt  # noqa: F401


class Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Whole(nn.Module):
    """A function deep inside a model."""

    def __init__(self, function):
        super().__init__()
        self.stages = nn.Sequential(nn.Identity(), Part(function))

    def forward(self, images):
        out = self.stages(images)
        return out, out


class TanhMLP(nn.Module):
    layers = ()

    def forward(self, x):
        return F.gelu(x, approximate="tanh")


def mlp_of_norm(x):
    """Of a converter that leaves it to the functions that it calls."""
    return fused_ops.mlp_of_norm(x, nn.Identity(), TanhMLP())


ERRORS = {
    "sum with a factor": (lambda x: x.add(x, alpha=2), "torch.Tensor.add", "alpha=2"),
    "difference with a factor": (lambda x: torch.sub(x, x, alpha=2), "torch.sub", "alpha=2"),
    "index of a tensor": (
        lambda x: x[:, torch.tensor([0, 1])],
        "torch.Tensor.__getitem__",
        "tensor or a list",
    ),
    "mask": (lambda x: x[x > 3], "torch.Tensor.__getitem__", "tensor or a list"),
    "cast to integers": (lambda x: x.to(torch.int32), "torch.Tensor.to", "torch.int32"),
    "cast of a comparison": (lambda x: (x < 3).to(torch.int32), "torch.Tensor.to", "torch.bool"),
    "cast that no converter has": (lambda x: x.int(), "torch.Tensor.int", "no converter"),
    "padding by name": (
        lambda x: F.conv2d(x, torch.ones(1, 3, 3, 3), padding="same"),
        "torch.nn.functional.conv2d",
        "padding='same'",
    ),
    "rounding up": (
        lambda x: F.max_pool2d(x, 3, ceil_mode=True),
        "torch.nn.functional.max_pool2d",
        "ceil_mode",
    ),
    "tanh": (lambda x: F.gelu(x, approximate="tanh"), "torch.nn.functional.gelu", "approximate='tanh'"),
    "dropout": (lambda x: F.dropout(x, 0.5), "torch.nn.functional.dropout", "model.eval"),
    "norm of two dimensions": (
        lambda x: F.layer_norm(x, (3, 96, 128)),
        "torch.nn.functional.layer_norm",
        "3 dimensions",
    ),
    "attention with a mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        "torch.nn.functional.scaled_dot_product_attention",
        "mask",
    ),
    "argument that the converter does not know": (
        lambda x: torch.div(x, 2, rounding_mode="floor"),
        "torch.div",
        "rounding_mode",
    ),
    "function that a fused one calls": (mlp_of_norm, "torch.nn.functional.gelu", "approximate='tanh'"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_error_names_operation_module_and_line_once(trt, name, shapes, monkeypatch):  # noqa: F811
    function, operation, reason = ERRORS[name]
    with pytest.raises(ConversionError) as caught:
        trace(trt, Whole(function), BuildSpec(**shapes), monkeypatch)
    message = str(caught.value)
    assert message.count(operation + " ") == 1 and reason in message
    assert message.count("in module '") == 1 and "in module 'stages.1'" in message
    assert len(re.findall(r"test_conversion_errors\.py:\d+: ", message)) == 1
