"""Pillow's bilinear resize of 8-bit images on the GPU (csrc/preprocess/), byte for byte.

Pillow filters with a triangle as wide as the output's pixel spacing (antialiased), along one axis, then along the other, in
fixed-point numbers, and rounds to bytes after each pass. The weights depend on the sizes alone: they are computed here as
Pillow computes them, in float64, and kept on the device. Which pass is the first depends on the sizes and on the version,
so the installed Pillow is asked.

Source: Pillow, src/libImaging/Resample.c (precompute_coeffs, normalize_coeffs_8bpc, ImagingResampleInner) and
Image.resize.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from .. import kernels

# Bits after the point of a weight; resize_math.h has the same.
PRECISION_BITS = 32 - 8 - 2
# Tables of one axis that are kept; each takes 4 bytes * output size * (2 + taps), 20 KB for 1,067 pixels.
MAX_TABLES = 256


# When the vertical pass is the first, by input and output (height, width).
Size = tuple[int, int]
_ORDERS: dict[str, Callable[[Size, Size], bool]] = {
    "Pillow before 12.2: never": lambda before, after: False,
    "Pillow 12.2: images more than 100 times as high as wide that get lower": lambda before, after: (
        before[0] > 100 * before[1] and after[0] < before[0]
    ),
    "Pillow 13: images that lose more than twice as many rows as columns": lambda before, after: (
        before[0] - after[0] > max(0, 2 * (before[1] - after[1]))
    ),
}
# Sizes around the edges of these rules, at which the two orders give different bytes.
_PROBES: list[tuple[Size, Size]] = [
    ((30, 40), (50, 67)),
    ((60, 40), (30, 20)),
    ((60, 40), (29, 25)),
    ((60, 40), (40, 30)),
    ((60, 40), (39, 30)),
    ((60, 40), (58, 45)),
    ((60, 40), (70, 20)),
    ((60, 40), (70, 50)),
    ((200, 2), (50, 3)),
    ((201, 2), (50, 3)),
    ((603, 6), (599, 3)),
    ((603, 6), (700, 3)),
    ((603, 6), (300, 4)),
    ((99, 200), (30, 195)),
    ((40, 200), (15, 60)),
]


def _resize_pillow(image: Image.Image, *sizes: Size) -> bytes:
    for height, width in sizes:
        image = image.resize((width, height), Image.BILINEAR)
    return image.tobytes()


@functools.lru_cache(maxsize=1)
def _pass_order() -> Callable[[Size, Size], bool] | None:
    """The rule that the installed Pillow follows at all probes, or None."""
    noise = np.random.RandomState(0).randint(0, 256, (1024, 1024)).astype(np.uint8)
    rules = dict(_ORDERS)
    for before, after in _PROBES:
        image = Image.fromarray(np.ascontiguousarray(noise[: before[0], : before[1]]))
        direct = _resize_pillow(image, after)
        by_order = {
            False: _resize_pillow(image, (before[0], after[1]), after),
            True: _resize_pillow(image, (after[0], before[1]), after),
        }
        rules = {name: rule for name, rule in rules.items() if by_order[rule(before, after)] == direct}
    return next(iter(rules.values()), None)


def why_not() -> str:
    """Why resize_bilinear cannot be used, whatever the image; empty where it can."""
    if not kernels.available():
        return f"the CUDA kernels are not built or do not load: {kernels.BUILD_HINT}"
    if _pass_order() is None:
        return f"Pillow {PIL.__version__} resizes in an order that this version of d2_trt does not know"
    return ""


def axis_table(in_size: int, out_size: int) -> np.ndarray:
    """Where the pixels of one axis come from, and their weights.

    An axis that keeps its size gets weights of one and zero, which change nothing: Pillow leaves such a pass out.

    Args:
        in_size, out_size: pixels along the axis, at least 1.

    Returns:
        (2 + taps, out_size) int32. Row 0 is the first pixel read, row 1 how many are read, row 2 + t the weight of the
        t-th of them times 2^PRECISION_BITS.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"cannot resize {in_size} pixels to {out_size}; expected at least 1 of both")
    # Pillow takes the input's extent as a float32 box, which holds every whole number up to 2^24.
    scale = float(np.float32(in_size)) / out_size
    support = max(scale, 1.0)  # half the triangle's base
    taps = int(np.ceil(support)) * 2 + 1
    center = (np.arange(out_size, dtype=np.float64) + 0.5) * scale
    # astype truncates, as C does; a negative number that Pillow clamps to 0 becomes 0 either way.
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), in_size) - first
    weights = np.zeros((taps, out_size))
    total = np.zeros(out_size)
    inverse = 1.0 / support
    for tap in range(taps):  # in order: the sum's rounding is Pillow's
        distance = np.abs(((tap + first) - center + 0.5) * inverse)
        weights[tap] = np.where((tap < count) & (distance < 1.0), 1.0 - distance, 0.0)
        total += weights[tap]
    weights = np.divide(weights, total, out=weights, where=total != 0.0)
    fixed = (0.5 + weights * (1 << PRECISION_BITS)).astype(np.int32)
    return np.concatenate([first[None].astype(np.int32), count[None].astype(np.int32), fixed])


