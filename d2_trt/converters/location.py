"""Where in the model an operation is that cannot be converted."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

from ..errors import ConversionError

# Core's name of the model, and so the path of what the model computes outside of all its modules.
MODEL = "model"


class LocatedError(ConversionError):
    """A ConversionError whose message already names operation, module and source line."""


def where(graph) -> str:
    """Module and source line of the model's code that is being traced."""
    return f"in module '{graph.current_module() or MODEL}' ({_caller()})"


def size_error(graph, name: str) -> LocatedError:
    """An error for code that reads a size, by the name of what reads it, where an engine is for a range of sizes."""
    return LocatedError(
        f"the size of a traced tensor is read, by {name}, {where(graph)}: an engine for a range of sizes would keep the "
        "size of the image that was traced. Use a function of mask2former.modeling.shape_ops, or build with "
        "MODEL.TENSORRT.STATIC True"
    )


def _caller() -> str:
    """File and line of the model's code that is being traced."""
    ours, torchs = Path(__file__).resolve().parent.parent, Path(torch.__file__).resolve().parent
    for frame in reversed(traceback.extract_stack(sys._getframe())):
        path = Path(frame.filename).resolve()
        # The wrapper that the context puts around converted functions stands between the model and its converter.
        if ours not in path.parents and torchs not in path.parents and frame.name != "wrapper":
            return f"{path.name}:{frame.lineno}: {frame.line}"
    return "unknown line"
