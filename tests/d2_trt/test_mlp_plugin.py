"""The decoder's feed-forward layers, mask embedding and attention's output projections in a network: our plugin's layers, or
TensorRT's own.

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


class Projections(nn.Module):
    """Linear layers with residual and LayerNorm after them: of an image's pixels, then of what that gives."""

    def __init__(self, channels: int = 64, layers: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 32, stride=32)
        self.linears = nn.ModuleList(nn.Linear(channels, channels) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))
        rng = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=1.0 if "norm" in name else 0.1, generator=rng)
        self.eval()

    def forward(self, images):
        pixels = self.conv(images / 128 - 1).flatten(2).transpose(1, 2)
        outputs = [pixels]
        for linear, norm in zip(self.linears, self.norms):
            outputs.append(fused_ops.linear_residual_layer_norm(outputs[-1], linear, pixels, norm))
        return outputs[-2], outputs[-1]

    core = forward


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


def test_sizes_without_code_are_told_once_a_build(registered, monkeypatch, caplog):  # noqa: F811
    model = Projections(48, layers=3)
    for builds in (1, 2):
        network = trace(registered, model, spec(STATIC, pinned=()), monkeypatch)
        assert not layers_of(network, plugin.MLP)
        assert caplog.text.count("no code for layers of [48, 48] channels") == builds
    assert max(errors(network, model, TRACED)) < 1e-2


def test_layers_that_do_not_pay_are_tensorrts_own(registered, monkeypatch):  # noqa: F811
    model = Layers()
    monkeypatch.setattr(mlp_cuda, "pays", lambda widths, dtype, capability: len(widths) > 3)
    network = trace(registered, model, spec(STATIC), monkeypatch)
    assert set(mlp_layers(network)) == {"mlp"}


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_projection_with_residual_and_norm_is_one_layer(registered, shapes, monkeypatch):  # noqa: F811
    model = Projections()
    network = trace(registered, model, spec(shapes, pinned=()), monkeypatch)
    assert len(layers_of(network, plugin.MLP)) == 2
    kinds = {row["kind"] for row in network.precisions() if row["name"].startswith(("linears", "norms"))}
    assert not kinds & {"MATRIX_MULTIPLY", "CONVOLUTION", "ELEMENTWISE", "NORMALIZATION", "CAST"}
    for layer in layers_of(network, plugin.MLP):
        fields = layer.plugin._ours.fields
        assert [fields[t] for t in ("type", "x_type", "residual_type", "out_type")] == [1, 1, 1, 1]
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        assert max(errors(network, model, shape)) < 5e-3, shape


@pytest.mark.parametrize(
    ("pinned", "types"),
    [
        (("conv",), [(1, 0, 0, 1), (1, 1, 0, 1)]),  # what comes in float32 is taken so
        (("linears.0", "norms.0"), [(1, 0, 1, 1)]),
        (("linears.1",), [(1, 1, 1, 1)]),  # layer and norm differ
        (("norms.0",), [(1, 0, 1, 1)]),
        (("linears", "norms"), []),
    ],
    ids=str,
)
def test_projections_whose_precisions_agree(registered, pinned, types, monkeypatch):  # noqa: F811
    model = Projections()
    network = trace(registered, model, spec(STATIC, pinned=pinned), monkeypatch)
    fields = [layer.plugin._ours.fields for layer in layers_of(network, plugin.MLP)]
    names = ("type", "x_type", "residual_type", "out_type")
    assert [tuple(f[name] for name in names) for f in fields] == types
    assert max(errors(network, model, TRACED)) < 1e-2


@pytest.mark.parametrize(
    "options", [{"precision": "fp32"}, {"precision": "tf32"}, {"attention": "native", "precision": "fp16"}]
)
@pytest.mark.parametrize("normalization", ["native", "plugin"])
def test_projections_without_the_plugin(registered, options, normalization, monkeypatch):  # noqa: F811
    model = Projections()
    made = spec(DYNAMIC, pinned=("norms",), normalization=normalization, **options)
    network = trace(registered, model, made, monkeypatch)
    assert not layers_of(network, plugin.MLP)
    assert len(layers_of(network, plugin.LAYER_NORM)) == (2 if normalization == "plugin" else 0)
    assert max(errors(network, model, OTHERS[0])) < (5e-3 if "attention" in options else 1e-5)


def test_projections_on_gpus_without_clusters_are_tensorrts_own(registered, monkeypatch):  # noqa: F811
    pays = mlp_cuda.pays
    monkeypatch.setattr(mlp_cuda, "pays", lambda widths, dtype, capability: pays(widths, dtype, (8, 9)))
    network = trace(registered, Projections(), spec(STATIC, pinned=()), monkeypatch)
    assert not layers_of(network, plugin.MLP)


