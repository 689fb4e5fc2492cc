"""Pixel decoder: a deformable-attention encoder over three levels and an FPN step to stride 4."""

from __future__ import annotations

import math

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from .. import fused_ops, shape_ops
from ..transformer_decoder.position_encoding import PositionEmbeddingSine
from .ms_deform_attn import MSDeformAttn

# The release fixes the encoder's feed-forward width; MODEL.MASK_FORMER.DIM_FEEDFORWARD is the decoder's.
ENCODER_DIM_FEEDFORWARD = 1024
# The transformer decoder reads three levels, whatever the encoder's number.
NUM_DECODER_LEVELS = 3


class MSDeformAttnTransformerEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with residual and LayerNorm after it."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self, x: Tensor, query: Tensor, pos: Tensor | None, spatial_shapes: shape_ops.LevelShapes
    ) -> tuple[Tensor, Tensor | None]:
        """One step of the encoder.

        Args:
            x: (B, S, C).
            query: (B, S, C), x with the positions added, which only the queries have.
            pos: (1, S, C), the positions, or None in the last layer.
            spatial_shapes: (height, width) of each level, S pixels together.

        Returns:
            x and query of the next layer; in the last one the second is None.
        """
        attended = self.dropout1(self.self_attn(query, x, spatial_shapes))
        x = fused_ops.residual_layer_norm(x, attended, self.norm1)
        ffn = self.dropout3(self.linear2(self.dropout2(fused_ops.linear_relu(x, self.linear1))))
        if pos is None:
            return fused_ops.residual_layer_norm(x, ffn, self.norm2), None
        return fused_ops.residual_layer_norm_and_position(x, ffn, self.norm2, pos)


class MSDeformAttnTransformerEncoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, pos: Tensor, spatial_shapes: shape_ops.LevelShapes) -> Tensor:
        """(B, S, C) -> (B, S, C); pos (1, S, C) is added to the queries of every layer."""
        query = fused_ops.add_position(x, pos)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x, query = layer(x, query, pos if i < last else None, spatial_shapes)
        return x


class MSDeformAttnTransformerEncoderOnly(nn.Module):
    """Encodes the pixels of several levels together."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_encoder_layers: int,
        dim_feedforward: int,
        dropout: float,
        num_feature_levels: int,
        n_points: int,
    ):
        super().__init__()
        self.encoder = MSDeformAttnTransformerEncoder(
            [
                MSDeformAttnTransformerEncoderLayer(
                    d_model, dim_feedforward, dropout, num_feature_levels, nhead, n_points
                )
                for _ in range(num_encoder_layers)
            ]
        )
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        nn.init.normal_(self.level_embed)

    def forward(self, features: list[Tensor], positions: list[Tensor]) -> list[Tensor]:
        """Encoded levels.

        Args:
            features: levels (B, C, h, w), coarse to fine.
            positions: their position encodings (1, C, h, w).

        Returns:
            The levels in the same order and shape.
        """
        spatial_shapes = shape_ops.level_shapes(features)
        pixels = torch.cat([x.flatten(2) for x in features], dim=2).transpose(1, 2)  # (B, S, C)
        pos = [p.flatten(2) + self.level_embed[i][None, :, None] for i, p in enumerate(positions)]
        pos = torch.cat(pos, dim=2).transpose(1, 2)  # (1, S, C)
        memory = self.encoder(pixels, pos, spatial_shapes)
        return shape_ops.split_levels(memory, spatial_shapes)


class ConvNormReLU(Conv2d):
    """detectron2's Conv2d with a ReLU after its norm."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H, W)."""
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if isinstance(self.norm, nn.GroupNorm):
            return fused_ops.group_norm_relu(x, self.norm)
        return F.relu(x if self.norm is None else self.norm(x))


