"""Converters of LayerNorm and GroupNorm, and of what is fused with them."""

from __future__ import annotations

import torch

from ..errors import ConversionError
from .layers import affine
from .registry import converts


def _normalization(g, x, scale, bias, axes: int, eps: float, groups: int = 1):
    def add(t, s, b):
        # From 11 on, group normalisation takes one scale per channel: version 2.
        modern = groups > 1 and not hasattr(g.network, "add_normalization")
        layer = (g.network.add_normalization_v2 if modern else g.network.add_normalization)(t, s, b, axes)
        layer.epsilon = eps
        if groups > 1:
            layer.num_groups = groups
        if not g.strong:
            layer.compute_precision = g.trt.float32
        return layer

    return g.emit(add, x, scale, bias)


@converts("torch.nn.functional.layer_norm", "torch.layer_norm")
def layer_norm(g, result, input, normalized_shape, weight=None, bias=None, eps=1e-5, *unused):
    return _layer_norm(g, g.tensor(input), normalized_shape, weight, bias, eps)


@converts("mask2former.modeling.fused_ops.residual_layer_norm")
def residual_layer_norm(g, result, x, update, norm):
    total = g.elementwise("SUM", g.tensor(x), g.tensor(update))
    with g.inside(norm):
        return _layer_norm(g, total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _layer_norm(g, x, normalized_shape, weight, bias, eps: float):
    if len(normalized_shape) != 1:
        raise ConversionError(f"layer_norm over {len(normalized_shape)} dimensions has no converter")
    rank, channels = len(x.shape), normalized_shape[0]
    shape = (1,) * (rank - 1) + (channels,)
    scale = torch.ones(shape) if weight is None else weight.reshape(shape)
    shift = torch.zeros(shape) if bias is None else bias.reshape(shape)
    return _normalization(g, x, g.constant(scale), g.constant(shift), 1 << (rank - 1), eps)


@converts("torch.nn.functional.group_norm", "torch.group_norm")
def group_norm(g, result, input, num_groups, weight=None, bias=None, eps=1e-5, *unused):
    x = g.tensor(input)
    rank = len(x.shape)
    axes = sum(1 << i for i in range(2, rank))
    shape = (1, num_groups) + (1,) * (rank - 2)
    out = _normalization(
        g, x, g.constant(torch.ones(shape)), g.constant(torch.zeros(shape)), axes, eps, groups=num_groups
    )
    return affine(g, out, weight, bias, 1)
