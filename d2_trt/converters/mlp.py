"""Converters of the decoder's feed-forward layers, mask embedding and attention's output projections: our plugin, or the
functions that they call.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from mask2former.modeling.transformer_decoder import attention_cuda, mlp_cuda

from .. import plugin
from .registry import DECLINED, converts

logger = logging.getLogger(__name__)
_OPS = "mask2former.modeling.fused_ops."


@converts(_OPS + "feed_forward")
def feed_forward(g, result, x, linear1, linear2, norm):
    dtype = _precision(g, [linear1, linear2, norm])
    # In float32 its weights are twice as many bytes, and products three times as many: TensorRT's TF32 does as well.
    if dtype not in attention_cuda.DTYPES or not _usable(g, [linear1, linear2], True, dtype):
        return DECLINED
    return _plugin(g, g.tensor(x), [linear1, linear2], norm, after=1, dtype=dtype)


@converts(_OPS + "linear_residual_layer_norm")
def linear_residual_layer_norm(g, result, x, linear, residual, norm):
    dtype = _precision(g, [linear, norm])
    # In float32 as for feed-forward layers.
    if dtype not in attention_cuda.DTYPES or not _usable(g, [linear], True, dtype):
        return DECLINED
    return _plugin(g, g.tensor(x), [linear], norm, after=1, dtype=dtype, residual=g.tensor(residual))


@converts(_OPS + "mlp_of_norm")
def mlp_of_norm(g, result, x, norm, mlp):
    return _mlp(g, x, norm, mlp, with_normed=False)


@converts(_OPS + "norm_and_mlp")
def norm_and_mlp(g, result, x, norm, mlp):
    return _mlp(g, x, norm, mlp, with_normed=True)


def _mlp(g, x, norm, mlp, with_normed: bool):
    layers = list(mlp.layers)
    dtype = _precision(g, [norm, *layers])
    if dtype is None or not _usable(g, layers, False, dtype):
        return DECLINED
    with g.inside(mlp):
        return _plugin(g, g.tensor(x), layers, norm, after=0, dtype=dtype, with_normed=with_normed)


def _precision(g, modules: list[nn.Module]) -> torch.dtype | None:
    """The type that all of these modules compute in; None where they differ, and in engines that are not in half precision.

    In those a module that is pinned to float32 may use TF32, than which the plugin's float32 is more exact.
    """
    if g.attention != "plugin" or g.compute_dtype("") not in attention_cuda.DTYPES:
        return None
    dtypes = set()
    for module in modules:
        with g.inside(module):
            dtypes.add(g.compute_dtype(g.current_module()))
    return dtypes.pop() if len(dtypes) == 1 else None


def _usable(g, layers: list[nn.Linear], after: bool, dtype: torch.dtype) -> bool:
    widths = _widths(layers)
    between = widths[1:-1]
    if not mlp_cuda.supported(widths, after, dtype) or any(w != between[0] for w in between):
        if g.first_time("mlp", after, *widths):
            logger.warning(
                "%s has no code for layers of %s channels: %s gets TensorRT's own layers, as do all others like it",
                plugin.MLP.name,
                widths,
                g.current_module(),
            )
        return False
    device = layers[0].weight.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return mlp_cuda.pays(widths, dtype, capability)


def _widths(layers: list[nn.Linear]) -> list[int]:
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def _plugin(
    g,
    x,
    layers: list[nn.Linear],
    norm: nn.LayerNorm,
    after: int,
    dtype: torch.dtype,
    residual=None,
    with_normed: bool = False,
):
    """x and the residual come in the types that they have, and results are of the layers' type."""
    widths = _widths(layers)
    biases = [torch.zeros(n) if layer.bias is None else layer.bias for n, layer in zip(widths[1:], layers)]
    inputs = [
        x,
        g.words(mlp_cuda.pack_weights([layer.weight.detach() for layer in layers], dtype)),
        g.constant(torch.cat([bias.detach().float().cpu() for bias in biases])),
        g.constant(torch.stack([norm.weight, norm.bias])),
        *([] if residual is None else [residual]),
    ]
    fields = {
        "type": dtype,
        "x_type": g.torch_dtype(x),
        "residual_type": -1 if residual is None else g.torch_dtype(residual),
        "out_type": dtype,
        "normed_type": dtype if with_normed else -1,
        "layers": len(layers),
        "channels": widths[0],
        "hidden": widths[1],
        "out": widths[-1],
        "after": after,
        "epsilon": float(norm.eps),
    }
    if not with_normed:
        return g.plugin(plugin.MLP, inputs, fields, dtype)
    out, normed = g.plugin(plugin.MLP, inputs, fields, dtype, dtype)
    return [normed, out]
