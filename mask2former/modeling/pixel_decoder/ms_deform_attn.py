"""Multi-scale deformable attention of the pixels of a feature pyramid over that pyramid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..shape_ops import LevelShapes
from . import ms_deform_attn_cuda
from .ms_deform_attn_reference import ms_deform_attn_reference


class MSDeformAttnCore(nn.Module):
    """Softmax, sampling and weighted sum of multi-scale deformable attention, without its linear layers.

    The queries are the pixels of the pyramid themselves, so the points from which the offsets count follow from the
    levels' shapes. It has no parameters. An engine replaces this one module.

    On a GPU our kernels compute it and its gradients where they are built, else grid_sample does.

    Source: Deformable DETR (Zhu et al. 2021), equation 3.
    """

    # False, on the class or on one module, keeps to grid_sample: to compare the two.
    use_kernel = True

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
        pixels = value.shape[1]
        if sum(h * w for h, w in spatial_shapes) != pixels:
            raise ValueError(
                f"levels of {spatial_shapes} (height, width) do not hold the {pixels} pixels of `value`"
            )
        arguments = (value, sampling_offsets, attention_logits)
        if self.use_kernel and ms_deform_attn_cuda.usable(*arguments):
            return ms_deform_attn_cuda.ms_deform_attn(*arguments, spatial_shapes)
        return ms_deform_attn_reference(*arguments, spatial_shapes)


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
