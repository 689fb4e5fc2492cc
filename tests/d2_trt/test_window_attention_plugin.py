"""Swin's window attention in a network: our plugin's layer, or the functions that it stands for.

On a CPU the network is the double of tests/doubles, for each version of TensorRT's bindings; tests marked `tensorrt` need
the library of csrc/trt_plugin, built for the TensorRT in use.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_trt import builder, compat, plugin
from d2_trt.build_spec import BuildSpec
from mask2former.modeling.backbone.swin import BasicLayer
from tests.d2_trt.plugin_helpers import plugin_layers, real, registered  # noqa: F401
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, random_images, trace
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.doubles.trt_api import Refused
from tests.golden import relative_error

WINDOW, HEADS = 7, 2


class Stage(nn.Module):
    """One block that does not shift its windows and one that does, over a map that is no whole number of them."""

    def __init__(self, dim: int = 16, qkv_bias: bool = True):
        super().__init__()
        channels = HEADS * dim
        self.conv = nn.Conv2d(3, channels, 8, stride=8)
        block = {"mlp_ratio": 2.0, "qkv_bias": qkv_bias, "qk_scale": None, "drop": 0.0, "attn_drop": 0.0}
        self.layer = BasicLayer(
            channels, 2, WINDOW, drop_path=[0.0, 0.0], downsample=False, num_heads=HEADS, **block
        )
        rng = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=rng)
        self.eval()

    def forward(self, images):
        x = self.layer(self.conv(images / 255).permute(0, 2, 3, 1))
        return x, x

    core = forward  # as MaskFormer has it


def spec(shapes, precision="fp16", pinned=(), **options) -> BuildSpec:
    return BuildSpec(**shapes, precision=precision, fp32_modules=pinned, **{"attention": "plugin", **options})


def worst(network, model, shapes) -> float:
    errors = []
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        with torch.no_grad():
            expected = model(images)[0]
        out = network.evaluate({"images": images})["pred_masks"]
        assert out.shape == expected.shape
        errors.append(relative_error(out, expected))
    return max(errors)


def kinds_below(network, name: str) -> set[str]:
    return {row["kind"] for row in network.precisions() if row["name"].startswith(name)}


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_plugin_does_all_between_the_projections(registered, shapes, qkv_bias, monkeypatch):  # noqa: F811
    model = Stage(qkv_bias=qkv_bias)
    network = trace(registered, model, spec(shapes), monkeypatch)
    layers = plugin_layers(network)
    assert [layer.name.split(":")[0] for layer in layers] == ["layer.blocks.0.attn", "layer.blocks.1.attn"]
    assert [layer.plugin._ours.fields["shift"] for layer in layers] == [0, 3]
    for i in range(2):
        assert "SOFTMAX" not in kinds_below(network, f"layer.blocks.{i}")
        for part in ("qkv", "proj"):
            assert "MATRIX_MULTIPLY" in kinds_below(network, f"layer.blocks.{i}.attn.{part}:")
        # No padding, no shift, no partition.
        assert not {"SLICE", "CONCATENATION"} & kinds_below(network, f"layer.blocks.{i}")
    assert worst(network, model, shapes) < 1e-2


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"attention": "native", "precision": "fp32"}])
def test_without_the_plugin_every_function_is_converted(registered, shapes, options, monkeypatch):  # noqa: F811
    model = Stage()
    network = trace(registered, model, spec(shapes, **options), monkeypatch)
    assert not plugin_layers(network)
    assert "SOFTMAX" in kinds_below(network, "layer.blocks.1.attn:")
    assert worst(network, model, shapes) < 1e-5


def test_pinned_block_keeps_float32_layers(registered, monkeypatch):  # noqa: F811
    model = Stage()
    network = trace(registered, model, spec(STATIC, pinned=("layer.blocks.1.attn",)), monkeypatch)
    assert [layer.name.split(":")[0] for layer in plugin_layers(network)] == ["layer.blocks.0.attn"]
    rows = [row for row in network.precisions() if row["kind"] == "SOFTMAX"]
    assert [(row["name"].split(":")[0], row["compute"]) for row in rows] == [("layer.blocks.1.attn", "FLOAT")]
    assert worst(network, model, STATIC) < 1e-2


def test_sizes_that_the_plugin_has_no_code_for_are_told(registered, monkeypatch, caplog):  # noqa: F811
    model = Stage(dim=8)
    network = trace(registered, model, spec(STATIC), monkeypatch)
    assert not plugin_layers(network)
    assert "D2TRTWindowAttention has no code for windows of 7 with heads of 8 channels" in caplog.text
    assert worst(network, model, STATIC) < 1e-2


def test_bfloat16(registered, monkeypatch):  # noqa: F811
    if not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    model = Stage()
    network = trace(registered, model, spec(STATIC, "bf16"), monkeypatch)
    assert [layer.get_output(0).dtype.name for layer in plugin_layers(network)] == ["BF16"] * 2
    assert worst(network, model, STATIC) < 0.1


# What the plugin refuses

FIELDS = {"type": torch.float16, "heads": 2, "dim": 16, "window": 7, "shift": 3, "scale": 0.25}


@pytest.mark.parametrize("change", [{"dim": 24}, {"window": 13}, {"shift": 7}, {"type": torch.float32}])
def test_fields_that_are_not_allowed(registered, change):  # noqa: F811
    network = build_network(registered)
    x = network.add_input("x", registered.float16, (1, 5, 6, 96))
    with pytest.raises(ValueError, match="D2TRTWindowAttention is not to be had with"):
        plugin.add_layer(network, plugin.WINDOW_ATTENTION, [x, x, x], {**FIELDS, **change})


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ([(1, 5, 6, 90), (96,), (2, 13, 13)], r"qkv \(1, 5, 6, 90\), its"),
        ([(1, 5, 6, 96), (90,), (2, 13, 13)], r"its bias \(90,\)"),
        ([(1, 5, 6, 96), (96,), (2, 7, 13)], r", bias \(2, 7, 13\)"),
        ([(5, 6, 96), (96,), (2, 13, 13)], r"qkv \(5, 6, 96\), its"),
    ],
)
def test_shapes_that_do_not_fit(registered, shapes, told):  # noqa: F811
    network = build_network(registered)
    types = [registered.float16, registered.float32, registered.float32]
    inputs = [network.add_input(f"x{i}", t, s) for i, (t, s) in enumerate(zip(types, shapes))]
    network.mark_output(plugin.add_layer(network, plugin.WINDOW_ATTENTION, inputs, FIELDS).get_output(0))
    with pytest.raises(Refused, match=told):
        network.check()


# Real engines


@real
@pytest.mark.parametrize("normalization", ["plugin", "native"])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("dim", [16, 32])
def test_real_engine_stays_near_pytorch(shapes, dim, normalization):
    from d2_trt.engine import Engine

    model = Stage(dim).cuda()
    made = spec(shapes, normalization=normalization)
    plan, report, _ = builder.build_engine(model, made, random_images(TRACED).cuda())
    assert len(report.plugin_layers) == (6 if normalization == "plugin" else 2)
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape).cuda()
        with torch.no_grad():
            expected = model(images)[0]
        assert relative_error(engine(images)[1], expected) < 1e-2, shape
