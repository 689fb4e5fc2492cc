"""A CPU stand-in for TensorRT's network: every layer computes with torch.

A network of the double holds the graph that converters build through the real interface. Its dynamic inputs get example
tensors of several shapes, and every tensor is computed for all of them: a dimension that differs between the examples is
-1. `network.evaluate` runs the graph on other inputs. What TensorRT would refuse raises `Refused`, at the latest when the
result of the layer is asked for; what the emulated version lacks raises AttributeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from .layer import FakeLayer, FakeTensor
from .trt_api import Api, ApiObject, Refused, as_any, as_str
from .weights import HeldWeights

# The largest shape tensor that TensorRT evaluates on the host.
MAX_SHAPE_TENSOR = 64


def torch_dtypes(trt) -> dict:
    """torch dtype of each trt.DataType that torch can hold."""
    names = {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT8": torch.int8,
        "INT32": torch.int32,
        "INT64": torch.int64,
        "BOOL": torch.bool,
        "UINT8": torch.uint8,
        "FP8": torch.float8_e4m3fn,
    }
    return {getattr(trt.DataType, n): d for n, d in names.items() if hasattr(trt.DataType, n)}


class FakeNetwork(ApiObject):
    """INetworkDefinition. Layer families of other modules are mixed in by `network_class`.

    Beyond the real interface:
        examples: sizes of example inputs, {input name: [shape, ...]}; every input needs equally many. Set them before
            an input's values are needed. By default they are made up from the declared dimensions.
        evaluate: runs the graph.
        precisions: type of every layer.
        check: validates every layer, as a build does.
    """

    _kind = "INetworkDefinition"
    _extra = frozenset({"examples", "evaluate", "precisions", "check"})
    _settable: ClassVar = {"name": as_str, "error_recorder": as_any}

    def __init__(self, api: Api, flags: int, builder=None):
        super().__init__(api)
        creation = api.trt.NetworkDefinitionCreationFlag
        strong = getattr(creation, "STRONGLY_TYPED", None)
        self._strong = api.numbers >= (11, 0) or (strong is not None and bool(flags >> int(strong) & 1))
        if api.numbers < (10, 0) and not flags >> int(creation.EXPLICIT_BATCH) & 1:
            raise Refused(
                "TensorRT 8: create_network without EXPLICIT_BATCH makes a network of implicit batch"
            )
        self._flags = flags
        self._dtype_map = torch_dtypes(api.trt)
        self._layers: list[FakeLayer] = []
        self._inputs: list[FakeTensor] = []
        self._outputs: list[FakeTensor] = []
        self._cache: dict[FakeLayer, list] = {}
        self._dtype_cache: dict[FakeLayer, list] = {}
        self._input_values: dict[FakeTensor, list] = {}
        self._values = {"name": "", "error_recorder": None, "builder": builder}
        self.examples: dict[str, list[tuple[int, ...]]] = {}

    # The real interface

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def has_implicit_batch_dimension(self) -> bool:
        return False

    @property
    def flags(self) -> int:
        return self._flags

    def get_flag(self, flag):
        return self._strong if flag.name == "STRONGLY_TYPED" else bool(self._flags >> int(flag) & 1)

    def __len__(self):
        return len(self._layers)

    def __getitem__(self, index):
        return self._layers[index]

    def get_layer(self, index):
        return self._layers[index] if 0 <= index < len(self._layers) else None

    def get_input(self, index):
        return self._inputs[index] if 0 <= index < len(self._inputs) else None

    def get_output(self, index):
        return self._outputs[index] if 0 <= index < len(self._outputs) else None

    def add_input(self, name, dtype, shape):
        if any(t.name == name for t in self._inputs):
            raise Refused(f"there is an input {name!r} already")
        if any(size < -1 for size in shape):
            raise Refused(f"input {name!r}: {shape} has a negative size")
        tensor = FakeTensor(self, None, 0, name)
        tensor._declared = (dtype, shape)
        self._inputs.append(tensor)
        return tensor

    def mark_output(self, tensor):
        if tensor._network is not self:
            raise Refused(f"{tensor!r} belongs to another network")
        if tensor.is_network_output:
            raise Refused(f"{tensor!r} is an output already")
        if tensor.is_network_input:
            raise Refused(f"{tensor!r} is an input; an output needs a layer, if only an identity")
        self._outputs.append(tensor)

    def unmark_output(self, tensor):
        self._outputs = [t for t in self._outputs if t is not tensor]

    def set_weights_name(self, weights, name):
        return True

    # Evaluation

    def _add(self, layer: FakeLayer) -> FakeLayer:
        self._layers.append(layer)
        return layer

    def _forget(self, tensor: FakeTensor) -> None:
        self._input_values.pop(tensor, None)
        for layer in tensor._consumers:
            self._forget_layer(layer)

    def _forget_layer(self, layer: FakeLayer) -> None:
        stack = [layer]
        while stack:
            layer = stack.pop()
            known = self._cache.pop(layer, None), self._dtype_cache.pop(layer, None)
            if known != (None, None):
                stack.extend(consumer for tensor in layer._made for consumer in tensor._consumers)

    def _example_shapes(self, tensor: FakeTensor) -> list[tuple[int, ...]]:
        name, declared = tensor.name, tensor._declared[1]
        if name in self.examples:
            for shape in self.examples[name]:
                if len(shape) != len(declared) or any(d not in (-1, s) for d, s in zip(declared, shape)):
                    raise ValueError(
                        f"example {shape} of input {name!r} does not fit its dimensions {declared}"
                    )
            return [tuple(shape) for shape in self.examples[name]]
        count = max((len(shapes) for shapes in self.examples.values()), default=2)
        # Sizes whose products differ too: two dimensions merged must not look fixed.
        batch, pixels = (2, 1, 3), ((64, 96), (96, 160), (128, 64))
        return [
            tuple(
                size if size >= 0 else batch[i % 3] if dim == 0 else pixels[i % 3][dim % 2]
                for dim, size in enumerate(declared)
            )
            for i in range(count)
        ]

    def _example_inputs(self, tensor: FakeTensor) -> list[torch.Tensor]:
        if tensor not in self._input_values:
            generator = torch.Generator().manual_seed(len(self._inputs))
            dtype = self._dtype_map[tensor._declared[0]]
            values = []
            for shape in self._example_shapes(tensor):
                value = torch.rand(shape, generator=generator)
                values.append(value.to(dtype) if dtype.is_floating_point else (value * 2).to(dtype))
            self._input_values[tensor] = values
        return self._input_values[tensor]

    def _order(self, wanted: Sequence[FakeLayer], known) -> list[FakeLayer]:
        """Layers that must run to have the wanted ones, in order; without recursion, since networks are deep."""
        order, state, stack = [], {}, list(wanted)
        while stack:
            layer = stack[-1]
            if layer in known or state.get(layer) == "done":
                stack.pop()
                continue
            missing = [
                t._producer
                for t in layer._inputs
                if t is not None and t._producer is not None and t._producer not in known
                if state.get(t._producer) != "done"
            ]
            if not missing:
                state[layer] = "done"
                order.append(stack.pop())
            elif state.get(layer) == "open":
                raise Refused(f"{layer!r} depends on its own output")
            else:
                state[layer] = "open"
                stack.extend(missing)
        return order

    def _results(self, layer: FakeLayer) -> list[list[torch.Tensor]]:
        """Outputs of a layer for every example."""
        for step in self._order([layer], self._cache):
            columns = [t._examples() if t is not None else None for t in step._inputs]
            lengths = {len(column) for column in columns if column is not None and len(column) != 1}
            if len(lengths) > 1:
                raise ValueError(f"the inputs have different numbers of examples: {sorted(lengths)}")
            self._layer_dtypes(step)
            step._check_shape_tensors()
            step._validate()
            results = []
            for i in range(max(lengths, default=1)):
                row = [None if c is None else c[i if len(c) > 1 else 0] for c in columns]
                results.append(step._run(row))
            self._cache[step] = results
        return self._cache[layer]

    def _layer_dtypes(self, layer: FakeLayer) -> list:
        for step in self._order([layer], self._dtype_cache):
            self._dtype_cache[step] = step._final_dtypes()
        return self._dtype_cache[layer]

    def _why_no_shape_tensor(self, tensor: FakeTensor) -> str:
        """Why TensorRT cannot know a tensor's values from the inputs' shapes alone; empty where it can."""
        stack, seen = [tensor], set()
        while stack:
            current = stack.pop()
            layer = current._producer
            if layer is None:
                return f"it depends on the values of input {current.name!r}"
            if layer in seen or layer._type == "SHAPE":
                continue
            seen.add(layer)
            if not layer._host:
                return f"{layer!r} cannot run on the host"
            if any(not self._is_constant(t) for t in layer._host_constants()):
                return f"{layer!r} has parameters that are no constants"
            if any(value.numel() > MAX_SHAPE_TENSOR for value in current._examples()):
                return f"{current!r} has more than {MAX_SHAPE_TENSOR} elements"
            stack.extend(t for t in layer._inputs if t is not None)
        return ""

    def _is_constant(self, tensor: FakeTensor) -> bool:
        """Whether a tensor depends on constants alone."""
        stack, seen = [tensor], set()
        while stack:
            current = stack.pop()
            layer = current._producer
            if layer is None or layer._type == "SHAPE":
                return False
            if layer not in seen:
                seen.add(layer)
                stack.extend(t for t in layer._inputs if t is not None)
        return True

    # Beyond the real interface

    def check(self) -> None:
        """Raise Refused where a build would fail: any layer, dead weights, no output."""
        if not self._outputs:
            raise Refused("the network has no output")
        for layer in self._layers:
            for tensor in layer._made:
                tensor._dims()
            for value in layer._values.values():
                if isinstance(value, HeldWeights):
                    value.check_alive(repr(layer))

    def evaluate(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name for inputs by name, of any sizes that the declared dimensions allow."""
        names = [t.name for t in self._inputs]
        if sorted(inputs) != sorted(names):
            raise ValueError(f"the network's inputs are {names}, got {sorted(inputs)}")
        values: dict[FakeTensor, torch.Tensor] = {}
        for tensor in self._inputs:
            value, (dtype, dims) = inputs[tensor.name], tensor._declared
            if value.dim() != len(dims) or any(d not in (-1, s) for d, s in zip(dims, value.shape)):
                raise ValueError(f"input {tensor.name!r} is {dims}, got {tuple(value.shape)}")
            if value.dtype != self._dtype_map[dtype]:
                raise ValueError(f"input {tensor.name!r} is {dtype.name}, got {value.dtype}")
            values[tensor] = value
        layers = self._order([t._producer for t in self._outputs], ())
        last_use = {t: i for i, layer in enumerate(layers) for t in layer._inputs if t is not None}
        for i, layer in enumerate(layers):
            self._layer_dtypes(layer)
            results = layer._run([None if t is None else values[t] for t in layer._inputs])
            values.update(zip(layer._made, results))
            for tensor in layer._inputs:
                if tensor is not None and last_use[tensor] == i and not tensor.is_network_output:
                    values.pop(tensor, None)
        return {t.name: values[t] for t in self._outputs}

    def precisions(self) -> list[dict]:
        """For each layer its name, kind, and the types it takes, computes in and makes.

        The type of the arithmetic is the layer's precision in a weakly typed network, and that of its first floating
        input, or else of its output, in a strongly typed one, where casts and constants compute nothing.
        """
        rows = []
        for layer in self._layers:
            ins = [t.dtype.name for t in layer._inputs if t is not None]
            outs = [t.dtype.name for t in layer._made]
            if not self._strong:
                compute = layer._values["precision"].name if "precision" in layer._values else ""
            elif layer._type in ("CAST", "CONSTANT"):
                compute = ""
            else:
                floating = [n for n in (*ins, *outs) if n in ("FLOAT", "HALF", "BF16")]
                compute = floating[0] if floating else outs[0]
            row = {
                "name": layer.name,
                "kind": layer._type,
                "inputs": ins,
                "outputs": outs,
                "compute": compute,
            }
            rows.append(row)
        return rows
