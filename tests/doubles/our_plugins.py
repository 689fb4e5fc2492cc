"""Our plugins (csrc/trt_plugin) as the network's double has them: what they refuse, and what they compute, with torch."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch.nn import functional as F

from mask2former.modeling import shape_ops
from mask2former.modeling.pixel_decoder.ms_deform_attn_reference import ms_deform_attn_reference
from mask2former.modeling.transformer_decoder import attention_core, attention_cuda, mlp_cuda

from .trt_api import Refused

NAMESPACE = "d2_trt"
TYPE_NAMES = ("FLOAT", "HALF", "BF16")


class OurPlugin:
    """One plugin with its fields; subclasses mirror the cores of csrc/trt_plugin."""

    NAME = ""
    VERSION = "1"
    FIELDS: ClassVar[dict[str, type]] = {}

    def __init__(self, fields: dict[str, int | float], numbers: tuple[int, int]):
        """numbers: major and minor version of TensorRT."""
        self.fields = fields
        self._types = range(3) if numbers >= (10, 0) else range(2)

    def _is_type(self, *names: str) -> bool:
        return all(self.fields[name] in self._types for name in names)

    def possible(self) -> bool:
        """Whether the creator makes it: as a core's `check`."""
        raise NotImplementedError

    def input_types(self) -> list[str]:
        """Types that the inputs must have, by their names in DataType."""
        raise NotImplementedError

    def output_types(self) -> list[str]:
        raise NotImplementedError

    def compute(self, *inputs: torch.Tensor):
        """The output, or a tuple of them, in float32. Raises Refused where shapes do not fit."""
        raise NotImplementedError


