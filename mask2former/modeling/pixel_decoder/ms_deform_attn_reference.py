"""Multi-scale deformable attention in PyTorch's own functions, and its gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shape_ops import LevelShapes

_BILINEAR, _ZEROS = 0, 0  # interpolation and padding modes of aten's grid_sampler


def _sampling_grid(
    spatial_shapes: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What turns offsets in pixels into grid_sample's coordinates, which run from -1 to 1 over a level.

    Returns:
        centres (x, y) of the pixels of all levels, (S, 1, 1, 1, 2), and the size of a pixel of each level,
        (levels, 1, 2); both float32.
    """
    # See _axis_encoding on why this leaves inference mode.
    with torch.inference_mode(False), torch.no_grad():
        centers = []
        for height, width in spatial_shapes:
            y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
            x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
            grid = torch.stack((x[None, :].expand(height, -1), y[:, None].expand(-1, width)), dim=-1)
            centers.append(grid.flatten(0, 1) * 2 - 1)
        # Levels without pixels are never sampled.
        sizes = [(2.0 / max(w, 1), 2.0 / max(h, 1)) for h, w in spatial_shapes]
        pixel_size = torch.tensor(sizes, device=device)
        return torch.cat(centers)[:, None, None, None, :], pixel_size[:, None, :]


_cached_sampling_grid = functools.lru_cache(maxsize=16)(_sampling_grid)


def _queries_last(weights: Tensor) -> Tensor:
    """(B, S, heads, levels * points) -> (B * heads, 1, levels * points, S): sums over points run over contiguous memory."""
    batch, pixels, heads, count = weights.shape
    return weights.permute(0, 2, 3, 1).reshape(batch * heads, 1, count, pixels)


def _locations(sampling_offsets: Tensor, centers: Tensor, pixel_size: Tensor, dtype: torch.dtype) -> Tensor:
    """grid_sample's coordinates, (levels, B * heads, points, S, 2)."""
    grid = torch.addcmul(centers, sampling_offsets, pixel_size)  # (B, S, heads, levels, points, 2)
    return grid.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).to(dtype)


def _levels(value: Tensor, spatial_shapes: LevelShapes):
    """Index and map (B * heads, D, h, w) of each level that has pixels, from value (B, S, heads, D)."""
    batch, _, heads, dim = value.shape
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        if height == 0 or width == 0:
            continue
        level_value = value[:, start : start + height * width].permute(0, 2, 3, 1)  # (B, heads, D, hw)
        yield level, level_value.reshape(batch * heads, dim, height, width)
        start += height * width


def ms_deform_attn_reference(
    value: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, spatial_shapes: LevelShapes
) -> Tensor:
    """MSDeformAttnCore.forward through grid_sample, on any device, in any floating dtype, differentiable."""
    batch, pixels, heads, dim = value.shape
    points = sampling_offsets.shape[4]
    weights = _queries_last(attention_logits.softmax(-1))
    grid = _cached_sampling_grid(tuple(spatial_shapes), value.device)
    grid = _locations(sampling_offsets, *grid, value.dtype)
    out = None
    for level, level_value in _levels(value, spatial_shapes):
        sampled = F.grid_sample(
            level_value, grid[level], mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (B * heads, D, points, S)
        part = (sampled * weights[:, :, level * points : (level + 1) * points]).sum(2)
        out = part if out is None else out + part
    if out is None:
        out = value.new_zeros(batch * heads, dim, pixels)
    return out.view(batch, heads * dim, pixels).transpose(1, 2)


def ms_deform_attn_reference_backward(
    grad: Tensor,
    value: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    spatial_shapes: LevelShapes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ms_deform_attn_reference, which it computes anew: nothing but its inputs need be kept.

    Args:
        grad: (B, S, heads * D), of its output.
        value, sampling_offsets, attention_logits, spatial_shapes: its inputs.

    Returns:
        gradients of value, sampling_offsets and attention_logits, in their dtypes; computed in float32, or in float64
        where one of them is.
    """
    batch, pixels, heads, dim = value.shape
    points = sampling_offsets.shape[4]
    inputs = (value, sampling_offsets, attention_logits)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in inputs), torch.float32)
    # Inside of a region of autocast grid_sample's gradient would come in half.
    with torch.autocast(value.device.type, enabled=False):
        weights = _queries_last(attention_logits.to(dtype).softmax(-1))
        # Not the cached one: torch.compile traces gradients with tensors that must not be kept.
        centers, pixel_size = _sampling_grid(tuple(spatial_shapes), value.device)
        grid = _locations(sampling_offsets.to(dtype), centers, pixel_size, dtype)
        grad = grad.to(dtype).transpose(1, 2).reshape(batch * heads, dim, 1, pixels)
        grad_levels = []
        grad_grid = torch.zeros_like(grid)
        grad_weights = torch.zeros_like(weights)
        for level, level_value in _levels(value.to(dtype), spatial_shapes):
            these = slice(level * points, (level + 1) * points)
            sampled = F.grid_sample(
                level_value, grid[level], mode="bilinear", padding_mode="zeros", align_corners=False
            )
            grad_weights[:, :, these] = (grad * sampled).sum(1, keepdim=True)
            grad_value, grad_grid[level] = torch.ops.aten.grid_sampler_2d_backward(
                grad * weights[:, :, these],
                level_value,
                grid[level],
                _BILINEAR,
                _ZEROS,
                False,
                [True, True],
            )
            grad_levels.append(grad_value.view(batch, heads, dim, -1))  # (B, heads, D, hw)
        grad_value = (
            torch.cat(grad_levels, -1).permute(0, 3, 1, 2) if grad_levels else torch.zeros_like(value)
        )
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(2, keepdim=True))
        grad_logits = grad_logits.view(batch, heads, -1, pixels).permute(0, 3, 1, 2)
        grad_grid = grad_grid.unflatten(1, (batch, heads))  # (levels, B, heads, points, S, 2)
        grad_offsets = grad_grid.permute(1, 4, 2, 0, 3, 5) * pixel_size
    gradients = zip((grad_value, grad_offsets, grad_logits), inputs)
    return tuple(gradient.to(t.dtype).contiguous() for gradient, t in gradients)
