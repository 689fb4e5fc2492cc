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
from .errors import CacheError

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
        CacheError: an attribute cannot be told from others.
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
                described[f"{path}:{name}"] = _digest(f"{path}.{name}".lstrip("."), value, paths)
    return described


def _digest(where: str, value: Any, paths: Mapping[int, str]) -> str:
    try:
        return cache_key.digest(_describe(value, paths, {}))
    except RecursionError:
        raise CacheError(
            f"the model's attribute {where} is nested too deeply to tell its values apart. Do without it, or name it in "
            "the model class's around_network where the network does not read it."
        ) from None


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


def _describe(value: Any, paths: Mapping[int, str], seen: dict[int, tuple[int, Any]]) -> Any:
    """A value as JSON, the same in every process and on every device.

    Args:
        paths: of the model's modules, by their id().
        seen: objects that were described before, which may refer to each other; kept, so that their id() stays theirs.
    """

    def inner(values: Iterable) -> list:
        return [_describe(one, paths, seen) for one in values]

    kind = _name(type(value))
    if value is None or isinstance(value, _PLAIN):
        return [kind, repr(value)]
    if isinstance(value, type):
        return [kind, _name(value)]
    if id(value) in paths:
        return [kind, paths[id(value)]]
    if type(value) is tuple:  # equal ones may be one object or two
        return [kind, inner(value)]
    if id(value) in seen:
        return [kind, seen[id(value)][0]]
    seen[id(value)] = len(seen), value
    if type(value) is list:
        return [kind, inner(value)]
    if type(value) is dict:
        return [kind, inner(value.items())]
    if isinstance(value, Tensor):
        content = cache_key.tensor_bytes("an attribute of a module", value)
        return [kind, str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, types.FunctionType):
        return [kind, *_describe_function(value, inner)]
    if isinstance(value, Mapping) and isinstance(value.get("MODEL"), Mapping) and hasattr(value, "MODEL"):
        return [kind, inner([cache_key.graph_config(value)])]  # a module may keep its config
    if isinstance(value, (set, frozenset)):
        return [kind, sorted(cache_key.canonical(_describe(one, paths, dict(seen))) for one in value)]
    if isinstance(value, property):
        return [kind, inner((value.fget, value.fset))]
    if isinstance(value, (staticmethod, classmethod)):
        return [kind, inner((value.__func__,))]
    parts = None if _says_nothing(value) else _parts(value)
    return [kind, *inner(parts or ())]


def _parts(value: Any) -> list | None:
    """What an object is made of, as pickle sees it; None where that cannot be told."""
    try:
        parts = value.__reduce_ex__(4)
    except Exception:  # a lock, a stream: they do not compute
        return None
    if isinstance(parts, str):  # a global's name
        return [getattr(value, "__module__", None), parts, dict(getattr(value, "__dict__", ()))]
    return [list(part) if isinstance(part, Iterator) else part for part in parts]


def _describe_function(function: types.FunctionType, inner) -> list:
    cells = [c.cell_contents for c in function.__closure__ or () if c != types.CellType()]  # no empty ones
    held = [cells, function.__defaults__, function.__kwdefaults__, vars(function)]
    if cache_key.is_versioned(function.__module__) and not function.__name__.startswith("<"):
        return [_name(function), inner(held)]
    codes, known = [function.__code__], function.__globals__
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        held += [
            c for c in (code.co_code, code.co_names, *code.co_consts) if not isinstance(c, types.CodeType)
        ]
        held += [known[n] for n in code.co_names if isinstance(known.get(n), (types.FunctionType, *_PLAIN))]
    return [_name(function), inner(held)]


def _says_nothing(value: Any) -> bool:
    """Whether it is of what lies around a network: where it runs, what it logs to, this package's backend."""
    if isinstance(value, (torch.device, torch.Generator, logging.Logger)):
        return True
    return _package(type(value).__module__) in ("d2_trt", "threading", "weakref")


def _package(module: str) -> str:
    return module.partition(".")[0]


def _name(thing) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
