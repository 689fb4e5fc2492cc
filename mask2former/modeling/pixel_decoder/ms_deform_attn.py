"""Multi-scale deformable attention of the pixels of a feature pyramid over that pyramid."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..shape_ops import LevelShapes


@functools.lru_cache(maxsize=16)
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
        pixel_size = torch.tensor([(2.0 / w, 2.0 / h) for h, w in spatial_shapes], device=device)
        return torch.cat(centers)[:, None, None, None, :], pixel_size[:, None, :]


class MSDeformAttnCore(nn.Module):
    """Softmax, sampling and weighted sum of multi-scale deformable attention, without its linear layers.

    The queries are the pixels of the pyramid themselves, so the points from which the offsets count follow from the
    levels' shapes. It has no parameters. An engine replaces this one module.

    Source: Deformable DETR (Zhu et al. 2021), equation 3.
    """

    def forward(
        self,
        value: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        spatial_shapes: LevelShapes,
    ) -> Tensor:
        """Attention output of each pixel.

        Args:
            value: (B, S, heads, D), S the number of pixels of all levels.
            sampling_offsets: (B, S, heads, levels, points, 2), (x, y) in pixels of the level sampled.
            attention_logits: (B, S, heads, levels * points), before the softmax.
            spatial_shapes: (height, width) of each level.

        Returns:
            (B, S, heads * D).

        Raises:
            ValueError: where the shapes do not hold S pixels.
        """
        batch, pixels, heads, dim = value.shape
        if sum(h * w for h, w in spatial_shapes) != pixels:
            raise ValueError(
                f"levels of {spatial_shapes} (height, width) do not hold the {pixels} pixels of `value`"
            )
        points = sampling_offsets.shape[4]
        # Queries last: the sum over points then runs over contiguous memory.
        weights = attention_logits.softmax(-1).permute(0, 2, 3, 1).reshape(batch * heads, 1, -1, pixels)
        centers, pixel_size = _sampling_grid(tuple(spatial_shapes), value.device)
        grid = torch.addcmul(centers, sampling_offsets, pixel_size)  # (B, S, heads, levels, points, 2)
        grid = (
            grid.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).to(value.dtype)
        )  # (levels, B * heads, points, S, 2)
        out = None
        start = 0
        for level, (height, width) in enumerate(spatial_shapes):
            level_value = value[:, start : start + height * width].permute(0, 2, 3, 1)  # (B, heads, D, hw)
            sampled = F.grid_sample(
                level_value.reshape(batch * heads, dim, height, width),
                grid[level],
                mode="bilinear",
                padding_mode="zeros",
                align_corners=False,
            )  # (B * heads, D, points, S)
            part = (sampled * weights[:, :, level * points : (level + 1) * points]).sum(2)
            out = part if out is None else out + part
            start += height * width
        return out.view(batch, heads * dim, pixels).transpose(1, 2)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its linear layers; keys are those of the release."""

    def __init__(self, d_model: int, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM ({d_model}) must be a multiple of MODEL.MASK_FORMER.NHEADS ({n_heads})"
            )
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.head_dim = d_model // n_heads
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.core = MSDeformAttnCore()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads look in evenly spaced directions, point k at k + 1 pixels, with equal weights (Deformable DETR)."""
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (heads, 2)
        distance = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        bias = direction[:, None, None, :] * distance[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, pixels: Tensor, spatial_shapes: LevelShapes) -> Tensor:
        """Attend from every pixel to points around it on every level.

        Args:
            query: (B, S, C), pixels with their position encoding.
            pixels: (B, S, C), what the values are made from.
            spatial_shapes: (height, width) of each level, S pixels together.

        Returns:
            (B, S, C).
        """
        value = self.value_proj(pixels).unflatten(2, (self.n_heads, self.head_dim))
        offsets = self.sampling_offsets(query).unflatten(2, (self.n_heads, self.n_levels, self.n_points, 2))
        logits = self.attention_weights(query).unflatten(2, (self.n_heads, self.n_levels * self.n_points))
        return self.output_proj(self.core(value, offsets, logits, spatial_shapes))
