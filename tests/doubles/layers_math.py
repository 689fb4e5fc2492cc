"""Layers that compute element by element, along axes, or products."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from .layer import FakeLayer
from .trt_api import as_bool, as_dims, as_enum, as_float, as_int, as_weights

TOPK_LIMIT = 3840


def broadcast(layer: FakeLayer, *shapes) -> tuple[int, ...]:
    """TensorRT's broadcasting: equal ranks, sizes equal or 1."""
    if len({len(shape) for shape in shapes}) != 1:
        layer._refuse(f"the inputs' ranks differ: {', '.join(str(len(s)) for s in shapes)}")
    out = []
    for sizes in zip(*shapes):
        larger = {size for size in sizes if size != 1}
        if len(larger) > 1:
            layer._refuse(f"sizes {sizes} are neither equal nor 1 in shapes {[tuple(s) for s in shapes]}")
        out.append(larger.pop() if larger else 1)
    return tuple(out)


class ConstantLayer(FakeLayer):
    _kind, _type, _host = "IConstantLayer", "CONSTANT", True
    _settable: ClassVar = {"shape": as_dims, "weights": as_weights}

    def _validate(self):
        shape, weights = self._values["shape"], self._values["weights"]
        if any(size < 0 for size in shape):
            self._refuse(f"shape {shape} of a constant")
        if math.prod(shape) != weights.size:
            self._refuse(f"{weights.size} weights for shape {shape}")

    def _dtypes(self):
        self._validate()
        return [self._values["weights"].dtype]

    def _may_output(self, natural, wanted):
        return False

    def _compute(self):
        return self._values["weights"].tensor(repr(self)).reshape(self._values["shape"])


class ElementWiseLayer(FakeLayer):
    _kind, _type, _host, _max_inputs = "IElementWiseLayer", "ELEMENTWISE", True, 2
    _settable: ClassVar = {"op": as_enum("ElementWiseOperation")}
    _COMPARISONS: ClassVar = {"EQUAL": torch.eq, "GREATER": torch.gt, "LESS": torch.lt}
    _LOGIC: ClassVar = {"AND": torch.logical_and, "OR": torch.logical_or, "XOR": torch.logical_xor}
    _ARITHMETIC: ClassVar = {
        "SUM": torch.add,
        "SUB": torch.sub,
        "PROD": torch.mul,
        "MAX": torch.maximum,
        "MIN": torch.minimum,
        "POW": torch.pow,
    }

    def _dtypes(self):
        dtype, op, boolean = self._common_dtype(), self._values["op"].name, self._api.trt.bool
        if op in self._LOGIC:
            if dtype != boolean:
                self._refuse(f"{op} needs bool inputs")
            return [boolean]
        if op in self._COMPARISONS:
            if dtype == boolean and op != "EQUAL":
                self._refuse(f"{op} of bool inputs")
            return [boolean]
        if not (self._is_float(dtype) or self._is_int(dtype)) or (op == "POW" and not self._is_float(dtype)):
            self._refuse(f"{op} of {dtype.name} inputs")
        return [dtype]

    def _compute(self, a, b):
        broadcast(self, a.shape, b.shape)
        op = self._values["op"].name
        if op == "DIV":
            return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")
        if op == "FLOOR_DIV":
            return torch.div(a, b, rounding_mode="floor")
        return {**self._COMPARISONS, **self._LOGIC, **self._ARITHMETIC}[op](a, b)


class UnaryLayer(FakeLayer):
    _kind, _type, _host = "IUnaryLayer", "UNARY", True
    _settable: ClassVar = {"op": as_enum("UnaryOperation")}

    def _dtypes(self):
        dtype, op = self._common_dtype(), self._values["op"].name
        if op == "NOT":
            if dtype != self._api.trt.bool:
                self._refuse("NOT needs a bool input")
        elif not self._is_float(dtype) and not (
            self._is_int(dtype) and (op == "SIGN" or (self._api.numbers >= (10, 0) and op in ("ABS", "NEG")))
        ):
            self._refuse(f"{op} of a {dtype.name} input")
        return [self._api.trt.bool if op in ("ISINF", "ISNAN") else dtype]

    def _compute(self, x):
        op = self._values["op"].name
        names = {"RECIP": "reciprocal", "NOT": "logical_not"}  # torch.round also rounds halves to even
        return getattr(torch, names.get(op, op.lower()))(x)


