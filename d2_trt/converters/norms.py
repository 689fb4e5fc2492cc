"""Converters of LayerNorm, GroupNorm and what is fused with them, and of images' normalisation: our plugins, or TensorRT's
layers.
"""

from __future__ import annotations

import functools
import weakref

import torch

from .. import plugin
from ..errors import ConversionError
from .layers import affine
from .registry import DECLINED, converts

# Constant positions as tensors of the network, by graph: all layers of the encoder add the same.
_positions_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@converts("torch.nn.functional.layer_norm", "torch.layer_norm")
def layer_norm(g, result, input, normalized_shape, weight=None, bias=None, eps=1e-5, *unused):
    return _layer_norm(g, g.tensor(input), normalized_shape, weight, bias, eps)


@converts("mask2former.modeling.fused_ops.residual_layer_norm")
def residual_layer_norm(g, result, x, update, norm):
    x, update = g.tensor(x), g.tensor(update)
    if g.normalization == "plugin":
        with g.inside(norm):
            return _layer_norm(g, x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, update)
    total = g.elementwise("SUM", x, update)
    with g.inside(norm):
        return _layer_norm(g, total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


@converts("mask2former.modeling.fused_ops.residual_layer_norm_and_position")
def residual_layer_norm_and_position(g, result, x, update, norm, position):
    if g.normalization != "plugin":
        out = residual_layer_norm(g, result, x, update, norm)
        return out, add_position(g, result, out, position)
    x, update = g.tensor(x), g.tensor(update)
    with g.inside(norm):
        added = (update, _position(g, position))
        return _layer_norm(g, x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, *added)


@converts("mask2former.modeling.fused_ops.add_position")
def add_position(g, result, x, position):
    return g.elementwise("SUM", g.tensor(x), _position(g, position))


def _position(g, position):
    """Positions as they come. Constant ones get the type that the module computes in, which TensorRT would otherwise bring
    them to in every call, and are one constant for all that add them.
    """
    if hasattr(position, "_trt"):
        return position._trt
    made, dtype = _positions_of.setdefault(g, {}), g.compute_dtype(g.current_module())
    key = (id(position), position._version, dtype)
    if key not in made:
        made[key] = (position, g.constant(position, dtype))  # held, so that no other tensor gets its id
    return made[key][1]


@converts("torch.nn.functional.group_norm", "torch.group_norm")
def group_norm(g, result, input, num_groups, weight=None, bias=None, eps=1e-5, *unused):
    return _group_norm(g, g.tensor(input), num_groups, weight, bias, eps)


@converts("mask2former.modeling.fused_ops.group_norm_relu")
def group_norm_relu(g, result, x, norm):
    fused = g.normalization == "plugin"
    with g.inside(norm):
        out = _group_norm(g, g.tensor(x), norm.num_groups, norm.weight, norm.bias, norm.eps, relu=fused)
    return out if fused else g.emit(lambda t: g.network.add_activation(t, g.trt.ActivationType.RELU), out)


@converts("mask2former.modeling.fused_ops.normalize_images")
def normalize_images(g, result, images, mean, std):
    """Exact to float32 whatever the output's type: pixels that are their mean, as padding is, become zeros."""
    if g.normalization != "plugin":
        return DECLINED
    out, channels = _out_type(g), int(images.shape[1])
    tensors = [g.cast(g.tensor(images), torch.float32), g.constant(mean.flatten()), g.constant(std.flatten())]
    return g.plugin(plugin.NORMALIZE_IMAGES, tensors, {"out_type": out, "channels": channels}, out)


def _layer_norm(g, x, normalized_shape, weight, bias, eps: float, residual=None, position=None):
    if len(normalized_shape) != 1:
        raise ConversionError(f"layer_norm over {len(normalized_shape)} dimensions has no converter")
    rank, channels = len(x.shape), normalized_shape[0]
    weight = torch.ones(channels) if weight is None else weight
    bias = torch.zeros(channels) if bias is None else bias
    if g.normalization == "plugin":
        tensors = [x, g.constant(weight), g.constant(bias)]
        out = _out_type(g)
        types = {"x_type": g.torch_dtype(x), "out_type": out}
        for name, added in (("residual_type", residual), ("position_type", position)):
            types[name] = -1 if added is None else g.torch_dtype(added)
            tensors += [] if added is None else [added]
        outputs = [out] if position is None else [out, out]
        return g.plugin(plugin.LAYER_NORM, tensors, {**types, "epsilon": float(eps)}, *outputs)
    shape = (1,) * (rank - 1) + (channels,)
    scale, shift = g.constant(weight.reshape(shape)), g.constant(bias.reshape(shape))
    return _normalization(g, x, scale, shift, 1 << (rank - 1), eps)


def _group_norm(g, x, groups: int, weight, bias, eps: float, relu: bool = False):
    if g.normalization == "plugin":
        return _group_norm_plugin(g, x, groups, weight, bias, eps, relu)
    if groups == 1:
        # TensorRT takes one group for none, and would normalise every channel by itself: all become one channel.
        sizes = g.sizes(x)
        merged = g.reshape(x, [sizes[0], 1, sizes[1], functools.reduce(g.mul, sizes[2:], 1)])
        out = g.reshape(_grouped(g, merged, 1, eps), sizes)
    elif len(x.shape) == 2:  # TensorRT wants a dimension to sum over beside the channels
        sizes = g.sizes(x)
        out = g.reshape(_grouped(g, g.reshape(x, [*sizes, 1]), groups, eps), sizes)
    else:
        out = _grouped(g, x, groups, eps)
    return affine(g, out, weight, bias, 1)


def _grouped(g, x, groups: int, eps: float):
    rank = len(x.shape)
    axes = sum(1 << i for i in range(2, rank))
    shape = (1, groups) + (1,) * (rank - 2)
    scale, shift = g.constant(torch.ones(shape)), g.constant(torch.zeros(shape))
    return _normalization(g, x, scale, shift, axes, eps, groups=groups)


def _group_norm_plugin(g, x, groups: int, weight, bias, eps: float, relu: bool):
    channels, sizes = int(x.shape[1]), g.sizes(x)
    weight = torch.ones(channels) if weight is None else weight
    bias = torch.zeros(channels) if bias is None else bias
    if len(sizes) != 4:  # the plugin takes maps; what a pixel is makes no difference
        x = g.reshape(x, [*sizes[:2], functools.reduce(g.mul, sizes[2:], 1), 1])
    fields = {
        "x_type": g.torch_dtype(x),
        "out_type": _out_type(g),
        "channels": channels,
        "groups": groups,
        "relu": int(relu),
        "epsilon": float(eps),
    }
    tensors = [x, g.constant(weight), g.constant(bias)]
    out = g.plugin(plugin.GROUP_NORM, tensors, fields, fields["out_type"])
    return out if len(sizes) == 4 else g.reshape(out, sizes)


def _out_type(g) -> torch.dtype:
    """The plugins sum in float32 and take their inputs in the types that these have; the policy decides on the output's."""
    return g.compute_dtype(g.current_module())


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
