"""Multi-head attention and feed-forward layers of the transformer decoder, batch first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Multi-head attention with a boolean mask that all heads share.

    Parameters are named as in torch.nn.MultiheadAttention (`in_proj_weight`, `in_proj_bias`, `out_proj`), so that the
    release's checkpoints load. Unlike it, the mask stays (B, 1, Q, K): nothing of size (B * heads, Q, K) is made.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"MODEL.MASK_FORMER.HIDDEN_DIM ({embed_dim}) must be a multiple of "
                f"MODEL.MASK_FORMER.NHEADS ({num_heads})"
            )
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        """Attention output after the output projection.

        Args:
            query: (B, Q, C).
            key, value: (B, K, C).
            blocked: (B, 1, Q, K) bool, True where a query may not attend to a key. No row may be True everywhere.

        Returns:
            (B, Q, C).
        """
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)
        q = self._split_heads(F.linear(query, w_q, b_q))  # (B, heads, Q, D)
        k = self._split_heads(F.linear(key, w_k, b_k))
        v = self._split_heads(F.linear(value, w_v, b_v))
        if blocked is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            # Not the fused kernel: with a hundred queries and many thousand keys it leaves most of a GPU idle.
            logits = (q * self.head_dim**-0.5) @ k.transpose(2, 3)  # (B, heads, Q, K)
            out = logits.masked_fill(blocked, float("-inf")).softmax(-1).to(v.dtype) @ v
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)


class SelfAttentionLayer(nn.Module):
    """Self-attention of the queries with residual and LayerNorm, before (`pre_norm`) or after it."""

    def __init__(self, d_model: int, nhead: int, pre_norm: bool = False):
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, nhead)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm

    def forward(self, queries: Tensor, query_pos: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C); query_pos (1 or B, Q, C) is added to queries and keys, not to values."""
        x = self.norm(queries) if self.pre_norm else queries
        with_pos = x + query_pos
        queries = queries + self.self_attn(with_pos, with_pos, x)
        return queries if self.pre_norm else self.norm(queries)


class CrossAttentionLayer(nn.Module):
    """Masked attention from queries to the pixels of one level, with residual and LayerNorm."""

    def __init__(self, d_model: int, nhead: int, pre_norm: bool = False):
        super().__init__()
        self.multihead_attn = MultiHeadAttention(d_model, nhead)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm

    def forward(
        self, queries: Tensor, query_pos: Tensor, key: Tensor, value: Tensor, blocked: Tensor
    ) -> Tensor:
        """(B, Q, C) -> (B, Q, C); key (pixels with position) and value (pixels): (B, HW, C); blocked: (B, 1, Q, HW)."""
        x = self.norm(queries) if self.pre_norm else queries
        queries = queries + self.multihead_attn(x + query_pos, key, value, blocked)
        return queries if self.pre_norm else self.norm(queries)


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
        x = self.norm(queries) if self.pre_norm else queries
        queries = queries + self.linear2(F.relu(self.linear1(x)))
        return queries if self.pre_norm else self.norm(queries)


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
            x = F.relu(layer(x))
        return self.layers[-1](x)
