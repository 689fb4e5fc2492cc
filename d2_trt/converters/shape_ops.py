"""Converters of mask2former.modeling.shape_ops and of the position encodings: all that depends on a map's size.

Where the sizes are fixed, what depends on nothing else is left untraced: what PyTorch makes of it becomes a constant.
"""

from __future__ import annotations

import math

import torch

from mask2former.modeling.shape_ops import LevelShapes

from .location import size_error
from .registry import converts, traced_tensors

_OPS = "mask2former.modeling.shape_ops."


class _UnknownShapes(LevelShapes):
    """Shapes that only functions which are converted as a whole may read: in an engine for a range of sizes they differ."""

    def __getitem__(self, index):
        self._check()
        return super().__getitem__(index)

    def __iter__(self):
        self._check()
        return super().__iter__()

    def _check(self) -> None:
        if self.graph.memory.outside():
            raise size_error(self.graph, "level_shapes")


@converts(_OPS + "level_shapes")
def level_shapes(g, result, maps):
    """The converters that take the shapes read them from the maps."""
    if any(size < 0 for source in maps for size in g.tensor(source).shape[2:]):
        result.graph = g
        result.__class__ = _UnknownShapes


@converts(_OPS + "split_levels")
def split_levels(g, result, pixels, shapes):
    x = g.tensor(pixels)  # (B, S, C)
    batch, channels = g.size(x, 0), g.size(x, 2)
    start, levels = 0, []
    for source in shapes.maps:
        height, width = g.size(g.tensor(source), 2), g.size(g.tensor(source), 3)
        count = g.mul(height, width)
        # Transposed after the slice: where rows are wanted of the map again, the two transpositions meet and cancel.
        part = g.transpose(g.slice(x, [0, start, 0], [batch, count, channels]), (0, 2, 1))
        levels.append(g.reshape(part, [g.size(part, 0), channels, height, width]))
        start = g.add(start, count)
    return levels


@converts(_OPS + "unflatten_like")
def unflatten_like(g, result, x, reference):
    t, r = g.tensor(x), g.tensor(reference)
    return g.reshape(t, [g.size(t, 0), g.size(t, 1), g.size(r, 2), g.size(r, 3)])


@converts(_OPS + "resize_like")
def resize_like(g, result, x, reference):
    r = g.tensor(reference)

    def add(t):
        layer = g.network.add_resize(t)
        sizes = [g.size(t, 0), g.size(t, 1), g.size(r, 2), g.size(r, 3)]
        if all(isinstance(s, int) for s in sizes):
            layer.shape = tuple(sizes)
        else:
            layer.set_input(1, g.shape_tensor(sizes))
        layer.resize_mode = g.trt.InterpolationMode.LINEAR
        layer.coordinate_transformation = g.trt.ResizeCoordinateTransformation.HALF_PIXEL
        return layer

    return g.emit(add, g.tensor(x))


@converts(_OPS + "expand_batch_like")
def expand_batch_like(g, result, x, reference):
    r = g.tensor(reference)
    if r.shape[0] >= 0 and not traced_tensors(x):
        return None
    t = g.tensor(x)
    return t if t.shape[0] != 1 else g.expand(t, [g.size(r, 0), *g.sizes(t)[1:]])


@converts(_OPS + "pad_to_multiple")
def pad_to_multiple(g, result, x, multiple):
    t = g.tensor(x)
    batch, height, width, channels = g.sizes(t)
    padded = [batch, g.ceil_to(height, multiple), g.ceil_to(width, multiple), channels]
    return g.slice(t, [0] * 4, padded, fill=True)


@converts(_OPS + "crop_like")
def crop_like(g, result, x, reference):
    t, r = g.tensor(x), g.tensor(reference)
    return g.slice(t, [0] * 4, [g.size(t, 0), g.size(r, 1), g.size(r, 2), g.size(t, 3)])


def _partition(g, t, window_size: int):
    batch, height, width, channels = g.sizes(t)
    rows, columns = g.floordiv(height, window_size), g.floordiv(width, window_size)
    t = g.reshape(t, [batch, rows, window_size, columns, window_size, channels])
    t = g.transpose(t, (0, 1, 3, 2, 4, 5))
    return g.reshape(t, [batch, g.mul(rows, columns), window_size * window_size, channels])