class ActivationLayer(FakeLayer):
    _kind, _type = "IActivationLayer", "ACTIVATION"
    _settable: ClassVar = {"alpha": as_float, "beta": as_float}

    @property
    def type(self):
        return self._values["type"]

    @type.setter
    def type(self, value):
        self._values["type"] = self._api.convert("ActivationType", value, "type")
        self._changed("type")

    def _dtypes(self):
        dtype = self._common_dtype()
        integer = self._values["type"].name == "RELU" and self._api.numbers >= (10, 0) and self._is_int(dtype)
        if not self._is_float(dtype) and not integer:
            self._refuse(f"{self._values['type'].name} of a {dtype.name} input")
        return [dtype]

    def _compute(self, x):
        f, alpha, beta = torch.nn.functional, self._values["alpha"], self._values["beta"]
        return {
            "RELU": lambda: x.clamp(min=0),
            "SIGMOID": lambda: x.sigmoid(),
            "TANH": lambda: x.tanh(),
            "LEAKY_RELU": lambda: f.leaky_relu(x, alpha),
            "ELU": lambda: f.elu(x, alpha),
            "SELU": lambda: torch.where(x > 0, beta * x, beta * (alpha * x.exp() - alpha)),
            "SOFTSIGN": lambda: f.softsign(x),
            "SOFTPLUS": lambda: alpha * (beta * x).exp().add(1).log(),
            "CLIP": lambda: x.clamp(alpha, beta),
            "HARD_SIGMOID": lambda: (alpha * x + beta).clamp(0, 1),
            "SCALED_TANH": lambda: alpha * (beta * x).tanh(),
            "THRESHOLDED_RELU": lambda: torch.where(x > alpha, x, 0),
            "GELU_ERF": lambda: f.gelu(x),
            "GELU_TANH": lambda: f.gelu(x, approximate="tanh"),
        }[self._values["type"].name]()


class ScaleLayer(FakeLayer):
    _kind, _type = "IScaleLayer", "SCALE"
    _settable: ClassVar = {
        "mode": as_enum("ScaleMode"),
        "shift": as_weights,
        "scale": as_weights,
        "power": as_weights,
        "channel_axis": as_int,
    }

    def _dtypes(self):
        self._need_float(0)
        dtype = self._common_dtype()
        for name in ("shift", "scale", "power"):
            weights = self._values[name]
            if weights is not None and weights.size and self._network._strong and weights.dtype != dtype:
                self._refuse(f"{name} is {weights.dtype.name} in a strongly typed network")
        return [dtype]

    def _validate(self):
        dims, axis, mode = self._inputs[0]._dims(), self._values["channel_axis"], self._values["mode"].name
        if len(dims) < 4:
            self._refuse("a scale layer's input needs at least 4 dimensions")
        if not 0 <= axis < len(dims):
            self._refuse(f"channel axis {axis}")
        if mode == "ELEMENTWISE":
            wanted = math.prod(dims[axis:])
        else:
            wanted = dims[axis] if mode == "CHANNEL" else 1
        if wanted < 0 or (mode == "ELEMENTWISE" and -1 in dims[axis:]):
            self._refuse(f"mode {mode} needs fixed sizes")
        for name in ("shift", "scale", "power"):
            weights = self._values[name]
            if weights is not None and weights.size not in (0, wanted):
                self._refuse(f"{name} has {weights.size} values; mode {mode} needs {wanted}")

    def _compute(self, x):
        axis, mode = self._values["channel_axis"], self._values["mode"].name
        shape = [1] * x.dim()
        if mode == "CHANNEL":
            shape[axis] = -1
        elif mode == "ELEMENTWISE":
            shape[axis:] = x.shape[axis:]

        def value(name):
            weights = self._values[name]
            return (
                weights.tensor(repr(self)).float().reshape(shape)
                if weights is not None and weights.size
                else None
            )

        shift, scale, power = value("shift"), value("scale"), value("power")
        x = x if scale is None else x * scale
        x = x if shift is None else x + shift
        return x if power is None or bool((power == 1).all()) else x**power


