"""Our plugin of deformable attention: what the converter gives it, and real engines with it.

On a CPU the network is the double of tests/doubles, for each version of TensorRT's bindings; tests marked `tensorrt` need
the library of csrc/trt_plugin, built for the TensorRT in use.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from d2_trt import builder, compat, plugin
from d2_trt.build_spec import DEFAULT_FP32_MODULES, BuildSpec
from d2_trt.converters import Graph
from tests.d2_trt.plugin_helpers import BF16, F16, F32, plugin_layers, real
from tests.d2_trt.plugin_helpers import registered as registered
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, errors, model, random_images, trace  # noqa: F401
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.doubles.trt_api import Refused
from tests.golden import MINI_MODELS, mini_model, relative_error
from tests.mask2former.ms_deform_attn_helpers import definition, error, offsets_and_logits

# The converter


def test_network_with_our_plugin_equals_pytorch(registered, model, monkeypatch):  # noqa: F811
    network = trace(registered, builder.Core(model), BuildSpec(**DYNAMIC, msda="plugin"), monkeypatch)
    layers = plugin_layers(network)
    attentions = [m for m in model.modules() if type(m).__name__ == "MSDeformAttnCore"]
    assert len(layers) == len(attentions) > 0
    assert all(layer.name.split(":")[0].endswith(".self_attn.core") for layer in layers)
    # Softmax and locations are the plugin's, and the level sizes are made once.
    ours = [row["kind"] for row in network.precisions() if ".self_attn.core:" in row["name"]]
    assert not {"SOFTMAX", "ELEMENTWISE", "UNARY", "GATHER"} & set(ours)
    assert ours.count("SHUFFLE") == 1
    assert len({layer.get_input(2).name for layer in layers}) == 1
    # One product gives offsets and logits.
    assert products(network) == dict.fromkeys(("value_proj", "sampling_offsets", "output_proj"), len(layers))
    for shape in (TRACED, *OTHERS, (1, 3, 64, 64)):
        assert max(errors(network, model, shape)) < 1e-4, shape


def products(network) -> dict[str, int]:
    """Matrix products of deformable attention, by the linear layer."""
    rows = [row["name"].split(":")[0] for row in network.precisions() if row["kind"] == "MATRIX_MULTIPLY"]
    return dict(
        Counter(
            name.rpartition(".")[2] for name in rows if ".encoder.layers." in name and "self_attn" in name
        )
    )


@pytest.mark.parametrize(
    ("precision", "pinned", "wanted", "joined"),
    [
        ("fp32", (), ["FLOAT"] * 2, True),
        ("fp16", (), ["HALF"] * 2, True),
        ("fp16", ("*.sampling_offsets",), ["HALF", "FLOAT"], False),
        ("fp16", ("*.attention_weights",), ["HALF", "FLOAT"], False),
        ("fp16", ("*.sampling_offsets", "*.attention_weights"), ["HALF", "FLOAT"], True),
        ("fp16", ("*.value_proj",), ["FLOAT"] * 2, True),
        ("fp16", ("*.self_attn",), ["FLOAT"] * 2, True),
        ("bf16", (), ["BF16"] * 2, True),
    ],
)
def test_plugin_gets_the_types_that_the_policy_gives_its_neighbours(
    registered, precision, pinned, wanted, joined, monkeypatch
):
    """wanted: types of value and sampling. joined: one product gives offsets and logits, which needs one type for both."""
    if precision == "bf16" and not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    model = mini_model("resnet50-mini").cpu()  # noqa: F811
    pins = DEFAULT_FP32_MODULES + pinned
    spec = BuildSpec(**STATIC, msda="plugin", precision=precision, fp32_modules=pins)
    network = trace(registered, builder.Core(model), spec, monkeypatch)
    for layer in plugin_layers(network):
        assert [layer.get_input(i)._kept_dtype.name for i in range(2)] == wanted
        assert layer.get_input(2).dtype.name == "INT32"
        assert layer.get_output(0)._kept_dtype.name == wanted[0]
    assert ("attention_weights" not in products(network)) == joined
    computed = {
        row["name"].split(":")[0].rpartition(".")[2]: row["compute"]
        for row in network.precisions()
        if row["kind"] == "MATRIX_MULTIPLY" and ".self_attn." in row["name"]
    }
    for name in ("sampling_offsets", "attention_weights")[: 1 if joined else 2]:
        low = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}[precision]
        assert computed[name] == ("FLOAT" if {f"*.{name}", "*.self_attn"} & set(pinned) else low)
    assert max(errors(network, model, TRACED)) < (1e-4 if precision == "fp32" else 0.2)


def small_network(trt, value_dtype=F32, sampling_dtype=F32, given=None):  # noqa: F811
    """A network of one plugin layer over inputs, with fixed level sizes 2x3 and 1x2, 2 heads and 3 points."""
    network = build_network(trt)
    names = {F32: trt.float32, F16: trt.float16, BF16: getattr(trt, "bfloat16", trt.float16)}
    value = network.add_input("value", names[value_dtype], (1, 8, 2, 4))
    sampling = network.add_input("sampling", names[given or sampling_dtype], (1, 8, 36))
    sizes = np.array([[2, 3], [1, 2]], np.int32)
    network._kept = sizes
    sizes = network.add_constant((2, 2), sizes).get_output(0)
    types = {"value_type": value_dtype, "sampling_type": sampling_dtype}
    layer = plugin.add_layer(network, plugin.MSDA, [value, sampling, sizes], types)
    network.mark_output(layer.get_output(0))
    return network


@pytest.mark.parametrize(("value", "sampling"), [(F32, F32), (F16, F16), (F16, F32), (BF16, BF16)])
def test_plugin_layer_computes_the_definition(registered, value, sampling):
    if value == BF16 and not compat.strongly_typed():
        with pytest.raises(
            ValueError,
            match=r"not to be had with value_type torch\.bfloat16.*log says why.*TENSORRT\.MSDA to stock or native",
        ):
            small_network(registered, value, sampling)
        return
    network = small_network(registered, value, sampling)
    network.check()
    rng = torch.Generator().manual_seed(0)
    inputs = {
        "value": torch.randn(1, 8, 2, 4, generator=rng).to(value),
        "sampling": torch.randn(1, 8, 36, generator=rng).to(sampling),
    }
    (out,) = network.evaluate(inputs).values()
    assert out.dtype == value
    wanted = definition(inputs["value"], *offsets_and_logits(inputs["sampling"], 2, 2, 3), ((2, 3), (1, 2)))
    assert error(out, wanted) < (1e-5 if value == F32 else 1e-2)


def test_strong_typing_takes_no_other_type_than_the_plugin_was_made_for(registered):
    if not compat.strongly_typed():
        small_network(registered, F32, F32, given=F16).check()  # the builder converts
        return
    with pytest.raises(Refused, match="made for FLOAT"):
        small_network(registered, F32, F32, given=F16).check()


def test_types_that_the_plugin_does_not_have(registered):
    with pytest.raises(
        ValueError, match=r"not to be had with value_type torch\.float32, sampling_type torch\.float16"
    ):
        small_network(registered, F32, F16)


# Real engines


HEADS, DIM, POINTS = 4, 32, 4
PYRAMIDS = [((4, 6), (8, 12)), ((3, 5), (7, 2)), ((9, 9), (16, 20))]


def build_plan(value_dtype, sampling_dtype) -> bytes:
    """A plan of one plugin layer over dynamic inputs; the level sizes come from the sizes of two further inputs."""
    trt = compat.tensorrt()  # noqa: F811
    names = {F32: trt.float32, F16: trt.float16}
    made = trt.Builder(builder.trt_logger())
    network, config = made.create_network(compat.network_flags()), made.create_builder_config()
    builder.configure(
        config, BuildSpec(**STATIC, precision="fp16" if value_dtype == F16 else "fp32", opt_level=0)
    )
    graph = Graph(network, lambda name: value_dtype, lambda: "core", largest_size=32, msda="plugin")
    profile = made.create_optimization_profile()

    def add(name, dtype, shape, low, best, high):
        def whole(sizes):
            sizes = iter(sizes)
            return tuple(next(sizes) if s < 0 else s for s in shape)

        profile.set_shape(name, whole(low), whole(best), whole(high))
        return network.add_input(name, names[dtype], shape)

    channels = HEADS * 2 * POINTS * 3
    sizes = ((1, 1), (2, 120), (3, 480))
    value = add("value", value_dtype, (-1, -1, HEADS, DIM), *sizes)
    sampling = add("sampling", sampling_dtype, (-1, -1, channels), *sizes)
    maps = [add(f"map{i}", F32, (1, 1, -1, -1), *((n, n) for n in (1, 8, 32))) for i in range(2)]
    pairs = [(graph.size(m, 2), graph.size(m, 3)) for m in maps]
    from d2_trt.converters.deformable import _level_sizes

    types = {"value_type": value_dtype, "sampling_type": sampling_dtype}
    layer = plugin.add_layer(network, plugin.MSDA, [value, sampling, _level_sizes(graph, pairs)], types)
    out = layer.get_output(0)
    out.name = "out"
    network.mark_output(out)
    if not compat.strongly_typed():
        out.dtype = names[value_dtype]
    config.add_optimization_profile(profile)
    plan = made.build_serialized_network(network, config)
    assert plan is not None, "TensorRT built nothing; its log says why"
    return bytes(plan)


class Runner:
    """A plan on a stream of its own."""

    def __init__(self, plan: bytes):
        trt = compat.tensorrt()  # noqa: F811
        compat.register_plugins()
        self.runtime = trt.Runtime(builder.trt_logger())
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()

    def __call__(self, inputs: dict[str, torch.Tensor], dtype) -> torch.Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        for name, tensor in inputs.items():
            assert self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        out = torch.zeros(tuple(self.context.get_tensor_shape("out")), dtype=dtype, device="cuda")
        self.context.set_tensor_address("out", out.data_ptr())
        self.stream.wait_stream(torch.cuda.current_stream())
        assert self.context.execute_async_v3(self.stream.cuda_stream)
        self.stream.synchronize()
        return out


def real_inputs(shapes, batch, value_dtype, sampling_dtype) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(batch)
    pixels = sum(h * w for h, w in shapes)
    sampling = torch.randn(batch, pixels, HEADS * 2 * POINTS * 3, generator=rng)
    sampling[..., : HEADS * 2 * POINTS * 2] *= 4
    made = {
        "value": torch.randn(batch, pixels, HEADS, DIM, generator=rng).to(value_dtype),
        "sampling": sampling.to(sampling_dtype),
    }
    maps = {f"map{i}": torch.zeros(1, 1, *shape) for i, shape in enumerate(shapes)}
    return {name: tensor.cuda() for name, tensor in {**made, **maps}.items()}


def real_definition(inputs, shapes) -> torch.Tensor:
    return definition(inputs["value"], *offsets_and_logits(inputs["sampling"], HEADS, 2, POINTS), shapes)


@real
@pytest.mark.parametrize(("value", "sampling"), [(F32, F32), (F16, F16), (F16, F32)])
def test_real_plugin_equals_the_definition_at_every_shape(value, sampling):
    run = Runner(build_plan(value, sampling))
    for shapes, batch in zip(PYRAMIDS, (2, 1, 3)):
        inputs = real_inputs(shapes, batch, value, sampling)
        out = run(inputs, value)
        wanted = real_definition(inputs, shapes)
        assert out.shape == wanted.shape
        assert error(out, wanted) < (2e-5 if value == F32 else 1e-3), shapes


@real
def test_real_plugin_gives_nan_where_the_levels_do_not_hold_the_pixels():
    run = Runner(build_plan(F32, F32))
    inputs = real_inputs(PYRAMIDS[0], 2, F32, F32)
    expected = run(inputs, F32)
    inputs["map0"] = torch.zeros(1, 1, 5, 6, device="cuda")
    assert run(inputs, F32).isnan().all()
    inputs["map0"] = torch.zeros(1, 1, 4, 6, device="cuda")
    assert torch.equal(run(inputs, F32), expected)


@real
def test_plan_with_the_plugin_runs_in_another_process(tmp_path):
    plan = tmp_path / "plan"
    plan.write_bytes(build_plan(F32, F32))
    code = """
import sys, torch
from pathlib import Path
from tests.d2_trt import test_deformable_plugin as t
inputs = t.real_inputs(t.PYRAMIDS[0], 2, t.F32, t.F32)
out = t.Runner(Path(sys.argv[1]).read_bytes())(inputs, t.F32)
wanted = t.real_definition(inputs, t.PYRAMIDS[0])
assert t.error(out, wanted) < 2e-5
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(plan)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", MINI_MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_real_engine_with_our_plugin_serves_every_size(name, precision):
    from d2_trt.engine import Engine

    network = mini_model(name)
    spec = BuildSpec(**DYNAMIC, precision=precision, opt_level=0, msda="plugin")
    plan, report, _ = builder.build_engine(network, spec, random_images(TRACED).cuda())
    assert report.plugin_layers
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS, (1, 3, 256, 224)):
        images = random_images(shape).cuda()
        with torch.no_grad():
            expected = network.core(images)
        for actual, wanted in zip(engine(images), expected):
            assert relative_error(actual, wanted) < (2e-3 if precision == "fp32" else 0.1), shape
