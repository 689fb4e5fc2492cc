"""Operations whose result depends on the size of a map.

Everywhere else the model treats sizes as unknown: it reads no shape and makes no tensor of a size that it computed. An
engine for a range of sizes can therefore be had by converting these few functions, one by one, instead of baking in the
size of the image that was traced.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class LevelShapes(tuple):
    """(height, width) of each map of a pyramid, with the maps themselves, from which a tracer reads them anew."""

    maps: tuple[Tensor, ...]


def level_shapes(maps: list[Tensor]) -> LevelShapes:
    """Sizes of maps (B, C, h, w)."""
    shapes = LevelShapes((int(x.shape[-2]), int(x.shape[-1])) for x in maps)
    shapes.maps = tuple(maps)
    return shapes


def split_levels(pixels: Tensor, shapes: LevelShapes) -> list[Tensor]:
    """Pixels of all levels (B, S, C) -> a map (B, C, h, w) for each level."""
    levels = pixels.transpose(1, 2).split([h * w for h, w in shapes], dim=2)
    return [level.unflatten(2, shape) for level, shape in zip(levels, shapes)]


def unflatten_like(x: Tensor, reference: Tensor) -> Tensor:
    """(B, N, h * w) -> (B, N, h, w), the size of reference (B, C, h, w)."""
    return x.unflatten(2, reference.shape[-2:])


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """Bilinear resizing of (B, C, H, W) to the size of reference (B, D, h, w), corners not aligned."""
    return F.interpolate(x, size=reference.shape[-2:], mode="bilinear", align_corners=False)


def expand_batch_like(x: Tensor, reference: Tensor) -> Tensor:
    """(1 or B, ...) -> (B, ...), the batch of reference (B, ...)."""
    return x.expand(reference.shape[0], *x.shape[1:])


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """(B, H, W, C), zeros added at the bottom and the right until H and W are multiples."""
    pad_h, pad_w = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, pad_w, 0, pad_h)) if pad_h or pad_w else x


def crop_like(x: Tensor, reference: Tensor) -> Tensor:
    """The top left of x (B, H', W', C), of the size of reference (B, H, W, D)."""
    return x[:, : reference.shape[1], : reference.shape[2]]


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C), H and W multiples of the window -> (B, windows, window_size ** 2, C), windows in row order."""
    x = x.unflatten(1, (-1, window_size)).unflatten(3, (-1, window_size))  # (B, H/ws, ws, W/ws, ws, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_reverse(windows: Tensor, window_size: int, reference: Tensor) -> Tensor:
    """(B, windows, window_size ** 2, C) -> (B, H, W, C), the inverse of window_partition(reference)."""
    rows, columns = reference.shape[1] // window_size, reference.shape[2] // window_size
    x = windows.unflatten(1, (rows, columns)).unflatten(3, (window_size, -1))
    return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention inside windows.

    Args:
        q, k, v: (B, windows, heads, N, D).
        bias: (heads, N, N), added to the logits.
        mask: (windows, N, N), added too, or None.
        scale: factor of the logits before that.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, windows, heads, N, D).
    """
    shape = q.shape
    # Fused kernels take four dimensions. Without a mask all windows share the bias; with one, windows and heads go into
    # one dimension, so that neither bias nor mask need be repeated for each image.
    if mask is None:
        first, bias = 0, bias[None]
    else:
        first, bias = 1, (bias[None] + mask[:, None]).flatten(0, 1)[None]
    q, k, v = (x.flatten(first, first + 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout, scale=scale)
    return out.unflatten(first, shape[first : first + 2])


def shifted_window_mask(x: Tensor, window_size: int, shift: int) -> Tensor:
    """What keeps pixels apart that only the cyclic shift brought together.

    After the shift a window of the last row or column holds pixels of two distant regions, which must not attend to
    each other.

    Args:
        x: (B, H, W, C), H and W multiples of the window size, read for its size and device only.

    Returns:
        (windows, N, N) float32 with N = window_size ** 2: 0 inside a region, -100 between regions.
    """

    def regions(size: int) -> Tensor:
        position = torch.arange(size, device=x.device)
        return (position >= size - window_size).int() + (position >= size - shift).int()

    region = regions(x.shape[1])[:, None] * 3 + regions(x.shape[2])[None, :]
    region = window_partition(region[None, :, :, None], window_size)[0, :, :, 0]  # (windows, N)
    return (region[:, :, None] != region[:, None, :]).float() * -100.0
