"""The surface of TensorRT's Python bindings by version: what exists, what may be set, which arguments a call takes.

It is read from the manifests in tests/data/trt_api, which were read off the real bindings.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from pathlib import Path
from typing import ClassVar

import numpy as np

MANIFESTS = Path(__file__).resolve().parent.parent / "data" / "trt_api"


class Refused(RuntimeError):
    """TensorRT would not accept this: where it logs an error and returns None or fails to build, the double raises."""


def versions() -> list[str]:
    """Versions with a manifest, oldest first."""
    names = [path.stem.removeprefix("tensorrt-") for path in MANIFESTS.glob("tensorrt-*.json")]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


@functools.cache
def manifest(version: str) -> dict[str, dict]:
    return json.loads((MANIFESTS / f"tensorrt-{version}.json").read_text(encoding="utf-8"))


def _split(text: str) -> list[str]:
    """Arguments of a signature, at the commas that are outside of brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "([<{") - (char in ")]>}")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


class Signature:
    """One overload: names, types and which arguments may be left out."""

    def __init__(self, text: str):
        inside = text[text.index("(") + 1 : text.rindex(") ->")]
        self.text = re.sub(r"^\d+\. ", "", text)
        self.parameters = []
        for part in _split(inside):
            name, _, rest = part.partition(":")
            kind, _, default = rest.partition(" = ")
            if name != "self":
                self.parameters.append((name, kind.strip(), bool(default), default.strip()))

    def bind(self, api: Api, args: tuple, kwargs: dict) -> dict:
        """Converted arguments by name. Raises TypeError where the bindings would."""
        if len(args) > len(self.parameters):
            raise TypeError(f"{len(args)} arguments for {self.text}")
        given = {name: value for (name, *_), value in zip(self.parameters, args)}
        for name, value in kwargs.items():
            if name in given or name not in {p[0] for p in self.parameters}:
                raise TypeError(f"unexpected argument {name!r} for {self.text}")
            given[name] = value
        bound = {}
        for name, kind, optional, default in self.parameters:
            if name in given:
                value = given[name]
                bound[name] = None if value is None and default == "None" else api.convert(kind, value, name)
            elif not optional:
                raise TypeError(f"missing argument {name!r} for {self.text}")
        return bound


class Api:
    """One version of the bindings: its manifest, and its module with the real enums, Dims and Weights."""

    def __init__(self, version: str, trt):
        self.version = version
        self.numbers = tuple(int(part) for part in version.split(".")[:2])
        self.trt = trt
        self.manifest = manifest(version)
        self.objects: dict[str, type] = {}  # doubles of the classes of which arguments must be instances
        self.hold_weights = None  # what a layer remembers of Weights; set with the doubles
        self._members = {}
        self._signatures = {}

    def member(self, cls: str, name: str) -> dict | None:
        """A manifest entry, looked for in the bases too."""
        key = (cls, name)
        if key not in self._members:
            entry = self.manifest.get(f"{cls}.{name}")
            if entry is None:
                # The manifests list no base classes; of the emulated classes only layers have one that matters.
                entry = self.manifest.get(f"ILayer.{name}") if re.fullmatch(r"I\w+Layer", cls) else None
            self._members[key] = entry
        return self._members[key]

    def bind(self, cls: str, name: str, args: tuple, kwargs: dict) -> dict:
        key = (cls, name)
        if key not in self._signatures:
            texts = self.member(cls, name).get("sig") or []
            self._signatures[key] = [Signature(text) for text in texts]
        failures = []
        for signature in self._signatures[key]:
            try:
                return signature.bind(self, args, kwargs)
            except TypeError as error:
                failures.append(str(error))
        raise TypeError(f"TensorRT {self.version}: {cls}.{name}(): " + "; ".join(failures))

    def convert(self, kind: str, value, name: str):
        """A value as the bindings convert it for a parameter of that type."""
        kind = re.sub(r"^nvinfer1::", "", kind)
        sequence = re.fullmatch(r"(?:List|collections\.abc\.Sequence)\[(.+)\]", kind)
        if sequence:
            if isinstance(value, str) or not hasattr(value, "__len__"):
                raise TypeError(f"{name} must be a sequence, not {type(value).__name__}")
            return [self.convert(sequence[1], item, name) for item in value]
        if kind in ("Dims", "DimsHW"):
            return self.dims(value, name, 2 if kind == "DimsHW" else None)
        if kind == "Weights":
            return self.weights(value, name)
        if kind in ("int", "typing.SupportsInt"):
            try:
                return operator.index(value)
            except TypeError:
                raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
        if kind in ("float", "typing.SupportsFloat"):
            if not isinstance(value, (int, float, np.floating, np.integer)):
                raise TypeError(f"{name} must be a float, not {type(value).__name__}")
            return float(value)
        if kind == "bool":
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
            return bool(value)
        if kind == "str":
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a str, not {type(value).__name__}")
            return value
        expected = self.objects.get(kind) or self._enum(kind)
        if expected is not None and not isinstance(value, expected):
            raise TypeError(f"{name} must be {kind}, not {type(value).__name__}")
        return value

    def _enum(self, kind: str):
        cls = getattr(self.trt, kind, None)
        return cls if hasattr(cls, "__members__") else None

    def dims(self, value, name: str = "dims", length: int | None = None) -> tuple[int, ...]:
        if not isinstance(value, (tuple, list, self.trt.Dims)):
            raise TypeError(f"{name} must be Dims, a tuple or a list, not {type(value).__name__}")
        try:
            out = tuple(operator.index(item) for item in value)
        except TypeError:
            raise TypeError(f"{name} must hold ints, got {tuple(value)}") from None
        if length is not None and len(out) != length:
            raise TypeError(f"{name} must have {length} entries, got {out}")
        # The bindings throw on both.
        if len(out) > 8:
            raise ValueError(f"{name} has {len(out)} entries; TensorRT takes at most {8}")
        limit = 2 ** (63 if self.numbers >= (10, 0) else 31)
        if any(not -limit <= item < limit for item in out):
            raise TypeError(
                f"{name} = {out} does not fit in {'int64' if self.numbers >= (10, 0) else 'int32'}"
            )
        return out

    def weights(self, value, name: str = "weights"):
        if isinstance(value, np.ndarray):
            value = self.objects["Weights"](value)
        if not isinstance(value, self.objects["Weights"]):
            raise TypeError(f"{name} must be Weights or a NumPy array, not {type(value).__name__}")
        return self.hold_weights(value)


