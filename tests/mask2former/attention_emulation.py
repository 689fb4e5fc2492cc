"""The kernels of csrc/attention on a CPU, compiled by the host's compiler over tests/native/emulation.h."""

from __future__ import annotations

import ctypes

import torch

from tests.mask2former.native_library import library

FIELDS = (
    "batch",
    "queries",
    "keys",
    "heads",
    "dim",
    "q_stride",
    "k_stride",
    "v_stride",
    "pos_stride",
    "mask_dim",
)
ADDRESSES = ("q", "k", "v", "q_pos", "k_pos", "mask_embed", "features", "out")
OPTIONS = ("multiprocessors", "may_split", "backwards")


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ADDRESSES),
        *((name, ctypes.c_int64) for name in (*FIELDS, *OPTIONS)),
    ]


def splits(batch, queries, keys, heads, multiprocessors) -> tuple[int, int]:
    """Splits of all images that a call has in the workspace, and at most has with these sizes or smaller ones."""
    needed, most = ctypes.c_int64(), ctypes.c_int64()
    sizes = map(ctypes.c_int64, (batch, queries, keys, heads, multiprocessors))
    library("attention").plan_splits(*sizes, ctypes.byref(needed), ctypes.byref(most))
    return needed.value, most.value


def _guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at an address that is a multiple of 16, between values that are not numbers."""
    width = tensor.shape[-1]
    around = torch.full((tensor.numel() + 2 * 16 * width,), float("nan"), dtype=tensor.dtype)
    start = 8 * width
    while (around.data_ptr() + start * around.element_size()) % 16:
        start += 1
    inner = around[start : start + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def attention(
    q,
    k,
    v,
    num_heads,
    mask_embed=None,
    mask_features=None,
    q_pos=None,
    k_pos=None,
    *,
    multiprocessors=6,
    may_split=True,
    backwards=False,
):
    """mask2former.modeling.transformer_decoder.attention_cuda.attention for tensors on the CPU.

    q, k and v are parts of wider rows, as three layers' projections of one matrix product are.
    """
    batch, queries, channels = q.shape
    keys = k.shape[1]
    nan = float("nan")

    def packed(x, before, after):
        return _guarded(torch.nn.functional.pad(x, (before, after), value=nan))

    inputs = {"q": packed(q, 0, 8), "k": packed(k, 16, 0), "v": packed(v, 8, 24)}
    starts = {"q": 0, "k": 16, "v": 8}
    out = torch.full((batch * queries * channels + 8,), nan, dtype=q.dtype)
    assert out.data_ptr() % 16 == 0
    arguments = Arguments(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=num_heads,
        dim=channels // num_heads,
        mask_dim=0 if mask_embed is None else mask_embed.shape[2],
        multiprocessors=multiprocessors,
        may_split=may_split,
        backwards=backwards,
        out=out.data_ptr(),
    )
    for name, tensor in inputs.items():
        setattr(arguments, name, tensor.data_ptr() + 2 * starts[name])
        setattr(arguments, f"{name}_stride", tensor.shape[2])
    for name, pos in (("q_pos", q_pos), ("k_pos", k_pos)):
        if pos is not None:
            inputs[name] = packed(pos, 8, 0)
            setattr(arguments, name, inputs[name].data_ptr() + 16)
            arguments.pos_stride = inputs[name].shape[2]
    if mask_embed is not None:
        inputs["mask_embed"], inputs["features"] = _guarded(mask_embed.float()), _guarded(mask_features)
        arguments.mask_embed = inputs["mask_embed"].data_ptr()
        arguments.features = inputs["features"].data_ptr()
    library("attention").emulate_attention(ctypes.byref(arguments), int(q.dtype == torch.bfloat16))
    assert out[-8:].isnan().all(), "the kernel wrote past the end"
    return out[:-8].view(batch, queries, channels)


def mask_product(mask_embed, features, *, multiprocessors=6):
    """attention_cuda.mask_product for tensors on the CPU."""
    batch, queries, channels = mask_embed.shape
    pixels = features.shape[1]
    embed, features = _guarded(mask_embed), _guarded(features)
    out = torch.full((batch * queries * pixels + 8,), float("nan"))
    sizes = map(ctypes.c_int64, (batch, queries, pixels, channels, multiprocessors))
    addresses = map(ctypes.c_void_p, (embed.data_ptr(), features.data_ptr(), out.data_ptr()))
    library("attention").emulate_mask_product(*addresses, *sizes, int(features.dtype == torch.bfloat16))
    assert out[-8:].isnan().all(), "the kernel wrote past the end"
    return out[:-8].view(batch, queries, pixels)


def resize_mask_features(features, size):
    """attention_cuda.resize_mask_features for tensors on the CPU."""
    batch, height, width, channels = features.shape
    features = _guarded(features)
    out = torch.full((batch, size[0] * size[1], channels), float("nan"), dtype=features.dtype)
    sizes = map(ctypes.c_int64, (batch, height, width, channels, *size))
    addresses = (ctypes.c_void_p(features.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    library("attention").emulate_resize(*addresses, *sizes, int(features.dtype == torch.bfloat16))
    return out
