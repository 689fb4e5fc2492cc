"""Attention of queries by the kernels of csrc/attention, as an operator of PyTorch for inference in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels

# What csrc/attention/attention.h has code for.
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEADS = 256
HEAD_DIMS = (8, 16, 32, 64)
MASK_DIM_STEP = 32
MAX_MASK_DIM = 512
RESIZE_DIM_STEP = 8


def supported(heads: int, dim: int, mask_dim: int = 0) -> bool:
    """Whether there is a kernel for so many heads, channels of a head, and channels of the mask embedding (0: no mask)."""
    return 1 <= heads <= MAX_HEADS and dim in HEAD_DIMS and (mask_dim == 0 or supported_mask_dim(mask_dim))


def supported_mask_dim(mask_dim: int) -> bool:
    """Whether there is a kernel for mask embeddings of so many channels."""
    return mask_dim % MASK_DIM_STEP == 0 and 0 < mask_dim <= MAX_MASK_DIM


@torch.compiler.assume_constant_result
def _built() -> bool:
    return kernels.available()


def usable(tensor: Tensor) -> bool:
    """Whether the kernels are built and the tensor is on a GPU that has their instructions."""
    return tensor.is_cuda and _built() and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mask_embed: Tensor | None = None,
    mask_features: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
) -> Tensor:
    """Attention by the kernel, with masked attention's mask or without; not differentiable.

    Products and softmax are in float32, the weights of the values are rounded to q's dtype.

    Args:
        q, k, v: (B, Q, C), (B, K, C), (B, K, C) float16 or bfloat16 on a GPU; may be slices of wider rows.
        mask_embed: (B, Q, mask_dim), taken as float32, or None.
        mask_features: (B, K, mask_dim), taken in q's dtype, or None.
        q_pos, k_pos: (1, Q, C) and, without a mask, (1, K, C), taken in q's dtype and added to q and k; or None.

    Returns:
        (B, Q, C) of q's dtype, heads side by side.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shapes, dtypes or devices do not go together, or the kernel has no such sizes.
    """
    if (mask_embed is None) != (mask_features is None):
        raise ValueError("mask_embed and mask_features go together; got one of them")
    if mask_embed is not None:
        mask_embed, mask_features = mask_embed.float(), mask_features.to(q.dtype)
    q_pos, k_pos = (None if pos is None else pos.to(q.dtype) for pos in (q_pos, k_pos))
    return _attention(q, k, v, num_heads, mask_embed, mask_features, q_pos, k_pos)


def mask_product(mask_embed: Tensor, features: Tensor) -> Tensor:
    """Mask logits (B, Q, pixels) float32 by the kernel, which takes the embedding as a sum of two half-precision numbers.

    Args:
        mask_embed: (B, Q, mask_dim) float32 on a GPU.
        features: (B, pixels, mask_dim) float16 or bfloat16.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shapes, dtypes or devices do not go together, or there is no kernel for this mask_dim.
    """
    _check_product(mask_embed, features)
    mask_embed, features = _aligned(mask_embed.contiguous()), _aligned(features.contiguous())
    batch, queries, channels = mask_embed.shape
    out = mask_embed.new_empty(batch, queries, features.shape[1])
    with torch.cuda.device(out.device):
        kernels.load().mask_product(
            mask_embed.data_ptr(),
            features.data_ptr(),
            out.data_ptr(),
            dtype=kernels.dtype_name(features),
            batch=batch,
            queries=queries,
            pixels=features.shape[1],
            channels=channels,
            stream=kernels.stream_of(out),
        )
    return out


def resize_mask_features(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Features resized by the kernel, bilinearly with corners not aligned.

    Args:
        features: (B, H, W, C) float16 or bfloat16 on a GPU; C is a multiple of RESIZE_DIM_STEP.
        size: (h, w) of the result.

    Returns:
        (B, h * w, C) of the features' dtype.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shape, dtype or device is another, or there is nothing to resize or to resize to.
    """
    _check_resize(features, size)
    features = _aligned(features.contiguous())
    batch, height, width, channels = features.shape
    out = features.new_empty(batch, size[0] * size[1], channels)
    with torch.cuda.device(features.device):
        kernels.load().resize_mask_features(
            features.data_ptr(),
            out.data_ptr(),
            dtype=kernels.dtype_name(features),
            batch=batch,
            height=height,
            width=width,
            channels=channels,
            out_height=size[0],
            out_width=size[1],
            stream=kernels.stream_of(features),
        )
    return out


