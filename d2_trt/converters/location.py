"""Where in the model an operation is that cannot be converted."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

import torch

from ..errors import ConversionError

# Core's name of the model, and so the path of what the model computes outside of all its modules.
MODEL = "model"


class LocatedError(ConversionError):
    """A ConversionError whose message already names operation, module and source line."""


def where(graph, thread: int | None = None) -> str:
    """Module and source line of the model's code that is being traced.

    Args:
        thread: of the model, where this is another one: of it the line, where this one runs nothing of the model's.
    """
    return f"in module '{graph.current_module() or MODEL}' ({_caller(thread)})"


def size_error(graph, name: str) -> LocatedError:
    """An error for code that reads a size, by the name of what reads it, where an engine is for a range of sizes."""
    return LocatedError(
        f"the size of a traced tensor is read, by {name}, {where(graph)}: an engine for a range of sizes would keep the "
        "size of the image that was traced. Use a function of mask2former.modeling.shape_ops, or build with "
        "MODEL.TENSORRT.STATIC True"
    )


def _caller(thread: int | None = None) -> str:
    """File and line of the model's code that is being traced."""
    line = _line_of_model(sys._getframe())
    if line is None and thread is not None:
        line = _line_of_model(sys._current_frames().get(thread))
    return line or "unknown line"


def _line_of_model(innermost: FrameType | None) -> str | None:
    ours, torchs = Path(__file__).resolve().parent.parent, Path(torch.__file__).resolve().parent
    pythons = Path(threading.__file__).resolve().parent
    for frame in reversed(traceback.extract_stack(innermost) if innermost else []):
        path = Path(frame.filename).resolve()
        of_a_thread = path.parent in (pythons, pythons / "concurrent" / "futures")
        # The wrapper that the context puts around converted functions stands between the model and its converter.
        if not (of_a_thread or {ours, torchs} & set(path.parents) or frame.name == "wrapper"):
            return f"{path.name}:{frame.lineno}: {frame.line}"
    return None
