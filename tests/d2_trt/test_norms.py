"""LayerNorm, GroupNorm, what is fused with them, and images' normalisation: what the converters make of them, and real
engines with our plugins.

On a CPU the network is the double of tests/doubles, for each version of TensorRT's bindings; tests marked `tensorrt` need
the library of csrc/trt_plugin, built for the TensorRT in use.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2_trt import builder, compat, plugin
from d2_trt.build_spec import BuildSpec, default_fp32_modules
from d2_trt.converters import Graph
from mask2former.modeling import fused_ops
from mask2former.modeling.transformer_decoder.position_encoding import PositionEmbeddingSine
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, Wrapped, random_images, trace
from tests.d2_trt.test_plugin import plugin_layers, real, registered  # noqa: F401
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.doubles.trt_api import Refused
from tests.golden import mini_model, relative_error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Norms(nn.Module):
    """A map and its pixels through every normalisation, with the calls that the model has."""

    def __init__(self, channels: int = 16, groups: int = 2, stride: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride, padding=1)
        self.group = nn.GroupNorm(groups, channels)
        self.lateral = nn.Conv2d(channels, channels, 1)
        self.plain_group = nn.GroupNorm(groups, channels)
        self.linear = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.plain_norm = nn.LayerNorm(channels)
        rng = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=rng)

    def forward(self, images):
        x = fused_ops.group_norm_relu(self.conv(images / 255), self.group)
        x = self.plain_group(self.lateral(x))
        pixels = self.plain_norm(x.flatten(2).transpose(1, 2))
        return fused_ops.residual_layer_norm(pixels, self.linear(pixels), self.norm), x

    core = forward  # as MaskFormer has it


def by_module(network) -> dict:
    return {layer.name.split(":")[0]: layer for layer in plugin_layers(network)}


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("normalization", ["plugin", "native"])
def test_network_equals_pytorch(registered, shapes, normalization, monkeypatch):  # noqa: F811
    model = Norms()
    network = trace(registered, model, BuildSpec(**shapes, normalization=normalization), monkeypatch)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        actual = network.evaluate({"images": images})
        for out, expected in zip(actual.values(), model(images)):
            assert out.shape == expected.shape and relative_error(out, expected) < 1e-5, shape


def test_plugins_take_the_place_of_layers_and_of_what_is_fused(registered, monkeypatch):  # noqa: F811
    network = trace(registered, Norms(), BuildSpec(**STATIC, normalization="plugin"), monkeypatch)
    assert set(by_module(network)) == {"group", "plain_group", "norm", "plain_norm"}
    kinds = {row["kind"] for row in network.precisions()}
    assert not {"NORMALIZATION", "ACTIVATION"} & kinds
    # One division by 255, and the bias of the linear layer: no residual sum, no affine.
    assert [row["kind"] for row in network.precisions()].count("ELEMENTWISE") == 2
    native = trace(registered, Norms(), BuildSpec(**STATIC), monkeypatch)
    assert not plugin_layers(native)
    assert [row["kind"] for row in native.precisions()].count("NORMALIZATION") == 4


@pytest.mark.parametrize(
    ("precision", "pinned", "types"),
    [
        ("fp32", (), {"group": "FF", "norm": "FFF", "plain_norm": "FF"}),
        ("fp16", (), {"group": "HH", "norm": "HHH", "plain_norm": "HH"}),
        ("fp16", ("norm",), {"group": "HH", "norm": "HHF", "plain_norm": "HH"}),
        ("fp16", ("linear",), {"group": "HH", "norm": "HFH"}),
        ("fp16", ("plain_*",), {"plain_group": "HF", "plain_norm": "FF", "norm": "FHH"}),
        ("bf16", ("conv",), {"group": "FB", "norm": "BBB"}),
    ],
)
def test_plugins_take_tensors_as_they_come_and_give_what_the_policy_says(
    registered,  # noqa: F811
    precision,
    pinned,
    types,
    monkeypatch,
):
    """types: of x, of the residual where there is one, and of the output."""
    if precision == "bf16" and not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    spec = BuildSpec(**STATIC, normalization="plugin", precision=precision, fp32_modules=pinned)
    model = Norms()
    network = trace(registered, model, spec, monkeypatch)
    for name, wanted in types.items():
        layer = by_module(network)[name]
        inputs = [layer.get_input(i) for i in range(layer.num_inputs) if i not in (1, 2)]
        assert all(layer.get_input(i).dtype.name == "FLOAT" for i in (1, 2))
        given = [tensor._kept_dtype.name[0] for tensor in (*inputs, layer.get_output(0))]
        assert "".join(given) == wanted, name
    # No casts in front of the plugins.
    casts = [row["name"].split(":")[0] for row in network.precisions() if row["kind"] == "CAST"]
    assert not set(casts) & set(by_module(network))
    images = random_images(TRACED)
    for out, expected in zip(network.evaluate({"images": images}).values(), model(images)):
        assert relative_error(out, expected) < {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]


def test_model_in_half_precision_gives_the_plugins_half_precision(registered, monkeypatch):  # noqa: F811
    """Also where TensorRT 8.6 calls a tensor float32 that was only moved."""
    model = mini_model("resnet50-mini").cpu()
    plugins = {"normalization": "plugin", "msda": "plugin", "attention": "plugin"}
    pins = default_fp32_modules("plugin")
    spec = BuildSpec(**STATIC, **plugins, precision="fp16", fp32_modules=pins)
    network = trace(registered, builder.Core(model), spec, monkeypatch)
    layers = by_module(network)
    half = plugin._TYPES[F16]
    decoder = "model.sem_seg_head.pixel_decoder."
    for name, layer in layers.items():
        if not name.startswith(decoder):
            continue
        fields = layer.plugin._ours.fields
        types = {key: value for key, value in fields.items() if key.endswith("type")}
        assert set(types.values()) <= {half, -1}, name
    assert sum(".encoder.layers." in name for name in layers) == 3 * 2
    casts = [row for row in network.precisions() if row["kind"] == "CAST" and row["outputs"] != ["INT32"]]
    ours = {name for name in layers if name.startswith(decoder)}
    assert not [row for row in casts if row["name"].split(":")[0] in ours]


class Positioned(nn.Module):
    """Norms as in the pixel decoder's encoder: each gives x, and x with the positions added, to what follows."""

    def __init__(self, channels: int = 16, stride: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride, padding=1)
        self.pe_layer = PositionEmbeddingSine(channels // 2)
        self.level_embed = nn.Parameter(torch.empty(channels))
        self.linears = nn.ModuleList(nn.Linear(channels, channels) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        rng = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=rng)

    def forward(self, images):
        features = self.conv(images / 255)
        position = self.pe_layer(features).flatten(2) + self.level_embed[None, :, None]
        x, position = (t.transpose(1, 2) for t in (features.flatten(2), position))
        query = x
        for linear, norm in zip(self.linears, self.norms):
            x, query = fused_ops.residual_layer_norm_and_position(x, linear(query), norm, position)
        return x, query

    core = forward


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("normalization", ["plugin", "native"])
def test_network_with_positions_equals_pytorch(registered, shapes, normalization, monkeypatch):  # noqa: F811
    model = Positioned()
    network = trace(registered, model, BuildSpec(**shapes, normalization=normalization), monkeypatch)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        actual = network.evaluate({"images": images})
        for out, expected in zip(actual.values(), model(images)):
            assert out.shape == expected.shape and relative_error(out, expected) < 1e-5, shape
    layers = plugin_layers(network)
    assert [layer.num_outputs for layer in layers] == ([2, 2] if normalization == "plugin" else [])
    assert len({layer.get_input(4).name for layer in layers}) == len(layers) // 2


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("precision", "pinned", "types"),
    [
        ("fp32", (), {"norms.0": "FFFFF", "norms.1": "FFFFF"}),
        ("fp16", (), {"norms.0": "HHHHH", "norms.1": "HHHHH"}),
        ("fp16", ("norms.0",), {"norms.0": "HH?FF", "norms.1": "FHHHH"}),
        ("bf16", (), {"norms.0": "BBBBB", "norms.1": "BBBBB"}),
    ],
)
def test_positions_have_the_type_of_the_sum(registered, shapes, precision, pinned, types, monkeypatch):  # noqa: F811
    """types: of x, residual, position and both outputs. ?: constants are float32, what is computed is what it was told."""
    if precision == "bf16" and not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    pins = ("pe_layer", *pinned)
    spec = BuildSpec(**shapes, normalization="plugin", precision=precision, fp32_modules=pins)
    model = Positioned()
    network = trace(registered, model, spec, monkeypatch)
    for name, wanted in types.items():
        layer = by_module(network)[name]
        tensors = [*(layer.get_input(i) for i in (0, 3, 4)), *(layer.get_output(i) for i in range(2))]
        given = "".join(tensor._kept_dtype.name[0] for tensor in tensors)
        assert given == wanted.replace("?", "F" if shapes is STATIC else "H"), name
        # A constant that TensorRT need not convert in every call.
        kind = layer.get_input(4)._producer.type.name
        assert (kind == "CONSTANT") == (shapes is STATIC)
    casts = [row["name"].split(":")[0] for row in network.precisions() if row["kind"] == "CAST"]
    assert not set(casts) & set(by_module(network))
    images = random_images(TRACED)
    for out, expected in zip(network.evaluate({"images": images}).values(), model(images)):
        assert relative_error(out, expected) < {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]