class ApiObject:
    """Base of the doubles: only what the emulated version has can be read, set or called.

    Subclasses name the manifest's class in `_kind`, list the converters of properties that can be set in `_settable`,
    and what tests may use beyond the real interface in `_extra`. Names with an underscore are the doubles' own.
    """

    _kind = ""
    _settable: ClassVar[dict] = {}
    _extra: ClassVar[frozenset] = frozenset()

    def __init__(self, api: Api, kind: str = ""):
        self._api = api
        if kind:
            self._kind = kind

    def __getattribute__(self, name: str):
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        cls = object.__getattribute__(self, "_kind")
        if name in object.__getattribute__(self, "_extra"):
            return object.__getattribute__(self, name)
        api = object.__getattribute__(self, "_api")
        entry = api.member(cls, name)
        if entry is None:
            raise AttributeError(f"TensorRT {api.version}: {cls!r} object has no attribute {name!r}")
        if entry["kind"] == "method":
            function = getattr(type(self), name, None)
            if function is None:
                raise NotImplementedError(f"the double of {cls} has no {name}()")
            if not entry.get("sig"):
                return function.__get__(self)
            return lambda *args, **kwargs: function(self, **api.bind(cls, name, args, kwargs))
        if hasattr(type(self), name):
            return object.__getattribute__(self, name)
        values = object.__getattribute__(self, "_values")
        if name not in values:
            raise NotImplementedError(f"the double of {cls} has no {name}")
        return values[name]

    def __setattr__(self, name: str, value):
        if name.startswith("_") or name in self._extra:
            return object.__setattr__(self, name, value)
        entry = self._api.member(self._kind, name)
        if entry is None or entry["kind"] != "property" or entry.get("readonly"):
            # pybind11 objects do take attributes that their class lacks; the project sets none, so it is a slip.
            raise AttributeError(f"TensorRT {self._api.version}: cannot set {self._kind}.{name}")
        if isinstance(getattr(type(self), name, None), property):
            return object.__setattr__(self, name, value)
        if name not in self._settable:
            raise NotImplementedError(f"the double of {self._kind} cannot set {name}")
        self._values[name] = self._settable[name](self._api, value)
        self._changed(name)

    def _changed(self, name: str) -> None:
        """Called when a property was set."""


# Converters of properties, whose types the manifests do not tell.


def as_dims(api: Api, value):
    return api.dims(value)


def as_int(api: Api, value):
    return api.convert("int", value, "value")


def as_float(api: Api, value):
    return api.convert("float", value, "value")


def as_bool(api: Api, value):
    return api.convert("bool", value, "value")


def as_str(api: Api, value):
    return api.convert("str", value, "value")


def as_weights(api: Api, value):
    return api.weights(value)


def as_floats(api: Api, value):
    return api.convert("List[float]", value, "value")


def as_any(api: Api, value):
    return value


def as_permutation(api: Api, value):
    if isinstance(value, api.trt.Permutation):
        return tuple(value)
    return api.dims(value, "permutation")


def as_enum(name: str):
    return lambda api, value: api.convert(name, value, name)
