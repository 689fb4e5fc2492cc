"""The only module that imports tensorrt and torch2trt, and the only one that asks for their versions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
import types
from collections.abc import Callable, Iterable, Mapping

import torch

from .errors import MissingDependencyError

logger = logging.getLogger(__name__)

# What installs them. torch2trt's own setup imports torch and tensorrt, which an isolated build would not find.
INSTALL = {
    "tensorrt": "pip install tensorrt",
    "torch2trt": "pip install --no-build-isolation git+https://github.com/NVIDIA-AI-IOT/torch2trt",
}
UPGRADE_TENSORRT = "pip install --upgrade tensorrt"
OLDEST_TENSORRT = (8, 6)
# Of int8 calibration. TensorRT 11 has them no more; torch2trt reads them when it is imported.
_GONE = ("CalibrationAlgoType", "IInt8Calibrator")
_importing = threading.Lock()
_ABSENT = object()


class OutdatedTensorRT(MissingDependencyError):
    """TensorRT is there, of the version `found`, which is too old."""

    def __init__(self, message: str, found: str = ""):
        super().__init__(message)
        self.found = found


@functools.cache
def tensorrt() -> types.ModuleType:
    """The tensorrt module.

    Raises:
        MissingDependencyError: it is not installed, its libraries do not load, or it is older than 8.6.
    """
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: the bindings are there, their libraries are not
        raise MissingDependencyError(
            f"MODEL.BACKEND 'tensorrt' needs NVIDIA TensorRT 8.6 or newer, which cannot be imported ({error}). "
            f"Install it with `{INSTALL['tensorrt']}`, or set MODEL.BACKEND torch."
        ) from error
    if _major_minor(module) < OLDEST_TENSORRT:
        raise OutdatedTensorRT(
            f"MODEL.BACKEND 'tensorrt' needs NVIDIA TensorRT 8.6 or newer, and {module.__version__} is installed. "
            f"Install a newer one with `{UPGRADE_TENSORRT}`, or set MODEL.BACKEND torch.",
            module.__version__,
        )
    return module


@functools.cache
def torch2trt() -> types.ModuleType:
    """The module torch2trt.torch2trt, which holds ConversionContext.

    Raises:
        MissingDependencyError: torch2trt is not installed, or does not import beside this TensorRT.
    """
    trt = tensorrt()
    try:
        with _importing, _with_gone_names(trt):
            return importlib.import_module("torch2trt.torch2trt")
    except Exception as error:  # it also fails on names that a TensorRT or a PyTorch lacks
        raise MissingDependencyError(
            f"building an engine needs torch2trt, which cannot be imported beside TensorRT {trt.__version__} "
            f"({type(error).__name__}: {error}). Install it with `{INSTALL['torch2trt']}`, or set MODEL.BACKEND torch."
        ) from error


@contextlib.contextmanager
def _with_gone_names(trt: types.ModuleType):
    """The names of _GONE in the module, where it lacks them, as classes without content."""
    missing = [name for name in _GONE if not hasattr(trt, name)]
    algorithms = dict.fromkeys(("ENTROPY_CALIBRATION", "ENTROPY_CALIBRATION_2"))
    for name in missing:
        setattr(trt, name, type(name, (), dict(algorithms)))
    try:
        yield
    finally:
        for name in missing:
            delattr(trt, name)


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version of TensorRT."""
    return _major_minor(tensorrt())


def _major_minor(module: types.ModuleType) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


def strongly_typed() -> bool:
    """Whether networks carry their types in their tensors (TensorRT 10 and newer) or in their layers' precisions."""
    return version() >= (10, 0)


def network_flags() -> int:
    """Flags for Builder.create_network."""
    trt = tensorrt()
    flags = trt.NetworkDefinitionCreationFlag
    if not strongly_typed():
        return 1 << int(flags.EXPLICIT_BATCH)
    # From 11 on every network is strongly typed, and the flag is gone.
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def timing_caches_combine() -> bool:
    """Whether ITimingCache.combine is safe: 8.6.0 was seen to crash the process over caches of full-size models."""
    return version() >= (10, 0)


def shape_dtype():
    """Type of shape tensors: int32 in 8.6, int64 later."""
    trt = tensorrt()
    return trt.int64 if strongly_typed() else trt.int32