class MatrixMultiplyLayer(FakeLayer):
    _kind, _type, _max_inputs = "IMatrixMultiplyLayer", "MATRIX_MULTIPLY", 2
    _settable: ClassVar = {"op0": as_enum("MatrixOperation"), "op1": as_enum("MatrixOperation")}

    def _dtypes(self):
        self._need_float(0, 1)
        return [self._common_dtype()]

    def _compute(self, a, b):
        ops = [self._values[name].name for name in ("op0", "op1")]
        for x, op in ((a, ops[0]), (b, ops[1])):
            if x.dim() < (1 if op == "VECTOR" else 2):
                self._refuse(f"operation {op} on {x.dim()} dimensions")
        a, b = (x.transpose(-1, -2) if op == "TRANSPOSE" else x for x, op in zip((a, b), ops))
        a = a.unsqueeze(-2) if ops[0] == "VECTOR" else a
        b = b.unsqueeze(-1) if ops[1] == "VECTOR" else b
        broadcast(self, a.shape[:-2], b.shape[:-2])
        if a.shape[-1] != b.shape[-2]:
            self._refuse(f"{a.shape[-1]} columns by {b.shape[-2]} rows")
        out = a @ b
        out = out.squeeze(-2) if ops[0] == "VECTOR" else out
        return out.squeeze(-1) if ops[1] == "VECTOR" else out


class SoftMaxLayer(FakeLayer):
    _kind, _type = "ISoftMaxLayer", "SOFTMAX"
    _settable: ClassVar = {"axes": as_int}

    def _dtypes(self):
        self._need_float(0)
        return [self._common_dtype()]

    def _compute(self, x):
        return x.softmax(self._one_axis(self._values.get("axes", 1 << max(0, x.dim() - 3)), x.dim()))


class ReduceLayer(FakeLayer):
    _kind, _type, _host = "IReduceLayer", "REDUCE", True
    _settable: ClassVar = {"op": as_enum("ReduceOperation"), "axes": as_int, "keep_dims": as_bool}

    def _dtypes(self):
        dtype, op = self._common_dtype(), self._values["op"].name
        if not self._is_float(dtype) and (not self._is_int(dtype) or op == "AVG"):
            self._refuse(f"{op} of a {dtype.name} input")
        return [dtype]

    def _compute(self, x):
        axes, keep = self._axes(self._values["axes"], x.dim()), self._values["keep_dims"]
        op = self._values["op"].name
        if op == "PROD":
            for axis in reversed(axes):
                x = x.prod(axis, keepdim=keep)
            return x
        return getattr(torch, {"AVG": "mean", "MAX": "amax", "MIN": "amin", "SUM": "sum"}[op])(
            x, axes, keepdim=keep
        )


class TopKLayer(FakeLayer):
    _kind, _type, _outputs, _max_inputs = "ITopKLayer", "TOPK", 2, 2
    _settable: ClassVar = {
        "op": as_enum("TopKOperation"),
        "k": as_int,
        "axes": as_int,
        "indices_type": as_enum("DataType"),
    }

    def _dtypes(self):
        dtype = self._inputs[0].dtype
        if not self._is_float(dtype) and not self._is_int(dtype):
            self._refuse(f"of a {dtype.name} input")
        return [dtype, self._values.get("indices_type") or self._api.trt.int32]

    def _compute(self, x, k=None):
        k = self._values["k"] if k is None else int(k)
        axis = self._one_axis(self._values["axes"], x.dim())
        if x.dim() < 2:
            self._refuse("a 1-D input; TensorRT's top-k needs 2 dimensions")
        if not 0 < k <= min(TOPK_LIMIT, x.shape[axis]):
            self._refuse(f"k = {k}; it must be 1 to {min(TOPK_LIMIT, x.shape[axis])}")
        values, indices = x.topk(k, axis, largest=self._values["op"].name == "MAX", sorted=True)
        return values, indices


