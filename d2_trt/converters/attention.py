"""Converters of attention: the decoder's by our plugin or TensorRT's own layers, others by those layers."""

from __future__ import annotations

import logging

import torch

from mask2former.modeling.backbone import window_attention_cuda
from mask2former.modeling.transformer_decoder import attention_cuda

from .. import plugin
from ..errors import ConversionError
from .layers import MASKED_LOGIT, linear
from .registry import DECLINED, converts

logger = logging.getLogger(__name__)
_CORE = "mask2former.modeling.transformer_decoder.attention_core."


def _attention(g, q, k, v, scale: float, add_to_logits=(), blocked=None, **types):
    logits = g.matmul(g.elementwise("PROD", q, scale, **types), k, transpose_b=True, **types)
    for term in add_to_logits:
        logits = g.elementwise("SUM", logits, term, **types)
    if blocked is not None:
        low = g.tensor(MASKED_LOGIT, len(logits.shape))
        logits = g.emit(lambda c, a, b: g.network.add_select(c, a, b), blocked, low, logits, **types)
    return g.matmul(g.softmax(logits, -1, **types), v, **types)


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


@converts("mask2former.modeling.backbone.swin.attend_in_windows")
def attend_in_windows(g, result, x, attention, window_size, shift, mask):
    """Padding, shift, partition and mask are the plugin's; where it is not used, each function is converted."""
    heads, dim = attention.num_heads, attention.head_dim
    with g.inside(attention):
        dtype = g.compute_dtype(g.current_module())
        if g.attention != "plugin" or dtype not in window_attention_cuda.DTYPES:
            return DECLINED
        if not window_attention_cuda.supported(window_size, dim):
            _warn_of_sizes(
                g, plugin.WINDOW_ATTENTION, f"windows of {window_size} with heads of {dim} channels"
            )
            return DECLINED
    with g.inside(attention.qkv):
        qkv = linear(g, None, g.tensor(x), attention.qkv.weight, attention.qkv.bias)
    with g.inside(attention):
        biases = attention.qkv.bias
        biases = torch.zeros(3 * heads * dim) if biases is None else biases
        span = 2 * window_size - 1
        # (span * span, heads) -> (heads, span, span)
        relative = attention.relative_position_bias_table.t().unflatten(1, (span, span))
        inputs = [g.cast(qkv, dtype), g.constant(biases), g.constant(relative)]
        sizes = {"heads": heads, "dim": dim, "window": window_size, "shift": shift}
        fields = {"type": dtype, **sizes, "scale": float(attention.scale)}
        out = g.plugin(plugin.WINDOW_ATTENTION, inputs, fields, dtype)
    with g.inside(attention.proj):
        return linear(g, None, out, attention.proj.weight, attention.proj.bias)


@converts(_CORE + "attention_mask")
def attention_mask(g, result, mask_logits):
    return _blocked(g, g.tensor(mask_logits))


def _blocked(g, logits, **types):
    """attention_core.attention_mask: (B, Q, K) mask logits -> (B, 1, Q, K) bool."""
    zero = g.tensor(0.0, 3)
    blocked = g.elementwise("LESS", logits, zero, **types)

    def largest(x):
        return g.network.add_reduce(x, g.trt.ReduceOperation.MAX, 1 << 2, True)

    # A row is blocked everywhere where its largest logit is.
    some = g.unary("NOT", g.elementwise("LESS", g.emit(largest, logits, **types), zero, **types))
    mask = g.elementwise("AND", blocked, some)
    return g.reshape(mask, [g.size(mask, 0), 1, mask.shape[1], g.size(mask, 2)])


