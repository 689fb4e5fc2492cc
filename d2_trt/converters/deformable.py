"""Converters of multi-scale deformable attention: our plugin, NVIDIA's, or TensorRT's own layers."""

from __future__ import annotations

import weakref

import numpy as np
import torch

from .. import compat, plugin
from ..errors import ConversionError
from .layers import linear
from .registry import DECLINED, converts

_F32 = {"compute": torch.float32, "out": torch.float32}
# Sizes of a pyramid's levels as a tensor, by graph: all layers of the encoder share it.
_level_sizes_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@converts("mask2former.modeling.pixel_decoder.ms_deform_attn.MSDeformAttnCore.forward")
def ms_deform_attn_core(g, result, module, value, sampling_offsets, attention_logits, spatial_shapes):
    maps = [g.tensor(m) for m in spatial_shapes.maps]
    sizes = [(g.size(m, 2), g.size(m, 3)) for m in maps]
    value, offsets, logits = g.tensor(value), g.tensor(sampling_offsets), g.tensor(attention_logits)
    if g.msda == "plugin":
        value_dtype, sampling_dtype = _plugin_types(g, g.current_module().removesuffix(".core"))
        parts = [g.cast(t, sampling_dtype) for t in (offsets, logits)]
        sampling = g.concat([g.reshape(t, [*g.sizes(t)[:2], -1]) for t in parts], 2)
        return _plugin(g, value, sampling, sizes, value_dtype, sampling_dtype)
    weights = g.softmax(logits, -1, **_F32)
    locations = _locations(g, offsets, sizes)
    points = sampling_offsets.shape[4]
    compute = {"stock": _stock_plugin, "native": _native}[g.msda]
    return compute(g, value, locations, weights, sizes, points)


@converts("mask2former.modeling.pixel_decoder.ms_deform_attn.MSDeformAttn.forward")
def ms_deform_attn(g, result, module, query, pixels, spatial_shapes):
    """Offsets and logits by one linear layer, as our plugin takes them, where the policy has one type for both."""
    offsets, logits = module.sampling_offsets, module.attention_weights
    name = g.current_module()
    dtypes = {g.compute_dtype(f"{name}.{part}") for part in ("sampling_offsets", "attention_weights")}
    if g.msda != "plugin" or len(dtypes) > 1:
        return DECLINED
    value_dtype, sampling_dtype = _plugin_types(g, name)
    with g.inside(module.value_proj):
        value = linear(g, None, g.tensor(pixels), module.value_proj.weight, module.value_proj.bias)
        value = g.reshape(value, [*g.sizes(value)[:2], module.n_heads, module.head_dim])
    with g.inside(offsets):
        weight, bias = (
            torch.cat([getattr(part, k) for part in (offsets, logits)]) for k in ("weight", "bias")
        )
        sampling = linear(g, None, g.tensor(query), weight, bias)
    with g.inside(module.core):
        sizes = [(g.size(m, 2), g.size(m, 3)) for m in map(g.tensor, spatial_shapes.maps)]
        out = _plugin(g, value, sampling, sizes, value_dtype, sampling_dtype)
    with g.inside(module.output_proj):
        return linear(g, None, out, module.output_proj.weight, module.output_proj.bias)


def _plugin_types(g, module: str) -> tuple[torch.dtype, torch.dtype]:
    """Types in which our plugin takes the value, and offsets and logits, in an MSDeformAttn.

    It computes in float32 whatever it is given. It takes each tensor in the type in which the linear layer before it gives
    it, as the precision policy says; float32 for offsets and logits where those differ from the value's. So a cast would
    change no number, and casts there are none.
    """
    dtypes = {
        name: g.compute_dtype(f"{module}.{name}")
        for name in ("value_proj", "sampling_offsets", "attention_weights")
    }
    value_dtype = dtypes["value_proj"]
    return value_dtype, value_dtype if len(set(dtypes.values())) == 1 else torch.float32


