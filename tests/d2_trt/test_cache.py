"""EngineCache in one process: what it keeps, what it looks after, and how threads share it."""

import fcntl
import json
import math
import os
import threading
import time
from pathlib import Path

import pytest

from d2_trt.cache import BuiltEngine, EngineCache
from d2_trt.errors import BuildError, CacheError
from tests.d2_trt.cache_helpers import (
    SIZE,
    Builder,
    engine,
    entry_size,
    files,
    files_of,
    ingredients,
    key_of,
    put,
    warnings,
)
from tests.d2_trt.cache_helpers import cache as cache
from tests.d2_trt.cache_helpers import captured as captured
from tests.d2_trt.cache_helpers import folder as folder

KEY = key_of(0)


# What is kept.


def test_engine_is_built_once_and_found_by_later_caches(folder):
    build = Builder()
    first = EngineCache(folder).get_or_build(ingredients(), build)
    second = EngineCache(folder).get_or_build(ingredients(), build)
    assert build.calls == 1
    assert (first.built, second.built) == (True, False)
    assert bytes(first.data) == second.data == engine()
    assert first.path == second.path == folder / f"{KEY}.engine"
    assert first.sidecar == second.sidecar


def test_sidecar_tells_where_the_engine_comes_from(cache):
    entry = put(cache)
    sidecar = json.loads((cache.directory / f"{KEY}.json").read_text())
    assert sidecar == entry.sidecar
    assert sidecar["ingredients"] == ingredients()
    assert sidecar["report"] == entry.report == {"layers": {"CONVOLUTION": 53}}
    assert sidecar["parity"] == entry.parity == {"sign_agreement": 0.9991}
    assert sidecar["engine"]["size"] == SIZE == (cache.directory / f"{KEY}.engine").stat().st_size
    assert sidecar["built_by"]["pid"] == os.getpid()
    assert time.strptime(sidecar["created"], "%Y-%m-%dT%H:%M:%SZ")


def test_report_with_odd_numbers_is_kept_in_readable_form(cache):
    import torch

    report = {
        "error": math.nan,
        "worst": math.inf,
        "time": torch.tensor(1.5),
        "kinds": (1, 2),
        "at": Path("x"),
        3: True,
    }
    cache.get_or_build(ingredients(), lambda: BuiltEngine(b"engine", report))
    found = EngineCache(cache.directory).load(KEY)
    assert found.report == {
        "error": "nan",
        "worst": "inf",
        "time": 1.5,
        "kinds": [1, 2],
        "at": "x",
        "3": True,
    }


def test_engine_in_another_buffer_than_bytes_is_kept(cache):
    cache.get_or_build(ingredients(), lambda: BuiltEngine(memoryview(bytearray(b"engine"))))
    assert EngineCache(cache.directory).load(KEY).data == b"engine"


def test_folder_and_files_are_their_owners(cache):
    os.umask(os.umask(0o022))
    put(cache)
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in cache.directory.iterdir() if p.is_file()} == {0o600}


