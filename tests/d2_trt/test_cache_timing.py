"""Timing caches: kept by TensorRT version and GPU, merged, and never a reason to fail."""

import errno
import logging
import os
import threading

import pytest

from d2_trt import cache_timing
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


# Where timings do not combine.

R50 = ({"DEPTH": 50}, {"precision": "fp16"}, {"opt_shape": (1, 800, 1088)})


def set_age(cache: TimingCache, seconds: int) -> None:
    os.utime(cache.own_path, (2_000_000_000 - seconds,) * 2)


def test_builds_at_the_same_time_lose_nothing_where_timings_do_not_combine(tmp_path):
    builds = [make(tmp_path, build=({"DEPTH": depth},)) for depth in range(8)]
    assert [one.load() for one in builds] == [b""] * 8

    def merge(number: int) -> None:
        assert builds[number].merge(b"kernel%d" % number, None)

    threads = [threading.Thread(target=merge, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [one.load() for one in builds] == [b"kernel%d" % number for number in range(8)]


def test_a_build_starts_from_the_timings_that_fit_best(tmp_path):
    wanted = make(tmp_path, build=R50)
    # The better one fits, the older it is.
    others = [
        (b"of another network", ({"DEPTH": 101}, *R50[1:])),
        (b"of the network", (R50[0], {"precision": "fp32"}, R50[2])),
        (b"in the same types", (*R50[:2], {"opt_shape": (2, 800, 1088)})),
        (b"of the same build", R50),
    ]
    for age, (timings, build) in enumerate(others):
        one = make(tmp_path, build=build)
        one.merge(timings, None)
        set_age(one, seconds=age)
        assert wanted.load() == timings
    assert len(timing_caches(tmp_path)) == len(others)
    assert make(tmp_path, gpu="NVIDIA H100", build=R50).load() == b""


def test_timings_that_all_builds_share_serve_too(tmp_path):
    make(tmp_path).merge(b"conv", never)
    assert make(tmp_path, build=R50).load() == b"conv"


def test_newest_timings_of_several_that_fit_alike_are_taken(tmp_path):
    for age, batch in ((2, 1), (1, 2), (3, 4)):
        one = make(tmp_path, build=(*R50[:2], batch))
        one.merge(b"batch %d" % batch, None)
        set_age(one, seconds=age)
    assert make(tmp_path, build=(*R50[:2], 8)).load() == b"batch 2"


def test_next_best_timings_stand_in_for_damaged_ones(tmp_path, caplog):
    wanted, other = make(tmp_path, build=R50), make(tmp_path, build=(*R50[:2], 8))
    for one in (wanted, other):
        one.merge(one.own_path.name.encode(), None)
    wanted.own_path.write_bytes(b"as another program wrote it")
    assert wanted.load() == other.own_path.name.encode()
    assert "is damaged" in warnings(caplog)[0]
    wanted.merge(b"conv", None)
    assert wanted.load() == b"conv"


@pytest.mark.parametrize(
    ("limit", "kept"), [({"MAX_FILES": 3}, 3), ({"MAX_BYTES": 3500}, 3), ({"MAX_BYTES": 500}, 1)]
)
def test_oldest_timings_go_where_there_are_too_many(tmp_path, monkeypatch, limit, kept):
    for name, value in limit.items():
        monkeypatch.setattr(cache_timing, name, value)
    written = []
    for number in range(6):
        # One by a clock that was put back: what was just written stays all the same.
        one = make(tmp_path, build=(number,), gpu="NVIDIA H100" if number == 4 else "NVIDIA H200")
        one.merge(b"%d" % number * 1000, None)
        written.append(one)
        assert one.own_path.exists()
        set_age(one, seconds=10 - number)
    assert timing_caches(tmp_path) == sorted(one.own_path for one in written[-kept:])


def test_engines_and_timings_share_a_folder(tmp_path):
    make(tmp_path).merge(b"conv", never)
    cache = EngineCache(tmp_path)
    assert cache.list() == []
    cache.prune(everything=True)
    assert make(tmp_path).load() == b"conv"
