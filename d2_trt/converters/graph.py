"""The network under construction, in the terms that converters share: sizes, constants, precision, layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from .. import compat, plugin
from ..errors import ConversionError
from .memory import TracedMemory


@dataclass(frozen=True)
class Dim:
    """A size that the engine learns at run time: a shape tensor of one element, and the dimension it was read from."""

    tensor: object
    origin: tuple[str, int] | None = None


Size = "int | Dim"


def _copied(value: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU whose memory is the network's alone: the model may change its own in place after it was used."""
    return value.detach().to("cpu", copy=True)


class Graph:
    """Adds layers to a TensorRT network, in one way for weakly typed (8.6) and strongly typed (10 and newer) networks.

    Every layer goes through `emit`, which decides its precision from the module that is being traced.
    """

    def __init__(
        self,
        network,
        compute_dtype: Callable[[str], torch.dtype],
        current_module: Callable[[], str],
        largest_size: int,
        msda: str = "stock",
        normalization: str = "native",
        attention: str = "native",
        inside: Callable[[torch.nn.Module], AbstractContextManager] | None = None,
        memory: TracedMemory | None = None,
    ):
        """
        Args:
            network: INetworkDefinition, or torch2trt's wrapper of one.
            compute_dtype: precision of a module, from its name.
            current_module: name of the module that is being traced.
            largest_size: the largest height or width of any map, in pixels.
            msda: how deformable attention is computed: "plugin", "stock" or "native".
            normalization, attention: how LayerNorm and GroupNorm, and the decoder's attention are: "plugin" or "native".
            inside: makes a context in which another module is the one that is traced; see `inside`.
            memory: of traced tensors.
        """
        self.trt = compat.tensorrt()
        self.network = network
        self.strong = compat.strongly_typed()
        self.compute_dtype = compute_dtype
        self.current_module = current_module
        self.largest_size = largest_size
        self.msda = msda
        self.normalization = normalization
        self.attention = attention
        self._inside = inside
        self.memory = memory or TracedMemory()
        self._seen = set()
        self._alive = []  # TensorRT reads weights when it builds: they must outlive the network
        self._shapes = {}
        # Float types by tensor name: TensorRT 8.6 calls what a shuffle, slice or concatenation gives float32.
        self._told_types = {}
        # What makes the tensors that depend on weights alone in another type, by name; and what it made.
        self._recipes: dict[str, Callable] = {}
        self._remade = {}
        self._iota = None
        self._float_types = {torch.float32: self.trt.float32, torch.float16: self.trt.float16}
        if hasattr(self.trt, "bfloat16"):
            self._float_types[torch.bfloat16] = self.trt.bfloat16

    def inside(self, module: torch.nn.Module) -> AbstractContextManager:
        """A context for layers of a module that the traced one calls no function of: they are named after it, and have its
        precision. For converters of functions that take a module.
        """
        return contextlib.nullcontext() if self._inside is None else self._inside(module)

    def first_time(self, *what) -> bool:
        """Whether this is asked about `what` for the first time: what many layers have in common is told once a build."""
        new = what not in self._seen
        self._seen.add(what)
        return new

    # Tensors

    def dtype(self, dtype: torch.dtype):
        """TensorRT's name of a torch dtype."""
        if dtype in self._float_types:
            return self._float_types[dtype]
        return {torch.bool: self.trt.bool, torch.int32: self.trt.int32, torch.int64: compat.shape_dtype()}[
            dtype
        ]

    def torch_dtype(self, tensor) -> torch.dtype:
        """The torch dtype of a floating network tensor."""
        return next(dtype for dtype, kind in self._float_types.items() if kind == self._kind(tensor))

    def _kind(self, tensor):
        """TensorRT's type of a tensor; of one whose elements were only moved, that of what they were moved from."""
        return self._told_types.get(tensor.name, tensor.dtype)

    def is_float(self, tensor) -> bool:
        return tensor.dtype in self._float_types.values()

    def tensor(self, value, rank: int | None = None):
        """The network's tensor of a traced tensor, a parameter or a number, with at least `rank` dimensions."""
        if isinstance(value, torch.Tensor) and not hasattr(value, "_trt"):
            return self.constant(value[(None,) * ((rank or 0) - value.dim())])
        if isinstance(value, torch.Tensor):
            out = value._trt
        elif isinstance(value, (int, float, np.number)):
            out = self.constant(torch.full((1,) * (1 if rank is None else rank), float(value)))
        else:
            out = value
        missing = (rank or 0) - len(out.shape)
        return self.reshape(out, [1] * missing + self.sizes(out)) if missing > 0 else out

    def constant(self, value: torch.Tensor, dtype: torch.dtype = torch.float32):
        """A constant; floating values become `dtype`, rounded to nearest as a cast in the engine would."""
        value = _copied(value)
        if value.is_floating_point():
            return self._float_constant(value.float(), dtype)
        array = value.numpy()
        if value.dtype != torch.bool:
            array = array.astype(np.int64 if self.strong else np.int32)
        array = np.ascontiguousarray(array)
        self._alive.append(array)
        return self.network.add_constant(tuple(value.shape), array).get_output(0)

    def _float_constant(self, value: torch.Tensor, dtype: torch.dtype):
        layer = self.network.add_constant(tuple(value.shape), self._held(value.to(dtype)))
        result = layer.get_output(0)
        if not self.strong and dtype != torch.float32:  # else TensorRT chooses the type
            layer.precision = self.dtype(dtype)
            layer.set_output_type(0, self.dtype(dtype))
        self._told_types[result.name] = self.dtype(dtype)
        self._recipes[result.name] = lambda other: self._float_constant(value, other)
        return result

    def words(self, value: torch.Tensor):
        """A constant of int32 words that only one of our plugins understands, such as packed weights: never converted."""
        array = np.ascontiguousarray(_copied(value).numpy())
        self._alive.append(array)
        return self.network.add_constant(tuple(value.shape), array).get_output(0)

    def weights(self, value: torch.Tensor, dtype: torch.dtype):
        """Weights of a layer, in the type that it computes in where networks are strongly typed."""
        return self._held(_copied(value).to(dtype if self.strong else torch.float32))

    def _held(self, value: torch.Tensor):
        """A tensor on the CPU as TensorRT takes weights, in memory that lives as long as the graph."""
        value = value.contiguous()
        self._alive.append(value)
        if value.dtype == torch.bfloat16:  # numpy has no such type
            return self.trt.Weights(self.dtype(value.dtype), value.data_ptr(), value.numel())
        return self.trt.Weights(value.numpy())

    # Layers

    def move(self, add: Callable, *inputs):
        """Add a layer that only moves elements: they keep their type, and several inputs are brought to one."""
        floats = [x for x in inputs if self.is_float(x)]
        if self.strong and len({x.dtype for x in floats}) > 1:
            inputs = floats = [self.cast(x, self.compute_dtype(self.current_module())) for x in inputs]
        result = add(*inputs).get_output(0)
        # Weakly typed: TensorRT carries the type through. Told one, a Myelin region refuses to convert on the way.
        kinds = {self._kind(x) for x in floats}
        if len(kinds) == 1:
            self._told_types[result.name] = kinds.pop()
        if floats and all(x.name in self._recipes for x in floats):
            self._recipes[result.name] = lambda dtype: self.move(add, *(self.cast(x, dtype) for x in floats))
        return result

    def emit(
        self, add: Callable, *inputs, compute: torch.dtype | None = None, out: torch.dtype | None = None
    ):
        """Add a layer that computes, and return its first output.

        Args:
            add: called with the inputs, which it hands to one of the network's add methods; returns the layer.
            inputs: network tensors; where networks are strongly typed, floating ones are cast to `compute`.
            compute: type of the arithmetic; by default what the policy says of the module that is traced.
            out: type of a floating output, by default `compute`.
        """
        compute = compute or self.compute_dtype(self.current_module())
        out = out or compute
        if self.strong:
            layer = add(*(self.cast(x, compute) if self.is_float(x) else x for x in inputs))
            result = layer.get_output(0)
            return self.cast(result, out) if self.is_float(result) else result
        layer = add(*inputs)
        result = layer.get_output(0)
        if self.is_float(result):
            layer.precision = self.dtype(compute)
            layer.set_output_type(0, self.dtype(out))
            self._told_types[result.name] = self.dtype(out)
        return result

    def plugin(
        self, kind, inputs: list, fields: Mapping[str, torch.dtype | int | float], out: torch.dtype, *more
    ):
        """Add one of our plugins, see plugin.add_layer, and return its output, which is of type `out`; a list of its outputs
        where `more` has the types of others.
        """
        layer = plugin.add_layer(self.network, kind, inputs, fields)
        results = [layer.get_output(i) for i in range(1 + len(more))]
        for result, dtype in zip(results, (out, *more)):
            self._told_types[result.name] = self.dtype(dtype)
        return results if more else results[0]

    def cast(self, tensor, dtype: torch.dtype):
        """The tensor in another type; one that depends on weights alone is made anew, so that the engine casts nothing."""
        if self._kind(tensor) == self.dtype(dtype):
            return tensor
        if dtype in self._float_types and tensor.name in self._recipes:
            key = (tensor.name, dtype)
            if key not in self._remade:
                self._remade[key] = self._recipes[tensor.name](dtype)
            return self._remade[key]
        result = self.network.add_cast(tensor, self.dtype(dtype)).get_output(0)
        if dtype in self._float_types:
            self._told_types[result.name] = self.dtype(dtype)
        return result

    def elementwise(self, op: str, a, b, **types):
        """Binary operation by its name in ElementWiseOperation, with ranks made equal."""
        rank = max(len(x.shape) if hasattr(x, "shape") else 1 for x in (a, b))
        a, b = self.tensor(a, rank), self.tensor(b, rank)
        kind = getattr(self.trt.ElementWiseOperation, op)
        return self.emit(lambda x, y: self.network.add_elementwise(x, y, kind), a, b, **types)

    def unary(self, op: str, x, **types):
        """Unary operation by its name in UnaryOperation."""
        kind = getattr(self.trt.UnaryOperation, op)
        return self.emit(lambda t: self.network.add_unary(t, kind), x, **types)

    def transpose(self, x, order: Sequence[int]):
        """Dimensions in another order."""

        def add(t):
            layer = self.network.add_shuffle(t)
            layer.first_transpose = tuple(order)
            return layer

        return self.move(add, x)

    def matmul(self, a, b, transpose_b: bool = False, **types):
        """Batched matrix product of tensors of any rank."""
        rank = max(len(a.shape), len(b.shape))
        a, b = self.tensor(a, rank), self.tensor(b, rank)
        op = self.trt.MatrixOperation
        second = op.TRANSPOSE if transpose_b else op.NONE
        return self.emit(lambda x, y: self.network.add_matrix_multiply(x, op.NONE, y, second), a, b, **types)

    def softmax(self, x, dim: int, **types):
        """Softmax over one dimension, negative ones counting from the last."""

        def add(t):
            layer = self.network.add_softmax(t)
            layer.axes = 1 << (dim % len(t.shape))
            return layer

        return self.emit(add, x, **types)

    def concat(self, tensors: Sequence, dim: int):
        """Concatenation of tensors of equal rank."""

        def add(*parts):
            layer = self.network.add_concatenation(list(parts))
            layer.axis = dim % len(parts[0].shape)
            return layer

        return self.move(add, *tensors)

    def select(self, condition, yes, no):
        """Where condition holds `yes`, else `no`; ranks made equal."""
        rank = max(len(x.shape) for x in (condition, yes, no) if hasattr(x, "shape"))
        condition, yes, no = (self.tensor(x, rank) for x in (condition, yes, no))
        return self.emit(lambda c, a, b: self.network.add_select(c, a, b), condition, yes, no)

    # Sizes

    def size(self, tensor, dim: int):
        """One size of a tensor: an int where it is fixed, else a Dim."""
        dim %= len(tensor.shape)
        if tensor.shape[dim] >= 0:
            return int(tensor.shape[dim])
        key = (tensor.name, dim)
        if key not in self._shapes:
            if tensor.name not in self._shapes:
                self._shapes[tensor.name] = self.network.add_shape(tensor).get_output(0)
            part = self.network.add_slice(self._shapes[tensor.name], (dim,), (1,), (1,)).get_output(0)
            self._shapes[key] = Dim(part, key)
        return self._shapes[key]

    def sizes(self, tensor) -> list:
        return [self.size(tensor, i) for i in range(len(tensor.shape))]

    def _size_op(self, op: str, python: Callable[[int, int], int], a, b):
        if isinstance(a, int) and isinstance(b, int):
            return python(a, b)
        kind = getattr(self.trt.ElementWiseOperation, op)
        layer = self.network.add_elementwise(self._size_tensor(a), self._size_tensor(b), kind)
        return Dim(layer.get_output(0))

    def add(self, a, b):
        return self._size_op("SUM", lambda x, y: x + y, a, b)

    def sub(self, a, b):
        return self._size_op("SUB", lambda x, y: x - y, a, b)

    def mul(self, a, b):
        return self._size_op("PROD", lambda x, y: x * y, a, b)

    def floordiv(self, a, b):
        return self._size_op("FLOOR_DIV", lambda x, y: x // y, a, b)

    def ceil_to(self, a, multiple: int):
        """The smallest multiple that is not below a."""
        return self.mul(self.floordiv(self.add(a, multiple - 1), multiple), multiple)

    def _size_tensor(self, size):
        return size.tensor if isinstance(size, Dim) else self.constant(torch.tensor([size]))

    def shape_tensor(self, sizes: Sequence):
        """Sizes as one shape tensor."""
        if all(isinstance(s, int) for s in sizes):
            return self.constant(torch.tensor(list(sizes)))
        return self.network.add_concatenation([self._size_tensor(s) for s in sizes]).get_output(0)

    def to_float(self, size):
        """A size as a float32 tensor of one element."""
        if isinstance(size, int):
            return self.constant(torch.tensor([float(size)]))
        return self.cast(size.tensor, torch.float32)

    def iota(self, size):
        """0, 1, ..., size - 1 as float32."""
        if isinstance(size, int):
            return self.constant(torch.arange(size, dtype=torch.float32))
        if self._iota is None:
            self._iota = self.constant(torch.arange(self.largest_size, dtype=torch.float32))
        return self.slice(self._iota, [0], [size])

    # Shapes

    def reshape(self, x, sizes: Sequence):
        """A tensor of the same elements in another shape; one size may be -1."""
        if 0 in sizes:  # which stands for the input's own size
            raise ConversionError("another shape of an empty tensor has no converter")
        plain, unknown = [], 0
        for i, size in enumerate(sizes):
            if isinstance(size, int):
                plain.append(size)
            elif size.origin == (x.name, i):
                plain.append(0)  # the input's own size at this place
            else:
                plain.append(-1)
            unknown += plain[-1] == -1

        def add(t):
            layer = self.network.add_shuffle(t)
            if unknown <= 1:
                layer.reshape_dims = tuple(plain)
            else:
                layer.set_input(1, self.shape_tensor(sizes))
            return layer

        return self.move(add, x)

    def slice(
        self, x, starts: Sequence, sizes: Sequence, strides: Sequence[int] | None = None, fill: bool = False
    ):
        """Part of a tensor; with `fill`, zeros where it reaches past the end."""
        rank = len(x.shape)
        strides = tuple(strides or (1,) * rank)
        fixed = all(isinstance(s, int) for s in (*starts, *sizes))

        def add(t):
            zeros, ones = (0,) * rank, (1,) * rank
            layer = self.network.add_slice(
                t, tuple(starts) if fixed else zeros, tuple(sizes) if fixed else ones, strides
            )
            if not fixed:
                layer.set_input(1, self.shape_tensor(starts))
                layer.set_input(2, self.shape_tensor(sizes))
            if fill:
                layer.mode = self.trt.SampleMode.FILL
            return layer

        return self.move(add, x)

    def expand(self, x, sizes: Sequence):
        """Sizes of 1 repeated to the given ones."""
        rank = len(x.shape)
        strides = [0 if x.shape[i] == 1 and sizes[i] != 1 else 1 for i in range(rank)]
        return self.slice(x, [0] * rank, sizes, strides) if 0 in strides else x
