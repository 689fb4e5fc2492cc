"""Linear layers on few rows, with the LayerNorm before or after them, by the kernel of csrc/mlp, which engines run.

Not differentiable; the model itself uses PyTorch's operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import kernels

# What csrc/mlp/mlp.h has code for.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_LAYERS = 4
WIDTH_STEP = 32
MAX_WIDTH = 8192
MAX_NORM_BEFORE = 512
MAX_NORM_AFTER = 256
_SHARED_BYTES = 99 << 10
# csrc/mlp/plan.h: shared memory of 16 rows of sums.
_PARTIAL_BYTES = 16 * (256 + 8) * 4
# Blocks of a cluster, from compute capability 9.0 on.
_PARTS = 8
# Bytes of weights that a multiprocessor reads of the second-level cache while TensorRT runs one more kernel: 64 a clock, at
# 1.3 GHz for 5 us, of which a kernel of ours takes some itself.
_BYTES_OF_A_KERNEL = 256 << 10


def supported(widths: Sequence[int], after: bool, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a chain of layers.

    Args:
        widths: channels of the input, then of what each layer gives.
        after: whether residual and LayerNorm come after the layers, or LayerNorm before them.
        dtype: of the products, see `mlp`.
    """
    layers, first, last = len(widths) - 1, widths[0], widths[-1]
    if dtype not in DTYPES or not 1 <= layers <= MAX_LAYERS:
        return False
    if any(w % WIDTH_STEP or not 0 < w <= MAX_WIDTH for w in widths):
        return False
    if after and (first != last or last > MAX_NORM_AFTER):
        return False
    if not after and first > MAX_NORM_BEFORE:
        return False
    # Operands of even and of odd layers, for 16 rows of which one block has all.
    widest = [max(widths[:-1][odd::2], default=0) * dtype.itemsize for odd in (0, 1)]
    return _PARTIAL_BYTES + sum(16 * ((b + 63) // 128 * 128 + 64) for b in widest if b) <= _SHARED_BYTES


def pays(widths: Sequence[int], dtype: torch.dtype, capability: tuple[int, int] | None = None) -> bool:
    """Whether an engine is faster with the kernel than with a kernel for each layer and the LayerNorm.

    What is weighed is the time that each multiprocessor takes to read weights from the second-level cache, all of them
    where there are no clusters. Rows are not: on an H100 the kernel was faster than PyTorch's operations up to 400 rows,
    and slower by 4 and 8 % at 800 (docs/performance.md). From compute capability 9.0 on clusters are taken to be there; a
    library without code for it, or a small part of a GPU, has none, and feed-forward layers are slower then. One layer
    saves one kernel, and nobody has measured whether it does without clusters: then it does not pay.

    Args:
        widths, dtype: as in `supported`.
        capability: the GPU's compute capability, None where there is none to ask: then as if it had clusters.
    """
    parts = _PARTS if capability is None or tuple(capability) >= (9, 0) else 1
    weights = sum(i * o for i, o in itertools.pairwise(widths)) * dtype.itemsize
    return (parts > 1 or len(widths) > 2) and weights <= len(widths) * parts * _BYTES_OF_A_KERNEL


def pack_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights of linear layers, each (out, in), as the kernel reads them: (words,) int32; see csrc/mlp/mlp.h."""
    packed = []
    for weight in weights:
        rows, columns = weight.shape
        if dtype == torch.float32:
            weight = weight.float()
            high = weight.bfloat16()
            low = (weight - high.float()).bfloat16()
            both = torch.stack([high, low], dim=1)  # (out, 2, in)
            blocks = both.view(rows // 8, 8, 2, columns // 16, 4, 4).permute(0, 3, 1, 4, 2, 5)
        else:
            blocks = weight.to(dtype).reshape(rows // 8, 8, columns // 32, 4, 8).transpose(1, 2)
        packed.append(blocks.contiguous().view(torch.int16).flatten())
    return torch.cat(packed).view(torch.int32)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    *,
    after: bool,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """norm(residual + layers(x)) or layers(norm(x)), with ReLU between the layers.

    Args:
        x: (..., C), of DTYPES, on a GPU.
        weights: of each layer (out, in), taken in `dtype`.
        biases: of each layer (out,), taken as float32.
        norm_weight, norm_bias: (C,) float32.
        after: whether residual and LayerNorm come after the layers, or LayerNorm before them.
        dtype: operands of the products and what is between layers; sums are float32. float32 operands are rounded to two
            bfloat16 each, about 16 bits.
        residual: of x's shape and of DTYPES, where it is not x itself.
        out_dtype: by default x's.
        normed_dtype: of norm(x), where it is wanted and comes before the layers.

    Returns:
        (..., out), and norm(x) or None.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shapes, dtypes or devices do not go together, or there is no kernel for these layers.
    """
    out_dtype = out_dtype or x.dtype
    widths = _check(
        x, weights, biases, norm_weight, norm_bias, after, dtype, residual, out_dtype, normed_dtype
    )
    packed = (
        pack_weights(weights, dtype),
        torch.cat([bias.float() for bias in biases]),
        torch.stack([norm_weight, norm_bias]),
    )
    residual = None if residual is None else residual.contiguous()
    return launch(x.contiguous(), *packed, widths, eps, after, dtype, out_dtype, normed_dtype, residual)


def launch(
    x: Tensor,
    words: Tensor,
    biases: Tensor,
    norm: Tensor,
    widths: Sequence[int],
    eps: float,
    after: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    normed_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`mlp` of what it makes of its arguments, unchecked: contiguous x and residual, packed weights, all biases, and norm
    (2, C).
    """
    out = x.new_empty((*x.shape[:-1], widths[-1]), dtype=out_dtype)
    normed = None if normed_dtype is None else torch.empty_like(x, dtype=normed_dtype)
    with torch.cuda.device(x.device):
        kernels.load().mlp(
            x.data_ptr(),
            words.data_ptr(),
            biases.data_ptr(),
            norm.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            0 if normed is None else normed.data_ptr(),
            dtype=str(dtype).removeprefix("torch."),
            x_dtype=kernels.dtype_name(x),
            residual_dtype=kernels.dtype_name(x if residual is None else residual),
            out_dtype=kernels.dtype_name(out),
            normed_dtype=kernels.dtype_name(out if normed is None else normed),
            rows=x.numel() // widths[0],
            widths=list(widths),
            after=after,
            epsilon=eps,
            stream=kernels.stream_of(x),
        )
    return out, normed


def _check(
    x, weights, biases, norm_weight, norm_bias, after, dtype, residual, out_dtype, normed_dtype
) -> list[int]:
    """The widths of the layers. Raises ValueError where the arguments of `mlp` do not go together."""
    if not x.is_cuda or x.dtype not in DTYPES or x.dim() < 1:
        raise ValueError(
            f"mlp: x is {x.dtype} {tuple(x.shape)} on {x.device}; expected (..., C) of "
            f"{' or '.join(map(str, DTYPES))} on a GPU"
        )
    if len(weights) != len(biases) or not weights:
        raise ValueError(
            f"mlp: {len(weights)} weights and {len(biases)} biases; expected as many, at least one"
        )
    widths = [x.shape[-1]]
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        if weight.dim() != 2 or weight.shape[1] != widths[-1] or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"mlp: layer {i} has weights {tuple(weight.shape)} and biases {tuple(bias.shape)}; expected "
                f"(out, {widths[-1]}) and (out,)"
            )
        widths.append(weight.shape[0])
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor.shape != (widths[0],) or tensor.dtype != torch.float32:
            raise ValueError(
                f"mlp: {name} is {tensor.dtype} {tuple(tensor.shape)}; expected torch.float32 ({widths[0]},)"
            )
    for tensor in (*weights, *biases, norm_weight, norm_bias):
        if tensor.device != x.device:
            raise ValueError(f"mlp: a parameter is on {tensor.device}, x on {x.device}; expected one GPU")
    if residual is not None:
        if not after:
            raise ValueError("mlp: a residual is given where LayerNorm comes before the layers")
        if residual.shape != x.shape or residual.dtype not in DTYPES or residual.device != x.device:
            raise ValueError(
                f"mlp: the residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}; expected "
                f"{tuple(x.shape)} of {' or '.join(map(str, DTYPES))} on {x.device}"
            )
    for name, wanted in (("out_dtype", out_dtype), ("normed_dtype", normed_dtype)):
        if wanted is not None and wanted not in DTYPES:
            raise ValueError(f"mlp: {name} is {wanted}; expected {' or '.join(map(str, DTYPES))}")
    if after and normed_dtype is not None:
        raise ValueError("mlp: normed_dtype is given where LayerNorm comes after the layers")
    if not supported(widths, after, dtype):
        raise ValueError(
            f"mlp: layers of {widths} channels with {dtype} have no kernel; expected 1 to {MAX_LAYERS} layers, multiples "
            f"of {WIDTH_STEP}, and at most {MAX_NORM_AFTER if after else MAX_NORM_BEFORE} channels to normalise"
        )
    return widths