def _plugin(g, value, sampling, sizes, value_dtype: torch.dtype, sampling_dtype: torch.dtype):
    """value (B, S, heads, D); sampling (B, S, heads * levels * points * 3), each pixel's offsets, then its logits."""
    inputs = [g.cast(value, value_dtype), g.cast(sampling, sampling_dtype), _level_sizes(g, sizes)]
    types = {"value_type": value_dtype, "sampling_type": sampling_dtype}
    return g.plugin(plugin.MSDA, inputs, types, value_dtype)


def _level_sizes(g, sizes):
    """(levels, 2) int32 on the device: height and width of each level."""
    made = _level_sizes_of.setdefault(g, {})
    key = tuple(sizes)
    if key not in made:
        rows = [g.shape_tensor([height, width]) for height, width in sizes]
        layer = g.network.add_shuffle(g.cast(g.network.add_concatenation(rows).get_output(0), torch.int32))
        layer.reshape_dims = (len(sizes), 2)
        made[key] = layer.get_output(0)
    return made[key]


def _locations(g, offsets, sizes):
    """Sampling points as fractions of each level: (B, S, heads, levels, points, 2) float32."""
    centers, pixel_sizes = [], []
    for height, width in sizes:
        y, x = (
            g.elementwise("DIV", g.elementwise("SUM", g.iota(n), 0.5, **_F32), g.to_float(n), **_F32)
            for n in (height, width)
        )
        whole = [height, width, 1]
        x = g.expand(g.reshape(x, [1, width, 1]), whole)
        y = g.expand(g.reshape(y, [height, 1, 1]), whole)
        centers.append(g.reshape(g.concat([x, y], 2), [g.mul(height, width), 2]))
        sides = g.concat([g.to_float(width), g.to_float(height)], 0)
        pixel_sizes.append(g.reshape(g.elementwise("DIV", 1.0, sides, **_F32), [1, 2]))
    center = g.concat(centers, 0)  # (S, 2)
    center = g.reshape(center, [1, g.size(center, 0), 1, 1, 1, 2])
    pixel = g.reshape(g.concat(pixel_sizes, 0), [1, 1, 1, len(sizes), 1, 2])
    return g.elementwise("SUM", g.elementwise("PROD", offsets, pixel, **_F32), center, **_F32)


def _stock_plugin(g, value, locations, weights, sizes, points):
    """NVIDIA's plugin. Its float16 kernel rounds coordinates to half, so it always gets float32."""
    creator = compat.plugin_creator(plugin.STOCK)
    if creator is None:
        raise ConversionError(
            f"TensorRT's plugin {plugin.STOCK} is not registered: is libnvinfer_plugin installed? "
            "MODEL.TENSORRT.MSDA native does without it"
        )
    made = creator.create_plugin("msda", g.trt.PluginFieldCollection([]))
    starts, start = [], 0
    for height, width in sizes:
        starts.append(g.shape_tensor([start]))
        start = g.add(start, g.mul(height, width))
    starts = g.cast(g.network.add_concatenation(starts).get_output(0), torch.int32)
    heads = value.shape[2]
    weights = g.reshape(weights, [g.size(weights, 0), g.size(weights, 1), heads, len(sizes), points])

    def add(v, locations, weights):
        inputs = [v, _level_sizes(g, sizes), starts, locations, weights]
        if hasattr(g.network, "add_plugin_v2"):
            return g.network.add_plugin_v2(inputs, made)
        raise ConversionError("this TensorRT has no add_plugin_v2; use MODEL.TENSORRT.MSDA native")

    # Cast outright, also where networks are weakly typed: a plugin takes no other type than the tensor's.
    inputs = [g.cast(t, torch.float32) for t in (value, locations, weights)]
    out = add(*inputs).get_output(0)  # (B, S, heads, D)
    return g.reshape(out, [g.size(out, 0), g.size(out, 1), heads * value.shape[3]])


