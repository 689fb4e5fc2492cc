"""Masked-attention transformer decoder."""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
from detectron2.config import configurable
from detectron2.layers import Conv2d
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from .. import fused_ops, shape_ops
from . import attention_core
from .attention import MLP, CrossAttentionLayer, FFNLayer, PixelMemory, SelfAttentionLayer
from .position_encoding import PositionEmbeddingSine

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_MODULE")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders by name (MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME), built as cls(cfg, in_channels).
"""


def build_transformer_decoder(cfg, in_channels: int) -> nn.Module:
    """Decoder named by MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME for features of `in_channels` channels."""
    return TRANSFORMER_DECODER_REGISTRY.get(cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME)(cfg, in_channels)


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Learned queries, refined by layers of masked cross-attention, self-attention and a feed-forward network.

    Each cross-attention reads one of three levels in turn, coarse to fine, inside the mask that the layer before
    predicted. Those masks are the product of the query with the mask features resized to the level: resizing is
    linear, so this equals resizing the product, at a fraction of the work. Class logits and full-size masks of the
    layers before the last are made only in training.

    Source: Mask2Former (Cheng et al. 2022), section 3.2, and its release.
    """

    _version = 2

    @configurable
    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dim_feedforward: int,
        dec_layers: int,
        pre_norm: bool,
        mask_dim: int,
        enforce_input_project: bool,
    ):
        """
        Args:
            in_channels: channels of the three feature levels.
            num_classes: classes without "no object", for which one logit is added.
            dec_layers: cross-attention layers (MODEL.MASK_FORMER.DEC_LAYERS - 1: the release counts the prediction of
                the bare queries as a layer).
            enforce_input_project: project the features even where in_channels equals hidden_dim.
        """
        super().__init__()
        self.num_feature_levels = 3
        self.num_layers = dec_layers
        self.num_heads = nheads
        self.num_queries = num_queries
        self.pe_layer = PositionEmbeddingSine(hidden_dim // 2)
        self.pixel_memory = PixelMemory()

        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, nheads, pre_norm) for _ in range(dec_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, nheads, pre_norm) for _ in range(dec_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, dim_feedforward, pre_norm) for _ in range(dec_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)

        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(self.num_feature_levels, hidden_dim)
        self.input_proj = nn.ModuleList()
        for _ in range(self.num_feature_levels):
            if in_channels != hidden_dim or enforce_input_project:
                self.input_proj.append(Conv2d(in_channels, hidden_dim, kernel_size=1))
                weight_init.c2_xavier_fill(self.input_proj[-1])
            else:
                self.input_proj.append(nn.Identity())

        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg, in_channels):
        dec_layers = cfg.MODEL.MASK_FORMER.DEC_LAYERS
        if dec_layers < 1:
            raise ValueError(f"MODEL.MASK_FORMER.DEC_LAYERS is {dec_layers}; it must be at least 1")
        return {
            "in_channels": in_channels,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": cfg.MODEL.MASK_FORMER.HIDDEN_DIM,
            "num_queries": cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES,
            "nheads": cfg.MODEL.MASK_FORMER.NHEADS,
            "dim_feedforward": cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD,
            "dec_layers": dec_layers - 1,
            "pre_norm": cfg.MODEL.MASK_FORMER.PRE_NORM,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ,
        }

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Checkpoints of the first version call the queries static_query. The key tells, not the version number, which
        # a plain dict of weights does not carry.
        old, new = prefix + "static_query.weight", prefix + "query_feat.weight"
        if old in state_dict and new not in state_dict:
            state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, features: list[Tensor], mask_features: Tensor) -> dict:
        """Class logits and mask logits of every query.

        Args:
            features: three levels, coarse to fine (strides 32, 16, 8), each (B, C, h, w).
            mask_features: (B, mask_dim, H/4, W/4).

        Returns:
            "pred_logits" (B, Q, num_classes + 1; the last is "no object") and "pred_masks" (B, Q, H/4, W/4) of the last
            layer; in training also "aux_outputs", a list with the same two of each layer before.
        """
        attentions = [layer.multihead_attn for layer in self.transformer_cross_attention_layers]
        memories = []
        # With fewer layers than levels, the last levels are read by none.
        for i, x in enumerate(features[: self.num_layers]):
            readers = attentions[i :: self.num_feature_levels]
            level_embed = self.level_embed.weight[i]
            memories.append(
                self.pixel_memory(
                    self.input_proj[i](x), self.pe_layer(x), level_embed, mask_features, readers
                )
            )

        query_pos = self.query_embed.weight[None]
        # (1, Q, C) until the first layer: what depends on weights alone is the same for every image.
        queries = self.query_feat.weight[None]

        aux_outputs = []
        for i in range(self.num_layers):
            part, level = divmod(i, self.num_feature_levels)
            if self.training:
                normed, mask_embed = fused_ops.norm_and_mlp(queries, self.decoder_norm, self.mask_embed)
                aux_outputs.append(self._predict(normed, mask_embed, mask_features))
            else:
                mask_embed = fused_ops.mlp_of_norm(queries, self.decoder_norm, self.mask_embed)
            keys, values, level_mask_features = memories[level]
            queries = self.transformer_cross_attention_layers[i](
                queries, query_pos, keys, values, part, mask_embed, level_mask_features
            )
            queries = self.transformer_self_attention_layers[i](queries, query_pos)
            queries = self.transformer_ffn_layers[i](queries)

        normed, mask_embed = fused_ops.norm_and_mlp(queries, self.decoder_norm, self.mask_embed)
        outputs = self._predict(normed, mask_embed, mask_features)
        if self.training:
            outputs["aux_outputs"] = aux_outputs
        return outputs

    def _predict(self, normed: Tensor, mask_embed: Tensor, mask_features: Tensor) -> dict:
        """normed and mask_embed (B or 1, Q, C), mask_features (B, mask_dim, H/4, W/4)."""
        mask_embed = shape_ops.expand_batch_like(mask_embed, mask_features)
        return {
            "pred_logits": shape_ops.expand_batch_like(self.class_embed(normed), mask_features),
            "pred_masks": attention_core.mask_product(mask_embed, mask_features),
        }
