"""LayerNorm, GroupNorm and images' normalisation by the kernels of csrc/normalization, which engines run: to test and time
them alone.

Not differentiable; the model itself uses PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    position: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of x + residual; sums and statistics in float32.

    Args:
        x: (..., C), of DTYPES, on a GPU.
        weight, bias: (C,) float32.
        residual: of x's shape and any of DTYPES, or None.
        out_dtype: by default x's.
        position: (1, ..., C), x's shape but for the first dimension, of any of DTYPES, or None.

    Returns:
        (..., C), contiguous; with a position that, and the same plus the position, rounded once.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shapes, dtypes or devices do not go together.
    """
    channels = x.shape[-1] if x.dim() else 0
    _check("layer_norm", x, weight, bias, channels)
    if residual is not None:
        _check_tensor("layer_norm: residual", residual, x.device, DTYPES)
        if residual.shape != x.shape:
            raise ValueError(
                f"layer_norm: residual is {tuple(residual.shape)}; expected {tuple(x.shape)}, as x"
            )
        residual = residual.contiguous()
    if position is not None:
        _check_tensor("layer_norm: position", position, x.device, DTYPES)
        if x.dim() < 2 or position.shape != (1, *x.shape[1:]):
            raise ValueError(
                f"layer_norm: position is {tuple(position.shape)}; expected {(1, *x.shape[1:])}, x's shape but for the "
                "first of two or more dimensions"
            )
        position = position.contiguous()
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    out = torch.empty_like(x, dtype=_out_dtype("layer_norm", out_dtype or x.dtype))
    added = {}
    if position is not None:
        total = torch.empty_like(out)
        added = {"position": position.data_ptr(), "sum": total.data_ptr()}
        added["position_dtype"] = kernels.dtype_name(position)
        added["position_rows"] = position.numel() // channels
    with torch.cuda.device(x.device):
        kernels.load().layer_norm(
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            x_dtype=kernels.dtype_name(x),
            residual_dtype=kernels.dtype_name(x if residual is None else residual),
            out_dtype=kernels.dtype_name(out),
            rows=x.numel() // channels,
            channels=channels,
            epsilon=eps,
            stream=kernels.stream_of(x),
            **added,
        )
    return out if position is None else (out, total)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """GroupNorm of a map, then ReLU where `relu`; the statistics in float32.

    Args:
        x: (B, C, H, W), of DTYPES, on a GPU; contiguous or channels_last, else it is made contiguous.
        weight, bias: (C,) float32.
        out_dtype: by default x's.

    Returns:
        (B, C, H, W) in x's memory format.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shapes, dtypes or devices do not go together, or channels_last has no kernel for these groups.
    """
    if x.dim() != 4:
        raise ValueError(f"group_norm: x has {x.dim()} dimensions; expected (B, C, H, W)")
    batch, channels, height, width = x.shape
    _check("group_norm", x, weight, bias, channels)
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    x = x if last else x.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    out = torch.empty_like(x, dtype=_out_dtype("group_norm", out_dtype or x.dtype))
    sizes = {"batch": batch, "channels": channels, "pixels": height * width, "groups": num_groups}
    sizes["channels_last"] = last
    with torch.cuda.device(x.device):
        module = kernels.load()
        workspace = torch.empty(
            max(1, module.group_norm_workspace(**sizes)), dtype=torch.uint8, device=x.device
        )
        module.group_norm(
            x.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            workspace.data_ptr(),
            x_dtype=kernels.dtype_name(x),
            out_dtype=kernels.dtype_name(out),
            epsilon=eps,
            relu=relu,
            stream=kernels.stream_of(x),
            **sizes,
        )
    return out


def normalize_images(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    out_dtype: torch.dtype = torch.float32,
    pixel_stride: int = 0,
) -> Tensor:
    """(images - mean) / std, rounded as PyTorch does in float32, then to out_dtype.

    Args:
        images: (B, C, H, W) float32 on a GPU.
        mean, std: (C,) float32.
        out_dtype: any of DTYPES.
        pixel_stride: 0; or C, 4 or 8, at least C and at most 8.

    Returns:
        (B, C, H, W), or with a pixel stride (B, H, W, pixel_stride), of which the channels past C are zeros.

    Raises:
        KernelsMissing: the kernels are not built.
        ValueError: shapes, dtypes or devices do not go together, or there is no kernel for the pixel stride.
    """
    if images.dim() != 4:
        raise ValueError(f"normalize_images: images have {images.dim()} dimensions; expected (B, C, H, W)")
    batch, channels, height, width = images.shape
    _check("normalize_images", images, mean, std, channels, ("images", "mean", "std"))
    if images.dtype != torch.float32:
        raise ValueError(f"normalize_images: images are {images.dtype}; expected torch.float32")
    images, mean, std = images.contiguous(), mean.contiguous(), std.contiguous()
    shape = (batch, height, width, pixel_stride) if pixel_stride else images.shape
    out = images.new_empty(shape, dtype=_out_dtype("normalize_images", out_dtype))
    with torch.cuda.device(images.device):
        kernels.load().normalize_images(
            images.data_ptr(),
            mean.data_ptr(),
            std.data_ptr(),
            out.data_ptr(),
            out_dtype=kernels.dtype_name(out),
            batch=batch,
            channels=channels,
            pixels=height * width,
            pixel_stride=pixel_stride,
            stream=kernels.stream_of(images),
        )
    return out


def _check(
    name: str, x: Tensor, weight: Tensor, bias: Tensor, channels: int, names=("x", "weight", "bias")
) -> None:
    first = names[0]
    if not x.is_cuda:
        raise ValueError(f"{name}: {first} is on {x.device}; expected a GPU")
    _check_tensor(f"{name}: {first}", x, x.device, DTYPES)
    if channels < 1:
        raise ValueError(f"{name}: {first} is {tuple(x.shape)}; expected at least one channel")
    for what, tensor in zip(names[1:], (weight, bias)):
        _check_tensor(f"{name}: {what}", tensor, x.device, (torch.float32,))
        if tensor.shape != (channels,):
            raise ValueError(
                f"{name}: {what} is {tuple(tensor.shape)}; expected ({channels},), {first}'s channels"
            )


def _check_tensor(name: str, tensor: Tensor, device: torch.device, dtypes: tuple) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, as x")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; expected {', '.join(map(str, dtypes))}")


def _out_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"{name}: out_dtype is {dtype}; expected {', '.join(map(str, DTYPES))}")
    return dtype
