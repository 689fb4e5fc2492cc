"""Images' normalisation: what the converter makes of it, and real engines with our plugin.

On a CPU the network is the double of tests/doubles, for each version of TensorRT's bindings; tests marked `tensorrt` need
the library of csrc/trt_plugin, built for the TensorRT in use.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_trt import builder, compat, plugin
from d2_trt.build_spec import BuildSpec
from mask2former.modeling import fused_ops
from tests.d2_trt.plugin_helpers import BF16, F16, plugin_layers, real
from tests.d2_trt.plugin_helpers import registered as registered
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, random_images, trace
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import mini_model, relative_error


class Normalised(nn.Module):
    """Images' normalisation, with the convolution after it."""

    def __init__(self, channels: int = 8, kernel: int = 3):
        super().__init__()
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1))
        self.stem = nn.Conv2d(3, channels, kernel, 2, padding=kernel // 2, bias=False)
        nn.init.uniform_(self.stem.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        x = fused_ops.normalize_images(images, self.mean, self.std)
        return self.stem(x), x

    core = forward


def padded_images(model, shape) -> torch.Tensor:
    """Images of whole numbers, as they come, padded with the mean at the right."""
    images = random_images(shape).round()
    images[..., shape[3] // 2 :] = model.mean.cpu()
    return images


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("normalization", ["plugin", "native"])
def test_images_are_normalised_as_in_pytorch(registered, shapes, normalization, monkeypatch):
    model = Normalised()
    network = trace(registered, model, BuildSpec(**shapes, normalization=normalization), monkeypatch)
    kinds = [row["kind"] for row in network.precisions()]
    ours = normalization == "plugin"
    assert len(plugin_layers(network)) == ours and kinds.count("ELEMENTWISE") == (0 if ours else 2)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = padded_images(model, shape)
        convolved, normalised = network.evaluate({"images": images}).values()
        expected = model(images)
        assert torch.equal(normalised, expected[1]) and relative_error(convolved, expected[0]) < 1e-5
        assert not normalised[..., shape[3] // 2 :].any()


@pytest.mark.parametrize(("precision", "out"), [("fp16", F16), ("bf16", BF16)])
def test_images_are_rounded_once_where_the_plugin_normalises_them(registered, precision, out, monkeypatch):
    if precision == "bf16" and not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    model = Normalised()
    images = padded_images(model, TRACED)
    exact = model(images)[1].to(out).float()
    for normalization in ("plugin", "native"):
        spec = BuildSpec(**STATIC, normalization=normalization, precision=precision, fp32_modules=())
        network = trace(registered, model, spec, monkeypatch)
        assert torch.equal(network.evaluate({"images": images})["pred_masks"], exact) == (
            normalization == "plugin"
        )
        layers = plugin_layers(network)
    assert not layers


def test_image_of_a_model_is_normalised_by_one_layer(registered, monkeypatch):
    model = mini_model("resnet50-mini").cpu()
    spec = BuildSpec(**STATIC, normalization="plugin", msda="plugin", precision="fp16")
    network = trace(registered, builder.Core(model), spec, monkeypatch)
    (layer,) = [x for x in plugin_layers(network) if x.plugin._name == plugin.NORMALIZE_IMAGES.name]
    assert layer.get_input(0).name == "images" and layer.get_output(0)._kept_dtype.name == "HALF"
    (first,) = layer.get_output(0)._consumers
    assert first.type.name == "CONVOLUTION"


@real
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_real_engine_normalises_images_exactly(precision, shapes):
    """In whatever layout TensorRT chooses for the convolution, and planar for the output."""
    from d2_trt.engine import Engine

    model = Normalised(64, 7).cuda()
    spec = BuildSpec(**shapes, normalization="plugin", precision=precision, fp32_modules=(), opt_level=3)
    plan, report, _ = builder.build_engine(model, spec, random_images(TRACED).cuda())
    assert len(report.plugin_layers) == 1
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = padded_images(model, shape).cuda()
        with torch.no_grad():
            convolved, normalised = model(images)
        actual = engine(images)
        exact = normalised.half().float() if precision == "fp16" else normalised
        assert torch.equal(actual[1], exact), shape
        assert relative_error(actual[0], convolved) < (1e-5 if precision == "fp32" else 2e-3), shape
