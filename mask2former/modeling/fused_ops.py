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


def linear_residual_layer_norm(x: Tensor, linear: nn.Linear, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(residual + linear(x)): (..., D) and (..., C) -> (..., C)."""
    return residual_layer_norm(residual, linear(x), norm)


def feed_forward(x: Tensor, linear1: nn.Linear, linear2: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """norm(x + linear2(relu(linear1(x)))): (..., C) -> (..., C)."""
    return residual_layer_norm(x, linear2(linear_relu(x, linear1)), norm)


def mlp_of_norm(x: Tensor, norm: nn.LayerNorm, mlp: nn.Module) -> Tensor:
    """mlp(norm(x)): (..., C) -> (..., D); `mlp.layers` are linear, with ReLU between them."""
    return mlp(norm(x))


def norm_and_mlp(x: Tensor, norm: nn.LayerNorm, mlp: nn.Module) -> tuple[Tensor, Tensor]:
    """norm(x) and mlp(norm(x)): (..., C) -> (..., C) and (..., D); as `mlp_of_norm`."""
    normed = norm(x)
    return normed, mlp(normed)
