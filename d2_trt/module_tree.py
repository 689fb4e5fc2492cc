"""What a model computes beside its weights: its modules' types, and the plain attributes that they may read."""

from __future__ import annotations

import enum
import hashlib
import logging
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import cache_key

_PLAIN = (bool, int, float, complex, str, bytes, slice, range, enum.Enum, np.generic)
_PLAIN += (torch.dtype, torch.layout, torch.memory_format)

# What nn.Module itself keeps; engines are built in evaluation mode whatever the model is in.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def describe_modules(model: nn.Module) -> dict[str, str]:
    """The modules that model.core() runs: "path" has a module's type, "path:name" the digest of an attribute's value.

    Everything counts but what the model's own class names in `around_network`: a needless build does no harm, an engine of
    another network does.

    Raises:
        CacheError: an attribute is a tensor without data.
    """
    # The meta-architecture of this package adds nothing to the network.
    kind = next(cls for cls in type(model).__mro__ if _package(cls.__module__) != "d2_trt")
    around = vars(kind).get("around_network", ())
    modules = dict(model.named_modules(remove_duplicate=False))
    paths: dict[int, str] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), path)
    described = {}
    for path, module in modules.items():
        if path.partition(".")[0] in around:
            continue
        described[path] = _name(type(module) if path else kind)
        for name, value in _attributes(module):
            if path or name not in around:
                described[f"{path}:{name}"] = cache_key.digest(_describe(value, paths))
    return described


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(module).items()):  # other threads may run it
        if name not in _OF_EVERY_MODULE:
            yield name, value
        elif name in _HOOKS and value:
            yield name, list(value.values())
    # A class that was typed into an interpreter is in no file that cache_key.model_sources reads.
    for cls in type(module).__mro__:
        if not hasattr(sys.modules.get(cls.__module__), "__file__") and cls is not object:
            members = {n: m for n, m in vars(cls).items() if not n.startswith("__") or callable(m)}
            yield f"class {_name(cls)}", members


def _describe(value: Any, paths: Mapping[int, str]) -> list:
    """A value as JSON, the same in every process and on every device: all objects that it leads to, which refer to
    each other by number.

    Args:
        paths: of the model's modules, by their id().
    """
    objects: list[Any] = []  # kept, so that their id() stays theirs
    numbers: dict[int, int] = {}

    def refer(part: Any) -> Any:
        kind = _name(type(part))
        if part is None or isinstance(part, _PLAIN):
            return [kind, repr(part)]
        if isinstance(part, type):
            return [kind, _name(part)]
        if id(part) in paths:
            return [kind, paths[id(part)]]
        if type(part) is tuple:  # equal ones may be one object or two
            return [kind, *map(refer, part)]
        if id(part) not in numbers:
            numbers[id(part)] = len(objects)
            objects.append(part)
        return numbers[id(part)]

    first = refer(value)
    # It grows on the way.
    return [first, *([_name(type(one)), *map(refer, _parts(one, paths))] for one in objects)]


def _parts(value: Any, paths: Mapping[int, str]) -> Iterable:
    """What an object is made of; nothing where that cannot be told."""
    if type(value) is list:
        return value
    if type(value) is dict:
        return list(value.items())
    if isinstance(value, Tensor):
        content = cache_key.tensor_bytes("an attribute of a module", value)
        return str(value.dtype), tuple(value.shape), hashlib.sha256(content).hexdigest()
    if isinstance(value, types.FunctionType):
        return _parts_of_function(value)
    if isinstance(value, Mapping) and isinstance(value.get("MODEL"), Mapping) and hasattr(value, "MODEL"):
        return [cache_key.graph_config(value)]  # a module may keep its config
    if isinstance(value, (set, frozenset)):
        return sorted(cache_key.canonical(_describe(one, paths)) for one in value)
    if isinstance(value, property):
        return value.fget, value.fset
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if _says_nothing(value):
        return []
    try:
        parts = value.__reduce_ex__(4)  # as pickle sees it
    except Exception:  # a lock, a stream: they do not compute
        return []
    if isinstance(parts, str):  # a global's name
        return getattr(value, "__module__", None), parts, dict(getattr(value, "__dict__", ()))
    return [list(part) if isinstance(part, Iterator) else part for part in parts]


def _parts_of_function(function: types.FunctionType) -> list:
    parts = [_name(function), function.__defaults__, function.__kwdefaults__, vars(function)]
    parts += [c.cell_contents for c in function.__closure__ or () if c != types.CellType()]  # no empty ones
    if cache_key.is_versioned(function.__module__) and not function.__name__.startswith("<"):
        return parts
    codes, known = [function.__code__], function.__globals__
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        parts += [
            c for c in (code.co_code, code.co_names, *code.co_consts) if not isinstance(c, types.CodeType)
        ]
        parts += [known[n] for n in code.co_names if isinstance(known.get(n), (types.FunctionType, *_PLAIN))]
    return parts


def _says_nothing(value: Any) -> bool:
    """Whether it is of what lies around a network: where it runs, what it logs to, this package's backend."""
    if isinstance(value, (torch.device, torch.Generator, logging.Logger)):
        return True
    return _package(type(value).__module__) in ("d2_trt", "threading", "weakref")


def _package(module: str) -> str:
    return module.partition(".")[0]


def _name(thing) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
