"""Converters of what moves, joins and compares elements."""

from __future__ import annotations

import operator

import numpy as np
import torch

from ..errors import ConversionError
from .registry import converts, traced_tensors


def _binary(op: str, reverse: bool = False):
    def convert(g, result, input, other, *, alpha=1):
        if alpha != 1:
            raise ConversionError(f"a sum with alpha={alpha} has no converter")
        operands = (other, input) if reverse else (input, other)
        if not (result.is_floating_point() or any(map(_is_floating, operands))):
            kinds = " and ".join(str(getattr(x, "dtype", type(x).__name__)) for x in operands)
            raise ConversionError(f"{op} of {kinds} has no converter: one of them must be floating")
        if op in ("SUM", "SUB", "PROD", "DIV"):
            _check_constant(g, op, operands)
        return g.elementwise(op, *(_floating(g, x, result.dim()) for x in operands))

    return convert


def _is_floating(x) -> bool:
    return x.is_floating_point() if isinstance(x, torch.Tensor) else isinstance(x, (float, np.floating))


def _floating(g, x, rank: int | None = None):
    """The network's tensor of an operand; integers and bool, which PyTorch promotes beside a float, as numbers."""
    if isinstance(x, torch.Tensor) and not traced_tensors(x) and not x.is_floating_point():
        x = x.float()
    t = g.tensor(x, rank)
    return t if g.is_float(t) else g.cast(t, torch.float32)


def _check_constant(g, op: str, operands) -> None:
    """Refuse constants that the module's type makes infinite, or zero where all that is left is zero or infinite."""
    compute = g.compute_dtype(g.current_module())
    for i, operand in enumerate(operands):
        if traced_tensors(operand):
            continue
        value = torch.as_tensor(operand).float()
        rounded, nonzero = value.to(compute), value != 0
        lost = nonzero & (rounded == 0)
        vanishes = (
            lost.any() if op == "DIV" and i == 1 else op == "PROD" and lost.any() and (lost == nonzero).all()
        )
        if vanishes or (value.isfinite() & rounded.isinf()).any():
            worst = value[lost] if vanishes else value[value.isfinite() & rounded.isinf()]
            raise ConversionError(
                f"{op} with {worst.flatten()[0]:g} has no converter in {compute}, which makes it "
                f"{'zero' if vanishes else 'infinite'}: use another value, or add the module to "
                "MODEL.TENSORRT.FP32_MODULES"
            )


for _names, _op in (
    (("add", "__add__", "__radd__", "__iadd__", "add_"), "SUM"),
    (("sub", "__sub__", "__isub__"), "SUB"),
    (("mul", "__mul__", "__rmul__", "__imul__"), "PROD"),
    (("div", "__truediv__", "__itruediv__"), "DIV"),
    (("__lt__", "lt"), "LESS"),
    (("__gt__", "gt"), "GREATER"),
):
    converts(*(f"torch.Tensor.{name}" for name in _names))(_binary(_op))
converts("torch.add")(_binary("SUM"))
converts("torch.sub")(_binary("SUB"))
converts("torch.mul")(_binary("PROD"))
converts("torch.div")(_binary("DIV"))
converts("torch.Tensor.__rsub__")(_binary("SUB", reverse=True))
converts("torch.Tensor.__rtruediv__", "torch.Tensor.__rdiv__")(_binary("DIV", reverse=True))


@converts("torch.Tensor.matmul", "torch.Tensor.__matmul__", "torch.matmul")
def matmul(g, result, input, other):
    if min(input.dim(), other.dim()) < 2:
        raise ConversionError("a product with a vector has no converter: give it a second dimension")
    return g.matmul(g.tensor(input), g.tensor(other))


@converts("torch.Tensor.contiguous", "torch.Tensor.detach", "torch.Tensor.clone")
def same(g, result, x, *unused, **also_unused):
    return g.tensor(x)


@converts("torch.Tensor.float", "torch.Tensor.to", "torch.Tensor.half", "torch.Tensor.type_as")
def to(g, result, x, *unused, **also_unused):
    if not traced_tensors(x):
        return None  # as another tensor is, of which the type is read alone
    if x.dtype == torch.bool and result.is_floating_point():
        return g.cast(g.tensor(x), torch.float32)
    # Precision is the policy's business, not that of the traced code: a float stays one.
    if result.dtype != x.dtype and not (result.is_floating_point() and x.is_floating_point()):
        raise ConversionError(f"a conversion from {x.dtype} to {result.dtype} has no converter")
    return g.tensor(x)


@converts("torch.Tensor.flatten", "torch.flatten")
def flatten(g, result, x, start_dim=0, end_dim=-1):
    t = g.tensor(x)
    start, end = start_dim % x.dim(), end_dim % x.dim()
    sizes = g.sizes(t)
    merged = 1
    for size in sizes[start : end + 1]:
        merged = g.mul(merged, size) if isinstance(merged, int) and isinstance(size, int) else -1
        if merged == -1:
            break
    others = sizes[:start] + sizes[end + 1 :]
    if merged == -1 and sum(not isinstance(s, int) for s in others[start:]):
        # A second unknown size after the merged one: compute the product.
        merged = 1
        for size in sizes[start : end + 1]:
            merged = g.mul(merged, size)
    return g.reshape(t, [*sizes[:start], merged, *sizes[end + 1 :]])


