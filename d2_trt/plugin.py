"""Our TensorRT plugin of multi-scale deformable attention (csrc/trt_plugin): finding, loading and using it."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import numpy as np
import torch

from . import compat
from .errors import MissingDependencyError

NAME = "D2TRTMSDeformAttn"
VERSION = "1"
NAMESPACE = "d2_trt"
STOCK = "MultiscaleDeformableAttnPlugin_TRT"
# Element types by their numbers in csrc/common/dtype.h.
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_loading = threading.Lock()


def library() -> Path:
    """Where the plugin's library for the TensorRT in use is, once it is built."""
    return Path(__file__).resolve().parent / f"libd2_trt_plugins_trt{compat.version()[0]}.so"


def is_built() -> bool:
    """Whether there is a library for the TensorRT in use; whether it loads is another question."""
    return library().is_file()


def load() -> None:
    """Make the plugin known to TensorRT's registry. Safe to call again, and from several threads.

    Raises:
        MissingDependencyError: the library is missing, was built for another TensorRT, or does not load.
    """
    with _loading:
        if _creator() is not None:
            return
        path = library()
        if not path.is_file():
            raise MissingDependencyError(
                f"MODEL.TENSORRT.MSDA 'plugin' needs {path.name}, which is not built in {path.parent}. Run `python setup.py "
                "build_ext --inplace` with nvcc on the PATH and TENSORRT_INCLUDE_DIR set to the folder of NvInfer.h, or set "
                "MODEL.TENSORRT.MSDA to auto, stock or native."
            )
        _check_version(path)
        registry = compat.tensorrt().get_plugin_registry()
        registry.load_library(str(path))  # says in TensorRT's log what went wrong, and nothing here
        if _creator() is None:
            raise MissingDependencyError(
                f"TensorRT {compat.tensorrt().__version__} does not register the plugin {NAME} of {path}; its log says why. "
                "Build it again with `python setup.py build_ext --inplace`, or set MODEL.TENSORRT.MSDA to stock or native."
            )


def _creator():
    # A registry that ignores the library's own namespace keeps it under the empty one.
    return compat.plugin_creator(NAME, VERSION, NAMESPACE) or compat.plugin_creator(NAME, VERSION)


def _check_version(path: Path) -> None:
    try:
        version = ctypes.CDLL(str(path)).d2_trt_tensorrt_version()
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"{path} does not load ({error}). Build it again with `python setup.py build_ext --inplace`, or remove it and "
            "set MODEL.TENSORRT.MSDA to stock or native."
        ) from error
    if version // 10000 != compat.version()[0]:
        raise MissingDependencyError(
            f"{path} was built for TensorRT {version // 10000}.{version // 100 % 100}; this is "
            f"{compat.tensorrt().__version__}. Build it again with TENSORRT_INCLUDE_DIR set to that version's headers, or "
            "set MODEL.TENSORRT.MSDA to stock or native."
        )


def resolve(msda: str) -> str:
    """What computes deformable attention, from MODEL.TENSORRT.MSDA: "plugin", "stock" or "native".

    "auto" is our plugin where it is built, else NVIDIA's where TensorRT has it, else TensorRT's own layers.

    Raises:
        MissingDependencyError: our plugin is to be used and cannot be.
    """
    if msda == "plugin" or (msda == "auto" and is_built()):
        load()
        return "plugin"
    if msda == "auto":
        return "native" if compat.plugin_creator(STOCK) is None else "stock"
    return msda


def identity(msda: str) -> str:
    """What computes deformable attention, with its version where it is ours: for an engine's cache key."""
    return f"{NAME} {VERSION}" if msda == "plugin" else msda


def add_layer(network, inputs: list, value_dtype: torch.dtype, sampling_dtype: torch.dtype):
    """Add the plugin to a network.

    Args:
        network: INetworkDefinition, or torch2trt's wrapper of one.
        inputs: network tensors: value (B, S, heads, D) of value_dtype; offsets (B, S, heads, levels, points, 2) and logits
            (B, S, heads, levels * points) of sampling_dtype; sizes of the levels (levels, 2) int32, height and width.
        value_dtype: float32, float16, or from TensorRT 10 on bfloat16; also that of the output (B, S, heads * D).
        sampling_dtype: float32 or value_dtype.

    Raises:
        MissingDependencyError: the plugin cannot be loaded.
        ValueError: it does not have these types.
    """
    load()
    trt = compat.tensorrt()
    types = {"value_type": value_dtype, "sampling_type": sampling_dtype}
    numbers = {name: np.array([_TYPES[dtype]], np.int32) for name, dtype in types.items()}
    fields = trt.PluginFieldCollection(
        [trt.PluginField(name, number, trt.PluginFieldType.INT32) for name, number in numbers.items()]
    )
    # IPluginV2DynamicExt for TensorRT 8.6, IPluginV3 from 10 on: see csrc/trt_plugin.
    phase = [trt.TensorRTPhase.BUILD] if compat.strongly_typed() else []
    plugin = _creator().create_plugin("msda", fields, *phase)
    if plugin is None:
        raise ValueError(
            f"{NAME} has no value of {value_dtype} with offsets and logits of {sampling_dtype} in TensorRT {trt.__version__}"
        )
    if compat.strongly_typed():
        return network.add_plugin_v3(inputs, [], plugin)
    return network.add_plugin_v2(inputs, plugin)


def embed(config) -> None:
    """Have a builder put the plugin's library into the plan, for engines that run where d2_trt is not installed.

    TensorRT loads it from there; the file that it runs is then the plan's own.
    """
    load()
    config.plugins_to_serialize = [*config.plugins_to_serialize, str(library())]
