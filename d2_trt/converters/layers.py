"""Converters of convolutions, linear layers, batch normalisation, and activations."""

from __future__ import annotations

import math

import torch

from ..errors import ConversionError
from .registry import converts

# Stands for minus infinity before a softmax: exp of it is 0 in every type, and it fits float16.
MASKED_LOGIT = -3.0e4


def _pair(v) -> tuple[int, int]:
    """Two numbers where PyTorch takes one for both, as a number or as a sequence of one."""
    v = tuple(v) if isinstance(v, (tuple, list)) else (v,)
    return v * 2 if len(v) == 1 else v


def _maps(g, input):
    if input.dim() != 4:
        raise ConversionError(f"an input of {input.dim()} dimensions, not (B, C, H, W), has no converter")
    return g.tensor(input)


@converts("torch.nn.functional.conv2d", "torch.conv2d")
def conv2d(g, result, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str):
        raise ConversionError(f"conv2d with padding={padding!r} has no converter; give numbers")

    def configure(layer):
        layer.stride_nd, layer.padding_nd, layer.dilation_nd = _pair(stride), _pair(padding), _pair(dilation)
        layer.num_groups = groups

    return _convolution(g, _maps(g, input), weight, bias, configure)


def _convolution(g, x, weight, bias, configure=lambda layer: None):
    """x (B, C, H, W) convolved with weight (D, C / groups, h, w); `configure` sets what is not the default."""
    compute = g.compute_dtype(g.current_module())
    kernel = g.weights(weight, compute)
    offset = g.trt.Weights() if bias is None else g.weights(bias, compute)

    def add(t):
        layer = g.network.add_convolution_nd(t, weight.shape[0], tuple(weight.shape[2:]), kernel, offset)
        configure(layer)
        return layer

    return g.emit(add, x)


@converts("torch.nn.functional.max_pool2d", "torch.max_pool2d")
def max_pool2d(
    g, result, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    if ceil_mode or return_indices or _pair(dilation) != (1, 1):
        raise ConversionError("max_pool2d with ceil_mode, return_indices or dilation has no converter")

    def add(x):
        layer = g.network.add_pooling_nd(x, g.trt.PoolingType.MAX, _pair(kernel_size))
        layer.stride_nd, layer.padding_nd = _pair(stride or kernel_size), _pair(padding)
        return layer

    return g.emit(add, _maps(g, input))


@converts("torch.nn.functional.batch_norm")
def batch_norm(
    g,
    result,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *unused,
    **also_unused,
):
    if training:
        raise ConversionError("batch_norm in training mode has no converter: call model.eval()")
    scale = (running_var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    if input.dim() < 4:  # a scale layer takes no less
        return affine(g, g.tensor(input), scale.float(), shift.float(), 1)
    compute = g.compute_dtype(g.current_module())
    factors, offsets = g.weights(scale.float(), compute), g.weights(shift.float(), compute)
    powers = g.weights(torch.ones_like(scale, dtype=torch.float32), compute)
    mode = g.trt.ScaleMode.CHANNEL
    return g.emit(lambda x: g.network.add_scale_nd(x, mode, offsets, factors, powers, 1), g.tensor(input))


@converts("torch.batch_norm")
def torch_batch_norm(
    g, result, input, weight, bias, running_mean, running_var, training, momentum, eps, *unused, **also_unused
):
    """The same with its arguments in another order."""
    return batch_norm(g, result, input, running_mean, running_var, weight, bias, training, momentum, eps)


def affine(g, x, weight, bias, dim: int):
    """x * weight + bias along one dimension, for either of them that there is."""
    rank = len(x.shape)
    shape = [1] * rank
    shape[dim % rank] = -1
    if weight is not None:
        x = g.elementwise("PROD", x, g.constant(weight.reshape(shape)))
    if bias is not None:
        x = g.elementwise("SUM", x, g.constant(bias.reshape(shape)))
    return x


@converts("torch.nn.functional.linear")
def linear(g, result, input, weight, bias=None):
    out = g.matmul(g.tensor(input), g.constant(weight), transpose_b=True)
    return affine(g, out, None, bias, -1)


@converts(
    "torch.nn.functional.relu", "torch.relu", "torch.nn.functional.relu_", "torch.relu_", "torch.Tensor.relu_"
)
def relu(g, result, input, inplace=False):
    return _relu(g, g.tensor(input))


def _relu(g, x):
    return g.emit(lambda t: g.network.add_activation(t, g.trt.ActivationType.RELU), x)


@converts("mask2former.modeling.fused_ops.linear_relu")
def linear_relu(g, result, x, linear):
    """A convolution of 1x1 maps: after a matrix product TensorRT 8.6 runs ReLU as a kernel of its own."""
    x = g.tensor(x)
    sizes = g.sizes(x)
    with g.inside(linear):
        maps = g.reshape(x, [-1, linear.in_features, 1, 1])
        out = _relu(g, _convolution(g, maps, linear.weight[:, :, None, None], linear.bias))
        return g.reshape(out, [*sizes[:-1], linear.out_features])


@converts("torch.nn.functional.gelu")
def gelu(g, result, input, approximate="none"):
    if approximate != "none":
        raise ConversionError(f"gelu with approximate={approximate!r} has no converter")
    x = g.tensor(input)
    erf = g.unary("ERF", g.elementwise("PROD", x, 1 / math.sqrt(2)))
    return g.elementwise("PROD", g.elementwise("PROD", x, 0.5), g.elementwise("SUM", erf, 1.0))


@converts("torch.nn.functional.dropout")
def dropout(g, result, input, p=0.5, training=True, inplace=False):
    if training and p > 0:
        raise ConversionError("dropout in training mode has no converter: call model.eval()")
    return g.tensor(input)


@converts("torch.Tensor.softmax", "torch.softmax", "torch.nn.functional.softmax")
def softmax(g, result, input, dim=None, *unused, **also_unused):
    return g.softmax(g.tensor(input), dim)


@converts("torch.Tensor.masked_fill")
def masked_fill(g, result, input, mask, value):
    if not result.is_floating_point():
        raise ConversionError(f"masked_fill of {result.dtype} has no converter")
    value, compute = float(value), g.compute_dtype(g.current_module())
    if value == -math.inf:
        value = MASKED_LOGIT
    elif math.isfinite(value) and torch.tensor(value).to(compute).isinf():
        raise ConversionError(
            f"masked_fill with {value:g} has no converter in {compute}, which holds at most {torch.finfo(compute).max:g}: "
            "fill with a smaller value or -inf, or add the module to MODEL.TENSORRT.FP32_MODULES"
        )
    return g.select(g.tensor(mask), g.tensor(value), g.tensor(input))
