"""Whole mini models and single functions, from PyTorch to TensorRT's layers, against PyTorch.

On a CPU the network is the double of tests/doubles, for each version of TensorRT's bindings; tests marked `tensorrt` build
and run real engines.
"""

from __future__ import annotations

from threading import Event, Thread, get_ident

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2_trt import builder, compat
from d2_trt.build_spec import BuildSpec
from d2_trt.converters import registry
from d2_trt.errors import ConversionError
from mask2former.modeling import shape_ops
from tests.doubles import conversion
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import MINI_MODELS, mini_model, relative_error

TRACED = (2, 3, 96, 128)
OTHERS = [(1, 3, 64, 160), (3, 3, 128, 96)]
DYNAMIC = {"min_shape": (1, 64, 64), "opt_shape": (2, 96, 128), "max_shape": (3, 256, 256)}
STATIC = dict.fromkeys(DYNAMIC, (2, 96, 128))


def random_images(shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu") * 255


def trace(trt, core, spec, monkeypatch):  # noqa: F811
    """A network of the double that holds the traced model."""
    conversion.use_conversion(monkeypatch)
    made = trt.Builder(trt.Logger())
    network = made.create_network(compat.network_flags())
    network.examples = {"images": [TRACED, *OTHERS] if spec.dynamic else [TRACED]}
    config = made.create_builder_config()
    network._graph = builder.trace(network, config, core, random_images(TRACED), spec)
    network.check()
    return network


@pytest.fixture(scope="module", params=MINI_MODELS)
def model(request):
    return mini_model(request.param).cpu()


def errors(network, model, shape) -> tuple[float, float]:
    images = random_images(shape)
    outputs = network.evaluate({"images": images})
    with torch.no_grad():
        logits, masks = model.core(images)
    return relative_error(outputs["pred_logits"], logits), relative_error(outputs["pred_masks"], masks)


@pytest.mark.parametrize("msda", ["stock", "native"])
def test_one_network_serves_every_size(trt, model, msda, monkeypatch):  # noqa: F811
    network = trace(trt, builder.Core(model), BuildSpec(**DYNAMIC, msda=msda), monkeypatch)
    for shape in (TRACED, *OTHERS, (1, 3, 64, 64)):
        assert max(errors(network, model, shape)) < 1e-4, shape


def test_static_network_equals_pytorch(trt, model, monkeypatch):  # noqa: F811
    network = trace(trt, builder.Core(model), BuildSpec(**STATIC), monkeypatch)
    assert max(errors(network, model, TRACED)) < 1e-4


def test_half_precision_stays_near_float32_and_keeps_its_pins(trt, model, monkeypatch):  # noqa: F811
    network = trace(trt, builder.Core(model), BuildSpec(**DYNAMIC, precision="fp16"), monkeypatch)
    assert max(errors(network, model, TRACED)) < 0.1
    types = {}
    for row in network.precisions():
        if row["kind"] == "CAST":
            continue  # between the types
        types.setdefault(row["name"].split(":")[0], set()).add(row["compute"])
    assert types["model.sem_seg_head.predictor.class_embed"] <= {"FLOAT", ""}
    assert types["model.sem_seg_head.predictor.mask_embed.layers.0"] <= {"FLOAT", ""}
    assert "HALF" in types["model.sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_every_layer_is_named_after_its_module(trt, model, shapes, precision, monkeypatch):  # noqa: F811
    core = builder.Core(model)
    network = trace(trt, core, BuildSpec(**shapes, precision=precision), monkeypatch)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    paths = [layer.name.split(":")[0] for layer in layers]
    assert set(paths) <= {name for name, _ in core.named_modules()} - {""}
    assert len({layer.name for layer in layers}) == len(layers)
    assert "model.sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.core" in paths
    assert "model.sem_seg_head.predictor.transformer_ffn_layers.0.linear1" in paths
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    last = [p for layer, p in zip(layers, paths) if layer.get_output(0).name in outputs]
    assert last == ["model"] * 2
    used_first = {}
    for layer, path in zip(layers, paths):
        for i in range(layer.num_inputs):
            if layer.get_input(i) is not None:
                used_first.setdefault(layer.get_input(i).name, path)
    constants = [
        (path, layer.get_output(0).name)
        for layer, path in zip(layers, paths)
        if "CONSTANT" in layer.type.name
    ]
    users = [
        (path, used_first[name]) for path, name in constants if name in used_first
    ]  # others were made in another type
    assert len(users) > 50 and all(path == user for path, user in users)


class Wrapped(nn.Module):
    """A function in the place of the model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        out = self.function(images)
        return out, out


def test_function_without_converter_is_named_with_module_and_line(trt, monkeypatch):  # noqa: F811
    core = Wrapped(lambda x: F.celu(x))
    with pytest.raises(
        ConversionError, match=r"no converter for torch.*celu.*test_conversion\.py:\d+: .*F\.celu"
    ):
        trace(trt, core, BuildSpec(**DYNAMIC), monkeypatch)


def test_size_read_from_a_traced_tensor_fails_a_dynamic_build(trt, monkeypatch):  # noqa: F811
    core = Wrapped(lambda x: x * x.shape[-1])
    with pytest.raises(ConversionError, match=r"size of a traced tensor is read.*shape_ops.*STATIC True"):
        trace(trt, core, BuildSpec(**DYNAMIC), monkeypatch)
    network = trace(trt, core, BuildSpec(**STATIC), monkeypatch)
    images = random_images(TRACED)
    assert torch.allclose(network.evaluate({"images": images})["pred_masks"], images * 128)


def attend(x):
    """(B, 1, N, 3), channels last: the one size of attention that must be known."""
    return F.scaled_dot_product_attention(x / 255, x / 255, x)


FUNCTIONS = {
    "linear above three dimensions": lambda x: F.linear(
        x.permute(0, 2, 3, 1), torch.arange(15.0).view(5, 3) / 15
    ),
    "gelu": lambda x: F.gelu(x / 100 - 1),
    "layer norm": lambda x: F.layer_norm(x.transpose(1, 3), (3,), torch.arange(3.0), torch.ones(3)),
    "group norm": lambda x: F.group_norm(x, 3, torch.arange(3.0), torch.ones(3)),
    "softmax over a negative dimension": lambda x: (x / 50).softmax(-2),
    "roll forth and back": lambda x: torch.roll(torch.roll(x, (-3, 2), (2, 3)), (1,), (2,)),
    "slices with steps": lambda x: torch.cat([x[:, :, 0::2, 1::2], x[:, :, 1::2, 0::2]], 1),
    "index that drops a dimension": lambda x: (x[:, 1] - x[:, 2])[:, None],
    "unbind": lambda x: torch.cat([t[:, None] for t in x.unbind(1)][::-1], 1),
    "arithmetic with numbers on either side": lambda x: 2 - (1 + x * 3) / 255,
    "masked fill": lambda x: x.masked_fill(x < 100, -5.0),
    "masked fill with a large value": lambda x: x.masked_fill(x < 100, -1e5),
    "activation taken before the trace": lambda x, relu=F.relu: relu(x - 100),
    "padding to a multiple": lambda x: shape_ops.pad_to_multiple(x.permute(0, 2, 3, 1), 7),
    "windows and back": lambda x: shape_ops.window_reverse(
        shape_ops.window_partition(x.permute(0, 2, 3, 1), 8), 8, x.permute(0, 2, 3, 1)
    ),
    "resizing to another map's size": lambda x: shape_ops.resize_like(x, x[:, :, 0::2, 0::2]),
    "attention": lambda x: attend(x[:, :, 0::4, 0::4].flatten(2).transpose(1, 2)[:, None]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_function_equals_pytorch(trt, name, shapes, monkeypatch):  # noqa: F811
    function = FUNCTIONS[name]
    network = trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        expected = function(images)
        actual = network.evaluate({"images": images})["pred_masks"]
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [-1e5, 1e5, -1e9])
def test_value_that_half_precision_does_not_hold_is_told(trt, value, monkeypatch):  # noqa: F811
    """As it is in float32, so that a row that is masked everywhere stays one of equal logits."""

    def function(x):
        return x.masked_fill(x < 100, value)

    half = BuildSpec(**STATIC, precision="fp16", fp32_modules=())
    told = rf"masked_fill with {value:g} has no.*float16.*65504.*FP32_MODULES".replace("+", r"\+")
    with pytest.raises(ConversionError, match=told):
        trace(trt, Wrapped(function), half, monkeypatch)
    pinned = BuildSpec(**STATIC, precision="fp16", fp32_modules=("*",))
    images = random_images(TRACED)
    for spec in (pinned, BuildSpec(**STATIC)):
        network = trace(trt, Wrapped(function), spec, monkeypatch)
        assert torch.equal(network.evaluate({"images": images})["pred_masks"], function(images))


@pytest.mark.parametrize("value", [float("-inf"), -6e4])
def test_value_that_half_precision_holds_masks_there(trt, value, monkeypatch):  # noqa: F811
    def function(x):
        return (x / 50).masked_fill(torch.arange(128) % 3 == 0, value).softmax(-1)

    network = trace(
        trt, Wrapped(function), BuildSpec(**STATIC, precision="fp16", fp32_modules=()), monkeypatch
    )
    images = random_images(TRACED)
    actual = network.evaluate({"images": images})["pred_masks"]
    assert relative_error(actual, function(images)) < 1e-2 and not actual[..., 0::3].any()


def test_tensors_are_no_sequences_after_a_trace(trt, monkeypatch):  # noqa: F811
    trace(trt, Wrapped(FUNCTIONS["index that drops a dimension"]), BuildSpec(**STATIC), monkeypatch)
    assert torch.as_tensor([torch.tensor(3), torch.tensor(4)]).tolist() == [3, 4]


def test_what_other_threads_compute_meanwhile_is_not_converted(trt, monkeypatch):  # noqa: F811
    threads, made = set(), []
    convert = registry.convert
    monkeypatch.setattr(
        registry, "convert", lambda *args, **kw: (threads.add(get_ident()), convert(*args, **kw))
    )

    def elsewhere():
        made.append(torch.cat([torch.ones(2), torch.zeros(1).clone()]) + 1)

    def function(x):
        thread = Thread(target=elsewhere)
        thread.start()
        thread.join()
        return F.relu(x) * 2

    network = trace(trt, Wrapped(function), BuildSpec(**STATIC), monkeypatch)
    assert threads == {get_ident()} and made[0].tolist() == [2, 2, 1]
    images = random_images(TRACED)
    assert torch.equal(network.evaluate({"images": images})["pred_masks"], images * 2)


def test_models_that_two_threads_trace_at_once_are_both_converted(trt, monkeypatch):  # noqa: F811
    begun, networks = Event(), {}

    def first(x):
        begun.set()
        thread.join(0.3)  # time for the other to begin, too
        return F.relu(x) * 2

    def convert(factor, function):
        networks[factor] = trace(trt, Wrapped(function), BuildSpec(**STATIC), monkeypatch)

    thread = Thread(target=lambda: begun.wait(10) and convert(3, lambda x: F.relu(x) * 3))
    thread.start()
    convert(2, first)
    thread.join(10)
    images = random_images(TRACED)
    for factor in (2, 3):
        assert torch.equal(networks[factor].evaluate({"images": images})["pred_masks"], images * factor)


@pytest.mark.tensorrt
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", MINI_MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_real_engine_serves_every_size(name, precision):
    from d2_trt.engine import Engine

    model = mini_model(name)
    spec = BuildSpec(**DYNAMIC, precision=precision, opt_level=0)
    plan, report, _ = builder.build_engine(model, spec, random_images(TRACED).cuda())
    assert report.engine_bytes == len(plan) and report.layers["CONVOLUTION"] >= 7
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS, (1, 3, 256, 224)):
        images = random_images(shape).cuda()
        with torch.no_grad():
            expected = model.core(images)
        for actual, wanted in zip(engine(images), expected):
            assert relative_error(actual, wanted) < (2e-3 if precision == "fp32" else 0.1), shape
