"""Our TensorRT plugins (csrc/trt_plugin): finding, loading and using them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import compat
from .errors import MissingDependencyError

NAMESPACE = "d2_trt"
STOCK = "MultiscaleDeformableAttnPlugin_TRT"
# Element types by their numbers in csrc/common/dtype.h.
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_loading = threading.Lock()


@dataclass(frozen=True)
class Plugin:
    """A plugin of the library: name and version of its core in csrc/trt_plugin, and the option below MODEL.TENSORRT
    that decides whether it is used.
    """

    name: str
    version: str
    option: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


ATTENTION = Plugin("D2TRTAttention", "1", "ATTENTION")
LEVEL_MASK_FEATURES = Plugin("D2TRTLevelMaskFeatures", "1", "ATTENTION")
MASK_PRODUCT = Plugin("D2TRTMaskProduct", "1", "ATTENTION")
MLP = Plugin("D2TRTMlp", "2", "ATTENTION")
WINDOW_ATTENTION = Plugin("D2TRTWindowAttention", "1", "ATTENTION")
MSDA = Plugin("D2TRTMSDeformAttn", "2", "MSDA")
LAYER_NORM = Plugin("D2TRTLayerNorm", "2", "NORMALIZATION")
GROUP_NORM = Plugin("D2TRTGroupNorm", "1", "NORMALIZATION")
NORMALIZE_IMAGES = Plugin("D2TRTNormalizeImages", "1", "NORMALIZATION")
# All that the library registers: csrc/trt_plugin/plugins.h has the same list.
PLUGINS = (
    ATTENTION,
    GROUP_NORM,
    LAYER_NORM,
    LEVEL_MASK_FEATURES,
    MASK_PRODUCT,
    MLP,
    MSDA,
    NORMALIZE_IMAGES,
    WINDOW_ATTENTION,
)
# Keys below MODEL.TENSORRT that choose between our plugins and TensorRT's own means.
OPTIONS = ("MSDA", "NORMALIZATION", "ATTENTION")
# Compute capability from which on a GPU has the instructions of an option's plugins, where not all that TensorRT runs on do.
_LEAST_CAPABILITY = {"ATTENTION": (8, 0)}


def library() -> Path:
    """Where the plugins' library for the TensorRT in use is, once it is built."""
    return Path(__file__).resolve().parent / f"libd2_trt_plugins_trt{compat.version()[0]}.so"


def is_built() -> bool:
    """Whether there is a library for the TensorRT in use; whether it loads is another question."""
    return library().is_file()


def load(option: str | None = None) -> None:
    """Make our plugins known to TensorRT's registry. Safe to call again, and from several threads.

    Args:
        option: the one below MODEL.TENSORRT that wants them, for the error; None: no certain one.

    Raises:
        MissingDependencyError: the library is missing, was built for another TensorRT or from other sources, or does not
            load.
    """
    with _loading:
        if not _missing():
            return
        path = library()
        if not path.is_file():
            raise MissingDependencyError(
                f"{_key(option)} 'plugin' needs {path.name}, which is not built in {path.parent}. Run `python "
                "setup.py build_ext --inplace` with nvcc on the PATH and TENSORRT_INCLUDE_DIR set to NvInfer.h's folder, "
                f"or {_way_out(option)}."
            )
        _check_version(path, option)
        registry = compat.tensorrt().get_plugin_registry()
        registry.load_library(str(path))  # says in TensorRT's log what went wrong, and nothing here
        missing = _missing()
        if missing:
            raise MissingDependencyError(
                f"TensorRT {compat.tensorrt().__version__} does not register the plugin {missing[0]} of {path}: the "
                "library is of other sources, or TensorRT's log says why. Build it again with `python setup.py build_ext "
                f"--inplace`, or {_way_out(option)}."
            )


def _key(option: str | None) -> str:
    return f"MODEL.TENSORRT.{option or ', '.join(OPTIONS[:-1]) + ' and ' + OPTIONS[-1]}"


def _way_out(option: str | None) -> str:
    return f"set {_key(option)} to {'stock or native' if option == MSDA.option else 'native'}"


def _missing() -> list[Plugin]:
    return [kind for kind in PLUGINS if _creator(kind) is None]


def _creator(kind: Plugin):
    # A registry that ignores the library's own namespace keeps it under the empty one.
    found = compat.plugin_creator(kind.name, kind.version, NAMESPACE)
    return found or compat.plugin_creator(kind.name, kind.version)