class _Tables:
    """Tables on devices, the least recently used first. Safe to use from several threads."""

    def __init__(self, limit: int = MAX_TABLES):
        self._limit = limit
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple[int, int, torch.device], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def get(self, in_size: int, out_size: int, device: torch.device) -> Tensor:
        key = (in_size, out_size, device)
        with self._lock:
            if key not in self._tables:
                # From pageable memory: the copy is over when this returns, so any stream may read the table.
                self._tables[key] = torch.from_numpy(axis_table(in_size, out_size)).to(device)
                while len(self._tables) > self._limit:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(key)
            return self._tables[key]


_tables = _Tables()


def resize_bilinear(image: Tensor, size: Size, *, reverse_channels: bool = False) -> Tensor:
    """Resize as `PIL.Image.fromarray(image).resize((width, height), PIL.Image.BILINEAR)` does, on the current stream.

    Args:
        image: (H, W, C) uint8, contiguous, on a CUDA device; C is 1 or 3.
        size: (height, width) of the result, in pixels.
        reverse_channels: give the channels in the opposite order, BGR for RGB.

    Returns:
        (C, height, width) uint8, contiguous, on the image's device.

    Raises:
        ValueError: a shape, dtype, size or layout that is not taken.
        KernelsMissing: the kernels are not built.
        RuntimeError: the installed Pillow is none whose bytes are known; see why_not.
    """
    height, width = int(size[0]), int(size[1])
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3:
        got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"got {got}; expected a uint8 tensor (height, width, channels)")
    in_height, in_width, channels = image.shape
    if channels not in (1, 3) or 0 in image.shape or height < 1 or width < 1:
        raise ValueError(
            f"cannot resize {tuple(image.shape)} (height, width, channels) to {height}x{width} (height x width); expected "
            "1 or 3 channels and sizes of at least 1"
        )
    if not image.is_cuda or not image.is_contiguous():
        problem = f"on {image.device}" if not image.is_cuda else f"strided {image.stride()}"
        raise ValueError(f"the image is {problem}; expected a contiguous tensor on a CUDA device")
    module = kernels.load().preprocess
    order = _pass_order()
    if order is None:
        raise RuntimeError(f"cannot resize as Pillow does: {why_not()}")
    in_size, out_size = (in_height, in_width), (height, width)
    vertical_first = order(in_size, out_size)
    device = image.device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        horizontal = _tables.get(in_width, width, device)
        vertical = _tables.get(in_height, height, device)
        for table in (horizontal, vertical):
            table.record_stream(
                stream
            )  # another thread may push it out of the cache while this stream reads it
        scratch_size = module.scratch_bytes(in_size, channels, out_size, vertical_first)
        scratch = torch.empty(scratch_size, dtype=torch.uint8, device=device)
        out = torch.empty((channels, height, width), dtype=torch.uint8, device=device)
        module.resize_bilinear(
            image=image.data_ptr(),
            size=in_size,
            channels=channels,
            reverse_channels=reverse_channels,
            vertical_first=vertical_first,
            horizontal=horizontal.data_ptr(),
            vertical=vertical.data_ptr(),
            scratch=scratch.data_ptr(),
            scratch_size=scratch_size,
            out=out.data_ptr(),
            out_size=out_size,
            stream=stream.cuda_stream,
        )
    return out
