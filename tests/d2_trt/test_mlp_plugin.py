"""The decoder's feed-forward layers and mask embedding in a network: our plugin's layers, or TensorRT's own.

On a CPU the network is the double of tests/doubles, for each version of TensorRT's bindings; tests marked `tensorrt` need
the library of csrc/trt_plugin, built for the TensorRT in use.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2_trt import builder, compat, plugin
from d2_trt.build_spec import BuildSpec
from mask2former.modeling import fused_ops
from mask2former.modeling.transformer_decoder import mlp_cuda
from mask2former.modeling.transformer_decoder.attention import MLP, FFNLayer
from tests.d2_trt.plugin_helpers import real, registered  # noqa: F401
from tests.d2_trt.test_attention_plugin import PREDICTOR, Decoder, layers_of, with_attention
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, errors, random_images, trace
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.doubles.trt_api import Refused
from tests.golden import relative_error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PINS = ("norm", "mlp")


class Layers(nn.Module):
    """A feed-forward layer, then LayerNorm and mask embedding, of pixels that a convolution of the image stands for."""

    def __init__(self, channels: int = 64, hidden: int = 128, pre_norm: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 32, stride=32)
        self.ffn = FFNLayer(channels, hidden, pre_norm)
        self.norm = nn.LayerNorm(channels)
        self.mlp = MLP(channels, channels, 96, 3)
        rng = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=1.0 if "norm" in name else 0.1, generator=rng)
        self.eval()

    def forward(self, images):
        x = self.ffn(self.conv(images / 128 - 1).flatten(2).transpose(1, 2))
        embed = fused_ops.mlp_of_norm(x, self.norm, self.mlp)
        normed, again = fused_ops.norm_and_mlp(x, self.norm, self.mlp)
        return normed, again + embed

    core = forward  # as MaskFormer has it


def spec(shapes, precision="fp16", pinned=PINS, **options) -> BuildSpec:
    return BuildSpec(**shapes, precision=precision, fp32_modules=pinned, **{"attention": "plugin", **options})


def mlp_layers(network) -> dict:
    return {layer.name.split(":")[0]: layer for layer in layers_of(network, plugin.MLP)}


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_plugin_does_all_from_queries_to_queries(registered, shapes, monkeypatch):  # noqa: F811
    model = Layers()
    network = trace(registered, model, spec(shapes), monkeypatch)
    assert [layer.name.split(":")[0] for layer in layers_of(network, plugin.MLP)] == ["ffn", "mlp", "mlp"]
    kinds = {row["kind"] for row in network.precisions() if row["name"].startswith(("ffn", "norm", "mlp"))}
    assert not kinds & {"MATRIX_MULTIPLY", "CONVOLUTION", "ACTIVATION", "NORMALIZATION", "CAST"}
    types = {name: layer.plugin._ours.fields for name, layer in mlp_layers(network).items()}
    assert [types["ffn"][t] for t in ("type", "x_type", "out_type", "normed_type")] == [1, 1, 1, -1]
    assert [types["mlp"][t] for t in ("type", "x_type", "out_type", "normed_type")] == [0, 1, 0, 0]
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        assert max(errors(network, model, shape)) < 5e-3, shape


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "options", [{"precision": "fp32"}, {"precision": "tf32"}, {"attention": "native", "precision": "fp16"}]
)
def test_without_the_plugin_every_function_is_converted(registered, shapes, options, monkeypatch):  # noqa: F811
    model = Layers()
    network = trace(registered, model, spec(shapes, **options), monkeypatch)
    assert not layers_of(network, plugin.MLP)
    kinds = [row["kind"] for row in network.precisions()]
    assert kinds.count("ACTIVATION") == 5 and kinds.count("NORMALIZATION") == 3
    assert max(errors(network, model, TRACED)) < (5e-3 if "attention" in options else 1e-5)


@pytest.mark.parametrize(
    ("pinned", "names"),
    [
        ((), {"ffn": 1, "mlp": 1}),
        (("ffn", "norm", "mlp"), {"mlp": 0}),
        (("ffn.linear1", "norm", "mlp"), {"mlp": 0}),
        (("norm",), {"ffn": 1}),
        (("mlp.layers.1",), {"ffn": 1}),
    ],
)
def test_layers_of_one_precision_go_together(registered, pinned, names, monkeypatch):  # noqa: F811
    """names: the plugin's layers, with the types of their products."""
    model = Layers()
    network = trace(registered, model, spec(STATIC, pinned=pinned), monkeypatch)
    assert {n: layer.plugin._ours.fields["type"] for n, layer in mlp_layers(network).items()} == names
    assert max(errors(network, model, TRACED)) < 1e-2


def test_bfloat16(registered, monkeypatch):  # noqa: F811
    if not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    model = Layers()
    network = trace(registered, model, spec(STATIC, "bf16"), monkeypatch)
    assert [layer.get_output(0).dtype.name for layer in mlp_layers(network).values()] == ["BF16", "FLOAT"]
    assert max(errors(network, model, TRACED)) < 5e-2


def test_layer_norm_before_the_feed_forward_layers_keeps_tensorrts_own(registered, monkeypatch):  # noqa: F811
    model = Layers(pre_norm=True)
    network = trace(registered, model, spec(STATIC), monkeypatch)
    assert set(mlp_layers(network)) == {"mlp"}
    assert max(errors(network, model, TRACED)) < 1e-2


