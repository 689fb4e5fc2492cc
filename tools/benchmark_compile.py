"""torch.compile as a backend, for tools/benchmark.py: the same modules, compiled by Inductor."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from mask2former.backend import BackendError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Shapes that one function may be compiled for before PyTorch would run it uncompiled.
_MOST_SHAPES = 64


def why_not(device: str) -> str:
    """What torch.compile lacks on this machine; empty where nothing."""
    if device.startswith("cuda"):
        if importlib.util.find_spec("triton") is None:
            return (
                "Triton is not installed: pip install triton, in the version that this PyTorch was built with"
            )
        from torch.utils._triton import has_triton

        if not has_triton():
            return f"Triton {importlib.import_module('triton').__version__} does not run on this GPU"
        names, variable = ("cc", "gcc", "clang"), "CC"  # of the launchers that Triton makes
    else:
        names, variable = ("g++", "clang++", "c++"), "CXX"
    wanted = [os.environ[variable]] if os.environ.get(variable) else list(names)
    if not any(shutil.which(name) for name in wanted):
        return f"there is no compiler: looked for {', '.join(wanted)} ({variable} names another)"
    return ""


class CompileBackend:
    """Runs a model's core compiled for each shape of images alone, without falling back to what is not compiled."""

    def __init__(self, model, device: str, mode: str = "reduce-overhead"):
        """
        Args:
            mode: of torch.compile, one of MODES.

        Raises:
            BackendError: this machine lacks what torch.compile needs.
        """
        reason = why_not(device)
        if reason:
            raise BackendError(f"torch.compile cannot run: {reason}")
        import torch._dynamo

        torch._dynamo.config.suppress_errors = False
        for name, value in (
            ("recompile_limit", _MOST_SHAPES),
            ("cache_size_limit", _MOST_SHAPES),
            ("accumulated_recompile_limit", 16 * _MOST_SHAPES),
            ("fail_on_recompile_limit_hit", True),
        ):
            if hasattr(torch._dynamo.config, name):  # the first was called the second before
                setattr(torch._dynamo.config, name, value)
        self._core = torch.compile(model.core, mode=mode, dynamic=False)
        self._graphs = mode in ("reduce-overhead", "max-autotune") and device.startswith("cuda")

    def prepare(self, ahead=None) -> None:
        """Nothing is left to do: a shape is compiled when it comes."""

    def describe(self) -> dict:
        from torch._dynamo.utils import counters

        return {"backend": "compile", "graph_breaks": sum(counters["graph_break"].values())}

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        outputs = self._core(images)
        # A graph writes into the same memory each time; results are the caller's own, as an engine's.
        return tuple(output.clone() for output in outputs) if self._graphs else outputs
