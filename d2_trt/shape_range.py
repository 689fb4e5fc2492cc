"""Ranges of image batches that an engine serves, and how they follow from detectron2's resizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import EngineShapeError, OptionsError

# Derived ranges hold images up to this many times as long as wide. A panorama beyond it is out of range.
LONGEST_ASPECT_RATIO = 5
# The shape that a derived range is fastest at: most photographs'.
USUAL_ASPECT_RATIO = 4 / 3
# A derived range that reaches further is a config without a limit, not a wish: GPUs have no memory for it.
LARGEST_DERIVED_SIDE = 8192

Shape = tuple[int, int, int]


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class ShapeRange:
    """Batches of padded images that one engine serves: smallest, fastest and largest, each (batch, height, width)."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self):
        for name in ("min", "opt", "max"):
            shape = getattr(self, name)
            if len(shape) != 3 or not all(is_int(n) and n >= 1 for n in shape):
                raise OptionsError(
                    f"ShapeRange.{name} is {shape!r}; allowed: (batch, height, width), each a whole number of at least 1."
                )
            object.__setattr__(self, name, tuple(int(n) for n in shape))
        for axis, low, opt, high in zip(("batch", "height", "width"), self.min, self.opt, self.max):
            if not low <= opt <= high:
                raise OptionsError(
                    f"the {axis} of a shape range is {low} (min), {opt} (opt), {high} (max); allowed: min <= opt <= max."
                )

    @classmethod
    def fixed(cls, batch: int, height: int, width: int) -> ShapeRange:
        """The range of one batch size and one padded size."""
        shape = (batch, height, width)
        return cls(shape, shape, shape)

    @classmethod
    def from_json(cls, value: Mapping[str, Sequence[int]]) -> ShapeRange:
        return cls(*(tuple(value[name]) for name in ("min", "opt", "max")))

    def to_json(self) -> dict[str, list[int]]:
        return {"min": list(self.min), "opt": list(self.opt), "max": list(self.max)}

    @property
    def is_static(self) -> bool:
        return self.min == self.max

    def contains(self, batch: int, height: int, width: int) -> bool:
        return all(
            low <= n <= high for low, n, high in zip(self.min, (batch, height, width), self.max, strict=True)
        )

    def describe(self) -> str:
        """Such as "batch 1..4, 256..1344 (H) x 256..1344 (W)"."""
        return f"batch {self._axis(0)}, {self._sizes()}"

    def explain(self, batch: int, height: int, width: int) -> str:
        """Why a batch of padded images is outside the range, and what to change. Empty where it is inside."""
        messages = []
        if not (self.min[1] <= height <= self.max[1] and self.min[2] <= width <= self.max[2]):
            too_large = height > self.max[1] or width > self.max[2]
            advice = "Lower INPUT.MAX_SIZE_TEST, or widen" if too_large else "Widen"
            messages.append(
                f"image padded to {height}x{width} is outside this engine's range {self._sizes()}. "
                f"{advice} MODEL.TENSORRT.SHAPES and rebuild."
            )
        if batch > self.max[0]:
            messages.append(
                f"a batch of {batch} images is outside this engine's range {self._axis(0)}. "
                f"Lower TEST.BATCH_SIZE, or raise MODEL.TENSORRT.MAX_BATCH_SIZE and rebuild."
            )
        elif batch < self.min[0]:
            messages.append(f"a batch of {batch} images is outside this engine's range {self._axis(0)}.")
        return " Also, ".join(messages)

    def check(self, batch: int, height: int, width: int) -> None:
        """
        Raises:
            EngineShapeError: the batch is outside the range; the message says what to change.
        """
        if not self.contains(batch, height, width):
            raise EngineShapeError(self.explain(batch, height, width))

    def _sizes(self) -> str:
        return f"{self._axis(1)} (H) x {self._axis(2)} (W)"

    def _axis(self, axis: int) -> str:
        return f"{self.min[axis]}..{self.max[axis]}"


def derive_sizes(
    min_sizes: Sequence[int], max_size: int, divisibility: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Smallest, usual and largest padded (height, width) that detectron2's ResizeShortestEdge leads to.

    It makes the shorter side one of min_sizes, unless the longer would exceed max_size and is made max_size then.
    Height and width may each be the shorter side, so both range from the shortest to the longest side of images up
    to LONGEST_ASPECT_RATIO times as long as wide. The usual size is a landscape image of USUAL_ASPECT_RATIO.
    """
    low, high = min(min_sizes), max(min_sizes)
    shortest = min(low, max_size / LONGEST_ASPECT_RATIO)
    longest = min(max_size, high * LONGEST_ASPECT_RATIO)
    smallest = max(int(shortest) // divisibility, 1) * divisibility
    largest = round_up(longest, divisibility)
    short, long = float(high), high * USUAL_ASPECT_RATIO
    if long > max_size:
        short, long = short * max_size / long, float(max_size)
    usual = tuple(min(max(round_up(int(x + 0.5), divisibility), smallest), largest) for x in (short, long))
    return (smallest, smallest), usual, (largest, largest)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
