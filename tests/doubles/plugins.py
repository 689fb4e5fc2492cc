"""The plug-in registry with NVIDIA's deformable attention and ours, and the layers of plug-ins."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from torch.nn import functional as F

from .layer import FakeLayer
from .our_plugins import NAMESPACE, OUR_PLUGINS
from .trt_api import Api, ApiObject, Refused

MSDA = "MultiscaleDeformableAttnPlugin_TRT"


def deformable_attention(value, shapes, starts, locations, weights):
    """Multi-scale deformable attention, as in Deformable DETR (Zhu et al., 2021).

    Args:
        value: (B, S, M, D).
        shapes: (L, 2) height and width of each level; starts: (L,) first row of each in S.
        locations: (B, Q, M, L, P, 2), x and y as fractions of the level.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M, D).
    """
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    total = value.new_zeros(batch * heads, dim, queries)
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist())):
        level_map = (
            value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, dim, height, width)
        )
        grid = locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2) * 2 - 1
        samples = F.grid_sample(level_map, grid, align_corners=False)  # (B * M, D, Q, P)
        share = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (samples * share).sum(-1)
    return total.reshape(batch, heads, dim, queries).permute(0, 3, 1, 2)


class FakePlugin(ApiObject):
    """IPluginV2 or IPluginV3."""

    def __init__(self, api: Api, kind: str, name: str, ours=None):
        super().__init__(api, kind)
        self._name, self._ours = name, ours
        self._values = {
            "num_outputs": 1 if ours is None else len(ours.output_types()),
            "plugin_type": name,
            "plugin_version": "1",
            "plugin_namespace": "",
            "tensorrt_version": 0,
            "serialization_size": 0,
        }


class FakeCreator(ApiObject):
    """IPluginCreator or IPluginCreatorV3One."""

    def __init__(self, api: Api, kind: str, version: str, name: str = MSDA, namespace: str = ""):
        super().__init__(api, kind)
        self._values = {
            "name": name,
            "plugin_version": version,
            "plugin_namespace": namespace,
            "field_names": api.trt.PluginFieldCollection(),
        }

    def create_plugin(self, name, field_collection, phase=None):
        if not isinstance(field_collection, self._api.trt.PluginFieldCollection):
            raise TypeError(
                f"field_collection must be PluginFieldCollection, not {type(field_collection).__name__}"
            )
        v3 = self._kind == "IPluginCreatorV3One"
        if v3 and phase != self._api.trt.TensorRTPhase.BUILD:
            raise TypeError(f"phase must be TensorRTPhase.BUILD, not {phase}")
        name, ours = self._values["name"], None
        if name in OUR_PLUGINS:
            kind = OUR_PLUGINS[name]
            fields = {
                field.name: self._number(field, kind.FIELDS.get(field.name)) for field in field_collection
            }
            ours = kind(fields, self._api.numbers)
            if set(fields) != set(kind.FIELDS) or not ours.possible():
                return None  # as TensorRT does; the plug-in's log says why
        return FakePlugin(self._api, "IPluginV3" if v3 else "IPluginV2", name, ours)

    def _number(self, field, kind: type | None) -> int | float:
        types = self._api.trt.PluginFieldType
        if kind is None:
            raise Refused(f"{self._values['name']} has no field {field.name}")
        if field.type != (types.INT32 if kind is int else types.FLOAT32) or field.size != 1:
            raise Refused(f"field {field.name} must be one {'int32' if kind is int else 'float32'}")
        if isinstance(field.data, np.ndarray):
            return kind(field.data[0])
        pointer = ctypes.pythonapi.PyCapsule_GetPointer  # what the bindings of 8.6 give
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        number = ctypes.c_int32 if kind is int else ctypes.c_float
        return number.from_address(pointer(field.data, None)).value


class FakeRegistry(ApiObject):
    """IPluginRegistry. NVIDIA's plug-ins are there once init_libnvinfer_plugins was called, as in TensorRT."""

    _kind = "IPluginRegistry"

    def __init__(self, api: Api):
        super().__init__(api)
        self._creators: list[FakeCreator] = []
        self._values = {"parent_search_enabled": True, "error_recorder": None}

    def _register_nvidia(self) -> None:
        if not any(c.name == MSDA for c in self._creators):
            self._creators.append(FakeCreator(self._api, "IPluginCreator", "1"))
            if self._api.numbers >= (10, 11):
                self._creators.append(FakeCreator(self._api, "IPluginCreatorV3One", "2"))

    def _has_ours(self) -> bool:
        return any(c.name in OUR_PLUGINS for c in self._creators)

    def _forget_ours(self) -> None:
        self._creators = [c for c in self._creators if c.name not in OUR_PLUGINS]

    def _register_ours(self) -> None:
        kind = "IPluginCreatorV3One" if self._api.numbers >= (10, 0) else "IPluginCreator"
        for plugin in OUR_PLUGINS.values():
            self._creators.append(FakeCreator(self._api, kind, plugin.VERSION, plugin.NAME, NAMESPACE))

    @property
    def plugin_creator_list(self):
        return [c for c in self._creators if c._kind == "IPluginCreator"]

    @property
    def all_creators(self):
        return list(self._creators)

    def _find(self, creators, kind, version, namespace):
        wanted = (kind, version, namespace)
        return next((c for c in creators if (c.name, c.plugin_version, c.plugin_namespace) == wanted), None)

    def get_plugin_creator(self, type, version, plugin_namespace=""):
        return self._find(self.plugin_creator_list, type, version, plugin_namespace)

    def get_creator(self, type, version, plugin_namespace=""):
        return self._find(self._creators, type, version, plugin_namespace)

    def register_creator(self, creator, plugin_namespace=""):
        self._creators.append(creator)
        return True

    def deregister_creator(self, creator):
        self._creators.remove(creator)
        return True

    def load_library(self, plugin_path):
        """Ours, by its name, whatever the file holds; None of others, as TensorRT."""
        if not Path(plugin_path).name.startswith("libd2_trt_plugins_trt") or self._has_ours():
            return None
        self._register_ours()
        return object()  # a capsule


