"""The double's typing, its versions and its plug-ins."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.doubles import trt_api, trt_stubs
from tests.doubles.fake_tensorrt import build_network, use_tensorrt
from tests.doubles.fixtures import VERSIONS, trt_double  # noqa: F401
from tests.doubles.plugins import MSDA, deformable_attention
from tests.doubles.trt_api import Refused

WEAK = [v for v in VERSIONS if not v.startswith("11.")]
STRONG = [v for v in VERSIONS if not v.startswith("8.")]


# Types


@pytest.mark.parametrize("version", WEAK)
def test_precision_of_a_layer_rounds_what_it_takes_and_makes_in_weak_typing(version):
    with use_tensorrt(version) as trt:
        network = build_network(trt, strong=False)
        x, y = (network.add_input(name, trt.float32, (4,)) for name in "xy")
        layer = network.add_elementwise(x, y, trt.ElementWiseOperation.SUM)
        outs = []
        a, b = torch.rand(4) * 1000, torch.rand(4)
        for precision, output in ((None, None), (trt.float16, None), (trt.float16, trt.float16)):
            if precision:
                layer.precision = precision
            if output:
                layer.set_output_type(0, output)
            assert layer.precision_is_set == bool(precision)
            network._outputs.clear()
            network.mark_output(layer.get_output(0))
            outs.append(network.evaluate({"x": a, "y": b})[layer.get_output(0).name])
        half = (a.half().float() + b.half().float()).half()
        assert torch.equal(outs[0], a + b)
        assert outs[1].dtype == torch.float32 and torch.equal(outs[1], half.float())
        assert outs[2].dtype == torch.float16 and torch.equal(outs[2], half)
        assert network.precisions()[0]["compute"] == "HALF"
        layer.reset_precision()
        assert network.precisions()[0]["compute"] == ""


@pytest.mark.parametrize("version", WEAK)
def test_weak_typing_mixes_floats_but_no_ints(version):
    with use_tensorrt(version) as trt:
        network = build_network(trt, strong=False)
        x = network.add_input("x", trt.float32, (4,))
        half = network.add_cast(x, trt.float16).get_output(0)
        assert half._kept_dtype == trt.float16 and half.dtype == trt.float32  # as 8.6.0 tells it
        mixed = network.add_elementwise(x, half, trt.ElementWiseOperation.SUM).get_output(0)
        assert mixed._kept_dtype == trt.float32
        relu = network.add_activation(x, trt.ActivationType.RELU)
        relu.set_output_type(0, trt.int32)
        with pytest.raises(Refused, match="cannot be set to INT32"):
            assert relu.get_output(0).dtype


@pytest.mark.parametrize("version", STRONG)
def test_strong_typing_refuses_mixed_types_and_every_weak_setting(version):
    with use_tensorrt(version) as trt:
        network = build_network(trt)
        x = network.add_input("x", trt.float32, (1, 2, 4, 4))
        half = network.add_cast(x, trt.float16).get_output(0)
        with pytest.raises(Refused, match="types differ"):
            assert network.add_elementwise(x, half, trt.ElementWiseOperation.SUM).get_output(0).dtype
        with pytest.raises(Refused, match="kernel is FLOAT"):
            kernel = np.ones((1, 2, 1, 1), np.float32)
            assert network.add_convolution_nd(half, 1, (1, 1), kernel).get_output(0).dtype
        layer = network.add_activation(half, trt.ActivationType.RELU)
        gone = AttributeError if version.startswith("11.") else Refused
        with pytest.raises(gone):
            layer.precision = trt.float16
        with pytest.raises(gone):
            layer.set_output_type(0, trt.float32)
        with pytest.raises((Refused, AttributeError)):
            layer.get_output(0).dtype = trt.float32
        ones = network.add_cast(
            network.add_constant((1, 1, 1, 4), kernel_of(4)).get_output(0), trt.float16
        ).get_output(0)
        norm = network.add_normalization(half, ones, ones, 1 << 3)
        with pytest.raises(gone):
            norm.compute_precision = trt.float16


def kernel_of(count: int) -> np.ndarray:
    KEPT.append(np.ones(count, np.float32))
    return KEPT[-1]


KEPT: list = []


@pytest.mark.parametrize("version", STRONG)
def test_strong_typing_computes_in_the_types_of_the_tensors(version):
    with use_tensorrt(version) as trt:
        network = build_network(trt)
        x = network.add_input("x", trt.float32, (4, 64))
        for kind, dtype in ((trt.float16, torch.float16), (trt.bfloat16, torch.bfloat16)):
            t = network.add_cast(x, kind).get_output(0)
            none, transpose = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
            out = network.add_matrix_multiply(t, none, t, transpose).get_output(0)
            assert out.dtype == kind
            network._outputs = [out]
            value = torch.randn(4, 64)
            got = network.evaluate({"x": value})[out.name]
            rounded = value.to(dtype).float()
            assert got.dtype == dtype and torch.equal(got, (rounded @ rounded.T).to(dtype))
        rows = network.precisions()
        assert [row["compute"] for row in rows] == ["", "HALF", "", "BF16"]


@pytest.mark.parametrize("version", STRONG)
def test_bfloat16_weights_by_their_address(version):
    with use_tensorrt(version) as trt:
        network = build_network(trt)
        value = torch.randn(3).bfloat16()
        weights = trt.Weights(trt.bfloat16, value.data_ptr(), value.numel())
        out = network.add_identity(network.add_constant((3,), weights).get_output(0)).get_output(0)
        network.mark_output(out)
        network.check()
        assert torch.equal(network.evaluate({})[out.name], value)
        value.zero_()
        with pytest.raises(Refused, match="overwritten"):
            network.check()


def test_float16_saturates_to_infinity(trt):
    network = build_network(trt)
    x = network.add_input("x", trt.float32, (1,))
    out = network.add_cast(x, trt.float16).get_output(0)
    network.mark_output(out)
    assert network.evaluate({"x": torch.tensor([1e5])})[out.name].isinf().all()


# Versions


@pytest.mark.skipif("8.6.1" not in VERSIONS, reason="there are no bindings of TensorRT 8.6 for this Python")
def test_8_6_lacks_what_came_later():
    with use_tensorrt("8.6.1") as trt:
        assert not hasattr(trt, "int64") and not hasattr(trt.ActivationType, "GELU_ERF")
        with pytest.raises(Refused, match="EXPLICIT_BATCH"):
            trt.Builder(trt.Logger()).create_network(0)
        network = build_network(trt)
        x = network.add_input("x", trt.float32, (1, 4))
        for name in ("add_plugin_v3", "add_normalization_v2", "add_squeeze"):
            with pytest.raises(AttributeError, match=name):
                getattr(network, name)
        with pytest.raises(ValueError, match="NumPy"):
            network.add_constant((1,), np.ones(1, np.int64))
        with pytest.raises(TypeError):
            trt.Weights(trt.float32, np.ones(1, np.float32).ctypes.data, 1)
        with pytest.raises(TypeError):
            network.add_fill((4,), trt.FillOperation.LINSPACE, trt.float32)
        with pytest.raises(TypeError):
            network.add_quantize(x, x, trt.int8)
        layer = network.add_slice(x, (0, 0), (1, 1), (1, 1))
        with pytest.raises(AttributeError):
            layer.axes = (1,)
        with pytest.raises(AttributeError):
            trt.Builder(trt.Logger()).create_builder_config().progress_monitor = None


def test_11_lacks_what_was_removed():
    with use_tensorrt("11.4.0.106") as trt:
        network = build_network(trt)
        x = network.add_input("x", trt.float32, (1, 4))
        layer = network.add_softmax(x)
        with pytest.raises(AttributeError, match="precision"):
            layer.precision = trt.float32
        with pytest.raises(AttributeError):
            assert layer.precision_is_set
        with pytest.raises(AttributeError):
            layer.set_output_type(0, trt.float32)
        with pytest.raises(TypeError):
            network.add_quantize(x, x)
        assert not hasattr(trt.BuilderFlag, "FP16")
        assert not hasattr(trt.get_plugin_registry(), "get_plugin_creator")
        with pytest.raises(AttributeError):
            assert trt.Builder(trt.Logger()).platform_has_fast_fp16


def test_unknown_names_and_read_only_properties(trt):
    network = build_network(trt)
    layer = network.add_softmax(network.add_input("x", trt.float32, (1, 4)))
    for name in ("axis", "dim"):
        with pytest.raises(AttributeError):
            getattr(layer, name)
        with pytest.raises(AttributeError):
            setattr(layer, name, 1)
    for name in ("type", "num_inputs"):
        with pytest.raises(AttributeError):
            setattr(layer, name, 1)


def test_tensorrt_is_importable_inside_and_compat_follows_the_version(trt):
    import tensorrt

    from d2_trt import compat

    assert tensorrt is trt
    assert compat.tensorrt() is trt
    assert compat.version() == tuple(int(part) for part in trt.__version__.split(".")[:2])
    assert compat.strongly_typed() == (not trt.__version__.startswith("8."))


def test_after_use_another_tensorrt_is_back():
    before = sys.modules.get("tensorrt")
    for version in VERSIONS:
        with use_tensorrt(version):
            assert sys.modules["tensorrt"].__version__ == version
    assert sys.modules.get("tensorrt") is before


def test_manifest_of_each_emulated_version_is_there():
    assert set(VERSIONS) <= set(trt_api.versions())
    assert len(VERSIONS) == (3 if sys.version_info < (3, 12) else 2)


def test_enums_are_those_of_the_manifest(trt):
    for name, entry in trt_api.manifest(trt.__version__).items():
        if entry["kind"] == "enum":
            owner, member = name.rsplit(".", 1)
            value = trt
            for part in owner.split("."):
                value = getattr(value, part)
            assert int(getattr(value, member)) == entry["value"], name


def test_bindings_import_in_a_fresh_process_and_nothing_is_installed_again(tmp_path):
    program = "from tests.doubles.trt_stubs import *\nfor v in requirements(): print(import_bindings(v).DataType.HALF)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=trt_api.MANIFESTS.parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split() == ["DataType.HALF"] * len(VERSIONS), result.stderr


def test_unknown_version_and_missing_compiler(monkeypatch, tmp_path):
    with pytest.raises(trt_stubs.StubError, match=r"no bindings of TensorRT 7\.0"):
        trt_stubs.import_bindings("7.0")
    monkeypatch.setattr(trt_stubs, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(trt_stubs.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(trt_stubs.StubError, match="no C compiler"):
        trt_stubs.stub_folder(10)
    assert not (tmp_path / "stubs-10").exists()


# Plug-in


def test_deformable_attention_is_the_sum_of_bilinear_samples():
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4), (2, 2)]
    value = torch.randn(1, 16, 2, 3, generator=generator)
    locations = torch.rand(1, 5, 2, 2, 2, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(1, 5, 2, 2, 2, generator=generator)
    got = deformable_attention(value, torch.tensor(sizes), torch.tensor([0, 12]), locations, weights)
    want = torch.zeros(1, 5, 2, 3)
    for q, head, level, p in np.ndindex(5, 2, 2, 2):
        height, width = sizes[level]
        x = locations[0, q, head, level, p, 0] * width - 0.5
        y = locations[0, q, head, level, p, 1] * height - 0.5
        for xi in (int(x.floor()), int(x.floor()) + 1):
            for yi in (int(y.floor()), int(y.floor()) + 1):
                if 0 <= xi < width and 0 <= yi < height:
                    share = (1 - (x - xi).abs()) * (1 - (y - yi).abs()) * weights[0, q, head, level, p]
                    want[0, q, head] += share * value[0, 12 * level + yi * width + xi, head]
    torch.testing.assert_close(got, want)


def plugin_network(trt, version="1", levels=((3, 4), (2, 2)), kind=np.int32):
    network = build_network(trt)
    trt.init_libnvinfer_plugins(None, "")
    registry = trt.get_plugin_registry()
    creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
    creator = next(c for c in creators if c.name == MSDA and c.plugin_version == version)
    value = network.add_input("value", trt.float32, (1, 16, 2, 3))
    locations = network.add_input("locations", trt.float32, (1, 5, 2, 2, 2, 2))
    weights = network.add_input("weights", trt.float32, (1, 5, 2, 2, 2))
    KEPT.extend([np.array(levels, kind), np.array([0, 12], kind)])
    shapes, starts = (network.add_constant(a.shape, a).get_output(0) for a in KEPT[-2:])
    inputs = [value, shapes, starts, locations, weights]
    fields = trt.PluginFieldCollection([])
    if version == "1":
        layer = network.add_plugin_v2(inputs, creator.create_plugin("msda", fields))
    else:
        layer = network.add_plugin_v3(
            inputs, [], creator.create_plugin("msda", fields, trt.TensorRTPhase.BUILD)
        )
    network.mark_output(layer.get_output(0))
    return network, layer


def test_plugin_of_either_interface(trt):
    numbers = tuple(int(part) for part in trt.__version__.split(".")[:2])
    for version in ("1", "2") if numbers >= (10, 11) else ("1",):
        network, layer = plugin_network(trt, version)
        network.check()
        shapes = {"value": (1, 16, 2, 3), "locations": (1, 5, 2, 2, 2, 2), "weights": (1, 5, 2, 2, 2)}
        inputs = {name: torch.rand(shape) for name, shape in shapes.items()}
        levels, starts = torch.tensor([(3, 4), (2, 2)]), torch.tensor([0, 12])
        want = deformable_attention(inputs["value"], levels, starts, inputs["locations"], inputs["weights"])
        got = network.evaluate(inputs)[layer.get_output(0).name]
        assert torch.equal(got, want)


def test_plugin_refuses_wrong_levels_and_types(trt):
    with pytest.raises(Refused, match="rows"):
        plugin_network(trt, levels=((3, 4), (3, 2)))[0].check()
    if not trt.__version__.startswith("8."):
        with pytest.raises(Refused, match="int32"):
            plugin_network(trt, kind=np.int64)[0].check()
