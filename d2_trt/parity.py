"""The gate that every new engine passes: its outputs against PyTorch's in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import ParityError
from .options import VerifyOptions


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """TF32 and autocast off, for a reference that is float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


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
        with exact_float32():
            numbers = compare(engine(images), reference(images))
        size = "x".join(map(str, images.shape))
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


def _below(numbers: dict[str, float], options: VerifyOptions) -> list[str]:
    tensor = {"logit": "pred_logits", "mask": "pred_masks", "sign": "pred_masks", "class": "pred_logits"}
    out = []
    for name, value in numbers.items():
        kind, measure = name.split("_")
        prefix = "max" if measure == "error" else "min"
        limit = getattr(options, f"{prefix}_{name}")
        if limit is None and value == value:
            continue
        good = limit is not None and (value <= limit if measure == "error" else value >= limit)
        if not good:  # NaN is never good
            key = f"MODEL.TENSORRT.VERIFY.{prefix.upper()}_{name.upper()}"
            bound = (
                "a number" if limit is None else f"{'at most' if prefix == 'max' else 'at least'} {limit:g}"
            )
            out.append(f"{tensor[kind]}: {name.replace('_', ' ')} is {value:.3g}, must be {bound} ({key})")
    return out
