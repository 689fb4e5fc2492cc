"""The runtime's side: engines and execution contexts on CPU tensors, given by their addresses as on a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
from typing import ClassVar

import torch

from .builder import BUILT, MAGIC, FakeHostMemory, as_bytes
from .interpreter import torch_dtypes
from .trt_api import Api, ApiObject, as_any, as_bool, as_enum, as_int, as_str


def tensor_at(address: int, shape, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over memory of this process."""
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    buffer = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).reshape(tuple(shape))


class FakeRuntime(ApiObject):
    """Runtime."""

    _kind = "Runtime"
    _settable: ClassVar = {
        "max_threads": as_int,
        "error_recorder": as_any,
        "gpu_allocator": as_any,
        "engine_host_code_allowed": as_bool,
        "temporary_directory": as_str,
    }

    def __init__(self, api: Api, logger):
        super().__init__(api)
        if not isinstance(logger, api.trt.ILogger):
            raise TypeError("Runtime needs an ILogger")
        self._values = {
            "logger": logger,
            "max_threads": 1,
            "error_recorder": None,
            "engine_host_code_allowed": False,
        }

    def get_plugin_registry(self):
        return self._api.registry

    def deserialize_cuda_engine(self, serialized_engine):
        """None for what is damaged, or was built by another version or process, with the reason in the log."""
        data = as_bytes(serialized_engine)
        start = len(MAGIC) + 32
        why = ""
        body = data[start:]
        if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != data[len(MAGIC) : start]:
            why = "the serialized engine is damaged"
        else:
            (length,) = struct.unpack_from("<I", body)
            header = json.loads(body[4 : 4 + length])
            if header["tensorrt"] != self._api.version:
                why = f"the engine was built by TensorRT {header['tensorrt']}, this is {self._api.version}"
            elif header["key"] not in BUILT:
                why = "the engine was built by another process: the double keeps graphs in memory"
        if why:
            self.logger.log(self._api.trt.ILogger.Severity.ERROR, f"[double] {why}")
            return None
        return FakeEngine(self._api, data, BUILT[header["key"]])


class FakeEngine(ApiObject):
    """ICudaEngine."""

    _kind = "ICudaEngine"
    _settable: ClassVar = {"error_recorder": as_any}

    def __init__(self, api: Api, data: bytes, built: dict):
        super().__init__(api)
        self._data, self._network, self._profiles = data, built["network"], built["profiles"]
        self._tensors = {t.name: t for t in (*self._network._inputs, *self._network._outputs)}
        self._values = {
            "name": self._network._values["name"],
            "num_io_tensors": len(self._tensors),
            "num_layers": len(self._network._layers),
            "num_optimization_profiles": max(1, len(self._profiles)),
            "num_aux_streams": 0,
            "refittable": False,
            "has_implicit_batch_dimension": False,
            "device_memory_size": 1 << 20,
            "device_memory_size_v2": 1 << 20,
            "profiling_verbosity": built["config"]["profiling_verbosity"],
            "error_recorder": None,
        }

    def __iter__(self):
        return iter(self._tensors)

    def _tensor(self, name: str):
        if name not in self._tensors:
            raise ValueError(f"the engine has no tensor {name!r}; it has {list(self._tensors)}")
        return self._tensors[name]

    def serialize(self):
        return FakeHostMemory(self._api, self._data)

    def create_execution_context(self, strategy=None):
        without = strategy is not None and strategy.name == "USER_MANAGED"
        return FakeContext(self._api, self, without_memory=without)

    def create_execution_context_without_device_memory(self):
        return FakeContext(self._api, self, without_memory=True)

    def create_engine_inspector(self):
        return FakeInspector(self._api, self)

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_mode(self, name):
        mode = self._api.trt.TensorIOMode
        return mode.INPUT if self._tensor(name).is_network_input else mode.OUTPUT

    def get_tensor_dtype(self, name):
        return self._tensor(name).dtype

    def get_tensor_shape(self, name):
        return self._tensor(name).shape

    def get_tensor_location(self, name):
        return self._tensor(name).location

    def is_shape_inference_io(self, name):
        return False

    def get_tensor_format(self, name, profile_index=0):
        return self._api.trt.TensorFormat.LINEAR

    def get_tensor_profile_shape(self, name, profile_index):
        profile = self._profiles[profile_index] if profile_index < len(self._profiles) else None
        shapes = profile._shapes.get(name) if profile is not None else None
        return [self._api.trt.Dims(s) for s in shapes or [self._tensor(name)._dims()] * 3]