@SEM_SEG_HEADS_REGISTRY.register()
class MSDeformAttnPixelDecoder(nn.Module):
    """Backbone features -> stride-4 mask features and three encoded levels.

    Source: Mask2Former (Cheng et al. 2022), section 3.2.1, and its release, whose module names it keeps
    (`adapter_N` are the lateral convolutions of the FPN step, `layer_N` its output convolutions).
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        transformer_dropout: float,
        transformer_nheads: int,
        transformer_dim_feedforward: int,
        transformer_enc_layers: int,
        transformer_n_points: int,
        conv_dim: int,
        mask_dim: int,
        norm: str,
        transformer_in_features: list[str],
        common_stride: int,
    ):
        """
        Args:
            input_shape: channels and stride of every backbone feature used.
            transformer_in_features: those that the encoder reads.
            common_stride: stride of the mask features.
        """
        super().__init__()
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        encoded = [(name, shape) for name, shape in by_stride if name in transformer_in_features]
        if len(encoded) < NUM_DECODER_LEVELS:
            raise ValueError(
                f"the pixel decoder needs {NUM_DECODER_LEVELS} levels, got {[n for n, _ in encoded]}. Set "
                "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES, and list its names in "
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES (now {sorted(input_shape)})"
            )
        # Coarse to fine from here on.
        self.transformer_in_features = [name for name, _ in encoded[::-1]]
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(shape.channels, conv_dim, kernel_size=1), nn.GroupNorm(32, conv_dim))
            for _, shape in encoded[::-1]
        )
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)

        self.pe_layer = PositionEmbeddingSine(conv_dim // 2)
        self.transformer = MSDeformAttnTransformerEncoderOnly(
            d_model=conv_dim,
            nhead=transformer_nheads,
            num_encoder_layers=transformer_enc_layers,
            dim_feedforward=transformer_dim_feedforward,
            dropout=transformer_dropout,
            num_feature_levels=len(encoded),
            n_points=transformer_n_points,
        )

        num_fpn_levels = int(math.log2(encoded[0][1].stride) - math.log2(common_stride))
        self.fpn_in_features = [name for name, _ in by_stride[:num_fpn_levels]][::-1]
        for i, (_, shape) in enumerate(by_stride[:num_fpn_levels], start=1):
            lateral = Conv2d(
                shape.channels, conv_dim, kernel_size=1, bias=norm == "", norm=get_norm(norm, conv_dim)
            )
            output = ConvNormReLU(
                conv_dim, conv_dim, kernel_size=3, padding=1, bias=norm == "", norm=get_norm(norm, conv_dim)
            )
            weight_init.c2_xavier_fill(lateral)
            weight_init.c2_xavier_fill(output)
            self.add_module(f"adapter_{i}", lateral)
            self.add_module(f"layer_{i}", output)

        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg, input_shape):
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "transformer_dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            # As in the release, not head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS, which nothing reads.
            "transformer_nheads": cfg.MODEL.MASK_FORMER.NHEADS,
            "transformer_n_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            "transformer_dim_feedforward": ENCODER_DIM_FEEDFORWARD,
            "transformer_enc_layers": head.TRANSFORMER_ENC_LAYERS,
            "transformer_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "common_stride": head.COMMON_STRIDE,
        }

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode backbone features, in float32 also under autocast, as the release does.

        Args:
            features: backbone features by name, each (B, C, H/stride, W/stride).

        Returns:
            mask features (B, mask_dim, H/4, W/4), and three levels (B, conv_dim, h, w), coarse to fine.
        """
        device_type = next(iter(features.values())).device.type
        with torch.autocast(device_type, enabled=False):
            inputs = [features[name].float() for name in self.transformer_in_features]
            projected = [projection(x) for projection, x in zip(self.input_proj, inputs)]
            levels = self.transformer(projected, [self.pe_layer(x) for x in inputs])
            for i, name in enumerate(self.fpn_in_features):
                number = len(self.fpn_in_features) - i
                lateral = getattr(self, f"adapter_{number}")(features[name].float())
                top_down = shape_ops.resize_like(levels[-1], lateral)
                levels.append(getattr(self, f"layer_{number}")(lateral + top_down))
            return self.mask_features(levels[-1]), levels[:NUM_DECODER_LEVELS]
