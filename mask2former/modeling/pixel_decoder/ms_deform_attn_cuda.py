"""Multi-scale deformable attention by the kernel of csrc/ms_deform_attn, as an operator of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import kernels
from ..shape_ops import LevelShapes
from .ms_deform_attn_reference import ms_deform_attn_reference_backward

# Limits of csrc/ms_deform_attn/ms_deform_attn.h.
MAX_LEVELS = 8
MAX_POINTS = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result
def _built() -> bool:
    return kernels.available()


def usable(value: Tensor, sampling_offsets: Tensor, attention_logits: Tensor) -> bool:
    """Whether the kernel takes these: built, on a GPU, of DTYPES, and not of more levels or points than it has."""
    return (
        value.is_cuda
        and _built()
        and all(t.dtype in DTYPES for t in (value, sampling_offsets, attention_logits))
        and sampling_offsets.shape[3] <= MAX_LEVELS
        and sampling_offsets.shape[4] <= MAX_POINTS
    )


def ms_deform_attn(
    value: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, spatial_shapes: LevelShapes
) -> Tensor:
    """MSDeformAttnCore.forward by the kernel: softmax, locations and sums in float32 whatever the dtypes. Differentiable.

    Args:
        value: (B, S, heads, D), float32, float16 or bfloat16, on a GPU.
        sampling_offsets: (B, S, heads, levels, points, 2), (x, y) in pixels of the level sampled, one of these dtypes.
        attention_logits: (B, S, heads, levels * points), one of these dtypes. Both may be columns of one tensor.
        spatial_shapes: (height, width) of each level, 1 to 8 of them.

    Returns:
        (B, S, heads * D), of value's dtype.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shapes, dtypes or devices do not go together.
    """
    if not sampling_offsets.dtype == attention_logits.dtype == value.dtype:
        # The kernel takes both in value's dtype or in float32, which holds the others exactly.
        sampling_offsets, attention_logits = sampling_offsets.float(), attention_logits.float()
    sizes = [side for shape in spatial_shapes for side in shape]
    return _ms_deform_attn(value, sampling_offsets, attention_logits, sizes)


@torch.library.custom_op(
    "mask2former::ms_deform_attn",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor value, Tensor sampling_offsets, Tensor attention_logits, SymInt[] level_sizes) -> Tensor",
)
def _ms_deform_attn(
    value: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_sizes: Sequence[int]
) -> Tensor:
    """level_sizes: height and width of each level, in one row."""
    _check(value, sampling_offsets, attention_logits, level_sizes)
    batch, pixels, heads, dim = value.shape
    value = _in_order(value)
    sampling_offsets, offsets_stride = _by_pixels(sampling_offsets)
    attention_logits, logits_stride = _by_pixels(attention_logits)
    out = value.new_empty(batch, pixels, heads * dim)
    with torch.cuda.device(value.device):
        kernels.load().ms_deform_attn(
            value.data_ptr(),
            sampling_offsets.data_ptr(),
            attention_logits.data_ptr(),
            out.data_ptr(),
            value_dtype=kernels.dtype_name(value),
            sampling_dtype=kernels.dtype_name(sampling_offsets),
            batch=batch,
            heads=heads,
            dim=dim,
            points=sampling_offsets.shape[4],
            offsets_stride=offsets_stride,
            logits_stride=logits_stride,
            level_sizes=list(zip(level_sizes[::2], level_sizes[1::2])),
            stream=kernels.stream_of(value),
        )
    return out


@_ms_deform_attn.register_fake
def _(value, sampling_offsets, attention_logits, level_sizes):
    batch, pixels, heads, dim = value.shape
    return value.new_empty(batch, pixels, heads * dim)


@torch.library.custom_op(
    "mask2former::ms_deform_attn_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor value, Tensor sampling_offsets, Tensor attention_logits, SymInt[] level_sizes) "
    "-> (Tensor, Tensor, Tensor)",
)
def _ms_deform_attn_backward(
    grad: Tensor,
    value: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs of _ms_deform_attn, in their dtypes; grad is that of its output."""
    inputs = (value, sampling_offsets, attention_logits)
    _check(*inputs, level_sizes)
    batch, pixels, heads, dim = value.shape
    if tuple(grad.shape) != (batch, pixels, heads * dim) or grad.device != value.device:
        raise ValueError(
            f"grad is {tuple(grad.shape)} on {grad.device}; value {tuple(value.shape)} on {value.device} needs "
            f"{(batch, pixels, heads * dim)}"
        )
    grad, *tensors = (_in_order(t.float()) for t in (grad, *inputs))
    # Of many queries, each adds to the value's.
    gradients = (torch.zeros_like(tensors[0]), *(torch.empty_like(t) for t in tensors[1:]))
    with torch.cuda.device(value.device):
        kernels.load().ms_deform_attn_backward(
            grad=grad.data_ptr(),
            value=tensors[0].data_ptr(),
            offsets=tensors[1].data_ptr(),
            logits=tensors[2].data_ptr(),
            grad_value=gradients[0].data_ptr(),
            grad_offsets=gradients[1].data_ptr(),
            grad_logits=gradients[2].data_ptr(),
            batch=batch,
            pixels=pixels,
            heads=heads,
            dim=dim,
            points=sampling_offsets.shape[4],
            level_sizes=list(zip(level_sizes[::2], level_sizes[1::2])),
            stream=kernels.stream_of(value),
        )
    return tuple(gradient.to(t.dtype) for gradient, t in zip(gradients, inputs))


