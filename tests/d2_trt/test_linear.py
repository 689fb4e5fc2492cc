"""A linear layer with ReLU: what the converter makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_trt.build_spec import BuildSpec
from mask2former.modeling import fused_ops
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, random_images, trace
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import relative_error


class Pixels(nn.Module):
    """Pixels of a map (B, S, C) through two linear layers, ReLU between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, 8, padding=1)
        self.linear1, self.linear2 = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, images):
        pixels = self.conv(images / 255).flatten(2).transpose(1, 2)
        return self.linear2(fused_ops.linear_relu(pixels, self.linear1)), pixels


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_linear_with_relu_is_a_convolution_of_pixels(trt, shapes, monkeypatch):  # noqa: F811
    model = Pixels()
    network = trace(trt, model, BuildSpec(**shapes), monkeypatch)
    rows = [row for row in network.precisions() if "linear1" in row["name"]]
    assert {"CONVOLUTION", "ACTIVATION"} <= {row["kind"] for row in rows}
    assert not any(row["kind"] == "MATRIX_MULTIPLY" for row in rows)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        actual = network.evaluate({"images": images}).values()
        for out, expected in zip(actual, model(images)):
            assert out.shape == expected.shape and relative_error(out, expected) < 1e-5, shape


def test_linear_with_relu_has_the_precision_of_the_linear_layer(trt, monkeypatch):  # noqa: F811
    spec = BuildSpec(**STATIC, precision="fp16", fp32_modules=("linear1",))
    rows = trace(trt, Pixels(), spec, monkeypatch).precisions()
    of_linear1 = {row["compute"] for row in rows if "linear1" in row["name"] and row["kind"] == "CONVOLUTION"}
    assert of_linear1 == {"FLOAT"}
