"""torch2trt beside every TensorRT, and what a conversion leaves behind."""

from __future__ import annotations

import importlib
import types

import pytest
import torch
from torch.nn import functional as F

from d2_trt import compat
from d2_trt.errors import MissingDependencyError
from tests.doubles import conversion
from tests.doubles.fixtures import trt_double as trt  # noqa: F401

needs_torch2trt = pytest.mark.skipif(not conversion.has_torch2trt(), reason="needs torch2trt")
GONE = {"CalibrationAlgoType", "IInt8Calibrator"}


@needs_torch2trt
def test_torch2trt_imports_beside_every_tensorrt(trt):  # noqa: F811
    before = set(vars(trt))
    module = compat.torch2trt()
    assert module.ConversionContext.__module__ == "torch2trt.torch2trt"
    assert set(vars(trt)) == before


SOURCE = """
import tensorrt as trt
ALGORITHM = trt.CalibrationAlgoType.ENTROPY_CALIBRATION
ALGORITHM_2 = trt.CalibrationAlgoType.ENTROPY_CALIBRATION_2
class Calibrator(trt.IInt8Calibrator):
    pass
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a torch2trt of the given source, in the place of the one that may be installed."""
    folder = tmp_path / "torch2trt"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> None:
        (folder / "torch2trt.py").write_text(source)
        importlib.invalidate_caches()

    return write


def test_names_that_torch2trt_reads_are_there_during_its_import_only(trt, package):  # noqa: F811
    before = dict(vars(trt))
    package(SOURCE)
    module = compat.torch2trt()
    assert vars(trt) == before
    if not GONE & set(before):  # TensorRT 11
        assert module.Calibrator.__mro__[1].__name__ == "IInt8Calibrator"
    else:
        assert module.Calibrator.__mro__[1] is trt.IInt8Calibrator


def test_torch2trt_that_does_not_import_is_said_with_the_command(trt, package):  # noqa: F811
    before = dict(vars(trt))
    package("import tensorrt\ntensorrt.SomethingElse\n")
    with pytest.raises(
        MissingDependencyError, match=r"(?s)AttributeError: .*SomethingElse.*pip install .*git\+"
    ):
        compat.torch2trt()
    assert vars(trt) == before


def test_tensorrt_without_its_libraries_is_said_with_the_command(monkeypatch):
    def fail(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    compat.tensorrt.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(MissingDependencyError, match=r"libnvinfer.*pip install tensorrt"):
        compat.tensorrt()


# What a conversion replaces.


class Model(torch.nn.Module):
    def forward(self, x):
        return F.relu(x)


def replaced(ctx):
    raise AssertionError("no tensor is traced here")


TABLE = {
    name: {
        "converter": replaced,
        "is_real": True,
        "module": owner,
        "module_name": name.rpartition(".")[0],
        "qual_name": qualified,
        "method_str": name,
        "method_impl": original,
    }
    for name, owner, qualified, original in (
        ("torch.nn.functional.gelu", F, "gelu", F.gelu),
        ("torch.Tensor.view", torch, "Tensor.view", torch.Tensor.view),  # inherited from a base class
        ("torch.nn.Linear.forward", torch.nn, "Linear.forward", torch.nn.Linear.forward),
    )
}


def make_context(trt, model, monkeypatch):  # noqa: F811
    conversion.use_conversion(monkeypatch)
    kwargs = {
        "module": model,
        "device_types": {},
        "default_device_type": trt.DeviceType.GPU,
        "gpu_fallback": True,
    }
    made = trt.Builder(trt.Logger())
    return compat.torch2trt().ConversionContext(
        made.create_network(compat.network_flags()),
        converters=TABLE,
        torch2trt_kwargs=kwargs,
        builder_config=made.create_builder_config(),
    )


def state(model) -> list:
    """What a conversion replaces, as it is now."""
    names = ("size", "__getattribute__", "view", "shape")
    own = [vars(torch.Tensor).get(name) for name in names]
    return [*own, F.gelu, torch.nn.Linear.forward, len(model._forward_hooks), len(model._forward_pre_hooks)]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_conversion_leaves_pytorch_as_it_was(trt, error, monkeypatch):  # noqa: F811
    model = Model()
    context = make_context(trt, model, monkeypatch)
    before = state(model)
    try:
        with compat.converting(context, TABLE):
            assert F.gelu is not before[4] and len(model._forward_hooks) == 1
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    assert state(model) == before


def test_conversion_that_fails_on_its_way_in_leaves_pytorch_as_it_was(trt, monkeypatch):  # noqa: F811
    model = Model()
    context = make_context(trt, model, monkeypatch)
    before = state(model)

    def fail(hook):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "register_forward_hook", fail)  # after everything else was replaced
    with pytest.raises(KeyboardInterrupt), compat.converting(context, TABLE):
        raise AssertionError("never reached")
    assert state(model)[:-1] == before[:-1]  # the last, a hook that torch2trt did not come to note, stays


def test_sizes_that_pytorch_reads_add_no_layers(trt, monkeypatch):  # noqa: F811
    """Whatever group_norm asks of its input's size is its own business."""
    context = make_context(trt, Model(), monkeypatch)
    network = context.network._network
    x = torch.ones(1, 4, 2, 2)
    x._trt = network.add_input("x", trt.float32, (1, 4, 2, 2))
    with compat.converting(context, TABLE):
        F.group_norm(x, 2)
        assert type(x.size(0)) is int and type(x.shape[1]) is int
    assert network.num_layers == 0


@pytest.mark.parametrize("names", [{"queryKeys"}, set()])
def test_timings_are_counted_where_tensorrt_tells(names):
    cache = types.SimpleNamespace(**{name: lambda: ["a", "b"] for name in names})
    assert compat.timing_entries(cache) == (2 if names else None)


def test_progress_monitor_comes_with_tensorrt_10(trt):  # noqa: F811
    assert compat.has_progress_monitor() == compat.strongly_typed() == (compat.version() >= (10, 0))
