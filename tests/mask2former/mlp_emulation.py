"""The kernel of csrc/mlp on a CPU, compiled by the host's compiler over tests/native/emulation.h."""

from __future__ import annotations

import ctypes

import torch

from mask2former.modeling.transformer_decoder import mlp_cuda
from tests.mask2former.native_library import library

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at an address that is a multiple of 16, between values that are no finite numbers."""
    fill = -(2**31) if tensor.dtype == torch.int32 else float("nan")
    around = torch.full((tensor.numel() + 256,), fill, dtype=tensor.dtype)
    start = next(i for i in range(64, 80) if (around.data_ptr() + i * around.element_size()) % 16 == 0)
    inner = around[start : start + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def mlp(
    x,
    weights,
    biases,
    norm_weight,
    norm_bias,
    eps=1e-5,
    *,
    after,
    dtype,
    residual=None,
    out_dtype=None,
    normed_dtype=None,
    parts=8,
    multiprocessors=132,
    shared_bytes=227 << 10,
    backwards=False,
    blocks=None,
):
    """mlp_cuda.mlp for tensors on the CPU, by clusters of at most so many parts.

    blocks: how many blocks of 16 rows the plan must have in a tile.
    """
    residual = x if residual is None else residual
    widths = [x.shape[-1], *(len(weight) for weight in weights)]
    nan = float("nan")
    given = {
        "x": _guarded(x),
        "weights": _guarded(mlp_cuda.pack_weights(weights, dtype)),
        "biases": _guarded(torch.cat([bias.float() for bias in biases])),
        "norm": _guarded(torch.stack([norm_weight, norm_bias])),
        "residual": _guarded(residual),
        "out": _guarded(torch.full((*x.shape[:-1], widths[-1]), nan, dtype=out_dtype or x.dtype)),
        "normed": None if normed_dtype is None else _guarded(torch.full_like(x, nan, dtype=normed_dtype)),
    }
    dtypes = (dtype, x.dtype, residual.dtype, out_dtype or x.dtype, normed_dtype)
    types = [TYPES[t or torch.float32] for t in dtypes]
    made = 0
    while not made:
        sizes = [parts, multiprocessors, shared_bytes, int(backwards), *types, int(after)]
        sizes += [x.numel() // widths[0], len(weights), *widths]
        made = library("mlp").emulate_mlp(
            *(ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in given.values()),
            (ctypes.c_int32 * len(sizes))(*sizes),
            ctypes.c_float(eps),
        )
        parts //= 2
    assert blocks in (None, made)
    for out in (given["out"], given["normed"]):
        if out is not None:
            around = out._base
            assert around.isnan().sum() == around.numel() - out.numel(), (
                "outside of the rows, or not all of them"
            )
    return given["out"], given["normed"]
