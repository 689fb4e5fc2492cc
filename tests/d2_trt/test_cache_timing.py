"""Timing caches: kept by TensorRT version and GPU, merged, and never a reason to fail."""

import errno
import logging
import os
import threading

import pytest

from d2_trt.cache import EngineCache
from d2_trt.cache_timing import TimingCache, timing_caches
from tests.d2_trt.cache_helpers import warnings


@pytest.fixture(autouse=True)
def captured(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)


def make(folder, **changes) -> TimingCache:
    values = {"tensorrt": "8.6.0", "gpu": "NVIDIA H200", "compute_capability": (9, 0)}
    return TimingCache(folder, **{**values, **changes})


def union(old: bytes, new: bytes) -> bytes:
    """Timings are words here."""
    return b" ".join(sorted(set(old.split()) | set(new.split())))


def never(old, new):
    raise AssertionError("there is nothing to combine")


def test_first_timings_are_kept_as_they_are(tmp_path):
    folder = tmp_path / "cache"
    assert make(folder).load() == b""
    assert not folder.exists()
    assert make(folder).merge(b"conv", never)
    assert make(folder).load() == b"conv"
    assert make(folder).path.name == "timing-8.6.0-NVIDIA_H200-sm90.cache"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_later_timings_are_combined(tmp_path):
    make(tmp_path).merge(b"conv", never)
    assert make(tmp_path).merge(b"gemm", union)
    assert make(tmp_path).load() == b"conv gemm"


def test_equal_timings_need_no_combining(tmp_path):
    make(tmp_path).merge(b"conv", never)
    assert make(tmp_path).merge(b"conv", never)


@pytest.mark.parametrize(
    "change", [{"tensorrt": "10.3.0"}, {"gpu": "NVIDIA H100"}, {"compute_capability": (8, 9)}]
)
def test_each_version_and_gpu_has_its_own(tmp_path, change):
    make(tmp_path).merge(b"conv", never)
    assert make(tmp_path, **change).load() == b""
    make(tmp_path, **change).merge(b"gemm", never)
    assert make(tmp_path).load() == b"conv"
    assert len(timing_caches(tmp_path)) == 2


def test_builds_at_the_same_time_lose_nothing(tmp_path):
    threads = [
        threading.Thread(target=lambda i=i: make(tmp_path).merge(b"kernel%d" % i, union)) for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(make(tmp_path).load().split()) == 16


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:30],
        lambda data: data[:-2] + b"\x00" + data[-1:],
        lambda data: b"",
        lambda data: b"as another program wrote it",
    ],
    ids=["truncated", "header truncated", "flipped", "empty", "foreign"],
)
def test_damaged_file_is_ignored_and_replaced(tmp_path, damage, caplog):
    cache = make(tmp_path)
    cache.merge(b"conv", never)
    cache.path.write_bytes(damage(cache.path.read_bytes()))
    assert cache.load() == b""
    assert "is damaged" in warnings(caplog)[0]
    assert cache.merge(b"gemm", never)
    assert cache.load() == b"gemm"


def test_timings_that_do_not_combine_are_replaced(tmp_path, caplog):
    cache = make(tmp_path)
    cache.merge(b"conv", never)

    def refuse(old, new):
        raise RuntimeError("another driver")

    assert cache.merge(b"gemm", refuse)
    assert cache.load() == b"gemm"
    assert "another driver" in warnings(caplog)[0]


@pytest.mark.parametrize("function", ["write", "fsync", "replace", "mkdir"])
def test_refusing_disk_is_only_warned_of(tmp_path, monkeypatch, caplog, function):
    folder = tmp_path / "cache"

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        assert not make(folder).merge(b"conv", never)
    assert "No space left on device" in warnings(caplog)[0]
    assert timing_caches(folder) == []
    assert not [p for p in folder.glob("*") if p.is_file()]


def test_file_that_cannot_be_read_is_only_warned_of(tmp_path, caplog):
    make(tmp_path).path.mkdir()
    assert make(tmp_path).load() == b""
    assert "cannot be read" in warnings(caplog)[0]


def test_nothing_is_written_where_it_may_not_be(tmp_path):
    assert not make(tmp_path, writable=False).merge(b"conv", never)
    assert list(tmp_path.iterdir()) == []


def test_empty_timings_replace_nothing(tmp_path):
    make(tmp_path).merge(b"conv", never)
    assert not make(tmp_path).merge(b"", never)
    assert make(tmp_path).load() == b"conv"


def test_engines_and_timings_share_a_folder(tmp_path):
    make(tmp_path).merge(b"conv", never)
    cache = EngineCache(tmp_path)
    assert cache.list() == []
    cache.prune(everything=True)
    assert make(tmp_path).load() == b"conv"
