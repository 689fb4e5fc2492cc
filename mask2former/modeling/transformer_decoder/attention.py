"""Multi-head attention and feed-forward layers of the transformer decoder, batch first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import fused_ops, shape_ops
from . import attention_core


class MultiHeadAttention(nn.Module):
    """Projections of multi-head attention, named as in torch.nn.MultiheadAttention (`in_proj_weight`, `in_proj_bias`,
    `out_proj`), so that the release's checkpoints load.

    `forward` gives what `out_proj` takes: that projection is for the layer around it to do, whose residual and LayerNorm an
    engine has in one kernel with it.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"MODEL.MASK_FORMER.HIDDEN_DIM ({embed_dim}) must be a multiple of "
                f"MODEL.MASK_FORMER.NHEADS ({num_heads})"
            )
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)


class SelfAttention(MultiHeadAttention):
    """Attention of queries to each other, their positions added to what queries and keys are made of."""

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """x (B, Q, C), pos (1, Q, C) -> (B, Q, C), without `out_proj`."""
        channels = self.in_proj_weight.shape[1]
        # W (x + pos) = W x + W pos, the second of which is the same for every image: one product makes all three.
        qk_pos = F.linear(pos, self.in_proj_weight[: 2 * channels])  # (1, Q, 2 * C)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return attention_core.self_attention(qkv, qk_pos, self.num_heads)


class MaskedCrossAttention(MultiHeadAttention):
    """Attention of queries to the pixels inside their predicted masks. PixelMemory makes keys and values."""

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        keys: Tensor,
        values: Tensor,
        part: int,
        mask_embed: Tensor,
        mask_features: Tensor,
    ) -> Tensor:
        """x (B or 1, Q, C), mask_embed (B or 1, Q, mask_dim), pos (1, Q, C) -> (B, Q, C), without `out_proj`; the others as
        in attention_core.masked_attention.
        """
        channels = self.in_proj_weight.shape[1]
        weight = self.in_proj_weight[:channels]
        q_pos = F.linear(pos, weight)  # the same for every image
        q = F.linear(x, weight, self.in_proj_bias[:channels])
        q, mask_embed = (shape_ops.expand_batch_like(t, keys) for t in (q, mask_embed))
        return attention_core.masked_attention(
            q, q_pos, keys, values, part, mask_embed, mask_features, self.num_heads
        )


class PixelMemory(nn.Module):
    """What the cross-attentions read of one level. It has no weights of its own: they are the layers'."""

    def forward(
        self,
        pixels: Tensor,
        position: Tensor,
        level_embed: Tensor,
        mask_features: Tensor,
        layers: Sequence[MaskedCrossAttention],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and mask features of a level, for the n layers that read it.

        Args:
            pixels: (B, C, h, w).
            position: (1, C, h, w), added for the keys.
            level_embed: (C,), added to all pixels.
            mask_features: (B, mask_dim, H/4, W/4).
            layers: their attentions.

        Returns:
            keys and values (B, h * w, n * C), the layers' side by side; mask features (B, h * w, mask_dim).
        """
        channels = level_embed.shape[0]
        weights = zip(*(layer.in_proj_weight.split(channels)[1:] for layer in layers))
        biases = zip(*(layer.in_proj_bias.split(channels)[1:] for layer in layers))
        rows, position = (x.flatten(2).transpose(1, 2) for x in (pixels, position))  # (B or 1, h * w, C)
        inputs = (rows + position, rows)
        made = []
        for x, weight, bias in zip(inputs, map(torch.cat, weights), map(torch.cat, biases)):
            # W (x + level_embed) = W x + W level_embed, which joins the bias.
            made.append(F.linear(x, weight, F.linear(level_embed, weight, bias)))
        keys, values = made
        return keys, values, attention_core.level_mask_features(mask_features, pixels)


class SelfAttentionLayer(nn.Module):
    """Self-attention of the queries with residual and LayerNorm, before (`pre_norm`) or after it."""

    def __init__(self, d_model: int, nhead: int, pre_norm: bool = False):
        super().__init__()
        self.self_attn = SelfAttention(d_model, nhead)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm

    def forward(self, queries: Tensor, query_pos: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C); query_pos (1, Q, C) is added to queries and keys, not to values."""
        out_proj = self.self_attn.out_proj
        if self.pre_norm:
            return queries + out_proj(self.self_attn(self.norm(queries), query_pos))
        attended = self.self_attn(queries, query_pos)
        return fused_ops.linear_residual_layer_norm(attended, out_proj, queries, self.norm)


class CrossAttentionLayer(nn.Module):
    """Masked attention from queries to the pixels of one level, with residual and LayerNorm."""

    def __init__(self, d_model: int, nhead: int, pre_norm: bool = False):
        super().__init__()
        self.multihead_attn = MaskedCrossAttention(d_model, nhead)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        keys: Tensor,
        values: Tensor,
        part: int,
        mask_embed: Tensor,
        mask_features: Tensor,
    ) -> Tensor:
        """(B or 1, Q, C) -> (B, Q, C); the others as in MaskedCrossAttention."""
        x = self.norm(queries) if self.pre_norm else queries
        attended = self.multihead_attn(x, query_pos, keys, values, part, mask_embed, mask_features)
        queries = shape_ops.expand_batch_like(queries, attended)
        out_proj = self.multihead_attn.out_proj
        if self.pre_norm:
            return queries + out_proj(attended)
        return fused_ops.linear_residual_layer_norm(attended, out_proj, queries, self.norm)


class FFNLayer(nn.Module):
    """Two linear layers with ReLU, residual and LayerNorm."""

    def __init__(self, d_model: int, dim_feedforward: int, pre_norm: bool = False):
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        if self.pre_norm:
            return queries + self.linear2(fused_ops.linear_relu(self.norm(queries), self.linear1))
        return fused_ops.feed_forward(queries, self.linear1, self.linear2, self.norm)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        hidden = [hidden_dim] * (num_layers - 1)
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip([input_dim, *hidden], [*hidden, output_dim])
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) -> (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = fused_ops.linear_relu(x, layer)
        return self.layers[-1](x)