@converts(_OPS + "window_partition")
def window_partition(g, result, x, window_size):
    return _partition(g, g.tensor(x), window_size)


@converts(_OPS + "window_reverse")
def window_reverse(g, result, windows, window_size, reference):
    t, r = g.tensor(windows), g.tensor(reference)
    batch, height, width = g.size(t, 0), g.size(r, 1), g.size(r, 2)
    rows, columns = g.floordiv(height, window_size), g.floordiv(width, window_size)
    t = g.reshape(t, [batch, rows, columns, window_size, window_size, g.size(t, 3)])
    t = g.transpose(t, (0, 1, 3, 2, 4, 5))
    return g.reshape(t, [batch, height, width, g.size(t, 5)])


@converts(_OPS + "shifted_window_mask")
def shifted_window_mask(g, result, x, window_size, shift):
    t = g.tensor(x)
    height, width = g.size(t, 1), g.size(t, 2)
    if isinstance(height, int) and isinstance(width, int):
        return None
    f32 = {"compute": torch.float32, "out": torch.float32}

    def regions(size):
        position = g.iota(size)
        length = g.to_float(size)
        total = None
        for border in (window_size, shift):
            # 0 before the border and 1 after it, from the sign of the distance to the gap between two pixels
            edge = g.elementwise("SUB", length, float(border) + 0.5, **f32)
            inside = g.elementwise("GREATER", position, edge, **f32)
            step = g.cast(inside, torch.float32)
            total = step if total is None else g.elementwise("SUM", total, step, **f32)
        return total

    rows = g.reshape(g.elementwise("PROD", regions(height), 3.0, **f32), [height, 1])
    region = g.elementwise("SUM", rows, g.reshape(regions(width), [1, width]), **f32)
    windows = _partition(g, g.reshape(region, [1, height, width, 1]), window_size)  # (1, windows, N, 1)
    count, area = g.size(windows, 1), window_size * window_size
    a = g.reshape(windows, [count, area, 1])
    b = g.reshape(windows, [count, 1, area])
    difference = g.unary("ABS", g.elementwise("SUB", a, b, **f32), **f32)
    # Regions differ by whole numbers.
    same = g.elementwise("MIN", difference, 1.0, **f32)
    return g.elementwise("PROD", same, -100.0, **f32)


@converts("mask2former.modeling.transformer_decoder.position_encoding.PositionEmbeddingSine.forward")
def position_embedding_sine(g, result, module, x):
    t = g.tensor(x)
    height, width = g.size(t, 2), g.size(t, 3)
    if isinstance(height, int) and isinstance(width, int):
        return None  # a constant, and so is what the model makes of it alone
    f32 = {"compute": torch.float32, "out": torch.float32}
    feature = torch.arange(module.num_pos_feats, dtype=torch.float64)
    wavelength = module.temperature ** (
        2 * torch.div(feature, 2, rounding_mode="floor") / module.num_pos_feats
    )
    frequency = g.constant((2 * math.pi / wavelength).float()[None])  # (1, F)
    phase = g.constant(torch.where(feature % 2 == 0, 0.0, math.pi / 2).float()[None])  # cos is a shifted sin

    def axis(size):
        position = g.elementwise("SUM", g.iota(size), 1.0, **f32)
        scaled = g.elementwise("DIV", position, g.elementwise("SUM", g.to_float(size), 1e-6, **f32), **f32)
        angle = g.elementwise("PROD", g.reshape(scaled, [size, 1]), frequency, **f32)
        return g.unary("SIN", g.elementwise("SUM", angle, phase, **f32), **f32)  # (size, F)

    channels = module.num_pos_feats
    y = g.reshape(g.transpose(axis(height), (1, 0)), [1, channels, height, 1])
    x = g.reshape(g.transpose(axis(width), (1, 0)), [1, channels, 1, width])
    whole = [1, channels, height, width]
    return g.concat([g.expand(y, whole), g.expand(x, whole)], 1)