@_ms_deform_attn_backward.register_fake
def _(grad, value, sampling_offsets, attention_logits, level_sizes):
    return tuple(t.new_empty(t.shape) for t in (value, sampling_offsets, attention_logits))


def _save(ctx, inputs, output):
    value, sampling_offsets, attention_logits, level_sizes = inputs
    ctx.save_for_backward(value, sampling_offsets, attention_logits)
    ctx.level_sizes = tuple(level_sizes)


def _backward(ctx, grad):
    if torch.are_deterministic_algorithms_enabled():
        # Neither has an order in which it sums; grid_sample says so, as it was asked to.
        shapes = tuple(zip(ctx.level_sizes[::2], ctx.level_sizes[1::2]))
        return *ms_deform_attn_reference_backward(grad, *ctx.saved_tensors, shapes), None
    return *_ms_deform_attn_backward(grad, *ctx.saved_tensors, list(ctx.level_sizes)), None


_ms_deform_attn.register_autograd(_backward, setup_context=_save)


def _in_order(tensor: Tensor) -> Tensor:
    """The tensor in C order, at an address of which the kernel can read 16 bytes at a time."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _by_pixels(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor (B, S, ...) with the elements of each pixel in C order, and how many lie from one pixel to the next.

    Columns of a wider tensor stay where they are. Where pixels are not equally far apart through all images, or lie at
    addresses that the kernel reads slowly, the tensor is a copy.
    """
    row = math.prod(tensor.shape[2:])
    order = [math.prod(tensor.shape[i + 1 :]) for i in range(2, tensor.dim())]
    image, pixel, *inner = tensor.stride()
    if inner == order and pixel >= row and image == pixel * tensor.shape[1] and tensor.data_ptr() % 16 == 0:
        return tensor, pixel
    return _in_order(tensor), row


def _check(
    value: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_sizes: Sequence[int]
) -> None:
    """Raises ValueError where the operator's arguments do not go together; the kernel's own limits are its own to tell."""
    if value.dim() != 4 or value.dtype not in DTYPES:
        raise ValueError(
            f"value is {tuple(value.shape)} {value.dtype}; expected (B, S, heads, D) of float32, float16 or bfloat16"
        )
    if sampling_offsets.dim() != 6:
        raise ValueError(
            f"sampling_offsets is {tuple(sampling_offsets.shape)}; expected (B, S, heads, levels, points, 2)"
        )
    batch, pixels, heads, _ = value.shape
    levels, points = len(level_sizes) // 2, sampling_offsets.shape[4]
    if len(level_sizes) % 2 or sum(h * w for h, w in zip(level_sizes[::2], level_sizes[1::2])) != pixels:
        raise ValueError(
            f"levels of {list(level_sizes)} (height, width, ...) do not hold the {pixels} pixels of value"
        )
    wanted = {
        "sampling_offsets": (sampling_offsets, (batch, pixels, heads, levels, points, 2)),
        "attention_logits": (attention_logits, (batch, pixels, heads, levels * points)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}; value {tuple(value.shape)} and {levels} levels need {shape}"
            )
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}; expected one GPU")
        if tensor.dtype not in (value.dtype, torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}; expected float32 or value's {value.dtype}")
    if sampling_offsets.dtype != attention_logits.dtype:
        raise ValueError(
            f"sampling_offsets is {sampling_offsets.dtype}, attention_logits {attention_logits.dtype}; expected one dtype"
        )
