"""What the engine cache holds: engines, and the JSON sidecars that say what they are."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cache_files import readable, timestamp
from .cache_key import FORMAT, digest, package_version
from .errors import CacheError


@dataclass(frozen=True)
class BuiltEngine:
    """What a build gives: the serialized engine, and what its sidecar is to say about it."""

    data: bytes | memoryview = field(repr=False)
    report: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheEntry:
    """An engine that is ready to load.

    `sidecar` is what KEY.json holds. `path` is None where the engine is not on the disk. `built` tells an engine that
    this call built from one that was found.
    """

    key: str
    data: bytes | memoryview = field(repr=False)
    sidecar: Mapping[str, Any] = field(repr=False)
    path: Path | None
    built: bool

    @property
    def report(self) -> Mapping[str, Any]:
        return self.sidecar["report"]

    @property
    def parity(self) -> Mapping[str, Any]:
        return self.sidecar["parity"]


@dataclass(frozen=True)
class EntryInfo:
    """An entry as list(), verify() and prune() report it: bytes of both files, last use in seconds since 1970.

    `problem` says what is wrong with it, or in prune() why it goes; empty where nothing is.
    """

    key: str
    size: int
    last_used: float
    sidecar: Mapping[str, Any] | None = field(default=None, repr=False)
    problem: str = ""
    in_use: bool = False


class Damaged(Exception):
    """A file of an entry is not what was written."""


def make_sidecar(
    key: str, ingredients: Mapping[str, Any], built: BuiltEngine, seconds: float
) -> dict[str, Any]:
    """What goes into KEY.json. `seconds` is the time of the build."""
    data = memoryview(built.data).cast("B")
    sidecar = {
        "format": FORMAT,
        "key": key,
        "created": timestamp(),
        "engine": {"sha256": hashlib.sha256(data).hexdigest(), "size": data.nbytes},
        "built_by": {
            "id": uuid.uuid4().hex,
            "host": platform.node(),
            "pid": os.getpid(),
            "python": platform.python_version(),
            # No ingredient of the key: it hands functions to our converters, and whoever only runs engines has none.
            "torch2trt": package_version("torch2trt"),
            "seconds": round(seconds, 3),
        },
        "parity": readable(built.parity),
        "report": readable(built.report),
        "ingredients": ingredients,
    }
    return {**sidecar, "checksum": digest(sidecar)}


def with_parity(sidecar: Mapping[str, Any], parity: Mapping[str, Any]) -> dict[str, Any]:
    """A sidecar with the numbers of another comparison."""
    changed = {**sidecar, "parity": readable(parity)}
    del changed["checksum"]
    return {**changed, "checksum": digest(changed)}


def parse_sidecar(content: bytes, key: str) -> dict[str, Any]:
    """KEY.json, checked.

    Raises:
        Damaged: it is not what make_sidecar made, or is another entry's.
    """
    try:
        sidecar = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Damaged(f"its sidecar is not JSON ({error})") from error
    if not isinstance(sidecar, dict) or "checksum" not in sidecar:
        raise Damaged("its sidecar is not one of this cache")
    # The version first: a later one may compute the rest in another way.
    if sidecar.get("format") != FORMAT:
        raise Damaged(f"it has format {sidecar.get('format')!r}, and this version reads {FORMAT}")
    body = {name: value for name, value in sidecar.items() if name != "checksum"}
    if _digest_or_none(body) != sidecar["checksum"]:
        raise Damaged("its sidecar is damaged: the checksum does not match")
    if sidecar["key"] != key or digest(sidecar["ingredients"]) != key:
        raise Damaged("it was made from something else than its name says")
    return sidecar


def _digest_or_none(value: Any) -> str | None:
    try:
        return digest(value)
    except CacheError:  # a flipped bit may have made a NaN of a number
        return None