def _check_version(path: Path, option: str | None) -> None:
    try:
        version = ctypes.CDLL(str(path)).d2_trt_tensorrt_version()
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"{path} does not load ({error}). Build it again with `python setup.py build_ext --inplace`, or remove it and "
            f"{_way_out(option)}."
        ) from error
    if version // 10000 != compat.version()[0]:
        raise MissingDependencyError(
            f"{path} was built for TensorRT {version // 10000}.{version // 100 % 100}; this is "
            f"{compat.tensorrt().__version__}. Build it again with TENSORRT_INCLUDE_DIR set to that version's headers, or "
            f"{_way_out(option)}."
        )


def resolve(option: str, choice: str, capability: tuple[int, int] | None = None) -> str:
    """What computes the operations of an option, from its value: "plugin", "stock" or "native".

    "auto" is our plugin where it is built and the GPU has its instructions, else for MSDA NVIDIA's where TensorRT has it,
    else TensorRT's own layers.

    Args:
        option: one of OPTIONS.
        choice: its value.
        capability: the GPU's compute capability; None where there is none to ask, which then counts as high enough.

    Raises:
        MissingDependencyError: our plugin is to be used and cannot be.
    """
    least = _LEAST_CAPABILITY.get(option, (0, 0))
    runs = capability is None or tuple(capability) >= least
    if choice == "plugin" and not runs:
        raise MissingDependencyError(
            f"{_key(option)} 'plugin' needs a GPU of compute capability {least[0]}.{least[1]} or higher; this one has "
            f"{capability[0]}.{capability[1]}: {_way_out(option)} or auto."
        )
    ours = runs and any(kind.option == option for kind in PLUGINS)
    if choice == "plugin" or (choice == "auto" and ours and is_built()):
        load(option)
        return "plugin"
    if choice == "auto":
        stock = option == MSDA.option and compat.plugin_creator(STOCK) is not None
        return "stock" if stock else "native"
    return choice


def identities(choices: Mapping[str, str]) -> dict[str, str]:
    """What computes what, with versions where it is ours: for an engine's cache key.

    Args:
        choices: what `resolve` returned, by option.
    """
    ours = {
        option: ", ".join(str(kind) for kind in PLUGINS if kind.option == option)
        for option, choice in choices.items()
        if choice == "plugin"
    }
    return {option: ours.get(option, choice) for option, choice in choices.items()}


def add_layer(network, kind: Plugin, inputs: list, fields: Mapping[str, torch.dtype | int | float]):
    """Add a plugin to a network.

    Args:
        network: INetworkDefinition, or torch2trt's wrapper of one.
        kind: one of PLUGINS.
        inputs: network tensors, as the header of its core in csrc/trt_plugin describes them.
        fields: all fields of the core: types as torch dtypes, flags and whole numbers as int, other numbers as float.

    Returns:
        the layer.

    Raises:
        MissingDependencyError: the plugins cannot be loaded.
        ValueError: the plugin is not to be had with these fields; TensorRT's log says why.
    """
    load(kind.option)
    trt = compat.tensorrt()
    arrays = {name: _as_array(value) for name, value in fields.items()}
    kinds = {"f": trt.PluginFieldType.FLOAT32, "i": trt.PluginFieldType.INT32}
    collection = trt.PluginFieldCollection(
        [trt.PluginField(name, array, kinds[array.dtype.kind]) for name, array in arrays.items()]
    )
    # IPluginV2DynamicExt for TensorRT 8.6, IPluginV3 from 10 on: see csrc/trt_plugin.
    phase = [trt.TensorRTPhase.BUILD] if compat.strongly_typed() else []
    plugin = _creator(kind).create_plugin(kind.name, collection, *phase)
    if plugin is None:
        given = ", ".join(f"{name} {value}" for name, value in fields.items())
        raise ValueError(
            f"{kind.name} is not to be had with {given} in TensorRT {trt.__version__}; its log says why. To do without the "
            f"plugin, {_way_out(kind.option)}."
        )
    if compat.strongly_typed():
        return network.add_plugin_v3(inputs, [], plugin)
    return network.add_plugin_v2(inputs, plugin)


def _as_array(value: torch.dtype | int | float) -> np.ndarray:
    if isinstance(value, torch.dtype):
        value = _TYPES[value]
    return np.array([value], np.float32 if isinstance(value, float) else np.int32)
