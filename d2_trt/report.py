"""What is in an engine and where its time goes: TensorRT's inspector and profiler, read and summed up."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UNKNOWN = "unknown"

# MODULE:NUMBER:TYPE, and from torch2trt the device, as the network under construction names its layers. TensorRT joins the
# names of what it fuses: "a + b", "a || b", "PWN(a, b)", "{ForeignNode[a...b]}", "Reformatting CopyNode for ... to a".
_OWN_NAME = re.compile(
    r"(?:([A-Za-z_]\w*(?:\.\w+)*)|(?<![\w.])):\d+:[A-Z][A-Z0-9_]*?(?=:GPU|:DLA|_myl|[^A-Z0-9_]|$)"
)
# What the core module puts before the model's own module names (d2_trt.builder.Core).
_CORE_PREFIX = "model."

# By TensorRT version the same type is "Half", "FP16", "... FP16 format where ..."; the first that occurs counts.
_TYPES = (
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"fp16|half|float16"),
    ("fp8", r"fp8|e4m3|e5m2"),
    ("tf32", r"tf32"),
    ("fp32", r"fp32|float32|float"),
    ("int64", r"int64"),
    ("int32", r"int32"),
    ("int8", r"u?int8"),
    ("int4", r"int4"),
    ("bool", r"bool"),
)
_FLOAT_TYPES = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "int4")
# A kernel's name says in what it multiplies: sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_... in TF32.
_TACTIC = re.compile(r"_(?:[a-z]+\d+){2}_(tf32|bf16|f16|f32|i8)[a-z]+\d+_[a-z]+\d+(?:_|$)")
_TACTIC_TYPES = {"f16": "fp16", "f32": "fp32", "i8": "int8"}

_PLUGIN_NAME_KEYS = ("PluginType", "PluginName", "Plugin Type", "Plugin Name")


@dataclass(frozen=True)
class LayerInfo:
    """A layer of an engine, which may be several of the network's in one kernel.

    `precision` is what it computes in where TensorRT tells, else what it writes; "unknown" where neither is told.
    `modules` are the paths of the PyTorch modules that it came from, without those that are another's parent.
    """

    name: str
    kind: str = UNKNOWN
    precision: str = UNKNOWN
    modules: tuple[str, ...] = ()
    plugin: str = ""
    tactic: str = ""
    output: tuple[int, ...] = ()

    @property
    def is_reformat(self) -> bool:
        """Whether it copies a tensor into another memory layout or type, which TensorRT added by itself."""
        return self.kind == "Reformat"

    @property
    def module(self) -> str:
        """The path that all its modules share; "" where there is none."""
        return common_path(self.modules)


def parse(inspector_json: str) -> list[LayerInfo]:
    """The layers that TensorRT's engine inspector tells of, in their order.

    Args:
        inspector_json: EngineInspector.get_engine_information in the format JSON. Engines built with a profiling verbosity
            below DETAILED give names only.

    Raises:
        ValueError: it is not what the inspector gives.
    """
    try:
        # Not strict: metadata of fused layers are joined by a control character.
        document = json.loads(inspector_json, strict=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the engine inspector's answer is not JSON ({error})") from error
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise ValueError('the engine inspector\'s answer has no list "Layers"')
    return [_layer(item) for item in layers]


def _layer(item: Any) -> LayerInfo:
    if isinstance(item, str):
        return LayerInfo(item, modules=module_paths(item))
    if not isinstance(item, dict):
        raise ValueError(f"the engine inspector has {type(item).__name__} {item!r} where a layer is expected")
    name = str(item.get("Name", ""))
    outputs = _dicts(item.get("Outputs"))
    dims = outputs[0].get("Dimensions") if outputs else None
    kind = str(item.get("LayerType", UNKNOWN))
    tactic = str(item.get("TacticName", ""))
    return LayerInfo(
        name,
        kind,
        _precision(item, outputs, tactic),
        # A region that TensorRT compiles itself (__myl_...) has a name of its own, and its origin in the metadata alone.
        module_paths(name) or module_paths(str(item.get("Metadata", ""))),
        _plugin(item, kind, name),
        tactic,
        tuple(dims) if isinstance(dims, list) else (),
    )


def _dicts(value: Any) -> list[dict]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _precision(item: Mapping[str, Any], outputs: Sequence[Mapping], tactic: str) -> str:
    """By the kernel's name, then the weights, then what is written or read: with a range of shapes the inspector tells
    the types of tensors only from some versions on ("N/A due to dynamic shapes" otherwise)."""
    if match := _TACTIC.search(tactic):
        return _TACTIC_TYPES.get(match[1], match[1])
    weights = item.get("Weights")
    if (
        isinstance(weights, dict)
        and weights.get("Count")
        and (kind := data_type(str(weights.get("Type", ""))))
    ):
        return kind
    tensors = [*outputs, *_dicts(item.get("Inputs"))]
    kinds = [k for k in (data_type(_format(t)) for t in tensors) if k]
    return next((k for k in kinds if k in _FLOAT_TYPES), kinds[0] if kinds else UNKNOWN)


def _format(tensor: Mapping[str, Any]) -> str:
    return str(tensor.get("Format/Datatype") or tensor.get("Datatype") or tensor.get("Format") or "")


def data_type(text: str) -> str:
    """The type in one of TensorRT's descriptions of a tensor, such as "Row major linear FP16 format"; "" without one."""
    text = text.lower()
    return next(
        (name for name, pattern in _TYPES if re.search(rf"(?<![a-z])(?:{pattern})(?![a-z0-9])", text)), ""
    )