class PluginLayer(FakeLayer):
    """IPluginV2Layer and IPluginV3Layer."""

    _max_inputs = 16

    def __init__(self, network, inputs, plugin):
        self._outputs = plugin._values["num_outputs"]
        super().__init__(network, inputs, plugin=plugin)

    @property
    def _ours(self):
        return self._values["plugin"]._ours

    def _dtypes(self):
        return self._dtypes_of_nvidia() if self._ours is None else self._dtypes_of_ours()

    def _compute(self, *inputs):
        if self._ours is None:
            return self._compute_nvidia(*inputs)
        try:
            return self._ours.compute(*inputs)
        except Refused as error:
            self._refuse(str(error))

    def _dtypes_of_ours(self):
        """Ours take the types that they were made for; a weakly typed build converts in front of them."""
        given = [tensor.dtype.name for tensor in self._inputs]
        wanted = self._ours.input_types()
        if len(given) != len(wanted):
            self._refuse(f"{len(given)} inputs; {self._ours.NAME} takes {len(wanted)}")
        for tensor, want in zip(self._inputs, wanted):
            converts = (
                not self._network._strong and self._is_float(tensor.dtype) and want in ("FLOAT", "HALF")
            )
            if tensor.dtype.name != want and not converts:
                self._refuse(f"an input is {tensor.dtype.name}; the plug-in was made for {want}")
        return [getattr(self._api.trt.DataType, name) for name in self._ours.output_types()]

    def _dtypes_of_nvidia(self):
        trt = self._api.trt
        dtypes = [tensor.dtype for tensor in self._inputs]
        if len(dtypes) != 5:
            self._refuse(f"{len(dtypes)} inputs; {MSDA} takes 5")
        if dtypes[1] != trt.int32 or dtypes[2] != trt.int32:
            self._refuse("spatial shapes and level starts must be int32")
        floats = {dtypes[i] for i in (0, 3, 4)}
        # A weakly typed build converts between float32 and float16 in front of the plug-in.
        if not floats <= {trt.float32, trt.float16} or (len(floats) > 1 and self._network._strong):
            self._refuse("value, locations and weights must be of one type, float32 or float16")
        return [dtypes[0] if len(floats) == 1 else trt.float32]

    def _compute_nvidia(self, value, shapes, starts, locations, weights):
        if [x.dim() for x in (value, shapes, starts, locations, weights)] != [4, 2, 1, 6, 5]:
            self._refuse("ranks must be 4, 2, 1, 6, 5")
        levels, heads = shapes.shape[0], value.shape[2]
        batch, queries, points = value.shape[0], locations.shape[1], locations.shape[4]
        if tuple(locations.shape) != (batch, queries, heads, levels, points, 2) or len(starts) != levels:
            self._refuse(
                f"locations {tuple(locations.shape)} for {batch} images, {heads} heads, {levels} levels"
            )
        if tuple(weights.shape) != tuple(locations.shape[:-1]):
            self._refuse(f"weights {tuple(weights.shape)} for locations {tuple(locations.shape)}")
        ends = (starts + shapes[:, 0] * shapes[:, 1]).tolist()
        if starts.tolist() != [0, *ends[:-1]] or ends[-1] != value.shape[1]:
            self._refuse(f"levels {shapes.tolist()} that start at {starts.tolist()} in {value.shape[1]} rows")
        return deformable_attention(value, shapes, starts, locations, weights)


class PluginV2Layer(PluginLayer):
    _kind, _type = "IPluginV2Layer", "PLUGIN_V2"


class PluginV3Layer(PluginLayer):
    _kind, _type = "IPluginV3Layer", "PLUGIN_V3"


class PluginLayers:
    """The network's add methods of this module."""

    def add_plugin_v2(self, inputs, plugin):
        if not isinstance(plugin, FakePlugin) or plugin._kind != "IPluginV2":
            raise TypeError("add_plugin_v2 takes an IPluginV2")
        return self._add(PluginV2Layer(self, inputs, plugin=plugin))

    def add_plugin_v3(self, inputs, shape_inputs, plugin):
        if not isinstance(plugin, FakePlugin) or plugin._kind != "IPluginV3":
            raise TypeError("add_plugin_v3 takes an IPluginV3")
        if shape_inputs:
            raise Refused(f"{plugin._name} takes no shape inputs")
        return self._add(PluginV3Layer(self, inputs, plugin=plugin))