def test_folder_that_everyone_may_write_to_is_warned_of_once(cache, caplog):
    cache.directory.mkdir()
    cache.directory.chmod(0o777)
    put(cache)
    put(cache, 1)
    assert [
        w for w in warnings(caplog) if "Everyone may write" in w and str(cache.directory) in w
    ] == warnings(caplog)
    assert len(warnings(caplog)) == 1
    assert cache.directory.stat().st_mode & 0o777 == 0o777


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "f" * 64},
        {"config": {"RESNETS": {"DEPTH": 101}}},
        {"options": {"precision": "fp32"}},
        {"versions": {"d2_trt": "0.2.0"}},
        {"plugins": {"MSDA": "D2TRTMSDeformAttn 1"}},
        {"plugins": {"MSDA": "D2TRTMSDeformAttn 2"}},
        {"tensorrt": "8.6.1"},
        {"gpu": "NVIDIA H100"},
        {"compute_capability": (8, 9)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_engine_of_anything_else_is_not_used(cache, change, caplog):
    put(cache)
    other = Builder(1)
    entry = cache.get_or_build(ingredients(**change), other)
    assert other.calls == 1
    assert entry.data == engine(1)
    name = next(iter(change))
    assert f"No cached engine fits: the nearest differs in {name}" in caplog.text


def test_failed_build_leaves_nothing_and_frees_the_key(cache):
    def fail():
        raise BuildError("no")

    with pytest.raises(BuildError, match="no"):
        cache.get_or_build(ingredients(), fail)
    assert files(cache) == set()
    assert put(cache).built
    assert files(cache) == files_of(KEY)


def test_interrupted_build_leaves_nothing(cache):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build(ingredients(), interrupt)
    assert files(cache) == set()
    assert put(cache).built


def test_ingredients_that_are_not_json_are_refused_before_the_build(cache):
    build = Builder()
    with pytest.raises(CacheError, match="JSON"):
        cache.get_or_build({"shape": {1, 2}}, build)
    with pytest.raises(CacheError, match="JSON"):
        cache.get_or_build({"threshold": math.nan}, build)
    assert build.calls == 0


# Threads.


def test_threads_that_ask_for_one_engine_build_it_once(cache):
    build, started, entries = Builder(), threading.Barrier(4), []

    def slow():
        time.sleep(0.1)
        return build()

    def ask():
        started.wait()
        entries.append(cache.get_or_build(ingredients(), slow))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert build.calls == 1
    assert [bytes(e.data) for e in entries] == [engine()] * 4
    assert sum(e.built for e in entries) == 1


def test_different_engines_are_built_at_the_same_time(cache):
    both_building = threading.Barrier(2, timeout=120)
    entries = {}

    def ask(number):
        def build():
            both_building.wait()  # breaks unless the other is in its build too
            return Builder(number)()

        entries[number] = cache.get_or_build(ingredients(number), build)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {n: bytes(e.data) for n, e in entries.items()} == {0: engine(0), 1: engine(1)}


# Size.


def test_least_recently_used_goes_first(folder):
    cache = EngineCache(folder)
    for number in range(3):
        put(cache, number)
    put(cache, 0)  # used again
    cache.max_bytes = 3.5 * entry_size(cache)
    put(cache, 3)
    assert {e.key for e in cache.list()} == {key_of(0), key_of(2), key_of(3)}
    put(cache, 4)
    assert [e.key for e in cache.list()] == [key_of(4), key_of(3), key_of(0)]
    assert files(cache) == files_of(key_of(4), key_of(3), key_of(0))


def test_order_of_use_survives_a_clock_put_back(folder, monkeypatch):
    cache = EngineCache(folder)
    for number in range(3):
        put(cache, number)
    before = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: before - 3600 * 10**9)
    put(cache, 0)
    put(cache, 1)
    assert [e.key for e in cache.list()] == [key_of(1), key_of(0), key_of(2)]
    cache.max_bytes = 3.5 * entry_size(cache)
    put(cache, 3)
    assert [e.key for e in cache.list()] == [key_of(3), key_of(1), key_of(0)]


def test_engine_just_written_is_never_dropped(folder):
    cache = EngineCache(folder, max_bytes=1.2 * SIZE)
    for number in range(3):
        entry = put(cache, number)
        assert entry.path.exists()
        assert key_of(number) in {e.key for e in cache.list()}


def test_engine_in_use_is_never_dropped(folder):
    user = EngineCache(folder)
    user.get_or_build(ingredients(0), Builder(0))
    other = EngineCache(folder, max_bytes=1.5 * entry_size(user))
    put(other, 1)
    put(other, 2)
    assert [e.key for e in other.list()] == [key_of(2), key_of(0)]
    assert [e.in_use for e in other.list()] == [False, True]
    assert not other.remove(key_of(0))
    user.close()
    put(other, 3)
    assert [e.key for e in other.list()] == [key_of(3)]


def test_engine_loaded_while_another_asks_whether_it_is_in_use_is_so(folder):
    path = put(EngineCache(folder), 0).path
    with open(path, "rb") as asked:
        fcntl.flock(asked, fcntl.LOCK_EX)
        done = threading.Timer(0.05, fcntl.flock, (asked, fcntl.LOCK_UN))
        done.start()
        user = EngineCache(folder)
        assert not user.get_or_build(ingredients(0), Builder(0)).built
        done.join()
    assert [e.in_use for e in EngineCache(folder).list()] == [True]


def test_engine_is_in_use_until_its_cache_is_gone(folder):
    user = EngineCache(folder)
    user.get_or_build(ingredients(0), Builder(0))
    looker = EngineCache(folder)
    assert looker.list()[0].in_use
    del user
    assert not looker.list()[0].in_use


def test_engine_above_the_limit_serves_this_run_only(folder, caplog):
    put(EngineCache(folder), 1)
    cache = EngineCache(folder, max_bytes=SIZE)
    entry = cache.get_or_build(ingredients(0), Builder(0, SIZE + 1))
    assert entry.path is None
    assert len(entry.data) == SIZE + 1
    assert files(cache) == files_of(key_of(1))
    assert len(warnings(caplog)) == 1
    assert "MODEL.TENSORRT.CACHE.MAX_GB" in warnings(caplog)[0]
