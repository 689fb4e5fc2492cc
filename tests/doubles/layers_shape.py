"""Layers that move elements or make them from sizes."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from .layer import FakeLayer
from .layers_math import broadcast
from .trt_api import as_any, as_bool, as_dims, as_enum, as_float, as_int, as_permutation


class ShapeLayer(FakeLayer):
    _kind, _type, _host = "IShapeLayer", "SHAPE", True

    def _dtypes(self):
        trt = self._api.trt
        return [trt.int32 if self._api.numbers < (10, 0) else trt.int64]

    def _compute(self, x):
        return torch.tensor(x.shape)


class ShuffleLayer(FakeLayer):
    _only_moves = True
    _kind, _type, _host, _max_inputs, _shape_inputs = "IShuffleLayer", "SHUFFLE", True, 2, frozenset({1})
    _settable: ClassVar = {
        "first_transpose": as_permutation,
        "second_transpose": as_permutation,
        "reshape_dims": as_dims,
        "zero_is_placeholder": as_bool,
    }

    def _changed(self, name):
        if name == "reshape_dims":
            del self._inputs[1:]
        super()._changed(name)

    def _dtypes(self):
        return [self._inputs[0]._kept_dtype]

    def _permute(self, x, name):
        order = self._values.get(name)
        if order is None:
            return x
        if len(order) != x.dim() and len(order) == 8:
            order = order[: x.dim()]  # trt.Permutation has always eight entries
        if sorted(order) != list(range(x.dim())):
            self._refuse(f"{name} {order} is no permutation of {x.dim()} dimensions")
        return x.permute(order)

    def _compute(self, x, dims=None):
        x = self._permute(x, "first_transpose")
        wanted = self._values.get("reshape_dims") if dims is None else tuple(dims.tolist())
        if wanted is not None:
            x = x.reshape(self._resolved(tuple(x.shape), wanted))
        return self._permute(x, "second_transpose")

    def _resolved(self, shape, wanted):
        sizes = list(wanted)
        for i, size in enumerate(sizes):
            if size == 0 and self._values["zero_is_placeholder"]:
                if i >= len(shape):
                    self._refuse(f"reshape_dims {wanted}: 0 at {i} has no dimension to copy in {shape}")
                sizes[i] = shape[i]
            elif size < -1:
                self._refuse(f"reshape_dims {wanted}")
        volume = math.prod(shape)
        if sizes.count(-1) > 1:
            self._refuse(f"reshape_dims {wanted} has more than one -1")
        if -1 in sizes:
            rest = math.prod(s for s in sizes if s != -1)
            if rest == 0 or volume % rest:
                self._refuse(f"{shape} cannot become {wanted}")
            sizes[sizes.index(-1)] = volume // rest
        if math.prod(sizes) != volume:
            self._refuse(f"{shape} cannot become {wanted}: {volume} and {math.prod(sizes)} elements")
        return sizes


class ConcatenationLayer(FakeLayer):
    _only_moves = True
    _kind, _type, _host, _max_inputs = "IConcatenationLayer", "CONCATENATION", True, 10_000
    _settable: ClassVar = {"axis": as_int}

    def _compute(self, *inputs):
        rank = inputs[0].dim()
        axis = self._values.get("axis", max(0, rank - 3))
        if not 0 <= axis < rank:
            self._refuse(f"axis {axis}")
        if any(x.dim() != rank for x in inputs):
            self._refuse("the inputs' ranks differ")
        shapes = {tuple(s for i, s in enumerate(x.shape) if i != axis) for x in inputs}
        if len(shapes) > 1:
            self._refuse(f"sizes outside of axis {axis} differ: {[tuple(x.shape) for x in inputs]}")
        return torch.cat(inputs, axis)


class SliceLayer(FakeLayer):
    _only_moves = True
    _kind, _type, _host, _max_inputs, _shape_inputs = "ISliceLayer", "SLICE", True, 6, frozenset({1, 2, 3, 5})
    _settable: ClassVar = {
        "start": as_dims,
        "shape": as_dims,
        "stride": as_dims,
        "axes": as_dims,
        "mode": as_enum("SampleMode"),
    }
    _PARAMETERS: ClassVar = {"start": 1, "shape": 2, "stride": 3, "axes": 5}

    def _changed(self, name):
        if name in self._PARAMETERS and self._in(self._PARAMETERS[name]) is not None:
            self._inputs[self._PARAMETERS[name]] = None
        super()._changed(name)

    def _host_constants(self):
        return [t for t in map(self._in, self._PARAMETERS.values()) if t is not None]

    def set_input(self, index, tensor):
        if index == 5 and self._api.numbers < (10, 0):
            self._refuse("there is no input for axes")
        super().set_input(index, tensor)

    def _dtypes(self):
        dtype, fill = self._inputs[0]._kept_dtype, self._in(4)
        if (
            fill is not None
            and fill.dtype != dtype
            and not (self._is_float(dtype) and self._is_float(fill.dtype))
        ):
            self._refuse(f"the fill value is {fill.dtype.name}")
        return [dtype]

    def _compute(self, x, start=None, shape=None, stride=None, fill=None, axes=None):
        mode = self._values["mode"].name
        if fill is not None and (mode != "FILL" or fill.numel() != 1):
            self._refuse(f"a fill value of {fill.numel()} elements in mode {mode}")
        axes = self._values.get("axes") if axes is None else tuple(axes.tolist())
        axes = tuple(range(x.dim())) if axes is None else tuple(a % x.dim() for a in axes)
        given = zip(("start", "shape", "stride"), (start, shape, stride))
        parts = [self._values[name] if value is None else tuple(value.tolist()) for name, value in given]
        for name, part in zip(("start", "shape", "stride"), parts):
            if len(part) != len(axes):
                self._refuse(f"{name} {tuple(part)} for {len(axes)} dimensions")
        for axis, first, size, step in zip(axes, *parts):
            if size < 0:
                self._refuse(f"size {size} of dimension {axis}")
            x = self._along(
                x, axis, first + step * torch.arange(size), mode, 0 if fill is None else fill.reshape(())
            )
        return x

    def _along(self, x, axis, at, mode, fill):
        length = x.shape[axis]
        outside = (at < 0) | (at >= length)
        if mode in ("STRICT_BOUNDS", "DEFAULT"):
            if outside.any():
                self._refuse(f"elements {at.min()} to {at.max()} of dimension {axis}, which has {length}")
        elif mode == "WRAP":
            at = at % length
        elif mode == "CLAMP":
            at = at.clamp(0, length - 1)
        elif mode == "REFLECT":
            period = max(1, 2 * (length - 1))
            at = at.abs() % period
            at = torch.where(at >= length, period - at, at)
        elif mode == "FILL":
            shape = [1] * x.dim()
            shape[axis] = -1
            if length == 0:
                return x.new_full((*x.shape[:axis], len(at), *x.shape[axis + 1 :]), float(fill))
            kept = x.index_select(axis, at.clamp(0, length - 1))
            return torch.where(outside.reshape(shape), torch.as_tensor(fill, dtype=x.dtype), kept)
        return x.index_select(axis, at)


class GatherLayer(FakeLayer):
    _kind, _type, _host, _max_inputs = "IGatherLayer", "GATHER", True, 2
    _settable: ClassVar = {"axis": as_int, "num_elementwise_dims": as_int, "mode": as_enum("GatherMode")}

    def _dtypes(self):
        self._need_index(1)
        return [self._inputs[0].dtype]

    def _compute(self, data, indices):
        mode, axis, shared = (self._values[n] for n in ("mode", "axis", "num_elementwise_dims"))
        indices = indices.long()
        limit = {"DEFAULT": 1, "ELEMENT": 0, "ND": data.dim() - 1}[mode.name]
        if not 0 <= shared <= limit:
            self._refuse(f"num_elementwise_dims {shared}; mode {mode.name} takes 0 to {limit}")
        if mode.name != "ND" and not shared <= axis < data.dim():
            self._refuse(f"axis {axis}")
        if mode.name == "ND":
            return self._nd(data, indices, shared)
        self._in_range(indices, data.shape[axis])
        if mode.name == "ELEMENT":
            if indices.dim() != data.dim():
                self._refuse("mode ELEMENT needs equal ranks")
            sizes = zip(data.shape, indices.shape)
            if any(i != axis and d != n for i, (d, n) in enumerate(sizes)):
                self._refuse(
                    f"mode ELEMENT: {tuple(data.shape)} and {tuple(indices.shape)} differ outside of {axis}"
                )
            return data.gather(axis, indices)
        if not shared:
            picked = data.index_select(axis, indices.reshape(-1))
            return picked.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
        if indices.dim() < 1:
            self._refuse("indices without a dimension to share")
        (count,) = broadcast(self, data.shape[:1], indices.shape[:1])
        rows = []
        for i in range(count):
            source, at = data[i % data.shape[0]], indices[i % indices.shape[0]]
            picked = source.index_select(axis - 1, at.reshape(-1))
            rows.append(picked.reshape(*source.shape[: axis - 1], *at.shape, *source.shape[axis:]))
        return torch.stack(rows)

    def _nd(self, data, indices, shared):
        width = indices.shape[-1]
        if indices.dim() <= shared or width > data.dim() - shared:
            self._refuse(f"mode ND: {width} indices into {data.dim() - shared} dimensions")
        if self._inputs[1]._dims()[-1] == -1:
            self._refuse("mode ND: the last size of indices must be fixed")
        broadcast(self, data.shape[:shared], indices.shape[:shared])
        batch = [torch.arange(size) for size in indices.shape[:shared]]
        grids = torch.meshgrid(*batch, indexing="ij") if batch else ()
        middle = indices.dim() - 1 - shared
        grids = [g.reshape(*g.shape, *[1] * middle) for g in grids]
        for k in range(width):
            self._in_range(indices[..., k], data.shape[shared + k])
        return data[(*grids, *indices.unbind(-1))]

    def _in_range(self, indices, size):
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            self._refuse(f"indices {int(indices.min())} to {int(indices.max())} into a size of {size}")


class FillLayer(FakeLayer):
    _kind, _type, _host, _max_inputs, _shape_inputs = "IFillLayer", "FILL", True, 3, frozenset({0})
    _settable: ClassVar = {
        "shape": as_dims,
        "alpha": as_any,
        "beta": as_any,
        "operation": as_enum("FillOperation"),
        "to_type": as_enum("DataType"),
    }

    def _changed(self, name):
        index = {"shape": 0, "alpha": 1, "beta": 2}.get(name)
        if index is not None and self._in(index) is not None:
            self._inputs[index] = None
        if name in ("alpha", "beta"):
            value = self._values[name]
            wide = isinstance(value, int) and self._api.numbers >= (10, 0)
            self._values[name] = value if wide else as_float(self._api, value)
        super()._changed(name)

    def _host_constants(self):
        return [t for t in self._inputs if t is not None]

    def is_alpha_beta_int64(self):
        return isinstance(self._values["alpha"], int)

    def _may_output(self, natural, wanted):
        return self._is_int(wanted) or self._is_float(wanted)

    def _dtypes(self):
        trt = self._api.trt
        if (self._in(1) is None) != (self._in(2) is None):
            self._refuse("alpha and beta must both be inputs or neither")
        if self._in(1) is not None:
            dtype = self._common_dtype(1, 2)
            if self._values.get("to_type") not in (None, dtype):
                self._refuse(f"alpha and beta are {dtype.name}, the output {self._values['to_type'].name}")
            if not self._is_int(dtype) and dtype != trt.float32:
                self._refuse(f"alpha and beta are {dtype.name}")
            return [dtype]
        return [self._values.get("to_type") or trt.float32]

    def _compute(self, shape=None, alpha=None, beta=None):
        if self._values["operation"].name != "LINSPACE":
            raise NotImplementedError("the double fills with LINSPACE only")
        sizes = self._values["shape"] if shape is None else tuple(shape.tolist())
        if any(size < 0 for size in sizes):
            self._refuse(f"shape {tuple(sizes)}")
        if alpha is None:
            if len(sizes) != 1:
                self._refuse("a static alpha and beta make a 1-D LINSPACE only; set inputs 1 and 2")
            alpha, beta = torch.tensor(self._values["alpha"]), torch.tensor([self._values["beta"]])
        if alpha.dim() != 0:
            self._refuse(f"alpha must be a scalar, not of shape {tuple(alpha.shape)}")
        if beta.dim() != 1 or len(beta) != len(sizes):
            self._refuse(
                f"beta must have one value for each of {len(sizes)} dimensions, not shape {tuple(beta.shape)}"
            )
        out = alpha.expand(sizes)
        for axis, size in enumerate(sizes):
            steps = torch.arange(size, dtype=beta.dtype).reshape(
                [-1 if i == axis else 1 for i in range(len(sizes))]
            )
            out = out + steps * beta[axis]
        return out


class ShapeLayers:
    """The network's add methods of this module."""

    def add_shape(self, input):
        return self._add(ShapeLayer(self, [input]))

    def add_shuffle(self, input):
        return self._add(ShuffleLayer(self, [input], zero_is_placeholder=True))

    def add_concatenation(self, inputs):
        return self._add(ConcatenationLayer(self, inputs))

    def add_slice(self, input, start, shape, stride):
        mode = self._api.trt.SampleMode(0)
        return self._add(SliceLayer(self, [input], start=start, shape=shape, stride=stride, mode=mode))

    def add_gather(self, input, indices, axis):
        mode = self._api.trt.GatherMode.DEFAULT
        return self._add(GatherLayer(self, [input, indices], axis=axis, mode=mode, num_elementwise_dims=0))

    def add_gather_v2(self, input, indices, mode):
        return self._add(GatherLayer(self, [input, indices], axis=0, mode=mode, num_elementwise_dims=0))

    def add_fill(self, shape, op, output_type=None):
        return self._add(
            FillLayer(self, [], shape=shape, operation=op, alpha=0.0, beta=1.0, to_type=output_type)
        )