@converts(_CORE + "masked_attention")
def masked_attention(g, result, q, q_pos, keys, values, part, mask_embed, mask_features, num_heads):
    """The plugin takes keys and values of all layers of a level, so that nothing is cut out of them."""
    channels, mask_dim = q.shape[2], mask_embed.shape[2]
    given = (q, q_pos, keys, values, mask_embed, mask_features)
    q, q_pos, keys, values, mask_embed, mask_features = map(g.tensor, given)
    dtype, types = _precision(g, num_heads, channels // num_heads, mask_dim)
    if dtype is not None:
        inputs = [g.cast(t, dtype) for t in (q, q_pos, keys, values)]
        # In half precision the embedding would have fewer bits than its product with the features has.
        inputs += [g.cast(mask_embed, torch.float32), g.cast(mask_features, dtype)]
        return _plugin(g, inputs, dtype, num_heads, masked=1, part=part)
    blocked = _blocked(g, g.matmul(mask_embed, mask_features, transpose_b=True, **types), **types)
    k, v = (_columns(g, t, part, channels) for t in (keys, values))
    q = g.elementwise("SUM", q, q_pos, **types)
    return _native(g, q, k, v, num_heads, blocked, **types)


@converts(_CORE + "self_attention")
def self_attention(g, result, qkv, qk_pos, num_heads):
    channels = qkv.shape[2] // 3
    qkv, qk_pos = g.tensor(qkv), g.tensor(qk_pos)
    dtype, types = _precision(g, num_heads, channels // num_heads)
    if dtype is not None:
        inputs = [g.cast(t, dtype) for t in (qkv, qk_pos)]
        return _plugin(g, inputs, dtype, num_heads, masked=0, part=0)
    q, k, v = (_columns(g, qkv, part, channels) for part in range(3))
    q, k = (
        g.elementwise("SUM", t, _columns(g, qk_pos, part, channels), **types) for part, t in enumerate((q, k))
    )
    return _native(g, q, k, v, num_heads, **types)


@converts(_CORE + "level_mask_features")
def level_mask_features(g, result, mask_features, level):
    """One kernel in the place of a resize and a transposition, where the features come in half precision."""
    features = g.tensor(mask_features)
    dtype = _half_features(g, mask_features)
    size, wanted = mask_features.shape[2:], level.shape[2:]
    # Levels halve the features' sides again and again, rounding up, whatever the image's size.
    factor = next(
        (f for f in (1, 2, 4, 8, 16, 32) if all(-(-s // f) == w for s, w in zip(size, wanted))), None
    )
    if dtype is None or factor is None or dtype != g.compute_dtype(g.current_module()):
        return DECLINED
    return g.plugin(plugin.LEVEL_MASK_FEATURES, [features], {"type": dtype, "factor": factor}, dtype)


@converts(_CORE + "mask_product")
def mask_product(g, result, mask_embed, mask_features):
    """Exact products of the features as they come with the float32 embedding, whatever the policy says of the module."""
    dtype = _half_features(g, mask_features)
    if dtype is None or not attention_cuda.supported_mask_dim(mask_features.shape[1]):
        return DECLINED
    inputs = [g.cast(g.tensor(mask_embed), torch.float32), g.tensor(mask_features)]
    return g.plugin(plugin.MASK_PRODUCT, inputs, {"type": dtype}, torch.float32)


def _half_features(g, mask_features) -> torch.dtype | None:
    """The type of mask features that our plugins take as they are: half precision, eight channels at a time."""
    dtype = g.torch_dtype(g.tensor(mask_features))
    usable = g.attention == "plugin" and dtype in attention_cuda.DTYPES and mask_features.shape[1] % 8 == 0
    return dtype if usable else None


def _precision(g, heads: int, dim: int, mask_dim: int = 0):
    """The plugin's type, or None and types for `emit`: what computes attention in the module that is traced.

    The plugin has half precision alone. Where it is to be used and has no code for the sizes, TensorRT's layers compute in
    float32: that the decoder may be in half precision rests on the plugin's float32 sums.
    """
    dtype = g.compute_dtype(g.current_module())
    if g.attention != "plugin" or dtype not in attention_cuda.DTYPES:
        return None, {}
    if attention_cuda.supported(heads, dim, mask_dim):
        return dtype, {}
    sizes = f"{heads} heads of {dim} channels with a mask of {mask_dim}"
    _warn_of_sizes(g, plugin.ATTENTION, sizes, ", in float32")
    return None, {"compute": torch.float32, "out": torch.float32}


def _warn_of_sizes(g, kind, sizes: str, how: str = "") -> None:
    logger.warning(
        "%s has no code for %s: %s gets TensorRT's own layers%s", kind.name, sizes, g.current_module(), how
    )


def _plugin(g, inputs, dtype, heads: int, masked: int, part: int):
    fields = {"type": dtype, "heads": heads, "masked": masked, "part": part}
    return g.plugin(plugin.ATTENTION, inputs, fields, dtype)


def _columns(g, t, part: int, channels: int):
    """Channels part * channels and on of (B, N, n * channels)."""
    if t.shape[2] == channels:
        return t
    return g.slice(t, [0, 0, part * channels], [g.size(t, 0), g.size(t, 1), channels])


def _native(g, q, k, v, heads: int, blocked=None, **types):
    """attention_core.reference by TensorRT's layers."""
    channels = q.shape[2]
    dim = channels // heads

    def split(t):  # (B, N, C) -> (B, heads, N, D)
        t = g.reshape(t, [g.size(t, 0), g.size(t, 1), heads, dim])
        return g.transpose(t, (0, 2, 1, 3))

    out = _attention(g, split(q), split(k), split(v), dim**-0.5, blocked=blocked, **types)
    out = g.transpose(out, (0, 2, 1, 3))
    return g.reshape(out, [g.size(out, 0), g.size(out, 1), channels])
