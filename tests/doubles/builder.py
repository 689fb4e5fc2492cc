"""The builder's side: IBuilder, its configuration, profiles, the timing cache, serialized engines."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from typing import ClassVar

from .interpreter import FakeNetwork
from .layers_math import MathLayers
from .layers_nn import NeuralLayers
from .layers_quantize import QuantizeLayers
from .layers_shape import ShapeLayers
from .plugins import PluginLayers
from .trt_api import Api, ApiObject, Refused, as_any, as_enum, as_int

MAGIC = b"d2trtfake\0"
CACHE_MAGIC = b"faketiming"

# What was built in this process. A serialized engine refers to an entry: graphs cannot be written to disk.
BUILT: dict[str, dict] = {}
_numbers = itertools.count()


class Network(FakeNetwork, MathLayers, ShapeLayers, NeuralLayers, QuantizeLayers, PluginLayers):
    """INetworkDefinition with every emulated layer."""


class FakeHostMemory(ApiObject):
    """IHostMemory: bytes through the buffer protocol where Python has it for classes, and through bytes()."""

    _kind = "IHostMemory"

    def __init__(self, api: Api, data: bytes):
        super().__init__(api)
        self._data = data
        self._values = {"nbytes": len(data), "dtype": api.trt.DataType.INT8}

    def __bytes__(self):
        return self._data

    def __buffer__(self, flags):
        return memoryview(self._data)

    def __len__(self):
        return len(self._data)


def as_bytes(value) -> bytes:
    """What a parameter of type `buffer` takes."""
    if isinstance(value, FakeHostMemory):
        return value._data
    return bytes(memoryview(value))


class FakeProfile(ApiObject):
    """IOptimizationProfile."""

    _kind = "IOptimizationProfile"
    _settable: ClassVar = {"extra_memory_target": as_any}

    def __init__(self, api: Api):
        super().__init__(api)
        self._shapes = {}
        self._values = {"extra_memory_target": 1.0}

    def __bool__(self):
        return bool(self._shapes)

    def set_shape(self, input, min, opt, max):
        if not len(min) == len(opt) == len(max) or any(
            not 0 <= a <= b <= c for a, b, c in zip(min, opt, max)
        ):
            raise Refused(f"profile of {input!r}: not min {min} <= opt {opt} <= max {max}")
        self._shapes[input] = (min, opt, max)

    def get_shape(self, input):
        return [self._api.trt.Dims(shape) for shape in self._shapes.get(input, ())]

    def set_shape_input(self, input, min, opt, max):
        raise NotImplementedError("the double has no shape inputs")


class FakeTimingCache(ApiObject):
    """ITimingCache: a set of keys that a build adds to."""

    _kind = "ITimingCache"

    def __init__(self, api: Api, serialized: bytes):
        super().__init__(api)
        self._keys, self._version = set(), api.version
        if serialized:
            if not serialized.startswith(CACHE_MAGIC):
                raise Refused("this is no timing cache")
            content = json.loads(serialized[len(CACHE_MAGIC) :])
            self._keys, self._version = set(content["keys"]), content["tensorrt"]

    def serialize(self):
        content = {"tensorrt": self._version, "keys": sorted(self._keys)}
        return FakeHostMemory(self._api, CACHE_MAGIC + json.dumps(content).encode())

    def combine(self, input_cache, ignore_mismatch):
        if input_cache._version != self._version and not ignore_mismatch:
            return False
        self._keys |= input_cache._keys
        return True

    def reset(self):
        self._keys.clear()
        return True

    def queryKeys(self):
        return sorted(self._keys)


class FakeConfig(ApiObject):
    """IBuilderConfig."""

    _kind = "IBuilderConfig"
    _settable: ClassVar = {
        "builder_optimization_level": as_int,
        "profiling_verbosity": as_enum("ProfilingVerbosity"),
        "progress_monitor": as_any,
        "avg_timing_iterations": as_int,
        "max_aux_streams": as_int,
        "flags": as_int,
        "hardware_compatibility_level": as_enum("HardwareCompatibilityLevel"),
        "plugins_to_serialize": as_any,
        "default_device_type": as_enum("DeviceType"),
        "engine_capability": as_enum("EngineCapability"),
        "tiling_optimization_level": as_enum("TilingOptimizationLevel"),
        "max_num_tactics": as_int,
        "DLA_core": as_int,
        "profile_stream": as_int,
    }

    def __init__(self, api: Api):
        super().__init__(api)
        self.reset()

    def reset(self):
        trt = self._api.trt
        self._flags = {trt.BuilderFlag.TF32}
        self._pools, self._profiles, self._previews, self._devices = {}, [], {}, {}
        self._cache = None
        self._tactics = sum(1 << int(v) for v in set(trt.TacticSource.__members__.values()))
        self._values = {
            "builder_optimization_level": 3,
            "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            "progress_monitor": None,
            "avg_timing_iterations": 1,
            "max_aux_streams": -1,
            "plugins_to_serialize": [],
            "default_device_type": trt.DeviceType.GPU,
            "hardware_compatibility_level": trt.HardwareCompatibilityLevel.NONE,
            "DLA_core": -1,
            "profile_stream": 0,
        }

    @property
    def flags(self) -> int:
        return sum(1 << int(flag) for flag in self._flags)

    @flags.setter
    def flags(self, value):
        self._flags = {
            flag for flag in self._api.trt.BuilderFlag.__members__.values() if value >> int(flag) & 1
        }

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def _changed(self, name):
        if name == "builder_optimization_level" and not 0 <= self._values[name] <= 5:
            raise Refused(f"builder_optimization_level {self._values[name]}; it must be 0 to 5")

    def set_flag(self, flag):
        self._flags.add(flag)

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def get_flag(self, flag):
        return flag in self._flags

    def set_memory_pool_limit(self, pool, pool_size):
        if pool_size < 0:
            raise TypeError("pool_size must not be negative")
        self._pools[pool] = pool_size

    def get_memory_pool_limit(self, pool):
        return self._pools.get(pool, 1 << 34 if pool.name == "WORKSPACE" else 1 << 30)

    def set_tactic_sources(self, tactic_sources):
        known = set(self._api.trt.TacticSource.__members__.values())
        if tactic_sources & ~sum(1 << int(source) for source in known):
            return False
        self._tactics = tactic_sources
        return True

    def get_tactic_sources(self):
        return self._tactics

    def set_preview_feature(self, feature, enable):
        self._previews[feature] = enable

    def get_preview_feature(self, feature):
        return self._previews.get(feature, False)

    def add_optimization_profile(self, profile):
        if not profile:
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return FakeTimingCache(self._api, as_bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache._version != self._api.version and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    def set_device_type(self, layer, device_type):
        self._devices[layer] = device_type

    def get_device_type(self, layer):
        return self._devices.get(layer, self._api.trt.DeviceType.GPU)

    def is_device_type_set(self, layer):
        return layer in self._devices

    def reset_device_type(self, layer):
        self._devices.pop(layer, None)

    def can_run_on_DLA(self, layer):
        return False


class FakeBuilder(ApiObject):
    """Builder. A network that TensorRT would refuse makes build_serialized_network log it and return None, as there.

    Beyond the real interface, tests may set `refuse` to False: then the refusal is raised; and `work` to a function that is
    called three times in a build, between which a progress monitor may end it.
    """

    _kind = "Builder"
    _extra = frozenset({"refuse", "work"})
    _settable: ClassVar = {"max_threads": as_int, "error_recorder": as_any, "gpu_allocator": as_any}
    refuse = True
    work = staticmethod(lambda: None)

    def __init__(self, api: Api, logger):
        super().__init__(api)
        if not isinstance(logger, api.trt.ILogger):
            raise TypeError("Builder needs an ILogger")
        fast = {f"platform_has_{name}": True for name in ("fast_fp16", "fast_int8", "tf32")}
        self._values = {
            "logger": logger,
            "max_threads": 1,
            "error_recorder": None,
            "num_DLA_cores": 0,
            **fast,
        }

    def create_network(self, flags=0):
        return Network(self._api, flags, self)

    def create_builder_config(self):
        return FakeConfig(self._api)

    def create_optimization_profile(self):
        return FakeProfile(self._api)

    def get_plugin_registry(self):
        return self._api.registry

    def is_network_supported(self, network, config):
        return True

    def build_serialized_network(self, network, config):
        severity = self._api.trt.ILogger.Severity
        try:
            self._check_build(network, config)
            if not self._build(config):
                self.logger.log(severity.ERROR, "the progress monitor ended the build")
                return None
        except Refused as error:
            if not self.refuse:
                raise
            self.logger.log(severity.ERROR, f"[double] {error}")
            return None
        graph = "\n".join(f"{layer.name} {layer._type}" for layer in network._layers)
        key = hashlib.sha256(f"{next(_numbers)} {graph}".encode()).hexdigest()
        BUILT[key] = {"network": network, "profiles": list(config._profiles), "config": dict(config._values)}
        if config._cache is not None:
            config._cache._keys |= {
                hashlib.sha256(layer._type.encode()).hexdigest() for layer in network._layers
            }
        header = json.dumps({"key": key, "tensorrt": self._api.version}).encode()
        body = struct.pack("<I", len(header)) + header
        return FakeHostMemory(self._api, MAGIC + hashlib.sha256(body).digest() + body)

    def build_serialized_network_to_stream(self, network, config, writer):
        plan = self.build_serialized_network(network, config)
        if plan is not None:
            writer.write(bytes(plan))
        return plan is not None

    def reset(self):
        pass

    def _check_build(self, network, config) -> None:
        network.check()
        dynamic = [t for t in network._inputs if -1 in t._declared[1]]
        if dynamic and not config._profiles:
            raise Refused(f"input {dynamic[0].name!r} is dynamic and there is no optimization profile")
        for profile in config._profiles:
            for name in profile._shapes:
                if name not in {t.name for t in network._inputs}:
                    raise Refused(f"the profile names an input {name!r} that the network lacks")
            for tensor in dynamic:
                shapes, declared = profile._shapes.get(tensor.name), tensor._declared[1]
                if shapes is None:
                    raise Refused(f"the profile lacks input {tensor.name!r}")
                for shape in shapes:
                    if len(shape) != len(declared) or any(d not in (-1, s) for d, s in zip(declared, shape)):
                        raise Refused(f"profile shape {shape} of input {tensor.name!r}, which is {declared}")
        if not network._strong:
            self._check_precisions(network, config)

    def _check_precisions(self, network, config) -> None:
        flag = self._api.trt.BuilderFlag
        low = [
            t
            for layer in network._layers
            for t in (layer._values.get("precision"), *layer._output_types.values())
        ]
        for dtype, needed in (("HALF", "FP16"), ("BF16", "BF16"), ("INT8", "INT8")):
            used = any(t is not None and t.name == dtype for t in low)
            if used and not config.get_flag(getattr(flag, needed)):
                raise Refused(f"layers are set to {dtype}, but BuilderFlag.{needed} is not set")

    def _build(self, config) -> bool:
        """Work, and call the progress monitor; False where it asks to stop."""
        monitor = config._values["progress_monitor"]
        if monitor is None:
            for _ in range(3):
                self.work()
            return True
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Tactic Selection", "Building Engine", 3)
        going = True
        for step in range(3):
            if going:
                self.work()
                going = monitor.step_complete("Tactic Selection", step)
        monitor.phase_finish("Tactic Selection")
        going = going and monitor.step_complete("Building Engine", 0)
        monitor.phase_finish("Building Engine")
        return going