def test_encoder_adds_positions_once_by_itself(registered, monkeypatch):  # noqa: F811
    """In front of its first layer; the norms do it for the others."""
    model = mini_model("resnet50-mini").cpu()
    plugins = {"normalization": "plugin", "msda": "plugin", "attention": "plugin"}
    network = trace(registered, builder.Core(model), BuildSpec(**STATIC, **plugins), monkeypatch)
    encoder = "model.sem_seg_head.pixel_decoder.transformer.encoder"
    rows = [row["name"].split(":")[0] for row in network.precisions() if row["kind"] == "ELEMENTWISE"]
    assert rows.count(encoder) == 1
    layers = model.sem_seg_head.pixel_decoder.transformer.encoder.layers
    assert not {f"{encoder}.layers.{i}" for i in range(len(layers))} & set(rows)
    outputs = [by_module(network)[f"{encoder}.layers.{i}.norm2"].num_outputs for i in range(len(layers))]
    assert outputs == [2] * (len(layers) - 1) + [1]


VARIANTS = {
    "layer norm without weights": lambda x: F.layer_norm(x.transpose(1, 3), (3,)),
    "layer norm of one weight": lambda x: F.layer_norm(x.transpose(1, 3), (3,), torch.arange(3.0), None, 0.1),
    "group norm without weights": lambda x: F.group_norm(x, 3),
    "group norm of three dimensions": lambda x: F.group_norm(x.flatten(2), 3, torch.arange(3.0), None, 10.0),
    "group norm of five dimensions": lambda x: F.group_norm(x[:, :, :, :, None], 1)[..., 0],
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_variants_by_the_plugins(registered, name, shapes, monkeypatch):  # noqa: F811
    function = VARIANTS[name]
    network = trace(registered, Wrapped(function), BuildSpec(**shapes, normalization="plugin"), monkeypatch)
    assert len(plugin_layers(network)) == 1
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        actual = network.evaluate({"images": images})["pred_masks"]
        torch.testing.assert_close(actual, function(images), rtol=1e-4, atol=1e-4)


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
def test_images_are_normalised_as_in_pytorch(registered, shapes, normalization, monkeypatch):  # noqa: F811
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
def test_images_are_rounded_once_where_the_plugin_normalises_them(registered, precision, out, monkeypatch):  # noqa: F811
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


def test_image_of_a_model_is_normalised_by_one_layer(registered, monkeypatch):  # noqa: F811
    model = mini_model("resnet50-mini").cpu()
    spec = BuildSpec(**STATIC, normalization="plugin", msda="plugin", precision="fp16")
    network = trace(registered, builder.Core(model), spec, monkeypatch)
    (layer,) = [x for x in plugin_layers(network) if x.plugin._name == plugin.NORMALIZE_IMAGES.name]
    assert layer.get_input(0).name == "images" and layer.get_output(0).dtype.name == "HALF"
    (first,) = layer.get_output(0)._consumers
    assert first.type.name == "CONVOLUTION"


# What the plugins refuse

IMAGES = {"out_type": F32, "channels": 3}
LAYER = {"x_type": F32, "residual_type": -1, "position_type": -1, "out_type": F32, "epsilon": 1e-5}
GROUP = {"x_type": F32, "out_type": F32, "channels": 8, "groups": 2, "relu": 0, "epsilon": 1e-5}


def network_of(trt, kind, fields, *shapes):  # noqa: F811
    network = build_network(trt)
    inputs = [network.add_input(f"input{i}", trt.float32, shape) for i, shape in enumerate(shapes)]
    network.mark_output(plugin.add_layer(network, kind, inputs, fields).get_output(0))
    return network


@pytest.mark.parametrize(
    ("kind", "fields", "shapes", "told"),
    [
        (plugin.LAYER_NORM, LAYER, [(2, 8), (7,), (8,)], r"weight \(7,\) and bias \(8,\) for x \(2, 8\)"),
        (plugin.LAYER_NORM, LAYER, [(2, 8), (8,)], "2 inputs; D2TRTLayerNorm takes 3"),
        (plugin.LAYER_NORM, LAYER, [(2, 8), (8,), (8,), (2, 8)], "4 inputs; D2TRTLayerNorm takes 3"),
        (
            plugin.LAYER_NORM,
            {**LAYER, "residual_type": F32},
            [(2, 8), (8,), (8,), (1, 8)],
            r"a residual \(1, 8\) for x \(2, 8\)",
        ),
        (
            plugin.LAYER_NORM,
            {**LAYER, "position_type": F32},
            [(2, 3, 8), (8,), (8,), (2, 3, 8)],
            r"a position \(2, 3, 8\) for x \(2, 3, 8\)",
        ),
        (
            plugin.LAYER_NORM,
            {**LAYER, "position_type": F32},
            [(2, 8), (8,), (8,)],
            "3 inputs; D2TRTLayerNorm takes 4",
        ),
        (plugin.GROUP_NORM, GROUP, [(2, 8, 3), (8,), (8,)], "ranks must be 4, 1, 1"),
        (plugin.GROUP_NORM, GROUP, [(2, 12, 3, 3), (12,), (12,)], "12 weights, 12 biases; made for 8"),
        (plugin.NORMALIZE_IMAGES, IMAGES, [(3, 4, 4), (3,), (3,)], "ranks must be 4, 1, 1"),
        (plugin.NORMALIZE_IMAGES, IMAGES, [(2, 3, 4, 4), (3,), (1,)], "3 means, 1 deviations"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(registered, kind, fields, shapes, told):  # noqa: F811
    with pytest.raises(Refused, match=told):
        network_of(registered, kind, fields, *shapes).check()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (plugin.LAYER_NORM, {**LAYER, "residual_type": 3}),
        (plugin.LAYER_NORM, {**LAYER, "position_type": 3}),
        (plugin.LAYER_NORM, {**LAYER, "epsilon": -1.0}),
        (plugin.GROUP_NORM, {**GROUP, "groups": 3}),
        (plugin.GROUP_NORM, {**GROUP, "relu": 2}),
        (plugin.GROUP_NORM, {**GROUP, "groups": 0}),
        (plugin.NORMALIZE_IMAGES, {**IMAGES, "channels": 0}),
    ],
)
def test_fields_that_are_not_allowed(registered, kind, fields):  # noqa: F811
    with pytest.raises(
        ValueError, match=f"{kind.name} is not to be had with {next(iter(fields))} torch.float32"
    ):
        network_of(registered, kind, fields, (2, 8), (8,), (8,))


def test_bfloat16_needs_tensorrt_10(registered):  # noqa: F811
    fields = {**LAYER, "out_type": BF16}
    if compat.strongly_typed():
        network_of(registered, plugin.LAYER_NORM, fields, (2, 8), (8,), (8,)).check()
    else:
        with pytest.raises(ValueError, match=r"out_type torch\.bfloat16"):
            network_of(registered, plugin.LAYER_NORM, fields, (2, 8), (8,), (8,))


# Real engines


@real
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (20, 5)])
def test_real_engine_equals_pytorch(precision, shapes, channels, groups):
    from d2_trt.engine import Engine

    model = Norms(channels, groups, stride=2).cuda()
    spec = BuildSpec(**shapes, normalization="plugin", precision=precision, fp32_modules=(), opt_level=3)
    plan, report, _ = builder.build_engine(model, spec, random_images(TRACED).cuda())
    assert len(report.plugin_layers) == 4
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape).cuda()
        with torch.no_grad():
            expected = model(images)
        for actual, wanted in zip(engine(images), expected):
            assert relative_error(actual, wanted) < (2e-3 if precision == "fp32" else 1e-2), shape


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