def _native(g, value, locations, weights, sizes, points):
    """Gathers and sums, for where no plugin is to be had: right, and slow."""
    batch, pixels, heads, dim = (g.size(value, i) for i in range(4))
    value = g.transpose(value, (0, 2, 1, 3))  # (B, heads, S, D)
    locations = g.transpose(locations, (0, 2, 1, 3, 4, 5))  # (B, heads, S, levels, points, 2)
    weights = g.transpose(weights, (0, 2, 1, 3))  # (B, heads, S, levels * points)
    total, start = None, 0
    for level, (height, width) in enumerate(sizes):
        count = g.mul(height, width)
        level_value = g.slice(value, [0, 0, start, 0], [batch, heads, count, dim])
        level_value = g.reshape(level_value, [g.mul(batch, heads), count, dim])
        start = g.add(start, count)

        def coordinate(index, size, level=level):
            part = g.slice(locations, [0, 0, 0, level, 0, index], [batch, heads, pixels, 1, points, 1])
            part = g.reshape(part, [batch, heads, pixels, points])
            length = g.tensor(g.to_float(size), 4)
            return g.elementwise("SUB", g.elementwise("PROD", part, length, **_F32), 0.5, **_F32), length

        (x, w), (y, h) = coordinate(0, width), coordinate(1, height)
        x0, y0 = g.unary("FLOOR", x, **_F32), g.unary("FLOOR", y, **_F32)
        weight = g.slice(weights, [0, 0, 0, level * points], [batch, heads, pixels, points])
        for dx in (0.0, 1.0):
            for dy in (0.0, 1.0):
                xi, yi = g.elementwise("SUM", x0, dx, **_F32), g.elementwise("SUM", y0, dy, **_F32)
                share = weight
                inside = None
                for at, corner, length in ((x, xi, w), (y, yi, h)):
                    gap = g.unary("ABS", g.elementwise("SUB", at, corner, **_F32), **_F32)
                    share = g.elementwise("PROD", share, g.elementwise("SUB", 1.0, gap, **_F32), **_F32)
                    high = g.elementwise("SUB", length, 0.5, **_F32)
                    for test in (
                        g.elementwise("GREATER", corner, -0.5, **_F32),
                        g.elementwise("LESS", corner, high, **_F32),
                    ):
                        inside = test if inside is None else g.elementwise("AND", inside, test)
                share = g.select(inside, share, g.tensor(0.0, 4))
                clamped = []
                for corner, length in ((xi, w), (yi, h)):
                    last = g.elementwise("SUB", length, 1.0, **_F32)
                    clamped.append(
                        g.elementwise("MIN", g.elementwise("MAX", corner, 0.0, **_F32), last, **_F32)
                    )
                index = g.elementwise("SUM", g.elementwise("PROD", clamped[1], w, **_F32), clamped[0], **_F32)
                # One batch dimension: TensorRT 8.6 gathers with no more.
                index = g.cast(index, torch.int32)
                flat = g.reshape(index, [g.mul(batch, heads), g.mul(pixels, points)])

                def gather(v, flat=flat):
                    layer = g.network.add_gather_v2(v, flat, g.trt.GatherMode.DEFAULT)
                    layer.axis, layer.num_elementwise_dims = 1, 1
                    return layer

                sample = g.emit(gather, level_value)  # (B * heads, S * points, D)
                sample = g.reshape(sample, [batch, heads, pixels, points, dim])
                weighted = g.elementwise("PROD", sample, g.reshape(share, [batch, heads, pixels, points, 1]))
                part = g.emit(
                    lambda t: g.network.add_reduce(t, g.trt.ReduceOperation.SUM, 1 << 3, False),
                    weighted,
                    **_F32,
                )
                total = part if total is None else g.elementwise("SUM", total, part, **_F32)
    out = g.transpose(total, (0, 2, 1, 3))  # (B, S, heads, D)
    return g.reshape(out, [g.size(out, 0), g.size(out, 1), int(np.prod([heads, dim]))])
