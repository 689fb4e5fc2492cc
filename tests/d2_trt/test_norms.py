"""LayerNorm, GroupNorm and what is fused with them: what the converters make of them, and real engines with our plugins.

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
from mask2former.modeling import fused_ops
from mask2former.modeling.transformer_decoder.position_encoding import PositionEmbeddingSine
from tests.d2_trt.plugin_helpers import F16, by_module, plugin_layers, real
from tests.d2_trt.plugin_helpers import registered as registered
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, Wrapped, random_images, trace
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import mini_model, relative_error


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


def check_outputs_without_casts(network, model, precision: str) -> None:
    """As PyTorch's, and nothing is cast in front of the plugins."""
    casts = [row["name"].split(":")[0] for row in network.precisions() if row["kind"] == "CAST"]
    assert not set(casts) & set(by_module(network))
    images = random_images(TRACED)
    for out, expected in zip(network.evaluate({"images": images}).values(), model(images)):
        assert relative_error(out, expected) < {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("normalization", ["plugin", "native"])
def test_network_equals_pytorch(registered, shapes, normalization, monkeypatch):
    model = Norms()
    network = trace(registered, model, BuildSpec(**shapes, normalization=normalization), monkeypatch)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        actual = network.evaluate({"images": images})
        for out, expected in zip(actual.values(), model(images)):
            assert out.shape == expected.shape and relative_error(out, expected) < 1e-5, shape


def test_plugins_take_the_place_of_layers_and_of_what_is_fused(registered, monkeypatch):
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
    registered,
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
    check_outputs_without_casts(network, model, precision)


def test_model_in_half_precision_gives_the_plugins_half_precision(registered, monkeypatch):
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
def test_network_with_positions_equals_pytorch(registered, shapes, normalization, monkeypatch):
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
def test_positions_have_the_type_of_the_sum(registered, shapes, precision, pinned, types, monkeypatch):
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
    check_outputs_without_casts(network, model, precision)


def test_encoder_adds_positions_once_by_itself(registered, monkeypatch):
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
def test_variants_by_the_plugins(registered, name, shapes, monkeypatch):
    function = VARIANTS[name]
    network = trace(registered, Wrapped(function), BuildSpec(**shapes, normalization="plugin"), monkeypatch)
    assert len(plugin_layers(network)) == 1
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        actual = network.evaluate({"images": images})["pred_masks"]
        torch.testing.assert_close(actual, function(images), rtol=1e-4, atol=1e-4)


def spread(x):
    """Channels that differ from each other: their own statistics are not those of all of them."""
    return x * torch.tensor([0.02, 0.1, 0.4]).reshape(1, 3, 1, 1)


ONE_GROUP = {
    "weights": lambda x: F.group_norm(spread(x), 1, torch.arange(3.0), torch.ones(3)),
    "no weights": lambda x: torch.group_norm(spread(x), 1),
    "three dimensions": lambda x: F.group_norm(spread(x).flatten(2), 1, torch.arange(3.0), None, 10.0),
    "five dimensions": lambda x: F.group_norm(spread(x)[:, :, :, :, None], 1)[..., 0],
    "two dimensions": lambda x: F.group_norm(spread(x)[:, :, 0, 0], 1),
    "each channel": lambda x: F.group_norm(spread(x), 3),
}


@pytest.mark.parametrize("name", ONE_GROUP)
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_one_group_spans_all_channels_natively(trt, name, shapes, monkeypatch):  # noqa: F811
    function = ONE_GROUP[name]
    network = trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        actual = network.evaluate({"images": images})["pred_masks"]
        torch.testing.assert_close(actual, function(images), rtol=1e-4, atol=1e-4)


# Real engines


@pytest.mark.tensorrt
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_real_engine_of_one_native_group_equals_pytorch(precision, shapes):
    """Pinned to float32 in fp16: 8.6 may not build native norms in half precision (MODEL.TENSORRT.NORMALIZATION)."""
    from d2_trt.engine import Engine

    class OneGroup(nn.Module):
        def core(self, images):
            scale = torch.tensor([0.02, 0.1, 0.4], device=images.device).reshape(1, 3, 1, 1)
            weight = torch.tensor([1.0, 2.0, 3.0], device=images.device)
            out = F.group_norm(images * scale, 1, weight, weight)
            return out.flatten(2), out

    model = OneGroup().cuda().eval()
    spec = BuildSpec(**shapes, precision=precision, fp32_modules=("*",), opt_level=0)
    plan, _, _ = builder.build_engine(model, spec, random_images(TRACED).cuda())
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape).cuda()
        for actual, wanted in zip(engine(images), model.core(images)):
            assert actual.shape == wanted.shape and relative_error(actual, wanted) < 2e-3, shape


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
