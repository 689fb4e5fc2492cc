"""What is asked of a build: shapes and precisions, which modules are kept in float32, and whether this GPU can."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import compat
from .errors import MissingDependencyError, OptionsError

# Kept in float32 at lower precisions, as patterns over module names ("=" in front: without the modules below).
DEFAULT_FP32_MODULES = (
    "sem_seg_head.predictor*",
    "*.self_attn.core",
    "*.pe_layer",
)
# The same where our plugin computes the decoder's attention. It sums in float32, so that projections and feed-forward layers
# may be in half precision; what says where a query attends, and what leaves the decoder, may not.
FP32_MODULES_WITH_ATTENTION = (
    "=sem_seg_head.predictor",
    "sem_seg_head.predictor.decoder_norm",
    "sem_seg_head.predictor.mask_embed",
    "sem_seg_head.predictor.class_embed",
    "*.self_attn.core",
    "*.pe_layer",
)


def default_fp32_modules(attention: str) -> tuple[str, ...]:
    """What "default" in MODEL.TENSORRT.FP32_MODULES stands for.

    Args:
        attention: what computes the decoder's attention, "plugin" or "native".
    """
    return FP32_MODULES_WITH_ATTENTION if attention == "plugin" else DEFAULT_FP32_MODULES


@dataclass(frozen=True)
class BuildSpec:
    """What decides an engine beside the weights. Shapes are (batch, height, width) of the padded images."""

    min_shape: tuple[int, int, int]
    opt_shape: tuple[int, int, int]
    max_shape: tuple[int, int, int]
    precision: str = "fp32"
    fp32_modules: tuple[str, ...] = DEFAULT_FP32_MODULES
    msda: str = "stock"
    normalization: str = "native"
    attention: str = "native"
    workspace_bytes: int = 0
    opt_level: int = 3

    @property
    def dynamic(self) -> bool:
        return self.min_shape != self.max_shape

    @property
    def dtype(self) -> torch.dtype:
        """The type that unpinned modules compute in."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision, torch.float32)


def pattern_covers(pattern: str, name: str) -> bool:
    """Whether an entry of FP32_MODULES covers a module: it and all below it, or with "=" in front it alone."""
    if pattern.startswith("="):
        return fnmatch.fnmatchcase(name, pattern[1:])
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")


def check_fp32_modules(patterns: Sequence[str], model: nn.Module) -> None:
    """See that every entry of MODEL.TENSORRT.FP32_MODULES covers a module, before minutes are spent on an engine without it.

    "default" and the built-in patterns are for all models, and need not cover any of this one.

    Raises:
        OptionsError: one covers none; the message names modules that are spelled alike.
    """
    known = {"default", *DEFAULT_FP32_MODULES, *FP32_MODULES_WITH_ATTENTION}
    # The model itself, "", has operations of its own too.
    names = [name for name, _ in model.named_modules()]  # a shared one has its first name while it is traced
    for pattern in patterns:
        if pattern in known or any(pattern_covers(pattern, name) for name in names):
            continue
        near = difflib.get_close_matches(pattern.removeprefix("=").removeprefix("model."), names, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise OptionsError(
            f"MODEL.TENSORRT.FP32_MODULES has {pattern!r}, which is no module of the model; {hint}allowed: 'default', and "
            "names as in model.named_modules(), with the wildcards * ? [] and '=' in front for a module without those below "
            "it."
        )


def precision_policy(spec: BuildSpec) -> Callable[[str], torch.dtype]:
    """Module name -> the type it computes in."""
    cache: dict[str, torch.dtype] = {}

    def dtype(name: str) -> torch.dtype:
        name = name.removeprefix("model.")  # patterns are over the model's own names, which Core prefixes
        if name not in cache:
            pinned = any(pattern_covers(pattern, name) for pattern in spec.fp32_modules)
            cache[name] = torch.float32 if pinned else spec.dtype
        return cache[name]

    return dtype


def check_precision(precision: str, device: torch.device) -> None:
    """See that TensorRT and the GPU have the precision, before minutes are spent.

    Raises:
        MissingDependencyError: they have not.
    """
    if precision != "bf16":
        return
    if not compat.strongly_typed():
        raise MissingDependencyError(
            "MODEL.TENSORRT.PRECISION is 'bf16', which needs TensorRT 10 or newer; this is "
            f"{compat.tensorrt().__version__}. Set it to fp16, tf32 or fp32."
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise MissingDependencyError(
            "MODEL.TENSORRT.PRECISION is 'bf16', which needs a GPU of compute capability 8.0 or higher; "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}. Set it to fp16 or fp32."
        )