class CastLayer(FakeLayer):
    _kind, _type, _host = "ICastLayer", "CAST", True
    _settable: ClassVar = {"to_type": as_enum("DataType")}

    def _dtypes(self):
        return [self._values["to_type"]]

    def _compute(self, x):
        return x


class IdentityLayer(FakeLayer):
    _kind, _type, _host = "IIdentityLayer", "IDENTITY", True

    def _may_output(self, natural, wanted):
        trt = self._api.trt
        convertible = {trt.float32, trt.float16, trt.int32, trt.bool, getattr(trt, "int64", trt.int32)}
        return natural in convertible and wanted in convertible

    def _compute(self, x):
        return x


class SelectLayer(FakeLayer):
    _kind, _type, _host, _max_inputs = "ISelectLayer", "SELECT", True, 3

    def _dtypes(self):
        if self._inputs[0].dtype != self._api.trt.bool:
            self._refuse("the condition must be bool")
        return [self._common_dtype(1, 2)]

    def _compute(self, condition, yes, no):
        broadcast(self, condition.shape, yes.shape, no.shape)
        return torch.where(condition, yes, no)


class EinsumLayer(FakeLayer):
    _kind, _type, _max_inputs = "IEinsumLayer", "EINSUM", 2
    _settable: ClassVar = {}

    def _dtypes(self):
        self._need_float(*range(len(self._inputs)))
        return [self._common_dtype()]

    def _compute(self, *inputs):
        if "..." in self._values["equation"] or len(inputs) > 2:
            self._refuse(f"equation {self._values['equation']!r}: no ellipsis, at most two inputs")
        return torch.einsum(self._values["equation"], *inputs)


class MathLayers:
    """The network's add methods of this module."""

    def add_constant(self, shape, weights):
        return self._add(ConstantLayer(self, [], shape=shape, weights=weights))

    def add_elementwise(self, input1, input2, op):
        return self._add(ElementWiseLayer(self, [input1, input2], op=op))

    def add_unary(self, input, op):
        return self._add(UnaryLayer(self, [input], op=op))

    def add_activation(self, input, type):
        alpha, beta = {"SELU": (1.6732632, 1.0507010), "SOFTPLUS": (1.0, 1.0)}.get(type.name, (0.0, 0.0))
        return self._add(ActivationLayer(self, [input], type=type, alpha=alpha, beta=beta))

    def add_scale(self, input, mode, shift=None, scale=None, power=None):
        return self.add_scale_nd(input, mode, shift, scale, power, channel_axis=1)

    def add_scale_nd(self, input, mode, shift=None, scale=None, power=None, channel_axis=1):
        values = {"mode": mode, "shift": shift, "scale": scale, "power": power, "channel_axis": channel_axis}
        return self._add(ScaleLayer(self, [input], **values))

    def add_matrix_multiply(self, input0, op0, input1, op1):
        return self._add(MatrixMultiplyLayer(self, [input0, input1], op0=op0, op1=op1))

    def add_softmax(self, input):
        return self._add(SoftMaxLayer(self, [input]))

    def add_reduce(self, input, op, axes, keep_dims):
        return self._add(ReduceLayer(self, [input], op=op, axes=axes, keep_dims=keep_dims))

    def add_topk(self, input, op, k, axes, indices_type=None):
        return self._add(TopKLayer(self, [input], op=op, k=k, axes=axes, indices_type=indices_type))

    def add_cast(self, input, to_type):
        return self._add(CastLayer(self, [input], to_type=to_type))

    def add_identity(self, input):
        return self._add(IdentityLayer(self, [input]))

    def add_select(self, condition, then_input, else_input):
        return self._add(SelectLayer(self, [condition, then_input, else_input]))

    def add_einsum(self, inputs, equation):
        return self._add(EinsumLayer(self, inputs, equation=equation))