def register_plugins() -> None:
    """Make NVIDIA's plugins known to TensorRT's registry, and ours where it is built."""
    tensorrt().init_libnvinfer_plugins(None, "")
    from . import plugin

    if plugin.is_built():
        try:
            plugin.load()
        except MissingDependencyError as error:
            # An engine may do without; one that needs it does not load, and plugin.resolve raises by itself.
            _warn_once(str(error))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def plugin_creator(name: str, plugin_version: str = "1", namespace: str = ""):
    """The registered creator of a plugin, NVIDIA's by default, or None."""
    tensorrt().init_libnvinfer_plugins(None, "")
    registry = tensorrt().get_plugin_registry()
    if hasattr(registry, "get_creator"):  # those of every interface
        return registry.get_creator(name, plugin_version, namespace)
    return registry.get_plugin_creator(name, plugin_version, namespace)


def has_progress_monitor() -> bool:
    """Whether a build tells of its phases and can be ended by who listens (TensorRT 10 and newer)."""
    return hasattr(tensorrt(), "IProgressMonitor")


def timing_entries(cache) -> int | None:
    """How many timings an ITimingCache holds; None where TensorRT does not tell (before 10.13)."""
    return len(cache.queryKeys()) if hasattr(cache, "queryKeys") else None


def device_memory(engine) -> int:
    """Bytes of GPU memory that an execution context of an ICudaEngine takes."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


def context_in(engine, memory: int, size: int):
    """An execution context of an ICudaEngine that works in memory of the caller's; None where TensorRT refuses.

    Args:
        memory: address of at least device_memory(engine) bytes, aligned to 256, that outlives the context and serves one
            run at a time.
        size: bytes of it.
    """
    if hasattr(engine, "create_execution_context_without_device_memory"):
        context = engine.create_execution_context_without_device_memory()
    else:  # TensorRT 11
        strategies = tensorrt().ExecutionContextAllocationStrategy
        context = engine.create_execution_context(strategies.USER_MANAGED)
    if context is None:
        return None
    _give_memory(context, memory, size)
    # Only an engine's first context has profile 0 by itself in TensorRT 8.6.
    if context.active_optimization_profile < 0:
        stream = torch.cuda.current_stream()
        if not context.set_optimization_profile_async(0, stream.cuda_stream):
            return None
        stream.synchronize()
    return context


def _give_memory(context, memory: int, size: int) -> None:
    if hasattr(context, "set_device_memory"):  # from 10.3 on
        context.set_device_memory(memory, size)
    else:
        context.device_memory = memory


@contextlib.contextmanager
def converting(conversion, table: Mapping[str, Mapping]):
    """A conversion at work: inside, the functions of a converter table are replaced by those that convert.

    Everything that it replaces is afterwards what it was before, also where it fails on its way in. torch2trt's own
    wrapping of sizes is off: PyTorch reads sizes in its own code, and for each of them it would add layers, with
    constants whose memory is freed before TensorRT reads it. Our converters read sizes in the network themselves.

    Args:
        conversion: the ConversionContext, not entered yet.
        table: what the context was made with.
    """
    sizes = [(torch.Tensor, name) for name in ("size", "__getattribute__")]
    plain = [getattr(owner, name) for owner, name in sizes]
    with _put_back([*sizes, *map(_place, table.values())]):
        try:
            conversion.__enter__()
            for (owner, name), function in zip(sizes, plain):
                setattr(owner, name, function)
            for entry in table.values():
                owner, name = _place(entry)
                setattr(owner, name, _in_this_thread(getattr(owner, name), entry["method_impl"]))
            yield
        finally:
            conversion.__exit__(None, None, None)


def _in_this_thread(hooked: Callable, original: Callable) -> Callable:
    """What calls `hooked` in the thread that asks for it, and `original` in all others, whose work is not the model's.

    Traced tensors refuse to be given to those.
    """
    tracing = threading.get_ident()

    @functools.wraps(original)
    def call(*args, **kwargs):
        return (hooked if threading.get_ident() == tracing else original)(*args, **kwargs)

    return call


def _place(entry: Mapping) -> tuple[object, str]:
    """Where a function of a converter table is found: a module or class, and a name in it."""
    *path, last = entry["qual_name"].split(".")
    return functools.reduce(getattr, path, entry["module"]), last


@contextlib.contextmanager
def _put_back(places: Iterable[tuple[object, str]]):
    """Attributes as they were, afterwards. What was inherited is not left as an attribute of the class itself."""
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name in places]
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
