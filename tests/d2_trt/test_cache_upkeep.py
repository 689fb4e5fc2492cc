"""The engine cache's modes, and its listing, checking and pruning."""

import contextlib
import os
import time

import pytest

from d2_trt import cache_files
from d2_trt.cache import MODES, EngineCache
from d2_trt.errors import CacheError
from d2_trt.options import CacheOptions
from tests.d2_trt.cache_helpers import (
    Builder,
    engine,
    entry_size,
    files,
    files_of,
    flip,
    ingredients,
    key_of,
    put,
    warnings,
)
from tests.d2_trt.cache_helpers import cache as cache
from tests.d2_trt.cache_helpers import captured as captured
from tests.d2_trt.cache_helpers import folder as folder

KEY = key_of(0)


# Modes.


def test_unknown_mode_names_the_allowed_ones(folder):
    with pytest.raises(CacheError, match="'sometimes'; allowed: 'readwrite', 'read'"):
        EngineCache(folder, mode="sometimes")


@pytest.mark.parametrize("mode", ["read", "require", "off"])
def test_modes_that_do_not_write_leave_the_folder_alone(folder, mode):
    cache = EngineCache(folder, mode)
    build = Builder()
    for _ in range(2):
        with pytest.raises(CacheError) if mode == "require" else contextlib.nullcontext():
            entry = cache.get_or_build(ingredients(), build)
            assert entry.path is None
            assert entry.built
            assert entry.data == engine()
    assert build.calls == (0 if mode == "require" else 2)
    assert not folder.exists()


@pytest.mark.parametrize("mode", MODES)
def test_what_each_mode_does_with_an_entry_that_is_there(folder, mode):
    put(EngineCache(folder))
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    build = Builder()
    entry = EngineCache(folder, mode).get_or_build(ingredients(), build)
    assert entry.built == bool(build.calls) == (mode in ("rebuild", "off"))
    touched = {path: path.stat().st_mtime_ns for path in folder.rglob("*")} != stamps
    assert touched == (mode in ("readwrite", "rebuild"))


def test_rebuild_replaces_the_entry_once(folder):
    put(EngineCache(folder))
    cache, build = EngineCache(folder, "rebuild"), Builder(7)
    assert cache.get_or_build(ingredients(), build).built
    assert not cache.get_or_build(ingredients(), build).built
    assert build.calls == 1
    assert EngineCache(folder).load(KEY).data == engine(7)
    assert files(cache) == files_of(KEY)


def test_require_says_what_is_missing_and_how_to_get_it(folder):
    put(EngineCache(folder))
    with pytest.raises(CacheError) as error:
        EngineCache(folder, "require").get_or_build(ingredients(gpu="NVIDIA L4"), Builder())
    message = str(error.value)
    assert "MODEL.TENSORRT.CACHE.MODE is 'require'" in message
    assert "the nearest differs in gpu" in message
    assert "tools/build_engine.py" in message


@pytest.mark.parametrize("mode", ["read", "require"])
def test_damage_is_told_but_not_mended_in_modes_that_do_not_write(folder, mode, caplog):
    put(EngineCache(folder))
    os.truncate(folder / f"{KEY}.engine", 10)
    with pytest.raises(CacheError) if mode == "require" else contextlib.nullcontext():
        EngineCache(folder, mode).get_or_build(ingredients(), Builder())
    assert len(warnings(caplog)) == 1
    assert "has 10 bytes instead of 4,000" in warnings(caplog)[0]
    assert files(EngineCache(folder)) == files_of(KEY)


def test_options_make_the_cache(tmp_path):
    cache = EngineCache.from_options(CacheOptions(dir=str(tmp_path), mode="read", max_gb=2.5))
    assert (cache.directory, cache.mode, cache.max_bytes) == (tmp_path, "read", 2.5e9)


# Looking after it.


def test_list_of_no_folder_is_empty(cache):
    assert cache.list() == cache.verify() == cache.prune() == []
    assert not cache.directory.exists()


def test_list_tells_size_use_and_damage(cache):
    put(cache, 0)
    put(cache, 1)
    os.truncate(cache.directory / f"{key_of(0)}.engine", 5)
    (cache.directory / "notes.txt").write_text("not an entry")
    one, zero = cache.list()
    assert (one.key, one.problem) == (key_of(1), "")
    assert one.size == sum((cache.directory / name).stat().st_size for name in files_of(key_of(1)))
    assert one.sidecar["ingredients"] == ingredients(1)
    assert abs(one.last_used - time.time()) < 60
    assert zero.problem == "the engine's file has 5 bytes instead of 4,000"


