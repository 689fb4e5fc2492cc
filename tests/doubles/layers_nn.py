"""Convolution, pooling, resizing, normalisation and padding."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch.nn import functional as F

from .layer import FakeLayer
from .trt_api import as_any, as_bool, as_dims, as_enum, as_float, as_floats, as_int, as_weights


class _Windowed(FakeLayer):
    """What convolutions and pooling share: padding, either symmetric or by side, and its modes."""

    _settable: ClassVar = {
        "stride_nd": as_dims,
        "padding_nd": as_dims,
        "pre_padding": as_dims,
        "post_padding": as_dims,
        "padding_mode": as_enum("PaddingMode"),
    }

    def _changed(self, name):
        if name == "padding_nd":
            self._values["pre_padding"] = self._values["post_padding"] = self._values["padding_nd"]
        super()._changed(name)

    def _ndim(self, kernel) -> int:
        if len(kernel) not in (2, 3):
            self._refuse(f"a window of {len(kernel)} dimensions; TensorRT has 2 and 3")
        if self._rank() != len(kernel) + 2:
            self._refuse(f"a window of {len(kernel)} dimensions needs an input of {len(kernel) + 2}")
        for name in ("stride_nd", "pre_padding", "post_padding", "dilation_nd"):
            if len(self._values.get(name, kernel)) != len(kernel):
                self._refuse(f"{name} {self._values[name]} for a window of {kernel}")
        return len(kernel)

    def _amounts(self, x, window):
        """Padding (before, after) of each spatial dimension, for windows of the given extents."""
        mode = self._values["padding_mode"].name
        pairs = []
        for i, extent in enumerate(window):
            size, stride = x.shape[2 + i], self._values["stride_nd"][i]
            before, after = self._values["pre_padding"][i], self._values["post_padding"][i]
            if mode.startswith("SAME"):
                total = max(0, (-(-size // stride) - 1) * stride + extent - size)
                small, large = total // 2, total - total // 2
                before, after = (small, large) if mode == "SAME_UPPER" else (large, small)
            elif mode == "EXPLICIT_ROUND_UP":
                after += -(size + before + after - extent) % stride
            elif mode != "EXPLICIT_ROUND_DOWN":
                raise NotImplementedError(f"the double has no padding mode {mode}")
            if before < 0 or after < 0:
                self._refuse(f"padding {before}, {after}")
            if size + before + after < extent:
                self._refuse(f"a window of {extent} in {size} + {before} + {after}")
            pairs.append((before, after))
        return pairs

    @staticmethod
    def _padded(x, pairs, value=0.0):
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)


class ConvolutionLayer(_Windowed):
    _kind, _type, _max_inputs = "IConvolutionLayer", "CONVOLUTION", 3
    _settable: ClassVar = {
        **_Windowed._settable,
        "num_output_maps": as_int,
        "kernel_size_nd": as_dims,
        "dilation_nd": as_dims,
        "num_groups": as_int,
        "kernel": as_weights,
        "bias": as_weights,
    }

    def _dtypes(self):
        self._need_float(0)
        dtype = self._inputs[0].dtype
        if self._in(1) is not None or self._in(2) is not None:
            self._check_weight_inputs()
        for name in ("kernel", "bias"):
            weights = self._values[name]
            if weights is None or not weights.size:
                continue
            if self._network._strong and weights.dtype != dtype:
                self._refuse(f"{name} is {weights.dtype.name} in a strongly typed network")
            if not self._is_float(weights.dtype):
                self._refuse(f"{name} is {weights.dtype.name}")
        return [self._common_dtype(0)]

    def _check_weight_inputs(self):
        for index, name in ((1, "kernel"), (2, "bias")):
            if self._in(index) is not None and self._values[name] is not None and self._values[name].size:
                self._refuse(f"{name} is given as weights and as an input")
        self._common_dtype()

    def _validate(self):
        self._ndim(self._values["kernel_size_nd"])
        if self._inputs[0]._dims()[1] == -1:
            self._refuse("the number of channels must be fixed")

    def _compute(self, x, kernel=None, bias=None):
        maps, groups = self._values["num_output_maps"], self._values["num_groups"]
        window, dilation = self._values["kernel_size_nd"], self._values["dilation_nd"]
        if groups < 1 or x.shape[1] % groups or maps % groups:
            self._refuse(f"{groups} groups of {x.shape[1]} channels and {maps} output maps")
        shape = self._kernel_shape(x.shape[1], maps, groups, window)
        if kernel is None:
            weights = self._values["kernel"]
            if weights.size != math.prod(shape):
                self._refuse(f"{weights.size} kernel weights for shape {shape}")
            kernel = weights.tensor(repr(self)).float().reshape(shape)
        elif tuple(kernel.shape) != shape:
            self._refuse(f"a kernel of {tuple(kernel.shape)}; it must be {shape}")
        if bias is None and self._values["bias"] is not None and self._values["bias"].size:
            bias = self._values["bias"].tensor(repr(self)).float()
        if bias is not None and bias.shape != (maps,):
            self._refuse(f"a bias of {tuple(bias.shape)} for {maps} output maps")
        return self._convolve(x, kernel, bias, groups, window, dilation)

    def _kernel_shape(self, channels, maps, groups, window):
        return (maps, channels // groups, *window)

    def _convolve(self, x, kernel, bias, groups, window, dilation):
        extents = [(size - 1) * step + 1 for size, step in zip(window, dilation)]
        x = self._padded(x, self._amounts(x, extents))
        convolution = F.conv2d if len(window) == 2 else F.conv3d
        return convolution(x, kernel, bias, self._values["stride_nd"], 0, dilation, groups)


class DeconvolutionLayer(ConvolutionLayer):
    _kind, _type = "IDeconvolutionLayer", "DECONVOLUTION"

    def _kernel_shape(self, channels, maps, groups, window):
        return (channels, maps // groups, *window)

    def _convolve(self, x, kernel, bias, groups, window, dilation):
        if self._values["padding_mode"].name != "EXPLICIT_ROUND_DOWN":
            raise NotImplementedError("the double deconvolves with explicit padding only")
        transposed = F.conv_transpose2d if len(window) == 2 else F.conv_transpose3d
        out = transposed(x, kernel, bias, self._values["stride_nd"], 0, 0, groups, dilation)
        pairs = zip(self._values["pre_padding"], self._values["post_padding"])
        return self._padded(out, [(-before, -after) for before, after in pairs])


class PoolingLayer(_Windowed):
    _kind, _type = "IPoolingLayer", "POOLING"
    _settable: ClassVar = {
        **_Windowed._settable,
        "window_size_nd": as_dims,
        "average_count_excludes_padding": as_bool,
        "blend_factor": as_float,
    }

    @property
    def type(self):
        return self._values["type"]

    @type.setter
    def type(self, value):
        self._values["type"] = self._api.convert("PoolingType", value, "type")
        self._changed("type")

    def _dtypes(self):
        self._need_float(0)
        return [self._common_dtype()]

    def _validate(self):
        self._ndim(self._values["window_size_nd"])

    def _compute(self, x):
        window, stride, kind = (
            self._values["window_size_nd"],
            self._values["stride_nd"],
            self._values["type"].name,
        )
        pairs = self._amounts(x, window)
        two = len(window) == 2
        if kind == "MAX":
            return (F.max_pool2d if two else F.max_pool3d)(self._padded(x, pairs, -math.inf), window, stride)
        if kind != "AVERAGE":
            raise NotImplementedError(f"the double has no pooling {kind}")
        average = F.avg_pool2d if two else F.avg_pool3d
        out = average(self._padded(x, pairs), window, stride)
        if self._values["average_count_excludes_padding"]:
            out = out / average(self._padded(torch.ones_like(x), pairs), window, stride)
        return out


class ResizeLayer(FakeLayer):
    _kind, _type, _max_inputs, _shape_inputs = "IResizeLayer", "RESIZE", 2, frozenset({1})
    _settable: ClassVar = {
        "shape": as_dims,
        "scales": as_floats,
        "resize_mode": as_enum("InterpolationMode"),
        "coordinate_transformation": as_enum("ResizeCoordinateTransformation"),
        "selector_for_single_pixel": as_enum("ResizeSelector"),
        "nearest_rounding": as_enum("ResizeRoundMode"),
        "cubic_coeff": as_float,
        "exclude_outside": as_any,
    }

    def _changed(self, name):
        if name in ("shape", "scales") and self._in(1) is not None:
            self._refuse(f"setting {name} of a resize with a shape input")
        super()._changed(name)

    def _dtypes(self):
        dtype = self._inputs[0].dtype
        linear = self._values["resize_mode"].name != "NEAREST"
        if not self._is_float(dtype) and (linear or not self._is_int(dtype)):
            self._refuse(f"resizing a {dtype.name} input")
        return [dtype]

    def _compute(self, x, shape=None):
        scales = self._values.get("scales")
        sizes = self._values.get("shape") if shape is None else tuple(shape.tolist())
        if sizes is None:
            if not scales or len(scales) != x.dim():
                self._refuse(f"neither a shape nor {x.dim()} scales")
            sizes = tuple(math.floor(size * scale) for size, scale in zip(x.shape, scales))
        else:
            scales = None
        if len(sizes) != x.dim() or any(size < 1 for size in sizes):
            self._refuse(f"to {tuple(sizes)}")
        mode = self._values["resize_mode"].name
        if mode == "CUBIC":
            raise NotImplementedError("the double resizes NEAREST and LINEAR only")
        changed = [i for i, (a, b) in enumerate(zip(x.shape, sizes)) if a != b]
        if mode == "LINEAR" and changed and x.dim() - changed[0] > 3:
            self._refuse(
                f"LINEAR from {tuple(x.shape)} to {tuple(sizes)}: only the last 3 dimensions can change"
            )
        for axis in changed:
            scale = scales[axis] if scales else sizes[axis] / x.shape[axis]
            x = self._along(x, axis, sizes[axis], scale, mode == "LINEAR")
        return x

    def _along(self, x, axis, size, scale, linear):
        length = x.shape[axis]
        at = torch.arange(size, dtype=torch.float64)
        transformation = self._values["coordinate_transformation"].name
        if size == 1 and self._values["selector_for_single_pixel"].name == "UPPER":
            at = torch.zeros(1, dtype=torch.float64)
        elif transformation == "ALIGN_CORNERS":
            at = at * ((length - 1) / (size - 1)) if size > 1 else at * 0
        elif transformation == "HALF_PIXEL":
            at = (at + 0.5) / scale - 0.5
        else:
            at = at / scale
        if not linear:
            rounding = self._values["nearest_rounding"].name
            rounded = {
                "FLOOR": at.floor,
                "CEIL": at.ceil,
                "HALF_UP": lambda: (at + 0.5).floor(),
                "HALF_DOWN": lambda: (at - 0.5).ceil(),
            }[rounding]()
            return x.index_select(axis, rounded.clamp(0, length - 1).long())
        at = at.clamp(0, length - 1)
        low = at.floor().long()
        shape = [1] * x.dim()
        shape[axis] = -1
        share = (at - low).float().reshape(shape)
        high = (low + 1).clamp(max=length - 1)
        return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


class NormalizationLayer(FakeLayer):
    _kind, _type, _max_inputs = "INormalizationLayer", "NORMALIZATION", 3
    _settable: ClassVar = {
        "epsilon": as_float,
        "axes": as_int,
        "num_groups": as_int,
        "compute_precision": as_enum("DataType"),
    }

    @property
    def is_v2(self) -> bool:
        return self._values["v2"]

    def _changed(self, name):
        if name == "compute_precision":
            trt = self._api.trt
            if self._network._strong:
                self._refuse("compute_precision is an error in a strongly typed network; cast the inputs")
            if self._values[name] not in (trt.float32, trt.float16):
                self._refuse(f"compute_precision {self._values[name].name}")
        super()._changed(name)

    def _dtypes(self):
        self._need_float(0, 1, 2)
        self._common_dtype()
        return [self._common_dtype(0)]

    def _compute(self, x, scale, bias):
        axes, groups = self._axes(self._values["axes"], x.dim()), self._values["num_groups"]
        if scale.shape != bias.shape:
            self._refuse("scale and bias differ in shape")
        shape = tuple(scale.shape)
        if groups == 1:
            if len(shape) != x.dim() or any(s not in (1, n) for s, n in zip(shape, x.shape)):
                self._refuse(f"a scale of {shape} does not broadcast to {tuple(x.shape)}")
        else:
            if axes != list(range(2, x.dim())):
                self._refuse(f"{groups} groups need all axes after the channels, got {axes}")
            if x.shape[1] % groups:
                self._refuse(f"{x.shape[1]} channels in {groups} groups")
            wanted = (1, x.shape[1] if self._values["v2"] else groups, *[1] * (x.dim() - 2))
            if shape != wanted:
                self._refuse(f"a scale of {shape} for {groups} groups; it must be {wanted}")
        half = self._values.get("compute_precision") == self._api.trt.float16
        if half:
            x = x.half().float()
        if groups > 1:
            grouped = x.unflatten(1, (groups, -1))
            normal = self._normal(grouped, list(range(2, grouped.dim())))
            if self._values["v2"]:
                return normal.flatten(1, 2) * scale + bias
            return (normal * scale.unsqueeze(2) + bias.unsqueeze(2)).flatten(1, 2)
        return self._normal(x, axes) * scale + bias

    def _normal(self, x, axes):
        mean = x.mean(axes, keepdim=True)
        variance = (x - mean).square().mean(axes, keepdim=True)
        return (x - mean) * (variance + self._values["epsilon"]).rsqrt()


class PaddingLayer(FakeLayer):
    _kind, _type = "IPaddingLayer", "PADDING"
    _settable: ClassVar = {"pre_padding_nd": as_dims, "post_padding_nd": as_dims}

    def _compute(self, x):
        pairs = list(zip(self._values["pre_padding_nd"], self._values["post_padding_nd"]))
        if len(pairs) != 2 or x.dim() < 4:
            self._refuse("padding is of the last two of at least four dimensions")
        return _Windowed._padded(x, pairs)


class NeuralLayers:
    """The network's add methods of this module."""

    def _window_values(self, size: int) -> dict:
        zeros, ones = (0,) * size, (1,) * size
        values = {"stride_nd": ones, "padding_nd": zeros, "pre_padding": zeros, "post_padding": zeros}
        return {**values, "padding_mode": self._api.trt.PaddingMode.EXPLICIT_ROUND_DOWN}

    def _convolution(self, cls, input, num_output_maps, kernel_shape, kernel, bias):
        values = self._window_values(len(kernel_shape))
        values |= {"num_output_maps": num_output_maps, "kernel_size_nd": kernel_shape, "num_groups": 1}
        values |= {"kernel": kernel, "bias": bias, "dilation_nd": (1,) * len(kernel_shape)}
        return self._add(cls(self, [input], **values))

    def add_convolution_nd(self, input, num_output_maps, kernel_shape, kernel, bias=None):
        return self._convolution(ConvolutionLayer, input, num_output_maps, kernel_shape, kernel, bias)

    def add_deconvolution_nd(self, input, num_output_maps, kernel_shape, kernel, bias=None):
        return self._convolution(DeconvolutionLayer, input, num_output_maps, kernel_shape, kernel, bias)

    def add_pooling_nd(self, input, type, window_size):
        values = self._window_values(len(window_size))
        values |= {"type": type, "window_size_nd": window_size, "blend_factor": 0.0}
        return self._add(PoolingLayer(self, [input], average_count_excludes_padding=True, **values))

    def add_resize(self, input):
        trt = self._api.trt
        values = {
            "resize_mode": trt.InterpolationMode.NEAREST,
            "coordinate_transformation": trt.ResizeCoordinateTransformation.ASYMMETRIC,
            "selector_for_single_pixel": trt.ResizeSelector.FORMULA,
            "nearest_rounding": trt.ResizeRoundMode.FLOOR,
        }
        return self._add(ResizeLayer(self, [input], **values))

    def _normalization(self, input, scale, bias, axes, v2):
        values = {"axes": axes, "epsilon": 1e-5, "num_groups": 1, "v2": v2}
        return self._add(NormalizationLayer(self, [input, scale, bias], **values))

    def add_normalization(self, input, scale, bias, axesMask):
        return self._normalization(input, scale, bias, axesMask, False)

    def add_normalization_v2(self, input, scale, bias, axesMask):
        return self._normalization(input, scale, bias, axesMask, True)

    def add_padding_nd(self, input, pre_padding, post_padding):
        return self._add(
            PaddingLayer(self, [input], pre_padding_nd=pre_padding, post_padding_nd=post_padding)
        )
