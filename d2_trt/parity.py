"""The gate that every new engine passes: its outputs against PyTorch's in float32."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import ParityError
from .options import VerifyOptions


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """TF32 and autocast off, for a reference that is float32; both as they were afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    medium = False
    try:
        before = [getattr(owner, name) for owner, name, _ in switches]
        medium = torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:
        # The application uses PyTorch's newer switches, beside which the older ones cannot be read.
        switches = [(owner, "fp32_precision", "ieee") for owner in (matmul, cudnn.conv, cudnn.rnn)]
        before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, exact in switches:
            setattr(owner, name, exact)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False), torch.no_grad():
            yield
    finally:
        for (owner, name, _), value in zip(switches, before):
            setattr(owner, name, value)
        if medium:  # which allow_tf32 cannot say
            torch.set_float32_matmul_precision("medium")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN stays NaN."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def compare(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Agreement of (pred_logits, pred_masks) with a reference.

    Returns:
        logit_error and mask_error, relative; sign_agreement, the share of mask pixels of equal sign; class_agreement, the
        share of queries with the same best class.
    """
    logits, masks = actual
    wanted_logits, wanted_masks = expected
    return {
        "logit_error": relative_error(logits, wanted_logits),
        "mask_error": relative_error(masks, wanted_masks),
        "sign_agreement": ((masks > 0) == (wanted_masks > 0)).double().mean().item(),
        "class_agreement": (logits.argmax(-1) == wanted_logits.argmax(-1)).double().mean().item(),
    }


def verify(
    engine: Callable[[Tensor], tuple[Tensor, Tensor]],
    reference: Callable[[Tensor], tuple[Tensor, Tensor]],
    batches: Iterable[Tensor],
    options: VerifyOptions,
) -> dict[str, Any]:
    """Run an engine and PyTorch on the same images.

    Args:
        engine, reference: images (B, 3, H, W) -> (pred_logits, pred_masks).
        batches: images of several sizes of the engine's range.
        options: what must be reached.

    Returns:
        the numbers of each size, for the engine's sidecar.

    Raises:
        ParityError: below the configured agreement; it names the tensors, sizes and keys.
    """
    rows, failures = [], []
    for images in batches:
        size = "x".join(map(str, images.shape))
        with exact_float32():
            actual, expected = engine(images), reference(images)
        if wrong := _shapes_that_differ(actual, expected):
            failures += [f"at {size}: {text}" for text in wrong]
            continue
        numbers = compare(actual, expected)
        rows.append({"images": size, **numbers})
        failures += [f"at {size}: {text}" for text in _below(numbers, options)]
    if failures:
        raise ParityError(
            "the engine disagrees with PyTorch float32 and is not used:\n  "
            + "\n  ".join(failures)
            + "\nKeep more modules in float32 (MODEL.TENSORRT.FP32_MODULES), use a higher MODEL.TENSORRT.PRECISION, or "
            "change MODEL.TENSORRT.VERIFY.* if the difference is acceptable."
        )
    return {"sizes": rows}


def _shapes_that_differ(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> list[str]:
    return [
        f"{name}: shape is {tuple(a.shape)}, must be {tuple(e.shape)}"
        for name, a, e in zip(("pred_logits", "pred_masks"), actual, expected)
        if a.shape != e.shape
    ]


def _below(numbers: dict[str, float], options: VerifyOptions) -> list[str]:
    tensor = {"logit": "pred_logits", "mask": "pred_masks", "sign": "pred_masks", "class": "pred_logits"}
    out = []
    for name, value in numbers.items():
        kind, measure = name.split("_")
        prefix = "max" if measure == "error" else "min"
        limit = getattr(options, f"{prefix}_{name}")
        if not math.isfinite(value):
            good = False  # one NaN or infinity, whatever is checked
        elif limit is None:
            good = True
        else:
            good = value <= limit if measure == "error" else value >= limit
        if not good:
            key = f"MODEL.TENSORRT.VERIFY.{prefix.upper()}_{name.upper()}"
            bound = (
                "a number" if limit is None else f"{'at most' if prefix == 'max' else 'at least'} {limit:g}"
            )
            out.append(f"{tensor[kind]}: {name.replace('_', ' ')} is {value:.3g}, must be {bound} ({key})")
    return out
