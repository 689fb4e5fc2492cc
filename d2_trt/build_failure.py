"""What to tell of a build that failed, or of an engine that did not load or run, and which keys to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch

from .build_spec import BuildSpec
from .errors import BuildError, D2TRTError, GPUMemoryError, first_line
from .logging import get_logger

logger = get_logger(__name__)

NO_CONTEXT = "the engine has no execution context:"


def build_failure(
    messages: Iterable[str],
    spec: BuildSpec,
    warnings: Iterable[str] = (),
    device: torch.device | None = None,
) -> str:
    """What to tell of a build that gave nothing.

    Args:
        messages, warnings: TensorRT's, which name layers by their modules' paths.
        device: the GPU, to tell what is free of it.
    """
    messages, warnings = list(messages), list(warnings)
    about_memory = [w for w in warnings if is_about_memory(w)]
    text = "\n  ".join([*about_memory[-2:], *messages[-5:]]) or "TensorRT gave no reason"
    hint = ""
    if about_memory or any(map(is_about_memory, messages)):
        hint = memory_hint(spec, device)
    return f"TensorRT built no engine for {spec}:\n  {text}{hint}"


def memory_hint(spec: BuildSpec, device: torch.device | None) -> str:
    """Which keys to change where memory ran out. Their present values are those of the spec."""
    batch, height, width = spec.max_shape
    free = ""
    if device is not None and device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a GPU that fails does not tell
            available, total = torch.cuda.mem_get_info(device)
            free = f", of which {available / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    limit = ""
    if spec.workspace_bytes:
        limit = (
            f" Where it is TensorRT's scratch memory that does not suffice, raise MODEL.TENSORRT.WORKSPACE (now "
            f"{spec.workspace_bytes / 2**30:g} GiB) or set it to 0.0, which is no limit."
        )
    return (
        f"\nLower MODEL.TENSORRT.MAX_BATCH_SIZE (now {batch}), the largest size in MODEL.TENSORRT.SHAPES (now "
        f"{height}x{width}) or MODEL.TENSORRT.WORKSPACE, or free memory of the GPU{free}.{limit}"
    )


def is_about_memory(message: str) -> bool:
    """Whether a message of TensorRT says that memory ran out."""
    message = message.lower()
    words = ("out of memory", "outofmemory", "insufficient memory", "gpu memory", "workspace", "cudamalloc")
    return any(word in message for word in words)


def is_memory_error(error: Exception) -> bool:
    """Whether an engine does not load for want of memory, which TensorRT tells in its messages, or by a missing context
    without any.
    """
    return (
        isinstance(error, (torch.cuda.OutOfMemoryError, GPUMemoryError))
        or is_about_memory(str(error))
        or str(error).strip() == NO_CONTEXT
    )


def memory_error(error: Exception, doing: str, spec: BuildSpec, device: torch.device) -> GPUMemoryError:
    """What to raise for a memory error.

    Args:
        error: PyTorch's, or one of TensorRT's messages.
        doing: such as "load".
    """
    said = " ".join(str(error).split()) if isinstance(error, D2TRTError) else first_line(error)
    hint = memory_hint(spec, device).strip()
    return GPUMemoryError(f"the GPU's memory does not suffice to {doing} the engine ({said}). {hint}")


def explained(error: Exception, doing: str, spec: BuildSpec, device: torch.device) -> D2TRTError:
    """An error of any kind as one of this project's, without its traceback, which holds tensors; see memory_error."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return memory_error(error, doing, spec, device)
    if isinstance(error, D2TRTError):
        return type(error)(*error.args)
    logger.debug("Told as a BuildError:", exc_info=error)
    return BuildError(f"TensorRT could not {doing} the engine ({type(error).__name__}: {first_line(error)})")