class MsDeformAttn(OurPlugin):
    """Inputs: value (B, S, heads, D), sampling (B, S, heads * levels * points * 3), level sizes (levels, 2)."""

    NAME = "D2TRTMSDeformAttn"
    VERSION = "2"
    FIELDS: ClassVar = {"value_type": int, "sampling_type": int}

    def possible(self):
        value, sampling = self.fields["value_type"], self.fields["sampling_type"]
        return self._is_type("value_type", "sampling_type") and sampling in (0, value)

    def input_types(self):
        return [TYPE_NAMES[self.fields[name]] for name in ("value_type", "sampling_type")] + ["INT32"]

    def output_types(self):
        return [TYPE_NAMES[self.fields["value_type"]]]

    def compute(self, value, sampling, sizes):
        if [x.dim() for x in (value, sampling, sizes)] != [4, 3, 2]:
            raise Refused("ranks must be 4, 3, 2")
        heads, levels = value.shape[2], len(sizes)
        points, rest = divmod(sampling.shape[2], 3 * heads * levels)
        if sampling.shape[:2] != value.shape[:2] or rest:
            raise Refused(f"sampling {tuple(sampling.shape)} for a value of {tuple(value.shape)}")
        shapes = [tuple(size) for size in sizes.tolist()]
        if sum(h * w for h, w in shapes) != value.shape[1]:
            raise Refused(f"levels {shapes} in {value.shape[1]} rows")
        offsets, logits = sampling.split([sampling.shape[2] // 3 * 2, sampling.shape[2] // 3], 2)
        offsets = offsets.unflatten(2, (heads, levels, points, 2))
        logits = logits.unflatten(2, (heads, levels * points))
        return ms_deform_attn_reference(value, offsets, logits, shapes)


class Attention(OurPlugin):
    NAME = "D2TRTAttention"
    FIELDS: ClassVar = {"type": int, "heads": int, "masked": int, "part": int}

    def possible(self):
        masked, part = self.fields["masked"], self.fields["part"]
        half = self.fields["type"] != 0 and self._is_type("type")
        heads = 1 <= self.fields["heads"] <= 256
        return half and heads and masked in (0, 1) and part >= 0 and (masked == 1 or part == 0)

    def input_types(self):
        half = TYPE_NAMES[self.fields["type"]]
        return [half, half, half, half, "FLOAT", half] if self.fields["masked"] else [half, half]

    def output_types(self):
        return [TYPE_NAMES[self.fields["type"]]]

    def compute(self, q, pos, *others):
        if any(x.dim() != 3 for x in (q, pos, *others)):
            raise Refused("ranks must be 3")
        heads = self.fields["heads"]
        channels = q.shape[2] if others else q.shape[2] // 3
        mask_dim = others[2].shape[2] if others else 0
        if channels % heads or not attention_cuda.supported(heads, channels // heads, mask_dim):
            raise Refused(f"{heads} heads of {channels} channels with a mask of {mask_dim}")
        if tuple(pos.shape) != (1, q.shape[1], channels if others else 2 * channels):
            raise Refused(f"positions are {tuple(pos.shape)}")
        if not others:
            (q, k, v), (q_pos, k_pos) = q.chunk(3, 2), pos.chunk(2, 2)
            return attention_core.reference(q + q_pos, k + k_pos, v, heads)
        k, v, mask_embed, features = others
        part = slice(self.fields["part"] * channels, (self.fields["part"] + 1) * channels)
        k, v = k[:, :, part], v[:, :, part]
        keys = (q.shape[0], k.shape[1])
        wanted = {"k": (*keys, channels), "v": (*keys, channels), "features": (*keys, mask_dim)}
        wanted["mask_embed"] = (*q.shape[:2], mask_dim)
        given = {"k": k, "v": v, "features": features, "mask_embed": mask_embed}
        for name, shape in wanted.items():
            if tuple(given[name].shape) != shape:
                raise Refused(f"{name} is {tuple(given[name].shape)}, not {shape}")
        return attention_core.reference(q + pos, k, v, heads, mask_embed, features)


class LayerNorm(OurPlugin):
    """Inputs: x (..., C), weight (C), bias (C); where their types are not -1, a residual of x's shape, and a position of
    x's shape but for its first dimension, which is 1. With a position there is a second output: the first one plus that.
    """

    NAME = "D2TRTLayerNorm"
    VERSION = "2"
    FIELDS: ClassVar = {
        "x_type": int,
        "residual_type": int,
        "position_type": int,
        "out_type": int,
        "epsilon": float,
    }

    @property
    def _added(self) -> list[str]:
        return [name for name in ("residual_type", "position_type") if self.fields[name] != -1]

    def possible(self):
        return self._is_type("x_type", "out_type", *self._added) and self.fields["epsilon"] >= 0

    def input_types(self):
        types = [TYPE_NAMES[self.fields["x_type"]], "FLOAT", "FLOAT"]
        return types + [TYPE_NAMES[self.fields[name]] for name in self._added]

    def output_types(self):
        return [TYPE_NAMES[self.fields["out_type"]]] * (1 + ("position_type" in self._added))

    def compute(self, x, weight, bias, *added):
        given = dict(zip(self._added, added))
        residual, position = given.get("residual_type"), given.get("position_type")
        channels = x.shape[-1] if x.dim() else 0
        if weight.shape != (channels,) or bias.shape != (channels,):
            raise Refused(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} for x {tuple(x.shape)}")
        if residual is not None:
            if residual.shape != x.shape:
                raise Refused(f"a residual {tuple(residual.shape)} for x {tuple(x.shape)}")
            x = x + residual
        out = F.layer_norm(x, (channels,), weight, bias, self.fields["epsilon"])
        if position is None:
            return out
        if x.dim() < 2 or position.shape != (1, *x.shape[1:]):
            raise Refused(f"a position {tuple(position.shape)} for x {tuple(x.shape)}")
        return out, out + position


class GroupNorm(OurPlugin):
    """Inputs: x (B, C, H, W), weight (C), bias (C)."""

    NAME = "D2TRTGroupNorm"
    FIELDS: ClassVar = {
        "x_type": int,
        "out_type": int,
        "channels": int,
        "groups": int,
        "relu": int,
        "epsilon": float,
    }

    def possible(self):
        channels, groups = self.fields["channels"], self.fields["groups"]
        return (
            self._is_type("x_type", "out_type")
            and 1 <= groups <= channels
            and channels % groups == 0
            and self.fields["relu"] in (0, 1)
            and self.fields["epsilon"] >= 0
        )

    def input_types(self):
        return [TYPE_NAMES[self.fields["x_type"]], "FLOAT", "FLOAT"]

    def output_types(self):
        return [TYPE_NAMES[self.fields["out_type"]]]

    def compute(self, x, weight, bias):
        channels = self.fields["channels"]
        if [t.dim() for t in (x, weight, bias)] != [4, 1, 1]:
            raise Refused("ranks must be 4, 1, 1")
        if not x.shape[1] == len(weight) == len(bias) == channels:
            raise Refused(
                f"x {tuple(x.shape)}, {len(weight)} weights, {len(bias)} biases; made for {channels}"
            )
        out = F.group_norm(x, self.fields["groups"], weight, bias, self.fields["epsilon"])
        return out.relu() if self.fields["relu"] else out


class NormalizeImages(OurPlugin):
    """Inputs: images (B, C, H, W), mean (C), std (C)."""

    NAME = "D2TRTNormalizeImages"
    FIELDS: ClassVar = {"out_type": int, "channels": int}

    def possible(self):
        return self._is_type("out_type") and 1 <= self.fields["channels"] <= 1024

    def input_types(self):
        return ["FLOAT"] * 3

    def output_types(self):
        return [TYPE_NAMES[self.fields["out_type"]]]

    def compute(self, images, mean, std):
        if [t.dim() for t in (images, mean, std)] != [4, 1, 1]:
            raise Refused("ranks must be 4, 1, 1")
        if not images.shape[1] == len(mean) == len(std) == self.fields["channels"]:
            raise Refused(f"images {tuple(images.shape)}, {len(mean)} means, {len(std)} deviations")
        return (images - mean[:, None, None]) / std[:, None, None]


class WindowAttention(OurPlugin):
    """Inputs: qkv (B, H, W, 3 * C), its bias (3 * C), relative position bias (heads, 2 * window - 1, 2 * window - 1)."""

    NAME = "D2TRTWindowAttention"
    FIELDS: ClassVar = {
        "type": int,
        "heads": int,
        "dim": int,
        "window": int,
        "shift": int,
        "scale": float,
    }

    def possible(self):
        f = self.fields
        sizes = f["heads"] >= 1 and 1 <= f["window"] <= 12 and f["dim"] in (16, 32)
        return f["type"] != 0 and self._is_type("type") and sizes and 0 <= f["shift"] < f["window"]

    def input_types(self):
        return [TYPE_NAMES[self.fields["type"]], "FLOAT", "FLOAT"]

    def output_types(self):
        return [TYPE_NAMES[self.fields["type"]]]

    def compute(self, qkv, qkv_bias, bias):
        heads, dim, window, shift, scale = (
            self.fields[name] for name in ("heads", "dim", "window", "shift", "scale")
        )
        wide, span = 3 * heads * dim, 2 * window - 1
        shapes = (qkv.dim(), qkv.shape[-1], tuple(qkv_bias.shape), tuple(bias.shape))
        if shapes != (4, wide, (wide,), (heads, span, span)):
            raise Refused(
                f"qkv {tuple(qkv.shape)}, its bias {tuple(qkv_bias.shape)}, bias {tuple(bias.shape)}"
            )
        batch, height, width, _ = qkv.shape
        high, across = (-(-n // window) * window for n in (height, width))
        padded = qkv_bias.expand(batch, high, across, wide).clone()
        padded[:, :height, :width] = qkv
        shifted = torch.roll(padded, (-shift, -shift), (1, 2))
        parts = shape_ops.window_partition(shifted, window).unflatten(3, (3, heads, dim))
        q, k, v = parts.permute(3, 0, 1, 4, 2, 5)
        y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
        relative = bias[:, y[:, None] - y + window - 1, x[:, None] - x + window - 1]
        mask = shape_ops.shifted_window_mask(shifted, window, shift) if shift else None
        out = shape_ops.window_attention(q, k, v, relative, mask, scale).transpose(2, 3).flatten(3)
        out = torch.roll(shape_ops.window_reverse(out, window, shifted), (shift, shift), (1, 2))
        return out[:, :height, :width]


class LevelMaskFeatures(OurPlugin):
    NAME = "D2TRTLevelMaskFeatures"
    FIELDS: ClassVar = {"type": int, "factor": int}

    def possible(self):
        return self.fields["type"] != 0 and self._is_type("type") and 1 <= self.fields["factor"] <= 64

    def input_types(self):
        return [TYPE_NAMES[self.fields["type"]]]

    output_types = input_types

    def compute(self, features):
        if features.dim() != 4 or features.shape[1] % 8:
            raise Refused(f"mask features {tuple(features.shape)}")
        size = [-(-side // self.fields["factor"]) for side in features.shape[2:]]
        resized = F.interpolate(features, size, mode="bilinear", align_corners=False)
        return resized.flatten(2).transpose(1, 2)


class MaskProduct(OurPlugin):
    NAME = "D2TRTMaskProduct"
    FIELDS: ClassVar = {"type": int}

    def possible(self):
        return self.fields["type"] != 0 and self._is_type("type")

    def input_types(self):
        return ["FLOAT", TYPE_NAMES[self.fields["type"]]]

    def output_types(self):
        return ["FLOAT"]

    def compute(self, embed, features):
        same = embed.dim() == 3 and features.dim() == 4 and embed.shape[::2] == features.shape[:2]
        if not same or not attention_cuda.supported_mask_dim(embed.shape[2]):
            raise Refused(f"a mask embedding {tuple(embed.shape)} for mask features {tuple(features.shape)}")
        return (embed @ features.flatten(2)).unflatten(2, features.shape[2:])


class Mlp(OurPlugin):
    """Inputs: x (..., C), packed weights (words), biases of all layers, and the LayerNorm's weight and bias (2, C); where
    its type is not -1, a residual of x's shape.
    """

    NAME = "D2TRTMlp"
    VERSION = "2"
    FIELDS: ClassVar = {
        **dict.fromkeys(("type", "x_type", "residual_type", "out_type", "normed_type"), int),
        **dict.fromkeys(("layers", "channels", "hidden", "out", "after"), int),
        "epsilon": float,
    }

    @property
    def _widths(self) -> list[int]:
        f = self.fields
        return [f["channels"], *[f["hidden"]] * (f["layers"] - 1), f["out"]]

    def possible(self):
        f = self.fields
        normed = f["normed_type"] == -1 or (self._is_type("normed_type") and f["after"] == 0)
        residual = f["residual_type"] == -1 or (self._is_type("residual_type") and f["after"] == 1)
        dtype = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}.get(f["type"])
        return (
            self._is_type("x_type", "out_type")
            and normed
            and residual
            and f["after"] in (0, 1)
            and f["layers"] >= 1
            and mlp_cuda.supported(self._widths, f["after"] == 1, dtype)
            and f["epsilon"] >= 0
        )

    def input_types(self):
        types = [TYPE_NAMES[self.fields["x_type"]], "INT32", "FLOAT", "FLOAT"]
        residual = self.fields["residual_type"]
        return types if residual == -1 else [*types, TYPE_NAMES[residual]]

    def output_types(self):
        types = (self.fields["out_type"], self.fields["normed_type"])
        return [TYPE_NAMES[t] for t in types if t != -1]

    def _weights(self, words) -> list[torch.Tensor]:
        """(out, in) of each layer from what csrc/mlp/mlp.h calls packed."""
        exact, start, weights = self.fields["type"] == 0, 0, []
        half = torch.float16 if self.fields["type"] == 1 else torch.bfloat16
        numbers = words.to(torch.int32).view(half).float()
        for i, o in itertools.pairwise(self._widths):
            end = start + o * i * (2 if exact else 1)
            part, start = numbers[start:end], end
            # Eight output channels and four lanes' input channels in a block, of float32 as high and low parts.
            if exact:
                blocks = part.view(o // 8, i // 16, 8, 4, 2, 4).sum(4).flatten(3)
            else:
                blocks = part.view(o // 8, i // 32, 8, 32)
            weights.append(blocks.transpose(1, 2).reshape(o, i))
        return weights

    def compute(self, x, words, biases, norm, residual=None):
        widths = self._widths
        per_word = 1 if self.fields["type"] == 0 else 2
        count = sum(i * o for i, o in itertools.pairwise(widths)) // per_word
        shapes = (x.shape[-1:], words.shape, biases.shape, norm.shape)
        if shapes != ((widths[0],), (count,), (sum(widths[1:]),), (2, widths[0])):
            raise Refused(f"x, weights, biases and norm are {shapes}")
        residual = x if residual is None else residual
        if residual.shape != x.shape:
            raise Refused(f"a residual {tuple(residual.shape)} for x {tuple(x.shape)}")

        def normalized(v):
            return F.layer_norm(v, (widths[0],), norm[0], norm[1], self.fields["epsilon"])

        first = x if self.fields["after"] else normalized(x)
        out, layers = first, list(zip(self._weights(words), biases.split(widths[1:])))
        for i, (weight, bias) in enumerate(layers):
            out = F.linear(out if i == 0 else out.relu(), weight, bias)
        if self.fields["after"]:
            return normalized(residual + out)
        return out if self.fields["normed_type"] == -1 else (out, first)


KINDS = (
    Attention,
    GroupNorm,
    LayerNorm,
    LevelMaskFeatures,
    MaskProduct,
    Mlp,
    MsDeformAttn,
    NormalizeImages,
    WindowAttention,
)
OUR_PLUGINS = {cls.NAME: cls for cls in KINDS}
