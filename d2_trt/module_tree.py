"""What a model computes beside its weights: its modules' types, and the plain attributes that they may read."""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import inspect
import itertools
import logging
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

# Code with one of these may read any attribute.
_READS_ALL = {"__dict__", "getattr", "vars", "children", "modules", "named_children", "named_modules"}

# Objects that refer to others are followed so far.
_DEPTH = 8


def describe_modules(model: nn.Module) -> dict[str, str]:
    """The modules that model.core() runs: "path" has a module's type, "path:name" the digest of an attribute's value.

    Of the model itself counts what core() and the methods that it names mention, where that can be told: what
    post-processes, and a backend, are no part of the network. Below it everything counts but what a module's forward()
    writes, such as a counter.
    """
    used = _names_in_core(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    paths: dict[int, str] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), path)
    described = {}
    for path, module in modules.items():
        if path and used is not None and path.partition(".")[0] not in used:
            continue
        described[path] = _name(type(module) if path or used is None else _class_of_core(module, used))
        for name, value in _attributes(module):
            if path or used is None or name in used or name in _HOOKS:
                described[f"{path}:{name}"] = cache_key.digest(_describe(value, paths))
    return described


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    written = _written_in_running(type(module))
    for name, value in list(vars(module).items()):  # other threads may run it
        if name not in _OF_EVERY_MODULE and name not in written:
            yield name, value
        elif name in _HOOKS and value:
            yield name, list(value.values())


def _describe(value: Any, paths: Mapping[int, str], depth: int = _DEPTH) -> Any:
    """A value as JSON, the same in every process and on every device."""

    def inner(values: Iterable) -> list:
        return [_describe(one, paths, depth - 1) for one in values]

    kind = _name(type(value))
    if value is None or isinstance(value, _PLAIN):
        return [kind, repr(value)]
    if isinstance(value, nn.Module) and id(value) in paths:
        return [kind, paths[id(value)]]
    if isinstance(value, Tensor):
        content = cache_key.tensor_bytes("an attribute of a module", value)
        return [kind, str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return [kind, str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, type):
        return [kind, _name(value)]
    if depth == 0 or _says_nothing(value):
        return [kind]
    if isinstance(value, functools.partial):
        return [kind, inner((value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return [kind, value.__name__, inner((value.__self__,))]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        bound = inner((cells, value.__defaults__, value.__kwdefaults__))
        return [kind, _name(value), _describe_code(value.__code__), bound]
    if isinstance(value, types.BuiltinFunctionType):
        return [kind, str(value.__module__), value.__qualname__]
    if isinstance(value, Mapping):
        if isinstance(value.get("MODEL"), Mapping) and hasattr(value, "MODEL"):
            value = cache_key.graph_config(value)  # a module may keep its config
        content = dict(value)
        return [kind, inner(content), inner(content.values())]
    if isinstance(value, (set, frozenset)):
        return [kind, sorted(map(cache_key.canonical, inner(value)))]
    if isinstance(value, nn.Module):  # hidden from the model, its weights too
        held = [
            *value.named_parameters(),
            *value.named_buffers(),
            *_attributes(value),
            *value.named_children(),
        ]
        return [kind, inner(held)]
    state = list(getattr(value, "__dict__", {}).items())
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                state.append((name, getattr(value, name)))
    if isinstance(value, (Sequence, deque)):
        return [kind, inner(value), inner(state)]
    return [kind, inner(state)]


def _says_nothing(value: Any) -> bool:
    """Whether it is of what lies around a network: where it runs, what it logs to, this package's backend."""
    if isinstance(value, (torch.device, torch.Generator, logging.Logger, types.ModuleType)):
        return True
    return type(value).__module__.partition(".")[0] in ("d2_trt", "threading", "_thread", "weakref")


def _describe_code(code: types.CodeType) -> list:
    constants = [_describe_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


def _is_empty(cell: types.CellType) -> bool:
    return cell == types.CellType()


def _name(thing) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _names_in_core(model: nn.Module) -> set[str] | None:
    """The names in the code of core() and of the model's methods that it names; None where it may read any attribute."""
    if "core" in vars(model):
        return None
    names, waiting = {"core"}, ["core"]
    while waiting:
        name = waiting.pop()
        for cls in type(model).__mro__:
            if cls in (nn.Module, object) or name not in vars(cls):
                continue
            for code in _codes(vars(cls)[name]):
                if _READS_ALL.intersection(code.co_names) or _passes_on(code):
                    return None
                waiting += set(code.co_names) - names
                names.update(code.co_names)
    return names


def _class_of_core(model: nn.Module, used: set[str]) -> type:
    """The class that has the last word on core(): those below it, TensorRTMaskFormer among them, are the same network."""
    return next(cls for cls in type(model).__mro__ if used & vars(cls).keys())


@functools.lru_cache(maxsize=1024)
def _written_in_running(kind: type) -> frozenset[str]:
    """The attributes that a class's own forward() or core() sets."""
    members = [vars(cls)[n] for cls in kind.__mro__ for n in ("forward", "core") if n in vars(cls)]
    steps = (step for member in members for code in _codes(member) for step in dis.get_instructions(code))
    return frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")


def _codes(member: Any) -> Iterator[types.CodeType]:
    """The code of a class's member, with the functions in it."""
    for part in (member.fget,) if isinstance(member, property) else (member,):
        part = inspect.unwrap(getattr(part, "__func__", part))
        waiting = [part.__code__] if isinstance(part, types.FunctionType) else []
        while waiting:
            code = waiting.pop()
            yield code
            waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]


def _passes_on(code: types.CodeType) -> bool:
    """Whether code does something else with "self" than naming attributes of it."""
    # "self.x += 1" loads it once and copies it.
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "COPY", "DUP_TOP")]
    return any(
        step.opname.startswith("LOAD_") and step.argval == "self" and not _takes_attribute(after.opname)
        for step, after in itertools.pairwise(steps)
    )


def _takes_attribute(opname: str) -> bool:
    return opname == "LOAD_METHOD" or opname.endswith("_ATTR")
