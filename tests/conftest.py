"""What every test shares: markers that depend on the machine, and threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPO_ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    # Worker processes share the cores; with torch's default each of them would start a thread for every core.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // workers)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the processes that tests start


def reason_without_gpu() -> str:
    if torch.cuda.is_available():
        return ""
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    return f"needs an NVIDIA GPU: torch.cuda.is_available() is False (torch {torch.__version__}, {build})"


def reason_without_tensorrt() -> str:
    try:
        import tensorrt  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: the bindings are there, libnvinfer is not
        return f"needs TensorRT: import tensorrt failed ({error})"
    return ""


def pytest_collection_modifyitems(items):
    for marker, find_reason in (("gpu", reason_without_gpu), ("tensorrt", reason_without_tensorrt)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = find_reason() if marked else ""
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def exact_float32():
    """Comparisons in float32 mean float32, not TF32, which PyTorch lets cuDNN's convolutions use by default."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout's root folder."""
    return REPO_ROOT