def test_projections_in_bfloat16(registered, monkeypatch):  # noqa: F811
    if not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    model = Projections()
    network = trace(registered, model, spec(STATIC, "bf16", pinned=()), monkeypatch)
    assert [layer.get_output(0).dtype.name for layer in layers_of(network, plugin.MLP)] == ["BF16"] * 2
    assert max(errors(network, model, TRACED)) < 5e-2


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_decoder(registered, shapes, monkeypatch):  # noqa: F811
    decoder = Decoder(layers=2)
    network = trace(registered, builder.Core(decoder), with_attention(shapes), monkeypatch)
    layers = layers_of(network, plugin.MLP)
    names = [layer.name.split(":")[0].removeprefix(PREDICTOR + ".") for layer in layers]
    assert names == [
        f"transformer_{kind}_layers.{i}" if kind != "mask_embed" else kind
        for i in range(2)
        for kind in ("cross_attention", "self_attention", "ffn", "mask_embed")
    ]
    assert [layer.num_outputs for layer in layers] == [1] * 7 + [2]  # the class head reads the last
    assert [layer.num_inputs for layer in layers] == [5, 5, 4, 4] * 2  # with a residual
    kinds = {row["kind"] for row in network.precisions() if "attention_layers" in row["name"]}
    assert not kinds & {"ACTIVATION", "NORMALIZATION"}
    made = [row["name"] for row in network.precisions() if "out_proj" in row["name"]]
    assert not [name for name in made if "CONSTANT" not in name]
    assert max(errors(network, decoder, TRACED)) < 0.02


# One layer

FIELDS = {
    "type": F16,
    "x_type": F16,
    "residual_type": -1,
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
# The same with one layer and a residual in float32.
PROJECTION = {"layers": 1, "residual_type": F32}
PROJECTION_SHAPES = {"weights": (2048,), "biases": (64,), "residual": (2, 5, 64)}


def small_network(trt, fields, shapes):  # noqa: F811
    network = build_network(trt)
    types = {"x": trt.float16, "weights": trt.int32}
    if fields.get("residual_type") == F16:
        types["residual"] = trt.float16
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


@pytest.mark.parametrize("residual_type", [F32, F16, None], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_layer_of_a_projection_computes_the_definition(registered, dtype, residual_type):  # noqa: F811
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(64, 64, generator=rng) / 8, torch.randn(64, generator=rng)
    norm = torch.randn(2, 64, generator=rng)
    x = torch.randn(SHAPES["x"], generator=rng).half()
    values = {"x": x, "weights": mlp_cuda.pack_weights([weight], dtype), "biases": bias, "norm": norm}
    shapes = {"weights": tuple(values["weights"].shape), "biases": (64,)}
    fields = {"type": dtype, "layers": 1}
    residual = x
    if residual_type is not None:
        residual = values["residual"] = torch.randn(SHAPES["x"], generator=rng).to(residual_type)
        shapes["residual"], fields["residual_type"] = SHAPES["x"], residual_type
    network = small_network(registered, fields, shapes)
    network.check()
    (out,) = network.evaluate(values).values()
    expected = F.layer_norm(residual.float() + F.linear(x.float(), weight, bias), (64,), *norm)
    assert relative_error(out, expected) < (1e-5 if dtype == F32 else 1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 80},
        {"out": 96},  # no residual
        {"layers": 0},
        {"residual_type": 3},
        {"after": 0, "residual_type": F16},
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


@pytest.mark.parametrize("shape", [(1, 5, 64), (2, 5, 32), (10, 64)], ids=str)
def test_residuals_of_another_shape(registered, shape):  # noqa: F811
    with pytest.raises(Refused, match="a residual"):
        small_network(registered, PROJECTION, {**PROJECTION_SHAPES, "residual": shape}).check()


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


@real
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("channels", [64, 256])
def test_real_engine_of_projections_stays_near_pytorch(channels, shapes):
    from d2_trt.engine import Engine

    model = Projections(channels).cuda()
    made = spec(shapes, pinned=())
    plan, report, _ = builder.build_engine(model, made, random_images(TRACED).cuda())
    assert len(report.plugin_layers) == (2 if torch.cuda.get_device_capability() >= (9, 0) else 0)
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape).cuda()
        with torch.no_grad():
            expected = model(images)
        for actual, wanted in zip(engine(images), expected):
            assert relative_error(actual, wanted) < 5e-3, shape