class FakeInspector(ApiObject):
    """EngineInspector: one entry for each layer of the network, unfused."""

    _kind = "EngineInspector"
    _settable: ClassVar = {"execution_context": as_any, "error_recorder": as_any}

    def __init__(self, api: Api, engine: FakeEngine):
        super().__init__(api)
        self._engine = engine
        self._values = {"execution_context": None, "error_recorder": None}

    def _layer(self, layer) -> dict | str:
        if self._engine.profiling_verbosity.name not in ("DETAILED", "VERBOSE"):
            return layer.name

        def tensors(items):
            return [
                {"Name": t.name, "Dimensions": list(t._dims()), "Format/Datatype": t.dtype.name}
                for t in items
            ]

        inputs = [t for t in layer._inputs if t is not None]
        entry = {"Name": layer.name, "LayerType": layer._type.title(), "Inputs": tensors(inputs)}
        return {**entry, "Outputs": tensors(layer._made), "Metadata": layer.metadata}

    def get_layer_information(self, layer_index, format):
        entry = self._layer(self._engine._network._layers[layer_index])
        return json.dumps(entry) if format.name == "JSON" else str(entry)

    def get_engine_information(self, format):
        layers = [self._layer(layer) for layer in self._engine._network._layers]
        document = {"Layers": layers, "Bindings": list(self._engine._tensors)}
        return json.dumps(document) if format.name == "JSON" else "\n".join(map(str, layers))


class FakeContext(ApiObject):
    """IExecutionContext. The stream is taken and ignored: work is done when execute_async_v3 returns."""

    _kind = "IExecutionContext"
    _settable: ClassVar = {
        "name": as_str,
        "profiler": as_any,
        "debug_sync": as_bool,
        "enqueue_emits_profile": as_bool,
        "nvtx_verbosity": as_enum("ProfilingVerbosity"),
        "device_memory": as_any,
        "persistent_cache_limit": as_int,
        "temporary_allocator": as_any,
    }

    def __init__(self, api: Api, engine: FakeEngine, without_memory: bool = False):
        super().__init__(api)
        self._engine, self._shapes, self._addresses = engine, {}, {}
        self._without_memory = without_memory
        self._aux_streams: list[int] = []
        for tensor in engine._network._inputs:
            if -1 not in tensor._declared[1]:
                self._shapes[tensor.name] = tensor._declared[1]
        self._output_shapes = None
        self._values = {
            "engine": engine,
            "name": "",
            "profiler": None,
            "debug_sync": False,
            "enqueue_emits_profile": True,
            "active_optimization_profile": 0,
            "device_memory": 0,
        }

    def set_device_memory(self, memory, size):
        self._values["device_memory"] = memory if size >= self._engine._values["device_memory_size"] else 0

    def set_aux_streams(self, aux_streams):
        assert len(aux_streams) <= self._engine._values["num_aux_streams"]
        self._aux_streams = list(aux_streams)

    @property
    def all_binding_shapes_specified(self) -> bool:
        return len(self._shapes) == len(self._engine._network._inputs)

    def set_optimization_profile_async(self, profile_index, stream_handle):
        if profile_index >= max(1, len(self._engine._profiles)):
            return False
        self._values["active_optimization_profile"] = profile_index
        return True

    def set_input_shape(self, name, shape):
        tensor = self._engine._tensor(name)
        if not tensor.is_network_input:
            return False
        low, _, high = self._engine.get_tensor_profile_shape(
            name, self._values["active_optimization_profile"]
        )
        low, high = tuple(low), tuple(high)
        if len(shape) != len(low) or any(not a <= s <= b for a, s, b in zip(low, shape, high)):
            return False
        self._shapes[name] = shape
        self._output_shapes = None
        return True

    def get_tensor_shape(self, name):
        tensor = self._engine._tensor(name)
        if tensor.is_network_input:
            return self._api.trt.Dims(self._shapes.get(name, tensor._declared[1]))
        if not self.all_binding_shapes_specified:
            return tensor.shape
        if self._output_shapes is None:
            self._output_shapes = {n: tuple(v.shape) for n, v in self._infer().items()}
        return self._api.trt.Dims(self._output_shapes[name])

    def _infer(self):
        dtypes = torch_dtypes(self._api.trt)
        inputs = self._engine._network._inputs
        return self._engine._network.evaluate(
            {t.name: torch.zeros(self._shapes[t.name], dtype=dtypes[t.dtype]) for t in inputs}
        )

    def infer_shapes(self):
        return [t.name for t in self._engine._network._inputs if t.name not in self._shapes]

    def get_max_output_size(self, name):
        dtype = torch_dtypes(self._api.trt)[self._engine._tensor(name).dtype]
        return torch.Size(tuple(self.get_tensor_shape(name))).numel() * dtype.itemsize

    def set_tensor_address(self, name, memory):
        self._engine._tensor(name)
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name):
        return self._addresses.get(name, 0)

    def execute_async_v3(self, stream_handle):
        network, dtypes = self._engine._network, torch_dtypes(self._api.trt)
        missing = [name for name in self._engine._tensors if not self._addresses.get(name)]
        if missing or not self.all_binding_shapes_specified:
            return False
        if self._without_memory and not self._values["device_memory"]:
            return False
        inputs = {
            t.name: tensor_at(self._addresses[t.name], self._shapes[t.name], dtypes[t.dtype]).clone()
            for t in network._inputs
        }
        outputs = network.evaluate(inputs)
        for name, value in outputs.items():
            tensor_at(self._addresses[name], value.shape, value.dtype).copy_(value)
        if self._values["profiler"] is not None and self._values["enqueue_emits_profile"]:
            self.report_to_profiler()
        return True

    def report_to_profiler(self):
        profiler = self._values["profiler"]
        if profiler is None:
            return False
        for layer in self._engine._network._layers:
            profiler.report_layer_time(layer.name, 0.001)
        return True
