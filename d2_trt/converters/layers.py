"""Converters of convolutions, linear layers, batch normalisation, activations and attention."""

from __future__ import annotations

import math

import torch

from ..errors import ConversionError
from .registry import converts

# Stands for minus infinity before a softmax: exp of it is 0 in every type, and it fits float16.
MASKED_LOGIT = -3.0e4


@converts("torch.nn.functional.conv2d", "torch.conv2d")
def conv2d(g, result, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, str):
        raise ConversionError(f"conv2d with padding={padding!r} has no converter; give numbers")

    def pair(v):
        return (v, v) if isinstance(v, int) else tuple(v)

    compute = g.compute_dtype(g.current_module())
    kernel = g.weights(weight, compute)
    offset = g.trt.Weights() if bias is None else g.weights(bias, compute)

    def add(x):
        layer = g.network.add_convolution_nd(x, weight.shape[0], tuple(weight.shape[2:]), kernel, offset)
        layer.stride_nd, layer.padding_nd, layer.dilation_nd = pair(stride), pair(padding), pair(dilation)
        layer.num_groups = groups
        return layer

    return g.emit(add, g.tensor(input))


@converts("torch.nn.functional.max_pool2d", "torch.max_pool2d")
def max_pool2d(
    g, result, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    if ceil_mode or return_indices or dilation not in (1, (1, 1)):
        raise ConversionError("max_pool2d with ceil_mode, return_indices or dilation has no converter")

    def pair(v):
        return (v, v) if isinstance(v, int) else tuple(v)

    def add(x):
        layer = g.network.add_pooling_nd(x, g.trt.PoolingType.MAX, pair(kernel_size))
        layer.stride_nd, layer.padding_nd = pair(stride or kernel_size), pair(padding)
        return layer

    return g.emit(add, g.tensor(input))


@converts("torch.nn.functional.batch_norm", "torch.batch_norm")
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
    compute = g.compute_dtype(g.current_module())
    factors, offsets = g.weights(scale.float(), compute), g.weights(shift.float(), compute)
    powers = g.weights(torch.ones_like(scale, dtype=torch.float32), compute)
    mode = g.trt.ScaleMode.CHANNEL
    return g.emit(lambda x: g.network.add_scale_nd(x, mode, offsets, factors, powers, 1), g.tensor(input))


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
    return g.emit(lambda x: g.network.add_activation(x, g.trt.ActivationType.RELU), g.tensor(input))


@converts("torch.nn.functional.gelu")
def gelu(g, result, input, approximate="none"):
    if approximate != "none":
        raise ConversionError(f"gelu with approximate={approximate!r} has no converter")
    x = g.tensor(input)
    erf = g.unary("ERF", g.elementwise("PROD", x, 1 / math.sqrt(2)))
    return g.elementwise("PROD", g.elementwise("PROD", x, 0.5), g.elementwise("SUM", erf, 1.0))


@converts("torch.nn.functional.dropout", "torch.nn.functional.dropout_")
def dropout(g, result, input, p=0.5, training=True, inplace=False):
    if training and p > 0:
        raise ConversionError("dropout in training mode has no converter: call model.eval()")
    return g.tensor(input)


@converts("torch.Tensor.softmax", "torch.softmax", "torch.nn.functional.softmax")
def softmax(g, result, input, dim=None, *unused, **also_unused):
    return g.softmax(g.tensor(input), dim)


@converts("torch.Tensor.masked_fill")
def masked_fill(g, result, input, mask, value):
    value = max(float(value), MASKED_LOGIT)
    return g.select(g.tensor(mask), g.tensor(value), g.tensor(input))


def _attention(g, q, k, v, scale: float, add_to_logits=()):
    logits = g.matmul(g.elementwise("PROD", q, scale), k, transpose_b=True)
    for term in add_to_logits:
        logits = g.elementwise("SUM", logits, term)
    return g.matmul(g.softmax(logits, -1), v)


@converts("torch.nn.functional.scaled_dot_product_attention")
def scaled_dot_product_attention(
    g, result, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise ConversionError(
            "scaled_dot_product_attention with a mask, dropout or grouping has no converter"
        )
    q, k, v = g.tensor(query), g.tensor(key), g.tensor(value)
    if scale is None:
        channels = g.size(q, -1)
        if not isinstance(channels, int):
            raise ConversionError("attention over an unknown number of channels has no converter")
        scale = channels**-0.5
    return _attention(g, q, k, v, scale)


@converts("mask2former.modeling.shape_ops.window_attention")
def window_attention(g, result, q, k, v, bias, mask, scale, dropout=0.0):
    terms = [g.tensor(bias, 5)]
    if mask is not None:
        m = g.tensor(mask)  # (windows, N, N) -> (1, windows, 1, N, N)
        terms.append(g.reshape(m, [1, g.size(m, 0), 1, m.shape[1], m.shape[2]]))
    return _attention(g, g.tensor(q), g.tensor(k), g.tensor(v), scale, terms)


@converts("mask2former.modeling.transformer_decoder.mask2former_transformer_decoder.attention_mask")
def attention_mask(g, result, mask_logits):
    logits = g.tensor(mask_logits)
    zero = g.tensor(0.0, 3)
    blocked = g.elementwise("LESS", logits, zero)

    def largest(x):
        return g.network.add_reduce(x, g.trt.ReduceOperation.MAX, 1 << 2, True)

    # A row is blocked everywhere where its largest logit is.
    some = g.unary("NOT", g.elementwise("LESS", g.emit(largest, logits), zero))
    mask = g.elementwise("AND", blocked, some)
    return g.reshape(mask, [g.size(mask, 0), 1, mask.shape[1], g.size(mask, 2)])
