"""Attention of queries between its projections: what a GPU and an engine compute in one kernel.

Call these through the module (`attention_core.masked_attention(...)`), so that a tracer that puts another function in their
place is seen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import shape_ops
from . import attention_cuda


def attention_mask(mask_logits: Tensor) -> Tensor:
    """Where queries may not attend, from their predicted masks.

    A query whose mask is empty attends everywhere: a softmax over nothing would be NaN.

    Args:
        mask_logits: (B, Q, K).

    Returns:
        (B, 1, Q, K) bool, True where the query may not attend.
    """
    blocked = mask_logits < 0  # the same as sigmoid < 0.5
    return (blocked & ~blocked.all(dim=-1, keepdim=True)).unsqueeze(1)


def masked_attention(
    q: Tensor,
    q_pos: Tensor,
    keys: Tensor,
    values: Tensor,
    part: int,
    mask_embed: Tensor,
    mask_features: Tensor,
    num_heads: int,
) -> Tensor:
    """Attention of queries to the keys inside their predicted masks; one without any attends to all keys.

    Source: Mask2Former (Cheng et al. 2022), equation 2. As in the release, no gradient flows through where a query attends.

    Args:
        q: (B, Q, C), heads side by side.
        q_pos: (1, Q, C), added to q.
        keys, values: (B, K, n * C), those of n layers side by side.
        part: which of the n this layer's are.
        mask_embed: (B, Q, mask_dim); a query may attend to a key where its product with the key's features is not negative.
        mask_features: (B, K, mask_dim).
        num_heads: heads of C / num_heads channels.

    Returns:
        (B, Q, C), heads side by side.
    """
    channels = q.shape[2]
    k, v = (x[:, :, part * channels : (part + 1) * channels] for x in (keys, values))
    mask_embed, mask_features = mask_embed.detach(), mask_features.detach()
    if _has_kernel(q, k, v, num_heads, mask_embed.shape[2]):
        return attention_cuda.attention(q, k, v, num_heads, mask_embed, mask_features, q_pos)
    return reference(q + q_pos.to(q.dtype), k, v, num_heads, mask_embed, mask_features)


def self_attention(qkv: Tensor, qk_pos: Tensor, num_heads: int) -> Tensor:
    """Attention of queries to each other.

    Args:
        qkv: (B, Q, 3 * C), queries, keys and values side by side, in each heads side by side.
        qk_pos: (1, Q, 2 * C), added to queries and keys.
        num_heads: heads of C / num_heads channels.

    Returns:
        (B, Q, C), heads side by side.
    """
    q, k, v = qkv.chunk(3, dim=2)
    q_pos, k_pos = qk_pos.to(qkv.dtype).chunk(2, dim=2)
    if _has_kernel(q, k, v, num_heads):
        return attention_cuda.attention(q, k, v, num_heads, q_pos=q_pos, k_pos=k_pos)
    return reference(q + q_pos, k + k_pos, v, num_heads)


def level_mask_features(mask_features: Tensor, level: Tensor) -> Tensor:
    """Mask features (B, mask_dim, H/4, W/4), resized to a level (B, C, h, w), in rows: (B, h * w, mask_dim)."""
    return shape_ops.resize_like(mask_features, level).flatten(2).transpose(1, 2)


def mask_product(mask_embed: Tensor, mask_features: Tensor) -> Tensor:
    """Mask logits (B, Q, H, W): mask embeddings (B, Q, mask_dim) times mask features (B, mask_dim, H, W)."""
    return shape_ops.unflatten_like(mask_embed @ mask_features.flatten(2), mask_features)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mask_embed: Tensor | None = None,
    mask_features: Tensor | None = None,
) -> Tensor:
    """Both by PyTorch's operations: q (B, Q, C), k and v (B, K, C), and mask embedding and features or None."""
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, Q or K, D)
    if mask_embed is None:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        blocked = attention_mask(mask_embed @ mask_features.transpose(1, 2))
        # Not the fused kernel: with a hundred queries and many thousand keys it leaves most of a GPU idle.
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, heads, Q, K)
        out = logits.masked_fill(blocked, float("-inf")).softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask_dim: int = 0) -> bool:
    """Whether the kernel computes this: half precision on a GPU without gradients."""
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return (
        not wants_gradients
        and q.dtype == k.dtype == v.dtype
        and q.dtype in attention_cuda.DTYPES
        and attention_cuda.supported(num_heads, q.shape[2] // num_heads, mask_dim)
        and attention_cuda.usable(q)
    )
