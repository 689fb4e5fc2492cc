"""The gate that every new engine passes: its outputs against PyTorch's in float32."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ParityError
from .options import VerifyOptions
from .shape_range import Shape

_switching = threading.Lock()
_exact_users = 0
_put_back: Callable[[], None] | None = None


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """TF32 and autocast off, for a reference that is float32; both as they were afterwards.

    TF32's switches are the process's: of threads that overlap the first turns them off, and the last back.
    """
    global _exact_users, _put_back
    with _switching:
        if not _exact_users:
            _put_back = _turn_off_tf32()
        _exact_users += 1
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False), torch.no_grad():
            yield
    finally:
        with _switching:
            _exact_users -= 1
            if not _exact_users:
                _put_back()


def _turn_off_tf32() -> Callable[[], None]:
    """Returns what puts the switches back."""
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

    def put_back() -> None:
        for (owner, name, _), value in zip(switches, before):
            setattr(owner, name, value)
        if medium:  # which allow_tf32 cannot say
            torch.set_float32_matmul_precision("medium")

    for owner, name, exact in switches:
        setattr(owner, name, exact)
    return put_back


class Comparison:
    """Agreement of (pred_logits, pred_masks) with a reference, over as many batches as are added."""

    def __init__(self):
        self._errors = {"logit": [0.0, 0.0], "mask": [0.0, 0.0]}  # squared norms: difference, reference
        self._equal = {"sign": [0, 0], "class": [0, 0]}  # equal, all

    def add(self, actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Comparison:
        """One more batch: pred_logits (B, Q, K + 1) and pred_masks (B, Q, H/4, W/4) of both."""
        logits, masks = actual
        wanted_logits, wanted_masks = expected
        self._add_error("logit", logits, wanted_logits)
        self._add_error("mask", masks, wanted_masks)
        self._add_equal("sign", (masks > 0) == (wanted_masks > 0))
        self._add_equal("class", logits.argmax(-1) == wanted_logits.argmax(-1))
        return self

    def numbers(self) -> dict[str, float]:
        """
        Returns:
            logit_error and mask_error, norms of the difference over those of the reference, where NaN stays NaN;
            sign_agreement, the share of mask pixels of equal sign; class_agreement, the share of queries with the same
            best class.
        """
        numbers = {
            f"{name}_error": math.sqrt(difference) / max(math.sqrt(norm), 1e-30)
            for name, (difference, norm) in self._errors.items()
        }
        for name, (equal, count) in self._equal.items():
            numbers[f"{name}_agreement"] = equal / count if count else math.nan
        return numbers

    def _add_error(self, name: str, actual: Tensor, expected: Tensor) -> None:
        actual, expected = actual.double(), expected.double()
        self._errors[name][0] += (actual - expected).square().sum().item()
        self._errors[name][1] += expected.square().sum().item()

    def _add_equal(self, name: str, equal: Tensor) -> None:
        self._equal[name][0] += int(equal.sum())
        self._equal[name][1] += equal.numel()


def compare(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Agreement of (pred_logits, pred_masks) with a reference; see Comparison.numbers."""
    return Comparison().add(actual, expected).numbers()


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
            + "\nKeep more modules in float32 (MODEL.TENSORRT.FP32_MODULES; `python tools/precision_search.py "
            "--config-file FILE --weights FILE` finds which), use a higher MODEL.TENSORRT.PRECISION, or change "
            "MODEL.TENSORRT.VERIFY.* if the difference is acceptable."
        )
    return {"sizes": rows}


def passed(numbers: Mapping[str, Any], batches: Iterable[Shape], options: VerifyOptions) -> bool:
    """Whether an earlier comparison, as a sidecar tells it, is all that is asked for now.

    Args:
        numbers: what verify returned.
        batches: (batch, height, width) of those to compare at.
    """
    rows = numbers.get("sizes") or []
    compared: Counter[str] = Counter()
    for row in rows:
        batch, _, size = row["images"].split("x", 2)
        compared[size] += int(batch)
    asked: Counter[str] = Counter()
    for batch, height, width in batches:
        asked[f"{height}x{width}"] += batch
    if not compared >= asked:  # fewer images of one of the sizes
        return False
    measured = [{name: row.get(name) for name in Comparison().numbers()} for row in rows]
    if any(not isinstance(value, (int, float)) for row in measured for value in row.values()):
        return False  # of a comparison that measured less, or what is no number
    return not any(_below(row, options) for row in measured)


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