def _plugin(item: Mapping[str, Any], kind: str, name: str) -> str:
    """A plugin layer's plugin; "unknown" where the inspector does not name it, "" for other layers."""
    if "plugin" not in f"{kind} {item.get('ParameterType', '')}".lower():
        return ""
    given = next((str(item[key]) for key in _PLUGIN_NAME_KEYS if item.get(key)), "")
    return given or UNKNOWN


def module_paths(name: str) -> tuple[str, ...]:
    """Paths of the PyTorch modules in a layer's name, in their order, without those that are another's parent."""
    found = dict.fromkeys((m[1] or "").removeprefix(_CORE_PREFIX) for m in _OWN_NAME.finditer(name))
    # The model's own functions, outside of its modules, are under its bare name.
    paths = ["" if path == _CORE_PREFIX.rstrip(".") else path for path in found]
    return tuple(p for p in paths if p and not any(q.startswith(p + ".") for q in paths))


def common_path(paths: Sequence[str]) -> str:
    """The longest module path above or equal to all of these."""
    if not paths:
        return ""
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def summarize(inspector_json: str) -> dict[str, Any]:
    """What an engine is made of, JSON-serialisable.

    Args:
        inspector_json: see parse.

    Returns:
        "count"; "kinds" and "precisions", counts of layers, the most frequent first; "plugins", counts by plugin;
        "reformats", how many copies between layouts TensorRT added; "detailed", whether kinds are known. For an answer that
        cannot be read "problem" alone, which says why: a build does not fail for its report.
    """
    try:
        layers = parse(inspector_json)
    except ValueError as error:
        return {"problem": str(error)}
    return {
        "count": len(layers),
        "detailed": any(layer.kind != UNKNOWN for layer in layers),
        "kinds": _count(layer.kind for layer in layers),
        "precisions": _count(layer.precision for layer in layers),
        "plugins": _count(layer.plugin for layer in layers if layer.plugin),
        "reformats": sum(layer.is_reformat for layer in layers),
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class Timing:
    """Mean time of a layer in a run, in milliseconds, and its share of all layers' (0 to 1)."""

    layer: LayerInfo
    ms: float
    share: float


@dataclass(frozen=True)
class GroupTiming:
    """Mean time of a group of layers in a run, in milliseconds, and its share of all layers' (0 to 1)."""

    name: str
    layers: int
    ms: float
    share: float


def time_layers(runs: Sequence[Mapping[str, float]], layers: Iterable[LayerInfo] = ()) -> list[Timing]:
    """Mean times of layers, the slowest first.

    Args:
        runs: for each run the milliseconds of each layer, by its name, as the profiler reports them. A layer that a run
            does not name took no time in it.
        layers: of parse, to know more of a layer than its name.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("there are no runs to take the times of")
    known = {layer.name: layer for layer in layers}
    total: dict[str, float] = {}
    for run in runs:
        for name, ms in run.items():
            total[name] = total.get(name, 0.0) + ms
    everything = sum(total.values())
    timings = [
        Timing(
            known.get(name) or LayerInfo(name, modules=module_paths(name)),
            ms / len(runs),
            ms / everything if everything else 0.0,
        )
        for name, ms in total.items()
    ]
    return sorted(timings, key=lambda t: -t.ms)


def group(timings: Iterable[Timing], key: Callable[[LayerInfo], str]) -> list[GroupTiming]:
    """Times summed over the layers with the same key, the slowest first."""
    sums: dict[str, list] = {}
    for timing in timings:
        entry = sums.setdefault(key(timing.layer), [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += timing.ms
        entry[2] += timing.share
    groups = [GroupTiming(name, *values) for name, values in sums.items()]
    return sorted(groups, key=lambda g: -g.ms)


def module_group(depth: int) -> Callable[[LayerInfo], str]:
    """A key for `group`: the first `depth` names of the module path that a layer's parts share."""

    def key(layer: LayerInfo) -> str:
        return ".".join(layer.module.split(".")[:depth]) or "(no module)"

    return key
