"""The decoder's attention in a network: our plugin's layers, TensorRT's own, and which of them where.

On a CPU the network is the double of tests/doubles, for each version of TensorRT's bindings; tests marked `tensorrt` need
the library of csrc/trt_plugin, built for the TensorRT in use.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_trt import builder, compat, plugin
from d2_trt.build_spec import BuildSpec, default_fp32_modules, precision_policy
from mask2former.modeling.transformer_decoder import MultiScaleMaskedTransformerDecoder, attention_core
from tests.d2_trt.plugin_helpers import plugin_layers, registered  # noqa: F401
from tests.d2_trt.test_conversion import (  # noqa: F401
    DYNAMIC,
    OTHERS,
    STATIC,
    TRACED,
    errors,
    model,
    random_images,
    trace,
)
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.doubles.trt_api import Refused
from tests.golden import MINI_MODELS, mini_model, relative_error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PREDICTOR = "model.sem_seg_head.predictor"


class Decoder(nn.Module):
    """The decoder of a mini model over features that a convolution of the image stands for, where a model has it."""

    def __init__(self, layers: int = 3, heads: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.predictor = MultiScaleMaskedTransformerDecoder(
            64,
            num_classes=13,
            hidden_dim=64,
            num_queries=20,
            nheads=heads,
            dim_feedforward=128,
            dec_layers=layers,
            pre_norm=False,
            mask_dim=64,
            enforce_input_project=False,
        )
        self.features = nn.ModuleList(nn.Conv2d(3, 64, s, s) for s in (32, 16, 8, 4))
        nn.init.normal_(self.sem_seg_head.predictor.query_feat.weight)
        self.eval()

    def core(self, images):
        *levels, mask_features = (layer(images / 128 - 1) for layer in self.features)
        outputs = self.sem_seg_head.predictor(levels, mask_features)
        return outputs["pred_logits"], outputs["pred_masks"]


def with_attention(shapes, precision="fp16", **others) -> BuildSpec:
    pins = default_fp32_modules("plugin")
    return BuildSpec(**shapes, attention="plugin", precision=precision, fp32_modules=pins, **others)


def attention_layers(network) -> list:
    return layers_of(network, plugin.ATTENTION)


def layers_of(network, kind) -> list:
    return [layer for layer in plugin_layers(network) if layer.plugin._name == kind.name]


def test_model_with_our_plugin_stays_near_pytorch(registered, model, monkeypatch):  # noqa: F811
    network = trace(registered, builder.Core(model), with_attention(DYNAMIC), monkeypatch)
    assert len(attention_layers(network)) == 6
    assert max(errors(network, model, OTHERS[0])) < 0.1


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_decoder_with_our_plugin_stays_near_pytorch(registered, shapes, monkeypatch):  # noqa: F811
    decoder = Decoder()
    network = trace(registered, builder.Core(decoder), with_attention(shapes), monkeypatch)
    layers = attention_layers(network)
    names = [layer.name.split(":")[0].removeprefix(f"{PREDICTOR}.transformer_") for layer in layers]
    assert names == [
        f"{kind}_attention_layers.{i}.{module}"
        for i in range(3)
        for kind, module in (("cross", "multihead_attn"), ("self", "self_attn"))
    ]
    # Queries of the first layer are the same for all images, and are repeated for the batch.
    rows = [row for row in network.precisions() if "cross_attention_layers.0" not in row["name"]]
    kinds = [row["kind"] for row in rows if "attention_layers" in row["name"]]
    assert not {"SOFTMAX", "SELECT", "SLICE"} & set(kinds)
    # In half precision, but for the mask embedding.
    for layer in layers:
        types = [layer.get_input(i)._kept_dtype.name for i in range(layer.num_inputs)]
        assert types == (["HALF"] * 4 + ["FLOAT", "HALF"] if "cross" in layer.name else ["HALF"] * 2)
        assert layer.get_output(0)._kept_dtype.name == "HALF"
    for shape in (TRACED, *OTHERS, (1, 3, 64, 64)) if shapes is DYNAMIC else (TRACED,):
        assert max(errors(network, decoder, shape)) < 0.02, shape


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_what_depends_on_weights_alone_is_constant(registered, shapes, precision, monkeypatch):  # noqa: F811
    if precision == "bf16" and not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    decoder = Decoder()
    network = trace(registered, builder.Core(decoder), with_attention(shapes, precision), monkeypatch)
    half = {"fp16": "HALF", "bf16": "BF16"}[precision]
    for i, layer in enumerate(attention_layers(network)):
        constant = {1: half, **({0: half, 4: "FLOAT"} if i == 0 else {})}
        for index, wanted in constant.items():
            source = layer.get_input(index)._producer
            if index != 1 and shapes is DYNAMIC:  # repeated for the batch
                assert source._type == "SLICE"
                source = source.get_input(0)._producer
            assert source._type == "CONSTANT" and source.get_output(0).dtype.name == wanted, (i, index)
    casts = [row["name"] for row in network.precisions() if row["kind"] == "CAST"]
    layers = {layer.name: layer for layer in network._layers}
    assert not [name for name in casts if network._is_constant(layers[name].get_input(0))]
    # Norm and mask embedding of the queries after each layer, and none of those before the first.
    embeddings = [layer for layer in layers_of(network, plugin.MLP) if not layer.plugin._ours.fields["after"]]
    modules = {f"{PREDICTOR}.mask_embed.layers.2", f"{PREDICTOR}.decoder_norm"}
    assert len(embeddings) == 3
    assert not [row for row in network.precisions() if row["name"].split(":")[0] in modules]


def test_mask_features_are_read_as_the_convolution_leaves_them(registered, monkeypatch):  # noqa: F811
    decoder = Decoder()
    network = trace(registered, builder.Core(decoder), with_attention(DYNAMIC), monkeypatch)
    levels, masks = (layers_of(network, k) for k in (plugin.LEVEL_MASK_FEATURES, plugin.MASK_PRODUCT))
    assert [layer.plugin._ours.fields["factor"] for layer in levels] == [8, 4, 2]
    assert len({layer.get_input(0).name for layer in levels} | {masks[0].get_input(1).name}) == 1
    assert len(masks) == 1 and masks[0].get_input(0)._kept_dtype.name == "FLOAT"
    assert not any(row["kind"] == "RESIZE" for row in network.precisions())


def test_mask_features_in_float32_keep_tensorrts_own_layers(registered, monkeypatch):  # noqa: F811
    decoder = Decoder()
    pins = (*default_fp32_modules("plugin"), "features.3")
    spec = BuildSpec(**DYNAMIC, attention="plugin", precision="fp16", fp32_modules=pins)
    network = trace(registered, builder.Core(decoder), spec, monkeypatch)
    assert not layers_of(network, plugin.LEVEL_MASK_FEATURES) and not layers_of(network, plugin.MASK_PRODUCT)
    assert attention_layers(network)
    assert max(errors(network, decoder, OTHERS[0])) < 0.02


def test_layers_of_a_level_share_keys_values_and_features(registered, monkeypatch):  # noqa: F811
    decoder = Decoder(layers=7)
    network = trace(registered, builder.Core(decoder), with_attention(STATIC), monkeypatch)
    layers = [layer for layer in attention_layers(network) if "cross" in layer.name]
    assert [layer.plugin._ours.fields["part"] for layer in layers] == [0, 0, 0, 1, 1, 1, 2]
    for first, second in zip(layers, layers[3:]):
        assert all(first.get_input(i).name == second.get_input(i).name for i in (2, 3, 5))
    assert max(errors(network, decoder, TRACED)) < 0.02


def test_decoder_of_fewer_layers_than_levels(registered, monkeypatch):  # noqa: F811
    decoder = Decoder(layers=1)
    network = trace(registered, builder.Core(decoder), with_attention(STATIC), monkeypatch)
    assert len(attention_layers(network)) == 2
    assert max(errors(network, decoder, TRACED)) < 0.02


def test_float32_keeps_tensorrts_own_layers(registered, monkeypatch):  # noqa: F811
    decoder = Decoder()
    network = trace(registered, builder.Core(decoder), with_attention(DYNAMIC, "tf32"), monkeypatch)
    assert not attention_layers(network)
    for shape in (TRACED, OTHERS[0]):
        assert max(errors(network, decoder, shape)) < 1e-4, shape


def test_bfloat16_decoder(registered, monkeypatch):  # noqa: F811
    if not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    decoder = Decoder()
    network = trace(registered, builder.Core(decoder), with_attention(STATIC, "bf16"), monkeypatch)
    layers = attention_layers(network)
    assert layers and all(layer.get_input(0)._kept_dtype.name == "BF16" for layer in layers)
    assert max(errors(network, decoder, TRACED)) < 0.1


def test_heads_that_the_plugin_has_no_code_for_get_float32_layers(registered, monkeypatch, caplog):  # noqa: F811
    decoder = Decoder(heads=16)  # of 4 channels
    network = trace(registered, builder.Core(decoder), with_attention(DYNAMIC), monkeypatch)
    assert not attention_layers(network)
    assert "D2TRTAttention has no code for 16 heads of 4 channels with a mask of 64" in caplog.text
    computed = {"SOFTMAX": set(), "SELECT": set()}
    for row in network.precisions():
        if "attn" in row["name"] and row["kind"] in computed:
            computed[row["kind"]].add(row["compute"])
    assert computed == {"SOFTMAX": {"FLOAT"}, "SELECT": {"FLOAT"}}
    assert max(errors(network, decoder, OTHERS[0])) < 0.02


def test_what_decides_a_mask_is_kept_in_float32():
    policy = precision_policy(with_attention(STATIC))
    whole, part = "model.sem_seg_head.predictor", "model.sem_seg_head.predictor."
    for name in (
        whole,
        part + "decoder_norm",
        part + "mask_embed.layers.2",
        part + "class_embed",
        part + "pe_layer",
    ):
        assert policy(name) == F32, name
    for name in (
        "pixel_memory",
        "transformer_cross_attention_layers.0.multihead_attn",
        "transformer_ffn_layers.2.norm",
    ):
        assert policy(part + name) == F16, name
    native = precision_policy(
        BuildSpec(**STATIC, precision="fp16", fp32_modules=default_fp32_modules("native"))
    )
    assert native(part + "transformer_ffn_layers.2.norm") == F32


# One layer


def small_network(trt, dtype, masked: int, part: int = 0, heads: int = 2):  # noqa: F811
    """A network of one plugin layer over inputs: 5 queries of 32 channels, 12 keys, two layers' keys and values."""
    network = build_network(trt)
    half = {F32: trt.float32, F16: trt.float16, BF16: getattr(trt, "bfloat16", trt.float16)}[dtype]
    shapes = {
        "q": (2, 5, 32),
        "pos": (1, 5, 32),
        "k": (2, 12, 64),
        "v": (2, 12, 64),
        "e": (2, 5, 32),
        "f": (2, 12, 32),
    }
    if not masked:
        shapes = {"q": (2, 5, 96), "pos": (1, 5, 64)}
    inputs = [
        network.add_input(name, trt.float32 if name == "e" else half, shape) for name, shape in shapes.items()
    ]
    fields = {"type": dtype, "heads": heads, "masked": masked, "part": part}
    network.mark_output(plugin.add_layer(network, plugin.ATTENTION, inputs, fields).get_output(0))
    rng = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=rng).to(F32 if name == "e" else dtype)
        for name, shape in shapes.items()
    }
    return network, values


