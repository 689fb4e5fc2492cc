"""Tensors and layers of the network's double: what all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from .trt_api import Api, ApiObject, Refused, as_any, as_bool, as_enum, as_int, as_str

if TYPE_CHECKING:
    from .interpreter import FakeNetwork

MAX_RANK = 8


class FakeTensor(ApiObject):
    """ITensor."""

    _kind = "ITensor"
    _settable: ClassVar = {
        "name": as_str,
        "allowed_formats": as_int,
        "location": as_enum("TensorLocation"),
        "broadcast_across_batch": as_bool,
        "dynamic_range": as_any,
    }

    def __init__(self, network: FakeNetwork, producer: FakeLayer | None, index: int, name: str):
        super().__init__(network._api)
        self._network, self._producer, self._index = network, producer, index
        self._consumers: set[FakeLayer] = set()
        self._declared = None  # dtype and dims of a network input
        self._dimension_names = {}
        trt = self._api.trt
        self._values = {
            "name": name,
            "allowed_formats": 1 << int(trt.TensorFormat.LINEAR),
            "location": trt.TensorLocation.DEVICE,
            "broadcast_across_batch": False,
            "dynamic_range": None,
        }

    def __repr__(self):
        return f"<ITensor {self._values['name']!r}>"

    @property
    def shape(self):
        return self._api.trt.Dims(self._dims())

    @shape.setter
    def shape(self, value):
        if self._producer is not None:
            raise Refused(f"the shape of {self!r} follows from its layer; only that of an input can be set")
        self._declared = (self._declared[0], self._api.dims(value))
        self._network._forget(self)

    @property
    def dtype(self):
        inner = self._producer is not None and self._producer._type != "CONSTANT"
        if inner and not self._network._strong and self._producer._is_float(self._kept_dtype):
            # What TensorRT 8.6.0 says of inner tensors, whatever their layers were told.
            return self._api.trt.float32
        return self._kept_dtype

    @property
    def _kept_dtype(self):
        """The type of the values, also where TensorRT tells another."""
        if self._producer is None:
            return self._declared[0]
        return self._network._layer_dtypes(self._producer)[self._index]

    @dtype.setter
    def dtype(self, value):
        value = self._api.convert("DataType", value, "dtype")
        if self._network._strong:
            raise Refused(f"setting the type of {self!r} is an error in a strongly typed network")
        if self._producer is None:
            self._declared = (value, self._declared[1])
            self._network._forget(self)
        else:
            self._producer.set_output_type(self._index, value)

    @property
    def is_network_input(self) -> bool:
        return self._producer is None

    @property
    def is_network_output(self) -> bool:
        return any(self is tensor for tensor in self._network._outputs)

    @property
    def is_shape_tensor(self) -> bool:
        return any(layer._uses_as_shape(self) for layer in self._consumers)

    @property
    def is_execution_tensor(self) -> bool:
        return not self.is_shape_tensor

    def get_dimension_name(self, index):
        return self._dimension_names.get(index, "")

    def set_dimension_name(self, index, name):
        if not self.is_network_input:
            raise Refused("only dimensions of network inputs can be named")
        self._dimension_names[index] = name

    def set_dynamic_range(self, min, max):
        self._values["dynamic_range"] = (min, max)
        return True

    def reset_dynamic_range(self):
        self._values["dynamic_range"] = None

    def _dims(self) -> tuple[int, ...]:
        """Sizes, -1 where they differ between the examples."""
        if self._producer is None:
            return self._declared[1]
        sizes = zip(*(value.shape for value in self._examples()))
        ranks = {value.dim() for value in self._examples()}
        if len(ranks) != 1:
            raise Refused(f"the rank of {self!r} depends on the input's size")
        return tuple(first[0] if len(set(first)) == 1 else -1 for first in sizes)

    def _examples(self) -> list[torch.Tensor]:
        if self._producer is None:
            return self._network._example_inputs(self)
        return [outputs[self._index] for outputs in self._network._results(self._producer)]


class FakeLayer(ApiObject):
    """Base of all layers. Subclasses give `_dtypes`, the types of the outputs, and `_compute`, their values.

    Floating inputs reach `_compute` as float32, whatever their type, and its result is rounded to the output's type.
    """

    _type = ""  # in LayerType
    _outputs = 1
    _settable: ClassVar = {}
    _shape_inputs: frozenset = frozenset()  # inputs whose values decide on a shape
    _max_inputs = 1
    # Can its output be computed on the host, as a shape tensor?
    _host = False
    _only_moves = False  # elements, so that no precision is asked of it

    def __init__(self, network: FakeNetwork, inputs: Sequence[FakeTensor], **values):
        super().__init__(network._api)
        self._settable = {
            **self._settable,
            "name": as_str,
            "precision": self._as_precision,
            "metadata": as_str,
            "num_ranks": as_int,
        }
        self._network = network
        self._position = len(network._layers)
        name = f"(Unnamed Layer* {self._position}) [{self._title()}]"
        self._values = {"name": name, "metadata": "", "num_ranks": 1, **values}
        self._output_types = {}
        self._inputs: list[FakeTensor | None] = []
        for index, tensor in enumerate(inputs):
            self._attach(index, tensor)
        self._made = [
            FakeTensor(network, self, i, f"{name}_output" if self._outputs == 1 else f"{name}_output_{i}")
            for i in range(self._outputs)
        ]

    def __repr__(self):
        return f"<{self._title()} layer {self._values['name']!r}>"

    def _title(self) -> str:
        return self._kind.removeprefix("I").removesuffix("Layer")

    def _refuse(self, why: str):
        shapes = [f"{tuple(t._dims())} {t.dtype.name}" if t else "none" for t in self._inputs]
        raise Refused(f"TensorRT {self._api.version}: {self!r} with inputs {'; '.join(shapes)}: {why}")

    # The real interface

    @property
    def type(self):
        return getattr(self._api.trt.LayerType, self._type)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return self._outputs

    @property
    def precision_is_set(self) -> bool:
        return "precision" in self._values

    @property
    def precision(self):
        return self._values.get("precision", self._api.trt.float32)

    @precision.setter
    def precision(self, value):
        self._values["precision"] = self._as_precision(self._api, value)
        self._changed("precision")

    def _as_precision(self, api: Api, value):
        if self._network._strong:
            raise Refused(f"{self!r}: setting a layer's precision is an error in a strongly typed network")
        return api.convert("DataType", value, "precision")

    def reset_precision(self):
        self._values.pop("precision", None)
        self._changed("precision")

    def get_input(self, index):
        return self._inputs[index] if 0 <= index < len(self._inputs) else None

    def get_output(self, index):
        return self._made[index] if 0 <= index < self._outputs else None

    def set_input(self, index, tensor):
        if not 0 <= index < self._max_inputs:
            raise Refused(f"{self!r} has no input {index}")
        self._attach(index, tensor)
        self._changed("input")

    def get_output_type(self, index):
        return self._made[index].dtype

    def output_type_is_set(self, index):
        return index in self._output_types

    def reset_output_type(self, index):
        self._output_types.pop(index, None)
        self._changed("output type")

    def set_output_type(self, index, dtype):
        if not 0 <= index < self._outputs:
            raise Refused(f"{self!r} has no output {index}")
        if self._network._strong:
            raise Refused(f"{self!r}: set_output_type is an error in a strongly typed network; use add_cast")
        self._output_types[index] = dtype
        self._changed("output type")

    # For the layers

    def _attach(self, index: int, tensor: FakeTensor | None) -> None:
        if tensor is not None and tensor._network is not self._network:
            raise Refused(f"{self!r}: input {index} belongs to another network")
        while len(self._inputs) <= index:
            self._inputs.append(None)
        self._inputs[index] = tensor
        if tensor is not None:
            tensor._consumers.add(self)

    def _changed(self, name: str) -> None:
        self._network._forget_layer(self)

    def _uses_as_shape(self, tensor: FakeTensor) -> bool:
        return any(i < len(self._inputs) and self._inputs[i] is tensor for i in self._shape_inputs)

    def _host_constants(self) -> list[FakeTensor]:
        """Inputs that must be constants for the output to be a shape tensor."""
        return []

    def _in(self, index: int) -> FakeTensor | None:
        return self._inputs[index] if index < len(self._inputs) else None

    def _rank(self, index: int = 0) -> int:
        return len(self._inputs[index]._dims())

    def _is_float(self, dtype) -> bool:
        t = self._api.trt.DataType
        return dtype in {t.FLOAT, t.HALF, getattr(t, "BF16", t.FLOAT)}

    def _is_int(self, dtype) -> bool:
        t = self._api.trt.DataType
        return dtype in {t.INT32, getattr(t, "INT64", t.INT32)}

    def _need_float(self, *indices: int) -> None:
        for index in indices:
            if not self._is_float(self._inputs[index].dtype):
                self._refuse(f"input {index} must be floating")

    def _need_index(self, index: int) -> None:
        if not self._is_int(self._inputs[index].dtype):
            self._refuse(
                f"input {index} must be int32" + ("" if self._api.numbers < (10, 0) else " or int64")
            )

    def _common_dtype(self, *indices: int):
        """The type of inputs that must agree: equal, or in weak typing all floating."""
        dtypes = [
            self._inputs[i]._kept_dtype
            for i in (indices or range(len(self._inputs)))
            if self._in(i) is not None
        ]
        if len(set(dtypes)) > 1:
            if self._network._strong or not all(self._is_float(d) for d in dtypes):
                self._refuse("the inputs' types differ: " + ", ".join(d.name for d in dtypes))
            return self._api.trt.float32
        return dtypes[0]

    def _axes(self, mask: int, rank: int) -> list[int]:
        if mask <= 0 or mask >> rank:
            self._refuse(f"axes {mask:#b} are not of {rank} dimensions")
        return [i for i in range(rank) if mask >> i & 1]

    def _one_axis(self, mask: int, rank: int) -> int:
        axes = self._axes(mask, rank)
        if len(axes) != 1:
            self._refuse(f"axes {mask:#b} must have exactly one bit set")
        return axes[0]

    def _check_shape_tensors(self) -> None:
        wanted = "int32" if self._api.numbers < (10, 0) else "int32 or int64"
        for index in self._shape_inputs:
            tensor = self._in(index)
            if tensor is None:
                continue
            if not self._is_int(tensor.dtype):
                self._refuse(f"input {index} is a shape tensor and must be {wanted}, not {tensor.dtype.name}")
            if len(tensor._dims()) != 1 or -1 in tensor._dims():
                self._refuse(f"input {index} is a shape tensor and must be 1-D of a fixed length")
            why = self._network._why_no_shape_tensor(tensor)
            if why:
                self._refuse(f"input {index} cannot be a shape tensor: {why}")

    def _dtypes(self) -> list:
        """Types of the outputs before set_output_type; refuses wrong input types."""
        return [self._common_dtype()]

    def _validate(self) -> None:
        """Refuses what does not depend on the examples one by one."""

    def _compute(self, *inputs: torch.Tensor | None):
        """The output, or a tuple of them, from one example's inputs."""
        raise NotImplementedError

    def _final_dtypes(self) -> list:
        natural = self._dtypes()
        for index, wanted in self._output_types.items():
            if wanted != natural[index] and not self._may_output(natural[index], wanted):
                self._refuse(f"output {index} is {natural[index].name} and cannot be set to {wanted.name}")
        if "precision" in self._values and not self._is_float(self._values["precision"]):
            t = self._api.trt.DataType
            if self._values["precision"] not in {t.INT8, *natural}:
                self._refuse(f"precision {self._values['precision'].name} is not possible")
        return [self._output_types.get(i, dtype) for i, dtype in enumerate(natural)]

    def _may_output(self, natural, wanted) -> bool:
        return self._is_float(natural) and self._is_float(wanted)

    def _run(self, inputs: list[torch.Tensor | None]) -> list[torch.Tensor]:
        """Outputs for one example, in their types."""
        low = None
        if "precision" in self._values and self._is_float(self._values["precision"]):
            low = self._network._dtype_map[self._values["precision"]]
        prepared = []
        for value in inputs:
            if value is not None and value.is_floating_point():
                value = value.to(low).float() if low else value.float()
            prepared.append(value)
        outputs = self._compute(*prepared)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        rounded = []
        for value, dtype in zip(outputs, self._network._layer_dtypes(self), strict=True):
            if value.dim() > MAX_RANK:
                self._refuse(f"the result has {value.dim()} dimensions; TensorRT has at most {MAX_RANK}")
            if low and value.is_floating_point():
                value = value.to(low)
            rounded.append(value.to(self._network._dtype_map[dtype]))
        return rounded
