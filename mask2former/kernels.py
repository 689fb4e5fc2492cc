"""The compiled CUDA kernels (csrc/), where they were built: everything else asks here and nowhere else."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

MODULE = "mask2former._kernels"
INTERFACE = 3  # of csrc/bindings.cpp: functions and arguments that go with this package
BUILD_HINT = "`python setup.py build_ext --inplace`, with nvcc on the PATH, compiles them"


class KernelsMissing(RuntimeError):
    """The CUDA kernels are not built, do not load, or belong to another state of the package."""


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        return None, "they are not built"
    except ImportError as error:
        return None, f"they do not load: {error}"
    found = getattr(module, "INTERFACE", 1)
    if found != INTERFACE:
        return (
            None,
            f"they were built from another state of csrc/ (interface {found}, this package needs {INTERFACE})",
        )
    return module, ""


def available() -> bool:
    """True where the kernels are built and load; whether there is a GPU is another question."""
    return _load()[0] is not None


def load() -> ModuleType:
    """The compiled module.

    Raises:
        KernelsMissing: with the reason and the command that builds it.
    """
    module, reason = _load()
    if module is None:
        raise KernelsMissing(f"the CUDA kernels of d2_trt cannot be used: {reason}. {BUILD_HINT}")
    return module


def usable(tensor: Tensor) -> bool:
    """True where a kernel can run on this tensor's device."""
    return tensor.is_cuda and available()


def stream_of(tensor: Tensor) -> int:
    """The handle of the caller's CUDA stream on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def dtype_name(tensor: Tensor) -> str:
    """The dtype as the C++ door spells it: "float32", "float16", "bfloat16", …"""
    return str(tensor.dtype).removeprefix("torch.")
