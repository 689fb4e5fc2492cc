"""Kernels of csrc/ on a CPU: the programs of tests/native, compiled by the host's compiler over tests/native/emulation.h."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """tests/native/NAME.cpp, compiled once a process."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-emulation-"))
    target = folder / f"{name}.so"
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-I{REPO / 'csrc'}"]
    source = REPO / "tests" / "native" / f"{name}.cpp"
    subprocess.run([compiler(), *flags, str(source), "-o", str(target)], check=True)
    made = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return made
