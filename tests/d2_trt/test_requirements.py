"""A machine without a GPU, TensorRT or torch2trt: one error with all that is missing, or PyTorch in their place."""

from __future__ import annotations

import logging
import sys
import types

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from d2_trt import TensorRTPredictor, compat
from d2_trt.errors import MissingDependencyError
from d2_trt.requirements import require
from tests.golden import mini_cfg

TENSORRT = ("MODEL.BACKEND", "tensorrt")
META = ("MODEL.META_ARCHITECTURE", "TensorRTMaskFormer")
FALL_BACK = ("MODEL.TENSORRT.ON_ERROR", "torch")
ON_CUDA = ("MODEL.DEVICE", "cuda")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    compat.tensorrt.cache_clear()
    yield
    compat.tensorrt.cache_clear()


def machine(
    monkeypatch, *, gpus=0, cuda: str | None = None, tensorrt: str | None = None, torch2trt=False
) -> None:
    """A machine with so many GPUs, of a PyTorch for this CUDA, and a TensorRT of this version."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for name, there in (("tensorrt", tensorrt), ("torch2trt", torch2trt)):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if there else None)
    if tensorrt:
        sys.modules["tensorrt"].__version__ = tensorrt


def lines(error: MissingDependencyError) -> list[str]:
    """Names of what the error lists, and their texts."""
    return [line.strip() for line in str(error).splitlines() if line.startswith("  ")]


def test_one_error_names_all_that_is_missing_with_what_installs_it(monkeypatch):
    machine(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"Missing: a GPU, TensorRT, torch2trt\.\n") as caught:
        require("cuda")
    gpu, tensorrt, torch2trt = lines(caught.value)
    assert "built without CUDA" in gpu and "pip install --force-reinstall torch==" in gpu
    assert "MODEL.DEVICE" not in gpu  # it is right as it is
    assert tensorrt.startswith("TensorRT: 8.6 or newer") and "`pip install tensorrt`" in tensorrt
    assert "`pip install --no-build-isolation git+https://github.com/NVIDIA-AI-IOT/torch2trt`" in torch2trt
    assert "MODEL.BACKEND torch with MODEL.DEVICE cpu, or MODEL.TENSORRT.ON_ERROR torch" in str(caught.value)


def test_tools_that_cannot_do_without_are_told_the_same_but_no_way_around(monkeypatch):
    machine(monkeypatch)
    with pytest.raises(MissingDependencyError) as caught:
        require("cuda", optional=False)
    assert str(caught.value).startswith(
        "Building engines takes a GPU, TensorRT and torch2trt. Missing: a GPU, TensorRT, torch2trt.\n"
    )
    assert [line.split(":")[0] for line in lines(caught.value)] == ["a GPU", "TensorRT", "torch2trt"]
    assert "MODEL.BACKEND" not in str(caught.value)
    with pytest.raises(MissingDependencyError, match="Running engines takes a GPU and TensorRT"):
        require("cuda", builds=False, optional=False)


def test_device_that_is_no_gpu_is_told_together_with_the_gpu(monkeypatch):
    machine(monkeypatch, cuda="12.8", tensorrt="8.6.0", torch2trt=True)
    with pytest.raises(MissingDependencyError, match=r"Missing: a GPU\.\n") as caught:
        require("cpu")
    assert "nvidia-smi" in lines(caught.value)[0] and "and set MODEL.DEVICE cuda (it is cpu)" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "device, message",
    [("cpu", "Set MODEL.DEVICE cuda$"), ("cuda:2", "sees 2. Set MODEL.DEVICE cuda:0 to cuda:1$")],
)
def test_device_that_is_not_the_gpu_that_is_there(monkeypatch, device, message):
    machine(monkeypatch, gpus=2, cuda="12.8", tensorrt="8.6.0", torch2trt=True)
    require("cuda:1")
    with pytest.raises(MissingDependencyError, match=f"(?m){message}") as caught:
        require(device)
    assert "To do without: MODEL.BACKEND torch, or" in str(caught.value)


def test_torch2trt_is_missed_where_engines_are_built(monkeypatch):
    machine(monkeypatch, gpus=1, cuda="12.8", tensorrt="8.6.0")
    require("cuda", builds=False)
    with pytest.raises(MissingDependencyError, match=r"Missing: torch2trt\.\n"):
        require("cuda")


@pytest.mark.parametrize("found", ["8.5.3.1", "8.5.3", "7.2.3.4", "5.1.5.0"])
def test_tensorrt_that_is_too_old_is_refused_by_its_version(monkeypatch, found):
    machine(monkeypatch, gpus=1, cuda="12.8", tensorrt=found, torch2trt=True)
    with pytest.raises(MissingDependencyError, match=r"Missing: TensorRT\.\n") as caught:
        require("cuda")
    assert lines(caught.value) == [
        f"TensorRT: 8.6 or newer; {found} is installed. `pip install --upgrade tensorrt`"
    ]
    with pytest.raises(MissingDependencyError, match=f"and {found} is installed.*--upgrade"):
        compat.tensorrt()  # whoever does not ask first


@pytest.mark.parametrize("found", ["8.6.0", "8.6.1.6", "10.0.0b6", "10.13.3.9", "11.0.0.1"])
def test_tensorrt_from_the_oldest_that_is_supported_on(monkeypatch, found):
    machine(monkeypatch, gpus=1, cuda="12.8", tensorrt=found, torch2trt=True)
    require("cuda")


@pytest.mark.parametrize("choice", [TENSORRT, META])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [build_model, DefaultPredictor, TensorRTPredictor])
def test_error_comes_when_the_model_is_built(monkeypatch, kind, device, choice):
    machine(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"Missing: a GPU, TensorRT, torch2trt"):
        kind(mini_cfg("resnet50-mini", (*choice, "MODEL.DEVICE", device)))


@pytest.mark.parametrize("choice", [TENSORRT, META])
@pytest.mark.parametrize("kind", [DefaultPredictor, TensorRTPredictor])
def test_pytorch_runs_on_the_cpu_where_there_is_no_gpu(monkeypatch, caplog, kind, choice):
    machine(monkeypatch)
    predictor = kind(mini_cfg("resnet50-mini", (*choice, *FALL_BACK, *ON_CUDA)))
    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    for _ in range(2):
        assert predictor(picture)
    assert predictor.model.device.type == predictor.cfg.MODEL.DEVICE == "cpu"
    assert caplog.text.count("PyTorch runs the network on cpu (MODEL.TENSORRT.ON_ERROR torch)") == 1
    assert predictor.model.backend.describe()["images"] == {"tensorrt": 0, "torch": 2}


def test_frozen_config_stays_frozen(monkeypatch):
    machine(monkeypatch)
    cfg = mini_cfg("resnet50-mini", (*TENSORRT, *FALL_BACK, *ON_CUDA))
    cfg.freeze()
    build_model(cfg)
    assert cfg.is_frozen() and cfg.MODEL.DEVICE == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for PyTorch without a GPU")
def test_device_is_left_alone_where_pytorch_is_asked_for(monkeypatch):
    machine(monkeypatch)
    cfg = mini_cfg("resnet50-mini", (*FALL_BACK, *ON_CUDA))
    with pytest.raises((AssertionError, RuntimeError)):  # PyTorch's own
        build_model(cfg)
    assert cfg.MODEL.DEVICE == "cuda"
