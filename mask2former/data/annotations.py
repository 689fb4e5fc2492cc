"""What annotations may hold: checked where they are read, and told with what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MOST_CHARACTERS = 7  # of a run length in COCO's text: 5 bits each, for 32 bits and a sign


def check_run_length_code(code: Mapping[str, Any], size: Sequence[int]) -> None:
    """
    Args:
        code: {"size": [height, width], "counts": run lengths, or COCO's text of them}.
        size: (height, width) of the image.

    Raises:
        ValueError: it is of another size, or its runs do not cover the image. pycocotools would leave the rest of the mask
            as the memory was, or write beside it.
    """
    told = code.get("size")
    if not isinstance(told, (list, tuple)) or list(told) != list(size):
        told = tuple(told) if isinstance(told, list) else told
        raise ValueError(f"a run-length code is of size {told}, the image {tuple(size)} (height, width)")
    counts = code.get("counts")
    lengths = _lengths_of_text(counts) if isinstance(counts, (str, bytes)) else counts
    pixels = size[0] * size[1]
    if (
        not isinstance(lengths, (list, tuple))
        or not all(isinstance(n, (int, np.integer)) and n >= 0 for n in lengths)
        or sum(lengths) != pixels
    ):
        raise ValueError(
            f"a run-length code has the counts {str(counts)[:80]!r}; allowed: whole numbers from 0 that sum to the "
            f"{size[0]} x {size[1]} = {pixels} pixels of the image, or COCO's text of such"
        )


def _lengths_of_text(text: str | bytes) -> list[int] | None:
    """Run lengths of COCO's text (rleFrString of cocoapi); None where it is no such text."""
    try:
        codes = np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, np.uint8).astype(
            np.int64
        )
    except UnicodeEncodeError:
        return None
    codes -= 48
    if not codes.size or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > _MOST_CHARACTERS:
        return None
    places = np.arange(codes.size) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((codes & 31) << (5 * places), starts)
    numbers -= np.where(codes[ends] & 16, np.int64(1) << (5 * sizes), 0)
    # From the fourth on they are differences from the one before the last.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers.tolist()


def polygon_points(polygon: Any, fewest: int = 6) -> np.ndarray:
    """A polygon's x, y, x, y, ... as float64 (2N,).

    Raises:
        ValueError: they are no numbers, not finite, not even in number, or fewer than `fewest`.
    """
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        points = None
    if (
        points is None
        or points.ndim != 1
        or points.size < fewest
        or points.size % 2
        or not np.isfinite(points).all()
    ):
        raise ValueError(
            f"a polygon is {str(polygon)[:80]}; expected x, y of at least three points, six finite numbers or more"
        )
    return points
