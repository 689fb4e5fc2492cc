"""Window attention of a map by the kernel of csrc/window_attention, which engines run: to test and time it alone.

Not differentiable; the model itself uses PyTorch's operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels

# What csrc/window_attention/window_attention.h has code for.
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32)
MAX_WINDOW = 12


def supported(window_size: int, dim: int) -> bool:
    """Whether there is a kernel for windows of this side and heads of so many channels."""
    return 1 <= window_size <= MAX_WINDOW and dim in HEAD_DIMS


def window_attention(
    qkv: Tensor, qkv_bias: Tensor, bias: Tensor, window_size: int, shift: int, scale: float
) -> Tensor:
    """Attention inside the windows of a map that is padded and cyclically shifted, and back.

    Args:
        qkv: (B, H, W, 3 * C) float16 or bfloat16 on a GPU: queries, keys and values, each heads * D.
        qkv_bias: (3 * C,) float32: what pixels of the padding at the bottom and the right have.
        bias: (heads, 2 * window_size - 1, 2 * window_size - 1) float32, added to the logits by the query's row and
            column minus the key's, plus window_size - 1.
        window_size, shift: in pixels; logits between regions that only the shift brought together get -100.
        scale: factor of the logits.

    Returns:
        (B, H, W, C) of qkv's dtype.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shapes, dtypes or devices do not go together, or there is no kernel for these sizes.
    """
    if not qkv.is_cuda or qkv.dtype not in DTYPES or qkv.dim() != 4:
        raise ValueError(
            f"window_attention: qkv is {qkv.dtype} {tuple(qkv.shape)} on {qkv.device}; expected (B, H, W, 3 * C) of "
            f"{' or '.join(map(str, DTYPES))} on a GPU"
        )
    batch, height, width, channels = qkv.shape
    heads, span = bias.shape[0] if bias.dim() else 0, 2 * window_size - 1
    if heads < 1 or channels % (3 * heads) or qkv_bias.shape != (channels,):
        raise ValueError(
            f"window_attention: qkv {tuple(qkv.shape)}, qkv_bias {tuple(qkv_bias.shape)} and bias {tuple(bias.shape)}; "
            "expected (B, H, W, 3 * heads * D), (3 * heads * D,) and (heads, 2 * window_size - 1, 2 * window_size - 1)"
        )
    if bias.shape != (heads, span, span):
        raise ValueError(
            f"window_attention: bias is {tuple(bias.shape)}; expected {(heads, span, span)} for windows of {window_size}"
        )
    for name, tensor in (("qkv_bias", qkv_bias), ("bias", bias)):
        if tensor.dtype != torch.float32 or tensor.device != qkv.device:
            raise ValueError(
                f"window_attention: {name} is {tensor.dtype} on {tensor.device}; expected torch.float32 on {qkv.device}"
            )
    qkv, qkv_bias, bias = qkv.contiguous(), qkv_bias.contiguous(), bias.contiguous()
    out = qkv.new_empty(batch, height, width, channels // 3)
    with torch.cuda.device(qkv.device):
        kernels.load().window_attention(
            qkv.data_ptr(),
            qkv_bias.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            dtype=kernels.dtype_name(qkv),
            batch=batch,
            height=height,
            width=width,
            heads=heads,
            dim=channels // 3 // heads,
            window=window_size,
            shift=shift,
            scale=scale,
            stream=kernels.stream_of(qkv),
        )
    return out
