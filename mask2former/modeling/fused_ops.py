"""Operations that come together in the model and that an engine computes in one kernel.

Call them through this module (`fused_ops.residual_layer_norm(...)`), so that a tracer that puts another function in their
place is seen. In PyTorch they are what their docstrings say, operation by operation.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def residual_layer_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x + update): (..., C) and (..., C) -> (..., C)."""
    return norm(x + update)


def add_position(x: Tensor, position: Tensor) -> Tensor:
    """x + position: (B, ..., C) and (1, ..., C) -> (B, ..., C)."""
    return x + position


def residual_layer_norm_and_position(
    x: Tensor, update: Tensor, norm: nn.LayerNorm, position: Tensor
) -> tuple[Tensor, Tensor]:
    """y = norm(x + update), and y + position: (B, ..., C), (B, ..., C) and (1, ..., C) -> (B, ..., C) twice."""
    out = norm(x + update)
    return out, out + position


def group_norm_relu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """relu(norm(x)): (B, C, H, W) -> (B, C, H, W)."""
    return F.relu(norm(x))


def normalize_images(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std: (B, C, H, W), (C, 1, 1) and (C, 1, 1), float32 -> (B, C, H, W)."""
    return (images - mean) / std


def linear_relu(x: Tensor, linear: nn.Linear) -> Tensor:
    """relu(linear(x)): (..., C) -> (..., D)."""
    return F.relu(linear(x))
