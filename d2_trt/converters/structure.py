"""Converters of what moves, joins and compares elements."""

from __future__ import annotations

import torch

from ..errors import ConversionError
from .registry import converts


def _binary(op: str, reverse: bool = False):
    def convert(g, result, a, b, *, alpha=1):
        if alpha != 1:
            raise ConversionError(f"a sum with alpha={alpha} has no converter")
        rank = result.dim()
        a, b = g.tensor(a, rank), g.tensor(b, rank)
        return g.elementwise(op, b, a) if reverse else g.elementwise(op, a, b)

    return convert


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
def matmul(g, result, a, b):
    return g.matmul(g.tensor(a), g.tensor(b))


@converts("torch.Tensor.contiguous", "torch.Tensor.detach", "torch.Tensor.clone")
def same(g, result, x, *unused, **also_unused):
    return g.tensor(x)


@converts("torch.Tensor.float", "torch.Tensor.to", "torch.Tensor.half", "torch.Tensor.type_as")
def to(g, result, x, *unused, **also_unused):
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
def permute(g, result, x, *dims):
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    return g.transpose(g.tensor(x), [d % x.dim() for d in dims])


@converts("torch.cat", "torch.concat", "torch.concatenate")
def cat(g, result, tensors, dim=0):
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
        if isinstance(item, int):
            if item < 0 and not isinstance(size, int):
                raise ConversionError("a negative index into a dimension of unknown size has no converter")
            starts.append(item % size if item < 0 else item)
            sizes.append(1)
            strides.append(1)
        else:
            start, stop, step = item.start or 0, item.stop, item.step or 1
            if start < 0 or step < 0 or (stop is not None and stop < 0 and not isinstance(size, int)):
                raise ConversionError("a slice with negative bounds or step has no converter")
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
    shifts, dims = (shifts, dims) if isinstance(shifts, (tuple, list)) else ((shifts,), (dims,))
    for shift, dim in zip(shifts, dims):
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