@torch.library.custom_op(
    "mask2former::attention",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? mask_embed, Tensor? mask_features, Tensor? q_pos, "
    "Tensor? k_pos) -> Tensor",
)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mask_embed: Tensor | None,
    mask_features: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
) -> Tensor:
    _check(q, k, v, num_heads, mask_embed, mask_features, q_pos, k_pos)
    q, k, v = map(_rows, (q, k, v))
    positions = {name: _rows(pos) for name, pos in (("q_pos", q_pos), ("k_pos", k_pos)) if pos is not None}
    if len({pos.stride(1) for pos in positions.values()}) > 1:  # the kernel has one stride for both
        positions = {name: pos.contiguous() for name, pos in positions.items()}
    mask_dim = 0
    if mask_embed is not None:
        mask_embed, mask_features = _aligned(mask_embed.contiguous()), _aligned(mask_features.contiguous())
        mask_dim = mask_embed.shape[2]
    batch, queries, channels = q.shape
    sizes = {
        "batch": batch,
        "queries": queries,
        "keys": k.shape[1],
        "heads": num_heads,
        "dim": channels // num_heads,
        "mask_dim": mask_dim,
    }
    out = q.new_empty(batch, queries, channels)
    with torch.cuda.device(q.device):
        module = kernels.load()
        workspace = q.new_empty(module.attention_workspace(**sizes), dtype=torch.uint8)
        module.attention(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            **{name: pos.data_ptr() for name, pos in positions.items()},
            mask_embed=0 if mask_embed is None else mask_embed.data_ptr(),
            features=0 if mask_features is None else mask_features.data_ptr(),
            workspace=workspace.data_ptr(),
            dtype=kernels.dtype_name(q),
            **sizes,
            q_stride=q.stride(1),
            k_stride=k.stride(1),
            v_stride=v.stride(1),
            pos_stride=next((pos.stride(1) for pos in positions.values()), 0),
            stream=kernels.stream_of(q),
        )
    return out


@_attention.register_fake
def _(q, k, v, num_heads, mask_embed, mask_features, q_pos, k_pos):
    return q.new_empty(q.shape)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _rows(tensor: Tensor) -> Tensor:
    """The tensor (B, N, C), copied where the kernel cannot read 16 bytes at a time from rows of one stride."""
    batch, rows, channels = tensor.shape
    stride = tensor.stride(1)
    regular = (
        tensor.stride(2) == 1
        and stride % 8 == 0
        and stride >= channels
        and (batch == 1 or tensor.stride(0) == rows * stride)
        and tensor.data_ptr() % 16 == 0
    )
    return tensor if regular else tensor.clone(memory_format=torch.contiguous_format)


def _check_product(mask_embed: Tensor, features: Tensor) -> None:
    """Raises ValueError where the arguments of `mask_product` do not go together."""
    if mask_embed.dim() != 3 or mask_embed.dtype != torch.float32:
        raise ValueError(
            f"mask_embed is {tuple(mask_embed.shape)} {mask_embed.dtype}; expected (B, Q, mask_dim) torch.float32"
        )
    batch, _, channels = mask_embed.shape
    if features.dim() != 3 or features.shape[0] != batch or features.shape[2] != channels:
        raise ValueError(
            f"features are {tuple(features.shape)}; expected (B, pixels, mask_dim) with mask_embed's B {batch} and "
            f"mask_dim {channels}"
        )
    if features.dtype not in DTYPES:
        raise ValueError(f"features are {features.dtype}; expected float16 or bfloat16")
    if not supported_mask_dim(channels):
        raise ValueError(
            f"mask_embed has {channels} channels; expected a multiple of {MASK_DIM_STEP} up to {MAX_MASK_DIM}"
        )
    _check_device(mask_embed=mask_embed, features=features)


def _check_resize(features: Tensor, size: tuple[int, int]) -> None:
    """Raises ValueError where `resize_mask_features` does not take its arguments."""
    if features.dim() != 4 or features.dtype not in DTYPES:
        raise ValueError(
            f"features are {tuple(features.shape)} {features.dtype}; expected (B, H, W, C) of float16 or bfloat16"
        )
    if features.shape[3] % RESIZE_DIM_STEP:
        raise ValueError(
            f"features have {features.shape[3]} channels; expected a multiple of {RESIZE_DIM_STEP}"
        )
    if features.numel() == 0:
        raise ValueError(f"features are {tuple(features.shape)}; expected no side of 0")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"the size of the result is {tuple(size)}; expected (h, w) of at least 1")
    _check_device(features=features)


def _check_device(**tensors: Tensor) -> None:
    """Raises ValueError unless all are on one GPU."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1 or not all(tensor.is_cuda for tensor in tensors.values()):
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected one GPU; got {where}")


def _check(q, k, v, num_heads, mask_embed, mask_features, q_pos, k_pos) -> None:
    """Raises ValueError where the operator's arguments do not go together."""
    if q.dim() != 3 or q.dtype not in DTYPES:
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype}; expected (B, Q, C) of float16 or bfloat16")
    batch, queries, channels = q.shape
    if k.dim() != 3:
        raise ValueError(f"k is {tuple(k.shape)}; expected (B, K, C)")
    keys = k.shape[1]
    wanted = {"k": (k, (batch, keys, channels), q.dtype), "v": (v, (batch, keys, channels), q.dtype)}
    mask_dim = 0
    if mask_embed is not None:
        mask_dim = mask_embed.shape[-1]
        wanted["mask_embed"] = (mask_embed, (batch, queries, mask_dim), torch.float32)
        wanted["mask_features"] = (mask_features, (batch, keys, mask_dim), q.dtype)
        if k_pos is not None:
            raise ValueError("k_pos is given with a mask; add it to k")
    for name, pos, rows in (("q_pos", q_pos, queries), ("k_pos", k_pos, keys)):
        if pos is not None:
            wanted[name] = (pos, (1, rows, channels), q.dtype)
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; expected {shape} {dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}; expected one GPU")
    if channels % num_heads or not supported(num_heads, channels // num_heads, mask_dim):
        raise ValueError(
            f"{num_heads} heads of {channels} channels with a mask of {mask_dim} have no kernel; expected 1 to "
            f"{MAX_HEADS} heads of {HEAD_DIMS} channels each, and a multiple of {MASK_DIM_STEP} up to {MAX_MASK_DIM}"
        )
