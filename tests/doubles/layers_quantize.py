"""Quantisation and its inverse: int8, symmetric, one scale or one for each index of an axis."""

from __future__ import annotations

from typing import ClassVar

import torch

from .layer import FakeLayer
from .trt_api import as_enum, as_int


class _Scaled(FakeLayer):
    _max_inputs = 3
    _settable: ClassVar = {"axis": as_int, "to_type": as_enum("DataType")}

    def _factor(self, x, scale):
        if not self._network._is_constant(self._inputs[1]):
            self._refuse("the scale must be a constant")
        if bool((scale <= 0).any()):
            self._refuse("every scale must be positive")
        if scale.numel() == 1:
            return scale.reshape(())
        axis = self._values["axis"]
        if scale.dim() != 1 or not 0 <= axis < x.dim() or scale.numel() != x.shape[axis]:
            self._refuse(f"scale of shape {tuple(scale.shape)} with axis {axis}")
        shape = [1] * x.dim()
        shape[axis] = -1
        return scale.reshape(shape)


class QuantizeLayer(_Scaled):
    _kind, _type = "IQuantizeLayer", "QUANTIZE"

    def _dtypes(self):
        self._need_float(0, 1)
        if self._network._strong and self._inputs[1].dtype not in (
            self._inputs[0].dtype,
            self._api.trt.float32,
        ):
            self._refuse("the scale's type differs from the input's")
        if self._values["to_type"] != self._api.trt.int8:
            raise NotImplementedError("the double quantises to int8 only")
        return [self._api.trt.int8]

    def _compute(self, x, scale):
        return (x / self._factor(x, scale)).round().clamp(-128, 127).to(torch.int8)


class DequantizeLayer(_Scaled):
    _kind, _type = "IDequantizeLayer", "DEQUANTIZE"

    def _dtypes(self):
        self._need_float(1)
        if self._inputs[0].dtype != self._api.trt.int8:
            self._refuse("the input must be int8")
        return [
            self._values["to_type"]
            or (self._inputs[1].dtype if self._network._strong else self._api.trt.float32)
        ]

    def _compute(self, x, scale):
        return x.float() * self._factor(x, scale)


class QuantizeLayers:
    """The network's add methods of this module."""

    def add_quantize(self, input, scale, output_type=None):
        to_type = output_type or self._api.trt.int8
        return self._add(QuantizeLayer(self, [input, scale], axis=-1, to_type=to_type))

    def add_dequantize(self, input, scale, output_type=None):
        return self._add(DequantizeLayer(self, [input, scale], axis=-1, to_type=output_type))
