"""Swin Transformer backbone."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import shape_ops


class DropPath(nn.Module):
    """Drops the residual branch of whole samples in training (stochastic depth, Huang et al. 2016)."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for each relative position."""

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.attn_drop = attn_drop

        span = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span * span, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        position = torch.arange(window_size)
        y, x = position.repeat_interleave(window_size), position.repeat(window_size)
        relative_y = y[:, None] - y[None, :] + window_size - 1
        relative_x = x[:, None] - x[None, :] + window_size - 1
        # Persistent: the release's checkpoints hold it.
        self.register_buffer("relative_position_index", relative_y * span + relative_x)

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def relative_position_bias(self) -> Tensor:
        """(heads, N, N) with N = window_size ** 2."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()].unflatten(0, index.shape)
        return bias.permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend inside each window.

        Args:
            x: (B, windows, N, C).
            mask: (windows, N, N) to add to the logits, or None.

        Returns:
            (B, windows, N, C).
        """
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each (B, windows, heads, N, D)
        dropout = self.attn_drop if self.training else 0.0
        out = shape_ops.window_attention(q, k, v, self.relative_position_bias(), mask, self.scale, dropout)
        return self.proj_drop(self.proj(out.transpose(2, 3).flatten(3)))


def attend_in_windows(
    x: Tensor, attention: WindowAttention, window_size: int, shift: int, mask: Tensor | None
) -> Tensor:
    """Window attention of a map of any size: padded to whole windows, shifted, and back.

    Args:
        x: (B, H, W, C).
        window_size, shift: in pixels.
        mask: shifted_window_mask's of the padded map, where shift is not 0.

    Returns:
        (B, H, W, C).
    """
    padded = shape_ops.pad_to_multiple(x, window_size)
    shifted = torch.roll(padded, shifts=(-shift, -shift), dims=(1, 2)) if shift > 0 else padded
    windows = attention(shape_ops.window_partition(shifted, window_size), mask)
    out = shape_ops.window_reverse(windows, window_size, padded)
    if shift > 0:
        out = torch.roll(out, shifts=(shift, shift), dims=(1, 2))
    return shape_ops.crop_like(out, x)


class SwinTransformerBlock(nn.Module):
    """Window attention, shifted by `shift_size` pixels, and an MLP, each with LayerNorm before it and residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); mask is shifted_window_mask's where the block shifts."""
        attended = attend_in_windows(self.norm1(x), self.attn, self.window_size, self.shift_size, mask)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Joins each 2x2 pixels: half the size, twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 * C)."""
        x = shape_ops.pad_to_multiple(x, 2)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        return self.reduction(self.norm(x))


class BasicLayer(nn.Module):
    """One stage: blocks in which every second one shifts its windows, then patch merging."""

    def __init__(
        self, dim: int, depth: int, window_size: int, drop_path: list[float], downsample: bool, **block
    ):
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                dim,
                window_size=window_size,
                shift_size=window_size // 2 if i % 2 else 0,
                drop_path=drop_path[i],
                **block,
            )
            for i in range(depth)
        )
        self.downsample = PatchMerging(dim) if downsample else None

    def forward(self, x: Tensor, use_checkpoint: bool = False) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C): the blocks, without the patch merging."""
        padded = shape_ops.pad_to_multiple(x, self.window_size)
        mask = shape_ops.shifted_window_mask(padded, self.window_size, self.window_size // 2)
        for block in self.blocks:
            block_mask = mask if block.shift_size else None
            x = (
                checkpoint(block, x, block_mask, use_reentrant=False)
                if use_checkpoint
                else block(x, block_mask)
            )
        return x


class PatchEmbed(nn.Module):
    """Patches of the image as pixels of a smaller map."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, norm: bool):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ceil(H / patch), ceil(W / patch), C)."""
        x = shape_ops.pad_to_multiple(x.permute(0, 2, 3, 1), self.patch_size)
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SwinTransformer(nn.Module):
    """Hierarchical transformer with shifted windows, channels last inside.

    Source: Swin Transformer (Liu et al. 2021); module names are those of the Mask2Former release.
    """

    def __init__(
        self,
        pretrain_img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
    ):
        """
        Args:
            pretrain_img_size: pixels; the size of the absolute position embedding, where `ape` is on.
            drop_path_rate: stochastic depth of the last block; the first has 0, in between it grows evenly.
            use_checkpoint: recompute blocks in the backward pass, for less memory.
        """
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.num_features = [embed_dim * 2**i for i in range(len(depths))]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_norm)
        self.absolute_pos_embed = None
        if ape:
            size = pretrain_img_size // patch_size
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, size, size))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)

        drop_path = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            self.layers.append(
                BasicLayer(
                    self.num_features[i],
                    depth,
                    window_size,
                    drop_path=drop_path[first : first + depth],
                    downsample=i < len(depths) - 1,
                    num_heads=num_heads[i],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                )
            )
            self.add_module(f"norm{i}", nn.LayerNorm(self.num_features[i]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised image -> "res2".."res5", each (B, C, H/stride, W/stride), strides 4 to 32."""
        x = self.patch_embed(x)  # (B, H/4, W/4, C)
        if self.absolute_pos_embed is not None:
            embed = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + embed.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        outputs = {}
        for i, layer in enumerate(self.layers):
            x = layer(x, use_checkpoint=self.use_checkpoint and self.training)
            outputs[f"res{i + 2}"] = getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2).contiguous()
            if layer.downsample is not None:
                x = layer.downsample(x)
        return outputs


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(SwinTransformer, Backbone):
    """SwinTransformer behind detectron2's Backbone interface, from the keys under MODEL.SWIN."""

    def __init__(self, cfg, input_shape: ShapeSpec):
        swin = cfg.MODEL.SWIN
        super().__init__(
            pretrain_img_size=swin.PRETRAIN_IMG_SIZE,
            patch_size=swin.PATCH_SIZE,
            in_chans=input_shape.channels,
            embed_dim=swin.EMBED_DIM,
            depths=tuple(swin.DEPTHS),
            num_heads=tuple(swin.NUM_HEADS),
            window_size=swin.WINDOW_SIZE,
            mlp_ratio=swin.MLP_RATIO,
            qkv_bias=swin.QKV_BIAS,
            qk_scale=swin.QK_SCALE,
            drop_rate=swin.DROP_RATE,
            attn_drop_rate=swin.ATTN_DROP_RATE,
            drop_path_rate=swin.DROP_PATH_RATE,
            ape=swin.APE,
            patch_norm=swin.PATCH_NORM,
            use_checkpoint=swin.USE_CHECKPOINT,
        )
        stages = {f"res{i + 2}": i for i in range(len(self.num_features))}
        unknown = [name for name in swin.OUT_FEATURES if name not in stages]
        if unknown:
            raise ValueError(f"MODEL.SWIN.OUT_FEATURES names {unknown}; this backbone has {list(stages)}")
        self._out_features = list(swin.OUT_FEATURES)
        self._out_feature_strides = {name: swin.PATCH_SIZE * 2**i for name, i in stages.items()}
        self._out_feature_channels = {name: self.num_features[i] for name, i in stages.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The features that MODEL.SWIN.OUT_FEATURES names; see SwinTransformer.forward."""
        outputs = super().forward(x)
        return {name: outputs[name] for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        return 32
