"""The only module that imports tensorrt and torch2trt, and the only one that asks for their versions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import types

from .errors import MissingDependencyError


@functools.cache
def tensorrt() -> types.ModuleType:
    """The tensorrt module.

    Raises:
        MissingDependencyError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise MissingDependencyError(
            f"MODEL.BACKEND 'tensorrt' needs NVIDIA TensorRT 8.6 or newer, which cannot be imported ({error}). "
            "Install it with `pip install tensorrt`, or set MODEL.BACKEND torch."
        ) from error


@functools.cache
def torch2trt() -> types.ModuleType:
    """The module torch2trt.torch2trt, which holds ConversionContext.

    Raises:
        MissingDependencyError: torch2trt is not installed, or does not import beside this TensorRT.
    """
    tensorrt()
    try:
        return importlib.import_module("torch2trt.torch2trt")
    except ImportError as error:
        raise MissingDependencyError(
            f"building an engine needs torch2trt, which cannot be imported ({error}). Install it with "
            "`pip install git+https://github.com/NVIDIA-AI-IOT/torch2trt`, or set MODEL.BACKEND torch."
        ) from error


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version of TensorRT."""
    major, minor = tensorrt().__version__.split(".")[:2]
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


def shape_dtype():
    """Type of shape tensors: int32 in 8.6, int64 later."""
    trt = tensorrt()
    return trt.int64 if strongly_typed() else trt.int32


def register_plugins() -> None:
    """Make NVIDIA's plugins known to TensorRT's registry."""
    tensorrt().init_libnvinfer_plugins(None, "")


def plugin_creator(name: str, plugin_version: str = "1"):
    """The registered creator of NVIDIA's plugin of that name, or None."""
    register_plugins()
    registry = tensorrt().get_plugin_registry()
    if hasattr(registry, "get_plugin_creator"):
        return registry.get_plugin_creator(name, plugin_version)
    return registry.get_creator(name, plugin_version)


@contextlib.contextmanager
def unwrapped_shapes():
    """torch2trt's own wrapping of sizes off: our converters read sizes in the network themselves."""
    with torch2trt().use_shape_wrapping(False):
        yield