def test_verify_reads_what_list_does_not(cache):
    put(cache, 0)
    put(cache, 1)
    put(cache, 2)
    flip(cache.directory / f"{key_of(0)}.engine", 5)
    (cache.directory / f"{key_of(2)}.json").unlink()
    assert {e.key: bool(e.problem) for e in cache.list()} == {
        key_of(0): False,
        key_of(1): False,
        key_of(2): True,
    }
    problems = {e.key: e.problem for e in cache.verify()}
    assert "sha256" in problems[key_of(0)]
    assert problems[key_of(1)] == ""
    assert problems[key_of(2)] == "the sidecar is missing"
    assert not any(e.in_use for e in cache.list())


def test_remove_takes_one_entry_with_its_lock(cache):
    put(cache, 0)
    put(cache, 1)
    assert cache.remove(key_of(0))
    assert files(cache) == files_of(key_of(1))
    assert f"{key_of(0)}.lock" not in os.listdir(cache.directory / "locks")


def test_prune_by_age(cache, monkeypatch):
    for number in range(3):
        put(cache, number)
    day = 86400
    for number, age in enumerate((40 * day, 20 * day, -10 * day)):  # the last by a clock put back
        used = time.time() - age
        os.utime(cache.directory / f"{key_of(number)}.json", (used, used))
    gone = cache.prune(older_than=30 * day, dry_run=True)
    assert [(e.key, e.problem) for e in gone] == [(key_of(0), "not used for 40.0 days")]
    assert len(cache.list()) == 3
    assert cache.prune(older_than=30 * day) == gone
    assert {e.key for e in cache.list()} == {key_of(1), key_of(2)}


def test_prune_by_size_takes_damaged_entries_first(cache):
    for number in range(3):
        put(cache, number)
    os.truncate(cache.directory / f"{key_of(2)}.json", 5)
    limit = 2.5 * entry_size(cache)
    assert [e.key for e in cache.prune(max_bytes=limit)] == [key_of(2)]
    assert {e.key for e in cache.list()} == {key_of(0), key_of(1)}


def test_prune_removes_what_dead_processes_left(cache):
    put(cache, 0)
    for name in (
        f".{key_of(1)}.engine.1-aa.tmp",
        f"{key_of(2)}.engine",
        ".timing-8.6.0-H200-sm90.cache.3-bb.tmp",
    ):
        (cache.directory / name).write_bytes(b"left")
    (cache.directory / "locks" / f"{key_of(3)}.lock").touch()
    cache.prune()
    assert files(cache) == files_of(key_of(0))
    assert sorted(os.listdir(cache.directory / "locks")) == sorted(
        [f"{key_of(0)}.lock", "folder.lock", "timing.lock"]
    )


def test_prune_leaves_what_is_being_built(cache):
    put(cache, 0)
    unfinished = cache.directory / f".{key_of(1)}.engine.1-aa.tmp"

    def build():
        unfinished.write_bytes(b"half")
        assert [e.key for e in EngineCache(cache.directory).prune(everything=True)] == [key_of(0)]
        assert unfinished.exists()
        return Builder(1)()

    assert cache.get_or_build(ingredients(1), build).path.exists()


def test_entry_whose_key_is_locked_is_not_removed(cache):
    put(cache, 0)
    with cache_files.FileLock(cache.directory / "locks" / f"{KEY}.lock"):
        assert not EngineCache(cache.directory).remove(KEY)
        assert EngineCache(cache.directory).prune(everything=True) == []
    assert cache.remove(KEY)


def test_entry_under_another_name_is_found_foreign(cache):
    put(cache, 0)
    for ending in ("engine", "json"):
        os.replace(cache.directory / f"{KEY}.{ending}", cache.directory / f"{key_of(1)}.{ending}")
    assert cache.load(key_of(1)) is None
    assert "made from something else" in cache.list()[0].problem
    assert "made from something else" in cache.verify()[0].problem
    assert [e.key for e in cache.prune()] == [key_of(1)]


def test_prune_everything_leaves_files_of_others(cache):
    put(cache, 0)
    (cache.directory / "notes.txt").write_text("mine")
    assert [e.key for e in cache.prune(everything=True)] == [key_of(0)]
    assert files(cache) == {"notes.txt"}
