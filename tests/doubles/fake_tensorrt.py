"""A module `tensorrt` for a CPU: the real bindings' enums, Dims and fields, with doubles for what needs a GPU.

with use_tensorrt("10.13.3.9") as trt:      # `import tensorrt` gives the double inside, for d2_trt too
    builder = trt.Builder(trt.Logger())
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import sys
import types

from . import (
    builder,
    interpreter,
    layer,
    layers_math,
    layers_nn,
    layers_quantize,
    layers_shape,
    plugins,
    runtime,
)
from .trt_api import Api
from .trt_stubs import import_bindings
from .weights import HeldWeights, make_weights_class

# Doubles that are made by others, never by calling the class.
PASSIVE = (
    layer.FakeTensor,
    layer.FakeLayer,
    builder.FakeProfile,
    builder.FakeTimingCache,
    builder.FakeConfig,
    builder.FakeHostMemory,
    builder.Network,
    plugins.FakeRegistry,
    runtime.FakeEngine,
    runtime.FakeContext,
    runtime.FakeInspector,
)
ABSENT = ("OnnxParser", "OnnxParserRefitter", "Refitter", "CaffeParser", "UffParser")


def _layer_classes():
    for module in (layers_math, layers_nn, layers_quantize, layers_shape, plugins):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, layer.FakeLayer) and value._type:
                yield value


def _absent(name: str):
    def raise_error(*args, **kwargs):
        raise NotImplementedError(f"the double of TensorRT has no {name}")

    return raise_error


@functools.cache
def fake_module(version: str) -> types.ModuleType:
    """The double of one version. Raises StubError where its bindings cannot be had."""
    real = import_bindings(version)
    module = types.ModuleType("tensorrt", f"A double of TensorRT {version} on real bindings.")
    module.__dict__.update(
        {k: v for k, v in vars(real).items() if not k.startswith("__") or k == "__version__"}
    )
    api = Api(version, real)
    api.registry = plugins.FakeRegistry(api)
    module.Weights = make_weights_class(real.Weights)
    dtypes = interpreter.torch_dtypes(real)
    api.hold_weights = lambda weights: HeldWeights(weights, dtypes)
    for cls in (*PASSIVE, *_layer_classes()):
        kind = "ILayer" if cls is layer.FakeLayer else cls._kind
        if hasattr(real, kind):
            setattr(module, kind, cls)
            api.objects[kind] = cls
    api.objects["Weights"] = module.Weights
    module.Builder = type(
        "Builder", (builder.FakeBuilder,), {"__init__": _init_with(builder.FakeBuilder, api)}
    )
    module.Runtime = type(
        "Runtime", (runtime.FakeRuntime,), {"__init__": _init_with(runtime.FakeRuntime, api)}
    )
    module.get_plugin_registry = lambda: api.registry
    module.get_builder_plugin_registry = lambda capability=None: api.registry

    def init_libnvinfer_plugins(logger, namespace):
        api.registry._register_nvidia()
        return True

    module.init_libnvinfer_plugins = init_libnvinfer_plugins
    for name in ABSENT:
        if hasattr(real, name):
            setattr(module, name, _absent(name))
    module.__file__ = __file__
    # What looks a module up without importing it (importlib.util.find_spec, as torch does) wants a spec.
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None, origin=__file__)
    return module


def _init_with(base: type, api: Api):
    def __init__(self, logger):
        base.__init__(self, api, logger)

    return __init__


def forget_version() -> None:
    """Clear what d2_trt's modules remember of TensorRT: functions under functools.cache or lru_cache."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "d2_trt":
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


@contextlib.contextmanager
def use_tensorrt(version: str):
    """`tensorrt` is the double of that version inside; modules that hold on to an earlier one are forgotten."""
    module = fake_module(version)
    held = {n: m for n, m in list(sys.modules.items()) if n.split(".")[0] in ("tensorrt", "torch2trt")}
    for name in held:
        del sys.modules[name]
    sys.modules["tensorrt"] = module
    forget_version()
    try:
        yield module
    finally:
        for name in [n for n in list(sys.modules) if n.split(".")[0] in ("tensorrt", "torch2trt")]:
            del sys.modules[name]
        sys.modules.update(held)
        forget_version()


def build_network(trt, examples=None, strong: bool | None = None):
    """An empty network in the typing mode of the version: weak in 8.6, strong from 10 on."""
    flags = trt.NetworkDefinitionCreationFlag
    strong = hasattr(flags, "STRONGLY_TYPED") if strong is None else strong
    flag = flags.STRONGLY_TYPED if strong else flags.EXPLICIT_BATCH
    network = trt.Builder(trt.Logger()).create_network(1 << int(flag))
    network.examples = dict(examples or {})
    return network