def test_sizes_that_the_plugin_has_no_code_for_are_told(registered, monkeypatch, caplog):  # noqa: F811
    model = Layers(hidden=80)
    network = trace(registered, model, spec(STATIC), monkeypatch)
    assert set(mlp_layers(network)) == {"mlp"}
    assert "D2TRTMlp has no code for layers of [64, 80, 64] channels: ffn gets TensorRT's own" in caplog.text
    assert max(errors(network, model, TRACED)) < 1e-2


def test_layers_that_do_not_pay_are_tensorrts_own(registered, monkeypatch):  # noqa: F811
    model = Layers()
    monkeypatch.setattr(mlp_cuda, "pays", lambda widths, dtype, capability: len(widths) > 3)
    network = trace(registered, model, spec(STATIC), monkeypatch)
    assert set(mlp_layers(network)) == {"mlp"}


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_decoder(registered, shapes, monkeypatch):  # noqa: F811
    decoder = Decoder(layers=2)
    network = trace(registered, builder.Core(decoder), with_attention(shapes), monkeypatch)
    layers = layers_of(network, plugin.MLP)
    names = [layer.name.split(":")[0].removeprefix(PREDICTOR + ".") for layer in layers]
    assert names[-4:] == ["transformer_ffn_layers.0", "mask_embed", "transformer_ffn_layers.1", "mask_embed"]
    assert [layer.num_outputs for layer in layers[-4:]] == [1, 1, 1, 2]  # the class head reads the last
    assert max(errors(network, decoder, TRACED)) < 0.02


# One layer

FIELDS = {
    "type": F16,
    "x_type": F16,
    "out_type": F32,
    "normed_type": -1,
    "layers": 2,
    "channels": 64,
    "hidden": 128,
    "out": 64,
    "after": 1,
    "epsilon": 1e-5,
}
SHAPES = {"x": (2, 5, 64), "weights": (8192,), "biases": (192,), "norm": (2, 64)}


def small_network(trt, fields, shapes):  # noqa: F811
    network = build_network(trt)
    types = {"x": trt.float16, "weights": trt.int32}
    inputs = [
        network.add_input(name, types.get(name, trt.float32), shape)
        for name, shape in {**SHAPES, **shapes}.items()
    ]
    layer = plugin.add_layer(network, plugin.MLP, inputs, {**FIELDS, **fields})
    for i in range(layer.num_outputs):
        network.mark_output(layer.get_output(i))
    return network


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("after", [0, 1])
def test_layer_computes_the_definition(registered, after, dtype):  # noqa: F811
    rng = torch.Generator().manual_seed(0)
    widths = [64, 128, 64]
    weights = [torch.randn(o, i, generator=rng) / i**0.5 for i, o in itertools.pairwise(widths)]
    biases = [torch.randn(o, generator=rng) for o in widths[1:]]
    words = mlp_cuda.pack_weights(weights, dtype)
    values = {
        "x": torch.randn(SHAPES["x"], generator=rng).half(),
        "weights": words,
        "biases": torch.cat(biases),
    }
    values["norm"] = torch.randn(2, 64, generator=rng)
    fields = {"type": dtype, "after": after, "normed_type": -1 if after else F32}
    network = small_network(registered, fields, {"weights": tuple(words.shape)})
    network.check()
    out, *normed = network.evaluate(values).values()

    def norm(v):
        return F.layer_norm(v, (64,), *values["norm"])

    x = values["x"].float()
    first = x if after else norm(x)
    expected = F.linear(F.linear(first, weights[0], biases[0]).relu(), weights[1], biases[1])
    expected = norm(x + expected) if after else expected
    assert relative_error(out, expected) < (1e-5 if dtype == F32 else 1e-3)
    assert len(normed) == 1 - after and all(relative_error(n, first) < 1e-6 for n in normed)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 80},
        {"out": 96},  # no residual
        {"layers": 0},
        {"layers": 5},
        {"normed_type": F32},  # LayerNorm comes after
        {"after": 2},
        {"epsilon": -1.0},
        {"channels": 512, "out": 512},
    ],
)
def test_fields_that_are_not_allowed(registered, change):  # noqa: F811
    with pytest.raises(ValueError, match="D2TRTMlp is not to be had with"):
        small_network(registered, change, {})


@pytest.mark.parametrize(
    "shapes", [{"x": (2, 5, 32)}, {"weights": (4096,)}, {"biases": (64,)}, {"norm": (2, 32)}]
)
def test_shapes_that_do_not_fit(registered, shapes):  # noqa: F811
    with pytest.raises(Refused, match="x, weights, biases and norm are"):
        small_network(registered, {}, shapes).check()


# Real engines


@real
@pytest.mark.parametrize("normalization", ["plugin", "native"])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(("channels", "hidden"), [(64, 128), (256, 2048)])
def test_real_engine_stays_near_pytorch(channels, hidden, shapes, normalization):
    from d2_trt.engine import Engine

    model = Layers(channels, hidden).cuda()
    made = spec(shapes, normalization=normalization)
    plan, report, _ = builder.build_engine(model, made, random_images(TRACED).cuda())
    assert len(report.plugin_layers) >= (3 if torch.cuda.get_device_capability() >= (9, 0) else 2)
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape).cuda()
        with torch.no_grad():
            expected = model(images)
        for actual, wanted in zip(engine(images), expected):
            assert relative_error(actual, wanted) < 5e-3, shape
