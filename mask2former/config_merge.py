"""Configs whose merges say which key is wrong, what its value is, what is allowed, and which key may be meant."""

from __future__ import annotations

import ast
import copy
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

# By key or by group of keys: functions that are called with a key and a value that its type forbids, or that no config has,
# and raise ValueError with what is allowed. A plugin that checks its keys adds its own.
CHECKS: dict[str, Callable[[str, Any], None]] = {}

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
_MISSING = object()


def explain_merges(cfg: CfgNode) -> None:
    """Have the merges of a config from detectron2's get_cfg() say more than yacs does; in place."""
    if type(cfg) is CfgNode:  # a class of the user's own is left alone
        object.__setattr__(cfg, "__class__", ExplainingCfgNode)  # a plain assignment would add a key


class ExplainingCfgNode(CfgNode):
    """The root of a config; the groups in it are plain CfgNodes.

    Spelled otherwise than Python does, and taken all the same: a number without its decimal point (4 for 4.0), inf or .inf
    where a number belongs, and true or false where True or False does.
    """

    @classmethod
    def _decode_cfg_value(cls, value):
        # Groups must have the class of those that they are merged into.
        return CfgNode(value) if isinstance(value, dict) else super()._decode_cfg_value(value)

    def merge_from_list(self, cfg_list: Sequence) -> None:
        """Merge KEY, VALUE, KEY, VALUE, ...

        Raises:
            KeyError: no such key.
            ValueError: a value of a type that the key does not take.
            AssertionError: of yacs; a key without a value.
        """
        cfg_list = list(cfg_list)
        if len(cfg_list) % 2:
            super().merge_from_list(cfg_list)
        for key, value in zip(cfg_list[::2], cfg_list[1::2]):
            key = str(key)
            there = _lookup(self, key)
            if there is _MISSING and self._is_no_key(key):
                raise KeyError(_unknown(self, key, _decoded(value)))
            value = _respelled(value, there)
            try:
                super().merge_from_list([key, value])
            except ValueError as error:
                raise ValueError(_wrong_type(key, _decoded(value), there)) from error

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        """Merge a config, such as that of a file.

        Raises:
            KeyError, ValueError: as merge_from_list.
        """
        other = copy.deepcopy(cfg_other)
        self._prepare(other, self, "")
        super().merge_from_other_cfg(other)

    def _prepare(self, other: CfgNode, mine: CfgNode, prefix: str) -> None:
        for name, value in other.items():
            key = f"{prefix}{name}"
            if name not in mine:
                if not mine.is_new_allowed() and self._is_no_key(key):
                    raise KeyError(_unknown(self, key, value))
            elif isinstance(value, CfgNode) and isinstance(mine[name], CfgNode):
                self._prepare(value, mine[name], f"{key}.")
            else:
                other[name] = _respelled(value, mine[name])
                try:
                    CfgNode({"KEY": mine[name]}).merge_from_list(["KEY", other[name]])
                except ValueError as error:
                    raise ValueError(_wrong_type(key, value, mine[name])) from error

    def _is_no_key(self, key: str) -> bool:
        # What yacs and detectron2 have words of their own for.
        return not (self.key_is_deprecated(key) or self.key_is_renamed(key) or key == "_BASE_")


def _lookup(cfg: Mapping, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _MISSING
        node = node[part]
    return node


def _decoded(value: Any) -> Any:
    """A word of a command line as yacs reads it."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def plain(value: Any) -> Any:
    """A value as messages show it: groups of keys as dicts."""
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _respelled(value: Any, there: Any) -> Any:
    """A value in the spelling that yacs takes for the type of the one that is there."""
    word = value.strip().lower() if isinstance(value, str) else ""
    if type(there) is bool and word in ("true", "false"):
        return word == "true"
    if type(there) is float:
        if word in ("inf", ".inf"):
            return math.inf
        number = _decoded(value)
        if type(number) is int and abs(number) <= 2**53:
            return float(number)
    return value


def _unknown(cfg: CfgNode, key: str, value: Any) -> str:
    if key.split(".")[:2] == ["MODEL", "TENSORRT"] and "TENSORRT" not in cfg.MODEL:
        hint = "d2_trt.add_tensorrt_config(cfg) adds the keys of the TensorRT backend"
    elif message := _checked(key, value):
        return message
    else:
        near = _near(cfg, key)
        hint = f"did you mean {' or '.join(near)}?" if near else "no other is spelled like it"
    return f"{key} is no key of this config (its value is {plain(value)!r}); {hint}"


def _wrong_type(key: str, value: Any, there: Any) -> str:
    if message := _checked(key, value):
        return message
    if isinstance(there, Mapping):
        allowed = f"a group of the keys {', '.join(map(str, there))}"
    else:
        kind = _KINDS.get(type(there), f"a {type(there).__name__}")
        allowed = f"{kind}; now it is {there!r}"
    return f"{key} is {plain(value)!r}; allowed: {allowed}."


def _checked(key: str, value: Any) -> str:
    """What the key's own check says; "" where it has none, or that one has nothing to say."""
    for group, check in CHECKS.items():
        if key == group or key.startswith(group + "."):
            try:
                check(key, value)
            except ValueError as error:
                return str(error)
    return ""


def _near(cfg: CfgNode, key: str) -> list[str]:
    """Keys that may be meant: spelled alike in the same group, else of the same name elsewhere, else spelled alike."""
    node: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, Mapping):
            break
        if part not in node:
            alike = difflib.get_close_matches(part, list(node), n=1)
            near = [".".join([*parts[:depth], name, *parts[depth + 1 :]]) for name in alike]
            if known := [name for name in near if _lookup(cfg, name) is not _MISSING]:
                return known
            break
        node = node[part]
    every = list(_leaves(cfg, ""))
    same = [name for name in every if name.rpartition(".")[2] == parts[-1]]
    return same[:2] or difflib.get_close_matches(key, every, n=2, cutoff=0.8)


def _leaves(node: Mapping, prefix: str) -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