@pytest.mark.parametrize("part", [0, 1])
def test_masked_layer_computes_the_definition(registered, part):  # noqa: F811
    network, values = small_network(registered, F16, 1, part)
    network.check()
    (out,) = network.evaluate(values).values()
    q, pos, k, v, embed, features = (x.float() for x in values.values())
    k, v = k[..., 32 * part : 32 * part + 32], v[..., 32 * part : 32 * part + 32]
    assert (
        out.dtype == F16
        and relative_error(out, attention_core.reference(q + pos, k, v, 2, embed, features)) < 2e-3
    )


def test_self_attention_layer_computes_the_definition(registered):  # noqa: F811
    network, values = small_network(registered, F16, 0)
    network.check()
    (out,) = network.evaluate(values).values()
    q, k, v = values["q"].float().chunk(3, 2)
    q_pos, k_pos = values["pos"].float().chunk(2, 2)
    assert relative_error(out, attention_core.reference(q + q_pos, k + k_pos, v, 2)) < 2e-3


def test_what_the_plugin_does_not_have(registered):  # noqa: F811
    for wrong in ({"dtype": F32}, {"masked": 0, "part": 1}, {"heads": 0}):
        arguments = {"dtype": F16, "masked": 1, **wrong}
        with pytest.raises(ValueError, match=f"{plugin.ATTENTION.name} is not to be had with type"):
            small_network(registered, **arguments)
    network, values = small_network(registered, F16, 1, part=2)
    with pytest.raises(Refused, match="k is"):
        network.evaluate(values)


# Real engines


@pytest.mark.tensorrt
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", MINI_MODELS)
def test_real_engine_with_our_plugin_serves_every_size(name):
    from d2_trt.engine import Engine

    model = mini_model(name)  # noqa: F811
    spec = with_attention(DYNAMIC, opt_level=0, msda="plugin")
    plan, report, _ = builder.build_engine(model, spec, random_images(TRACED).cuda())
    assert sum("predictor" in layer for layer in report.plugin_layers) >= 10
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS, (1, 3, 256, 224), (1, 3, 64, 64)):
        images = random_images(shape).cuda()
        with torch.no_grad():
            expected = model.core(images)
        for actual, wanted in zip(engine(images), expected):
            assert relative_error(actual, wanted) < 0.1, shape
