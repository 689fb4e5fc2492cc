"""What the "tensorrt" backend does where TensorRT, a plugin, the GPU or an option is not to be had, and what it tells."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest
import torch

from d2_trt import builder, cache_key, compat, engine_source, plugin
from d2_trt.backend import TensorRTBackend
from d2_trt.build_spec import BuildSpec
from d2_trt.errors import (
    BuildError,
    D2TRTError,
    GPUMemoryError,
    MissingDependencyError,
    OptionsError,
    ParityError,
)
from tests.d2_trt.backend_helpers import TinyModel, entries, equal, images, make_backend, make_cfg
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.doubles.fixtures import trt_double as trt  # noqa: F401


def test_engine_that_disagrees_is_not_kept_and_says_where(workshop, tmp_path):
    workshop.disturb = lambda logits, masks: (logits, masks + 0.5 * (masks.shape[-1] == 32))
    backend = make_backend()
    for _ in range(2):  # the second call does not build for minutes to fail again
        with pytest.raises(ParityError, match=r"at 1x3x128x128: pred_masks: mask error.*MAX_MASK_ERROR"):
            backend(images())
    assert len(workshop.built) == 1 and entries(tmp_path) == []
    assert not list((tmp_path / "d2_trt").glob("*.json"))


def test_unchecked_engine_is_used_as_it_is(workshop):
    workshop.disturb = lambda logits, masks: (logits, -masks)
    backend = make_backend(VERIFY__ENABLED=False)
    assert equal(backend(images())[1:], [-TinyModel().core(images())[1]])
    assert backend.describe()["engines"][0]["parity"] == {}


def test_model_that_was_moved_off_the_gpu_is_told_as_what_is_missing(workshop, monkeypatch):
    backend = make_backend()

    def require(self):
        raise MissingDependencyError("a GPU: there is one, but MODEL.DEVICE is cpu")

    monkeypatch.setattr(TensorRTBackend, "_require", require)
    with pytest.raises(MissingDependencyError, match=r"MODEL\.DEVICE is cpu"):
        backend(images())
    assert not workshop.built


def test_failure_falls_back_with_one_warning_and_says_so(workshop, caplog):
    workshop.fail = BuildError("TensorRT built nothing\n  details")
    model = TinyModel()
    backend = make_backend(model, ON_ERROR="torch")
    backend.prepare()
    for _ in range(3):
        assert equal(backend(images()), model.core(images()))
    assert len(workshop.built) == 1 and caplog.text.count("TensorRT built nothing") == 1
    told = backend.describe()
    assert told["backend"] == "torch (fallback: TensorRT built nothing)"
    assert told["images"] == {"tensorrt": 0, "torch": 3}
    assert "MODEL.TENSORRT.ON_ERROR" in told["reasons"][0]
    json.dumps(told)


def test_other_weights_get_another_try(workshop):
    workshop.fail = BuildError("no")
    model = TinyModel(0)
    backend = make_backend(model, ON_ERROR="torch")
    backend(images())
    workshop.fail = None
    model.load_state_dict(TinyModel(1).state_dict())
    backend(images())
    told = backend.describe()
    assert told["backend"] == "tensorrt (1 image) and torch (1 image)"


def test_static_size_that_fails_leaves_the_others_alone(workshop):
    backend = make_backend(STATIC=True, ON_ERROR="torch")
    workshop.fail = BuildError("no")
    backend(images(1, 64, 64))
    workshop.fail = None
    backend(images(1, 64, 96))
    backend(images(1, 64, 64))
    told = backend.describe()
    assert told["images"] == {"tensorrt": 1, "torch": 2} and len(workshop.built) == 2
    assert told["backend"] == "tensorrt (1 image) and torch (2 images)"


def test_out_of_memory_says_what_to_lower(workshop):
    workshop.fail = torch.cuda.OutOfMemoryError("Tried to allocate 3 GiB")
    with pytest.raises(BuildError, match=r"3 GiB.*MAX_BATCH_SIZE.*MODEL\.TENSORRT\.SHAPES"):
        make_backend().prepare()


def test_plugin_that_is_not_built(workshop, monkeypatch, tmp_path):
    monkeypatch.setattr(plugin, "library", lambda: tmp_path / "libd2_trt_plugins_trt10.so")
    with pytest.raises(
        MissingDependencyError, match=r"MSDA 'plugin' needs libd2_trt_plugins_trt10\.so.*setup\.py build_ext"
    ):
        make_backend(MSDA="plugin").prepare()


def test_plugin_is_taken_where_it_is_built(workshop, monkeypatch):
    make_backend().prepare()
    monkeypatch.setattr(plugin, "is_built", lambda: True)
    monkeypatch.setattr(plugin, "load", lambda option: None)
    backend = make_backend()
    entry = backend.entry(backend.options.shapes)  # not the stock plugin's
    made_by = entry.sidecar["ingredients"]["plugins"]
    assert made_by["MSDA"] == "D2TRTMSDeformAttn 2"
    # Every plugin's version counts.
    assert all(str(kind) in made_by[kind.option] for kind in plugin.PLUGINS)
    make_backend(MSDA="stock").prepare()
    monkeypatch.setattr(compat, "plugin_creator", lambda name, *rest: None)
    monkeypatch.setattr(plugin, "is_built", lambda: False)
    make_backend().prepare()
    assert [spec.msda for spec in workshop.built] == ["stock", "plugin", "stock", "native"]


def test_attention_is_tensorrts_own_on_a_gpu_without_the_plugins_instructions(workshop, monkeypatch):
    monkeypatch.setattr(plugin, "is_built", lambda: True)
    monkeypatch.setattr(plugin, "load", lambda option: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    make_backend().prepare()
    (spec,) = workshop.built
    assert (spec.attention, spec.normalization, spec.msda) == ("native", "plugin", "plugin")
    with pytest.raises(
        MissingDependencyError, match=r"ATTENTION 'plugin' needs .* 8\.0 .* 7\.5: set MODEL\.TENSORRT"
    ):
        make_backend(ATTENTION="plugin").prepare()


def test_bf16_needs_tensorrt_10(workshop, monkeypatch):
    monkeypatch.setattr(compat, "strongly_typed", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"'bf16', which needs TensorRT 10.*Set it to fp16"):
        make_backend(PRECISION="bf16").prepare()
    monkeypatch.setattr(compat, "strongly_typed", lambda: True)
    make_backend(PRECISION="bf16").prepare()
    assert workshop.built[0].dtype == torch.bfloat16


def test_model_on_the_cpu_is_refused_with_what_to_change(tmp_path):
    with pytest.raises(
        MissingDependencyError, match=r"(?s)a GPU: .*MODEL\.DEVICE.*cpu.*MODEL\.BACKEND torch"
    ):
        make_backend()
    backend = make_backend(model := TinyModel(), ON_ERROR="torch")
    backend.prepare()
    assert equal(backend(images()), model.core(images()))
    assert backend.describe()["backend"].startswith("torch (fallback: MODEL.BACKEND 'tensorrt' runs on an")
    with pytest.raises(MissingDependencyError):
        backend.entry(backend.options.shapes)


def test_wrong_key_is_an_error_even_with_a_fallback(workshop):
    cfg = make_cfg(ON_ERROR="torch")
    cfg.MODEL.TENSORRT.PRECISION = "fp8"
    with pytest.raises(OptionsError, match=r"MODEL\.TENSORRT\.PRECISION is 'fp8'"):
        TensorRTBackend(TinyModel(), cfg)
    workshop.fail = OptionsError("MODEL.TENSORRT.FP32_MODULES")  # what only the model tells
    for _ in range(2):
        with pytest.raises(OptionsError):
            make_backend(ON_ERROR="torch").prepare()


# Every failure of loading, building and running


def out_of_memory(*_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")


def no_memory_for_a_context(*_):
    raise BuildError(
        "the engine has no execution context:\n  Error Code 2: OutOfMemory (Requested size was 9 bytes.)"
    )


def no_context_and_no_word(*_):
    raise BuildError("the engine has no execution context:\n  ")


def no_memory_to_deserialize(*_):
    raise BuildError(
        "the engine does not load:\n  Requested amount of GPU memory (9 bytes) could not be allocated"
    )


def not_started(*_):
    raise TypeError("pybind11::init(): factory function returned nullptr")


def bug(*_):
    raise AssertionError


OF_MEMORY = [out_of_memory, no_memory_for_a_context, no_context_and_no_word, no_memory_to_deserialize]
FAILURES = [*OF_MEMORY, not_started, bug]


@pytest.mark.parametrize("fail", FAILURES)
def test_cached_engine_that_cannot_be_loaded_leaves_the_images_to_pytorch(
    workshop, monkeypatch, fail, caplog
):
    make_backend().prepare()
    monkeypatch.setattr(engine_source, "Engine", fail)
    if fail in OF_MEMORY:
        workshop.fail = AssertionError("nothing was to be built")
    backend = make_backend(model := TinyModel(), ON_ERROR="torch")
    for _ in range(2):
        assert equal(backend(images()), model.core(images()))
    assert caplog.text.count("PyTorch runs the network") == 1
    assert backend.describe()["images"] == {"tensorrt": 0, "torch": 2}
    assert backend.describe()["backend"].startswith("torch (fallback: ")


@pytest.mark.parametrize("fail", OF_MEMORY)
def test_memory_that_runs_out_in_loading_leaves_the_entry_and_says_what_to_lower(
    workshop, monkeypatch, tmp_path, fail
):
    make_backend().prepare()
    kept = {path: path.read_bytes() for path in (tmp_path / "d2_trt").glob("*.engine")}
    backend = make_backend()
    with monkeypatch.context() as patch:
        patch.setattr(engine_source, "Engine", fail)
        with pytest.raises(
            GPUMemoryError, match=r"to load the engine.*Lower MODEL\.TENSORRT\.MAX_BATCH_SIZE"
        ):
            backend.prepare()
    assert len(workshop.built) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "d2_trt").glob("*.engine")} == kept
    backend.prepare()  # memory has become free
    assert len(workshop.built) == 1 and workshop.deserialized == 2


def test_engine_is_loaded_once_pytorch_gives_its_unused_memory_back(workshop, monkeypatch):
    make_backend().prepare()
    monkeypatch.setattr(engine_source, "Engine", out_of_memory)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: monkeypatch.setattr(engine_source, "Engine", workshop.engine)
    )
    backend = make_backend()
    backend(images())
    assert backend.describe()["images"] == {"tensorrt": 1, "torch": 0} and len(workshop.built) == 1


def engine_did_not_run(*_):
    raise BuildError("the engine did not run:\n  [double] refused")


@pytest.mark.parametrize("fail", [engine_did_not_run, out_of_memory, bug])
def test_engine_that_does_not_run_leaves_the_image_to_pytorch(workshop, fail, caplog):
    backend = make_backend(model := TinyModel(), ON_ERROR="torch")
    backend(images())
    workshop.disturb = fail
    for _ in range(2):
        assert equal(backend(images()), model.core(images()))
    workshop.disturb = lambda *outputs: outputs
    backend(images())
    told = backend.describe()
    assert told["images"] == {"tensorrt": 2, "torch": 2} and len(told["reasons"]) == 1
    assert caplog.text.count("PyTorch runs the network") == 1 and len(workshop.built) == 1


def test_engine_that_does_not_run_is_an_error_without_a_fallback(workshop):
    backend = make_backend()
    backend.prepare()
    workshop.disturb = engine_did_not_run
    with pytest.raises(BuildError, match="did not run"):
        backend(images())
    workshop.disturb = out_of_memory
    with pytest.raises(GPUMemoryError, match=r"CUDA out of memory\. Tried.*MODEL\.TENSORRT\.MAX_BATCH_SIZE"):
        backend(images())
    workshop.disturb = bug
    with pytest.raises(BuildError, match=r"could not run the engine \(AssertionError") as error:
        backend(images())
    assert isinstance(error.value.__cause__, AssertionError)  # a fault of the program shows as one


@pytest.mark.parametrize("fail", [BuildError("no"), RuntimeError("CUDA error"), TypeError(), OSError("full")])
def test_build_that_fails_in_any_way_leaves_the_images_to_pytorch(workshop, fail, caplog):
    workshop.fail = fail
    backend = make_backend(model := TinyModel(), ON_ERROR="torch")
    backend.prepare()
    for _ in range(2):
        assert equal(backend(images()), model.core(images()))
    assert len(workshop.built) == 1 and caplog.text.count("PyTorch runs the network") == 1


def test_tensorrt_that_does_not_start_says_why(trt, monkeypatch):  # noqa: F811
    class Builder:
        def __init__(self, log):
            log.log(log_level.ERROR, said)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    log_level = builder.compat.tensorrt().ILogger.Severity
    said = "CUDA initialization failure with error: 35"
    spec = BuildSpec((1, 64, 64), (1, 64, 64), (1, 64, 64))
    monkeypatch.setattr(trt, "Builder", Builder)
    with pytest.raises(
        MissingDependencyError, match=r"cannot use this GPU \(CUDA initialization.*35\).*nvidia-smi"
    ):
        builder.build_engine(TinyModel(), spec, images(1, 64, 64))
    said = "CUDA initialization failure with error: 2 (out of memory)"
    with pytest.raises(GPUMemoryError, match=r"no memory left for TensorRT .* Free some"):
        builder.build_engine(TinyModel(), spec, images(1, 64, 64))
    log = builder.trt_logger()
    with pytest.raises(GPUMemoryError, match="no memory left"), builder.starting(log):
        Builder(log)


@pytest.mark.parametrize("alike", [True, False], ids=["same thresholds", "other thresholds"])
def test_refused_engine_is_built_once_for_ranks_that_wait_for_it(workshop, monkeypatch, caplog, alike):
    caplog.set_level(logging.INFO, logger="d2_trt")
    workshop.disturb = lambda logits, masks: (logits, -masks)
    workshop.gate = threading.Event()
    options = [{} if alike else {"VERIFY__MIN_SIGN_AGREEMENT": 0.99 - rank / 100} for rank in range(3)]
    ranks = [make_backend(ON_ERROR="torch", **more) for more in options]
    threads = [threading.Thread(target=rank.prepare) for rank in ranks]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 20
    while caplog.text.count("Waiting for process") < 2 and time.monotonic() < until:
        time.sleep(0.01)
    workshop.gate.set()
    for thread in threads:
        thread.join(30)
    assert len(workshop.built) == (1 if alike else 3)
    assert all(rank.describe()["backend"].startswith("torch (fallback: ") for rank in ranks)
    later = make_backend(ON_ERROR="torch", **options[0])
    later.prepare()
    assert len(workshop.built) == (2 if alike else 4)


@pytest.mark.parametrize("fail", [RuntimeError("CUDA error"), TypeError(), OSError("full")])
def test_every_failure_without_a_fallback_is_one_of_this_projects(workshop, monkeypatch, fail):
    def failed(call, doing):
        with pytest.raises(
            D2TRTError, match=rf"could not {doing} the engine \({type(fail).__name__}"
        ) as error:
            call()
        assert error.value.__cause__ is fail

    workshop.fail = fail
    backend = make_backend()
    failed(lambda: backend.entry(backend.options.shapes), "build")
    failed(lambda: backend(images()), "build or load")
    with pytest.raises(D2TRTError, match="could not build or load"):
        backend(images())  # without minutes of building that end the same way
    assert len(workshop.built) == 2
    workshop.fail = None

    def digest(model):
        raise fail

    for ask in (lambda b: b(images()), lambda b: b.prepare(), lambda b: b.entry(b.options.shapes)):
        backend = make_backend()
        with monkeypatch.context() as patch:
            patch.setattr(cache_key, "weights_digest", digest)
            failed(lambda: ask(backend), "build( or load)?")  # noqa: B023


def test_weights_that_cannot_be_read_leave_the_image_to_pytorch(workshop, monkeypatch):
    def digest(model):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    backend = make_backend(model := TinyModel(), ON_ERROR="torch")
    with monkeypatch.context() as patch:
        patch.setattr(cache_key, "weights_digest", digest)
        assert equal(backend(images()), model.core(images()))
    backend(images())  # they are to be read again
    assert backend.describe()["images"] == {"tensorrt": 1, "torch": 1}


@pytest.mark.parametrize("on_error", ["raise", "torch"])
def test_engines_of_other_weights_are_not_used_where_those_cannot_be_read(workshop, monkeypatch, on_error):
    def digest(model):
        raise RuntimeError("CUDA error")

    backend = make_backend(model := TinyModel(0), ON_ERROR=on_error)
    backend(images())
    model.load_state_dict(TinyModel(1).state_dict())
    monkeypatch.setattr(cache_key, "weights_digest", digest)
    for _ in range(2):
        if on_error == "torch":
            assert equal(backend(images()), TinyModel(1).core(images()))
        else:
            with pytest.raises(D2TRTError, match="CUDA error"):
                backend(images())