@converts("torch.Tensor.unflatten")
def unflatten(g, result, x, dim, sizes):
    t = g.tensor(x)
    dim %= x.dim()
    return g.reshape(t, [*g.sizes(t)[:dim], *map(int, sizes), *g.sizes(t)[dim + 1 :]])


@converts("torch.Tensor.unsqueeze", "torch.unsqueeze")
def unsqueeze(g, result, x, dim):
    t = g.tensor(x)
    sizes = g.sizes(t)
    sizes.insert(dim % (x.dim() + 1), 1)
    return g.reshape(t, sizes)


@converts("torch.Tensor.transpose", "torch.transpose")
def transpose(g, result, x, dim0, dim1):
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return g.transpose(g.tensor(x), order)


@converts("torch.Tensor.permute", "torch.permute")
def permute(g, result, input, *given, dims=()):
    dims = given or dims
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    return g.transpose(g.tensor(input), [d % input.dim() for d in dims])


@converts("torch.cat", "torch.concat", "torch.concatenate")
def cat(g, result, tensors, dim=0):
    # PyTorch passes over empty tensors of one dimension, whatever the others' shapes.
    tensors = [t for t in tensors if tuple(t.shape) != (0,)] if result.dim() > 1 else tensors
    if result.is_floating_point():
        return g.concat([_floating(g, t) for t in tensors], dim)
    if any(t.dtype != result.dtype for t in tensors):
        raise ConversionError("a concatenation of integers and bool has no converter")
    return g.concat([g.tensor(t) for t in tensors], dim)


@converts("torch.Tensor.unbind", "torch.unbind")
def unbind(g, result, x, dim=0):
    t = g.tensor(x)
    dim %= x.dim()
    sizes = g.sizes(t)
    if not isinstance(sizes[dim], int):
        raise ConversionError("a dimension of unknown size cannot be split into its elements")
    outputs = []
    for i in range(sizes[dim]):
        starts = [0] * x.dim()
        starts[dim] = i
        part = g.slice(t, starts, [*sizes[:dim], 1, *sizes[dim + 1 :]])
        outputs.append(g.reshape(part, [*g.sizes(part)[:dim], *g.sizes(part)[dim + 1 :]]))
    return outputs


@converts("torch.Tensor.__getitem__")
def getitem(g, result, x, index):
    t = g.tensor(x)
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, (torch.Tensor, list)) for i in index):
        raise ConversionError("indexing with a tensor or a list has no converter")
    if any(isinstance(i, (bool, np.bool_)) for i in index):
        raise ConversionError("indexing with a bool has no converter")
    if traced_tensors([(i.start, i.stop, i.step) for i in index if isinstance(i, slice)]):
        raise ConversionError("a slice that ends where a traced tensor says has no converter")
    used = sum(i is not None and i is not Ellipsis for i in index)
    full = []
    for item in index:
        full.extend([slice(None)] * (x.dim() - used) if item is Ellipsis else [item])
    full.extend([slice(None)] * (x.dim() - sum(i is not None for i in full)))
    starts, sizes, strides, kept = [], [], [], []
    dim = 0
    for item in full:
        if item is None:
            kept.append(None)
            continue
        size = g.size(t, dim)
        if not isinstance(item, slice):
            item = operator.index(item)
            if item < 0 and not isinstance(size, int):
                raise ConversionError("a negative index into a dimension of unknown size has no converter")
            starts.append(item % size if item < 0 else item)
            sizes.append(1)
            strides.append(1)
        else:
            start, stop, step = item.start or 0, item.stop, item.step or 1
            if not isinstance(size, int) and (start < 0 or (stop is not None and stop < 0)):
                raise ConversionError(
                    "a slice with negative bounds of a dimension of unknown size has no converter"
                )
            if isinstance(size, int):
                start, stop, step = item.indices(size)
                length = max(0, -(-(stop - start) // step))
            else:
                if stop is not None:
                    raise ConversionError(
                        "a slice that ends inside a dimension of unknown size has no converter"
                    )
                length = g.floordiv(g.add(size, step - 1 - start), step) if start or step != 1 else size
            starts.append(start)
            sizes.append(length)
            strides.append(step)
            kept.append(dim)
        dim += 1
    whole = all(s == 0 for s in starts) and all(s == 1 for s in strides) and sizes == g.sizes(t)
    out = t if whole else g.slice(t, starts, sizes, strides)
    if kept == list(range(x.dim())):
        return out
    return g.reshape(out, [1 if d is None else g.size(out, d) for d in kept])


@converts("torch.roll", "torch.Tensor.roll")
def roll(g, result, x, shifts, dims):
    t = g.tensor(x)
    shifts, dims = (v if isinstance(v, (tuple, list)) else (v,) for v in (shifts, dims))
    for shift, dim in zip(shifts, dims, strict=True):
        if shift == 0:
            continue
        dim %= x.dim()
        sizes = g.sizes(t)
        # The first part of the result starts `split` elements into the input.
        if isinstance(sizes[dim], int):
            split = -shift % sizes[dim]
        else:
            split = -shift if shift <= 0 else g.sub(sizes[dim], shift)
        zeros = [0] * x.dim()
        starts = [*zeros[:dim], split, *zeros[dim + 1 :]]
        tail = g.slice(t, starts, [*sizes[:dim], g.sub(sizes[dim], split), *sizes[dim + 1 :]])
        head = g.slice(t, zeros, [*sizes[:dim], split, *sizes[dim + 1 :]])
        t = g.concat([tail, head], dim)
    return t
