"""Engines of a few bytes, and what the tests of the cache ask about its folder."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from d2_trt.cache import BuiltEngine, EngineCache
from d2_trt.cache_key import digest, key_ingredients
from d2_trt.shape_range import ShapeRange

SIZE = 4000


@pytest.fixture(autouse=True)
def captured(caplog, monkeypatch):
    """Messages reach caplog even after another test set up detectron2's logging."""
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    caplog.set_level(logging.DEBUG, logger="d2_trt")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def cache(folder):
    return EngineCache(folder)


def ingredients(number: int = 0, **changes) -> dict:
    """What an engine is made from; another one for every number."""
    values = {
        "weights": f"{number:064x}",
        "modules": "",
        "config": {"RESNETS": {"DEPTH": 50}},
        "options": {"precision": "fp16"},
        "shapes": ShapeRange((1, 256, 256), (1, 800, 1088), (1, 1344, 1344)),
        "versions": {"d2_trt": "0.1.0"},
        "plugins": {"MSDA": "stock"},
        "tensorrt": "8.6.0",
        "gpu": "NVIDIA H200",
        "compute_capability": (9, 0),
    }
    return key_ingredients(**{**values, **changes})


def key_of(number: int = 0, **changes) -> str:
    return digest(ingredients(number, **changes))


def engine(number: int = 0, size: int = SIZE) -> bytes:
    return bytes((number + i) % 251 for i in range(size))


class Builder:
    """A build that counts its calls."""

    def __init__(self, number: int = 0, size: int = SIZE):
        self.calls = 0
        self.number = number
        self.size = size

    def __call__(self) -> BuiltEngine:
        self.calls += 1
        return BuiltEngine(
            engine(self.number, self.size), {"layers": {"CONVOLUTION": 53}}, {"sign_agreement": 0.9991}
        )


def put(cache: EngineCache, number: int = 0, size: int = SIZE):
    """Build and keep an engine, and let it be not in use."""
    entry = cache.get_or_build(ingredients(number), Builder(number, size))
    cache.close()
    return entry


def files(cache: EngineCache) -> set[str]:
    """Names of all files but locks, temporary ones too."""
    return {path.name for path in cache.directory.iterdir() if path.is_file()}


def files_of(*keys: str) -> set[str]:
    return {f"{key}.{ending}" for key in keys for ending in ("engine", "json")}


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def entry_size(cache: EngineCache) -> int:
    return max(e.size for e in cache.list())


def flip(path: Path, position: int) -> None:
    """Flip one bit of the byte at a position."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x04
    path.write_bytes(data)
