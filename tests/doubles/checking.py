"""Comparing one layer of the network's double with torch."""

from __future__ import annotations

import numpy as np
import torch

from .fake_tensorrt import build_network

SHAPES = [(2, 3, 8, 12), (1, 3, 6, 10), (3, 3, 16, 4)]
# Weights must outlive their network.
ALIVE: list[np.ndarray] = []


def check(trt, add, reference, shapes=SHAPES, dynamic=True, atol=1e-6, dtype=torch.float32):
    """Build `add(network, *inputs) -> tensor` over inputs of the given shapes and compare it with torch at each.

    shapes: one shape, or a tuple of shapes for several inputs, for each size to try. The last is not an example.
    """
    cases = [shape if isinstance(shape[0], tuple) else (shape,) for shape in shapes]
    count = len(cases[0])
    generator = torch.Generator().manual_seed(0)
    examples = {f"x{i}": [case[i] for case in (cases[:-1] if dynamic else cases[:1])] for i in range(count)}
    network = build_network(trt, examples)
    kinds = {torch.float32: trt.float32, torch.int32: trt.int32, torch.bool: trt.bool}
    inputs = []
    for i in range(count):
        sizes = zip(*(case[i] for case in cases))
        dims = tuple(s[0] if len(set(s)) == 1 or not dynamic else -1 for s in sizes)
        inputs.append(network.add_input(f"x{i}", kinds[dtype], dims))
    out = add(network, *inputs)
    outs = out if isinstance(out, (list, tuple)) else [out]
    for i, tensor in enumerate(outs):
        tensor.name = f"out{i}"
        network.mark_output(tensor)
    network.check()
    for case in cases if dynamic else cases[:1]:
        values = [torch.randn(shape, generator=generator) for shape in case]
        values = [v.to(dtype) if dtype is torch.float32 else (v * 3).to(dtype) for v in values]
        got = network.evaluate({f"x{i}": v for i, v in enumerate(values)})
        want = reference(*values)
        for i, expected in enumerate(want if isinstance(want, (list, tuple)) else [want]):
            result = got[f"out{i}"]
            assert result.shape == expected.shape
            if expected.is_floating_point():
                torch.testing.assert_close(result.float(), expected, atol=atol, rtol=1e-5)
            else:
                assert torch.equal(result.long(), expected.long())
    return network


def constant(network, value):
    value = torch.as_tensor(value)
    array = np.ascontiguousarray(value.numpy())
    ALIVE.append(array)
    return network.add_constant(tuple(value.shape), array).get_output(0)


def sizes(network, tensor):
    """The shape tensor of a tensor, and constants of its type."""
    shape = network.add_shape(tensor).get_output(0)
    kind = np.int64 if shape.dtype.name == "INT64" else np.int32

    def numbers(*values):
        ALIVE.append(np.array(values, kind))
        return network.add_constant((len(values),), ALIVE[-1]).get_output(0)

    return shape, numbers


def first(layer):
    return layer.get_output(0)


def configured(layer, **values):
    for name, value in values.items():
        setattr(layer, name, value)
    return layer.get_output(0)