@real
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("channels", [256, 20])
def test_real_engine_with_positions_equals_pytorch(precision, shapes, channels):
    from d2_trt.engine import Engine

    model = Positioned(channels, stride=4).cuda()
    spec = BuildSpec(
        **shapes, normalization="plugin", precision=precision, fp32_modules=("pe_layer",), opt_level=3
    )
    plan, report, _ = builder.build_engine(model, spec, random_images(TRACED).cuda())
    assert len(report.plugin_layers) == 2
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape).cuda()
        with torch.no_grad():
            expected = model(images)
        for actual, wanted in zip(engine(images), expected):
            assert relative_error(actual, wanted) < (2e-3 if precision == "fp32" else 1e-2), shape


@real
def test_real_network_tells_moved_tensors_types_as_the_double_does():
    """TensorRT 8.6 forgets the type of what it only moves; Graph remembers it."""
    trt = compat.tensorrt()  # noqa: F811
    made = trt.Builder(builder.trt_logger())
    _check_moved_types(trt, made.create_network(compat.network_flags()))


@real
def test_real_network_tells_the_type_that_a_plugin_gives():
    trt = compat.tensorrt()  # noqa: F811
    made = trt.Builder(builder.trt_logger())
    network = made.create_network(compat.network_flags())
    graph = Graph(network, lambda _: torch.float16, lambda: "", largest_size=64, normalization="plugin")
    x = network.add_input("x", trt.float32, (2, 3, 4))
    ones = graph.constant(torch.ones(4))
    out = graph.plugin(plugin.LAYER_NORM, [x, ones, ones], {**LAYER, "out_type": F16}, F16)
    assert out.dtype == trt.float16 and graph.torch_dtype(out) == F16


def test_graph_knows_the_type_of_a_tensor_that_was_only_moved(trt):  # noqa: F811
    _check_moved_types(trt, build_network(trt))


def _check_moved_types(trt, network):  # noqa: F811
    graph = Graph(network, lambda _: torch.float16, lambda: "", largest_size=64)
    x = network.add_input("x", trt.float32, (2, 3, 4))
    half = graph.emit(lambda t: network.add_activation(t, trt.ActivationType.RELU), x)
    moved = graph.transpose(half, (0, 2, 1))
    part = graph.slice(moved, [0, 0, 0], [1, 4, 3])
    joined = graph.concat([part, part], 0)
    wanted = trt.float16 if compat.strongly_typed() else trt.float32
    assert half.dtype == trt.float16 and [t.dtype for t in (moved, part, joined)] == [wanted] * 3
    for tensor in (half, moved, part, joined):
        assert graph.torch_dtype(tensor) == torch.float16
        assert graph.cast(tensor, torch.float16) is tensor
    assert graph.torch_dtype(graph.transpose(x, (2, 1, 0))) == torch.float32
