"""EngineCache in one process: what it keeps, what it refuses, and what it does when the disk does not."""

import builtins
import contextlib
import errno
import json
import logging
import math
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from d2_trt import cache_entry, cache_files
from d2_trt.cache import MODES, BuiltEngine, EngineCache
from d2_trt.cache_key import digest
from d2_trt.errors import BuildError, CacheError
from d2_trt.options import CacheOptions
from tests.d2_trt.cache_helpers import (
    SIZE,
    Builder,
    engine,
    files,
    files_of,
    ingredients,
    key_of,
    put,
    warnings,
)

KEY = key_of(0)


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


def rewrite_sidecar(path: Path, change) -> None:
    """Change a sidecar and make its checksum right again."""
    sidecar = json.loads(path.read_text())
    del sidecar["checksum"]
    change(sidecar)
    path.write_text(json.dumps({**sidecar, "checksum": digest(sidecar)}))


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
        {"plugin": "stock 2"},
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


# What is damaged.


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x04
    path.write_bytes(data)


def middle(path: Path) -> int:
    return path.stat().st_size // 2


DAMAGE = {
    "engine truncated": lambda e, s: os.truncate(e, SIZE // 2),
    "engine empty": lambda e, s: os.truncate(e, 0),
    "engine longer": lambda e, s: e.write_bytes(e.read_bytes() + b"x"),
    "engine bit flipped": lambda e, s: flip(e, SIZE // 2),
    "engine last bit flipped": lambda e, s: flip(e, SIZE - 1),
    "engine missing": lambda e, s: e.unlink(),
    "sidecar truncated": lambda e, s: os.truncate(s, middle(s)),
    "sidecar empty": lambda e, s: os.truncate(s, 0),
    "sidecar bit flipped": lambda e, s: flip(s, middle(s)),
    "sidecar parity changed": lambda e, s: s.write_text(s.read_text().replace("0.9991", "0.9999")),
    "sidecar not a number": lambda e, s: s.write_text(s.read_text().replace("0.9991", "NaN")),
    "sidecar not text": lambda e, s: s.write_bytes(b"\xff\xfe\x00"),
    "sidecar a list": lambda e, s: s.write_text("[1]"),
    "sidecar of deep lists": lambda e, s: s.write_text("[" * 100_000),
    "sidecar of a later format": lambda e, s: rewrite_sidecar(s, lambda d: d.update(format=99)),
    "sidecar made from something else": lambda e, s: rewrite_sidecar(
        s, lambda d: d["ingredients"].update(gpu="NVIDIA L4")
    ),
    "both swapped for another entry's": lambda e, s: [
        os.replace(e.with_name(f"{key_of(1)}.{end}"), e.with_name(f"{KEY}.{end}"))
        for end in ("engine", "json")
    ],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_entry_is_rebuilt_with_one_warning(cache, damage, caplog):
    put(cache, 1)
    put(cache)
    damage(cache.directory / f"{KEY}.engine", cache.directory / f"{KEY}.json")
    build = Builder()
    entry = EngineCache(cache.directory).get_or_build(ingredients(), build)
    assert build.calls == 1
    assert entry.data == engine()
    assert len(warnings(caplog)) == 1
    assert f"{KEY}.engine is built again: " in warnings(caplog)[0]
    assert EngineCache(cache.directory).get_or_build(ingredients(), build).data == engine()
    assert build.calls == 1
    assert len(warnings(caplog)) == 1


def test_every_flipped_bit_of_a_small_entry_is_noticed(cache):
    cache.get_or_build(ingredients(), lambda: BuiltEngine(b"abc"))
    for path in (cache.directory / f"{KEY}.engine", cache.directory / f"{KEY}.json"):
        whole = path.read_bytes()
        for position in range(len(whole)):
            flip(path, position)
            found = cache.load(KEY, ingredients())
            # White space between JSON's tokens says nothing.
            assert found is None or found.sidecar == json.loads(whole), position
            path.write_bytes(whole)
        assert cache.load(KEY, ingredients()).data == b"abc"


def test_engine_without_a_sidecar_is_a_plain_miss(cache, caplog):
    put(cache)
    (cache.directory / f"{KEY}.json").unlink()
    build = Builder()
    assert cache.get_or_build(ingredients(), build).built
    assert warnings(caplog) == []
    assert files(cache) == files_of(KEY)


def test_unfinished_files_of_dead_processes_are_removed_with_one_warning(cache, caplog):
    cache.directory.mkdir()
    for name in (f".{KEY}.engine.1-aa.tmp", f".{KEY}.json.1-bb.tmp", f".{key_of(1)}.engine.2-cc.tmp"):
        (cache.directory / name).write_bytes(b"half")
    put(cache)
    assert files(cache) == files_of(KEY)
    assert len(warnings(caplog)) == 1
    assert "Removed 2 unfinished files" in warnings(caplog)[0]


def test_entry_that_cannot_be_read_is_rebuilt(cache, monkeypatch, caplog):
    put(cache)
    broken = True
    real = builtins.open

    def failing(file, *args, **kwargs):
        if broken and str(file).endswith(".engine") and args[:1] == ("rb",):
            raise OSError(errno.EIO, "Input/output error", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", failing)
    build = Builder()

    def mended() -> BuiltEngine:
        nonlocal broken
        broken = False
        return build()

    assert cache.get_or_build(ingredients(), mended).data == engine()
    assert "Input/output error" in warnings(caplog)[0]
    assert put(cache).built is False


def test_entry_replaced_while_it_is_read_is_read_again(cache, monkeypatch):
    put(cache)
    sidecar, real, calls = cache.directory / f"{KEY}.json", cache_entry.digest, []
    put(other := EngineCache(cache.directory.with_name("other")), 0, SIZE + 1)

    def replacing(value):
        calls.append(value)
        if len(calls) == 1:  # the sidecar of one build was read; the engine that follows is another's
            for path in other.directory.glob("*.*"):
                os.replace(path, sidecar.with_suffix(path.suffix))
        return real(value)

    monkeypatch.setattr(cache_entry, "digest", replacing)
    entry, problem = cache._store.read(KEY, ingredients())
    assert problem == ""
    assert len(entry.data) == SIZE + 1


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


# Disks that refuse.

REFUSALS = {
    "no folder": ("mkdir", lambda path, *_: True, errno.EROFS),
    "no lock file": ("open", lambda path, *_: str(path).endswith(".lock"), errno.EACCES),
    "lock file on a full disk": ("open", lambda path, *_: str(path).endswith(".lock"), errno.ENOSPC),
    "no engine file": ("open", lambda path, *_: ".engine." in str(path), errno.EACCES),
    "disk full at the engine": ("write", lambda fd, data, *_: len(data) == SIZE, errno.ENOSPC),
    "disk full at the sidecar": ("write", lambda fd, data, *_: bytes(data[:1]) == b"{", errno.ENOSPC),
    "quota": ("write", lambda fd, data, *_: len(data) == SIZE, errno.EDQUOT),
    "sync": ("fsync", lambda fd: True, errno.EIO),
    "engine's rename": ("replace", lambda old, new: str(new).endswith(".engine"), errno.EROFS),
    "sidecar's rename": ("replace", lambda old, new: str(new).endswith(".json"), errno.EACCES),
}


@pytest.mark.parametrize(("function", "applies", "code"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("there", [False, True], ids=["fresh", "rebuild"])
def test_refusing_disk_costs_the_cache_not_the_engine(
    folder, there, function, applies, code, monkeypatch, caplog
):
    cache = EngineCache(folder, "rebuild" if there else "readwrite")
    if there:
        put(EngineCache(folder))
        shutil.rmtree(folder / "locks")  # as in a folder that was copied
    real = getattr(os, function)

    def refusing(*args, **kwargs):
        if applies(*args):
            raise OSError(code, os.strerror(code), str(args[0]))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refusing)
        build = Builder()
        entry = cache.get_or_build(ingredients(), build)
    assert build.calls == 1
    assert entry.path is None
    assert entry.data == engine()
    assert len(warnings(caplog)) == 1
    assert os.strerror(code) in warnings(caplog)[0]
    assert "serves this run only" in warnings(caplog)[0]
    assert "MODEL.TENSORRT.CACHE.DIR" in warnings(caplog)[0]
    left = files(cache) if folder.exists() else set()
    assert left in (set(), files_of(KEY))
    assert EngineCache(folder).get_or_build(ingredients(), build).data == engine()
    assert len(warnings(caplog)) == 1


def test_disk_that_fills_up_in_the_middle_leaves_no_half_written_file(cache, monkeypatch, caplog):
    monkeypatch.setattr(cache_files, "_CHUNK", 1000)
    real, written = os.write, []

    def filling(fd, data):
        if len(data) == 1000:
            written.append(fd)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", filling)
    entry = cache.get_or_build(ingredients(), Builder())
    assert entry.path is None
    assert files(cache) == set()
    assert f"{KEY}.engine" in warnings(caplog)[0]


def test_short_writes_are_continued(cache, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    put(cache)
    assert EngineCache(cache.directory).load(KEY).data == engine()


def test_cached_engine_of_a_read_only_disk_is_used_without_a_word(folder, monkeypatch, caplog):
    put(EngineCache(folder))

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    real = os.open
    monkeypatch.setattr(
        os, "open", lambda p, f, *a, **k: refuse() if f & (os.O_WRONLY | os.O_RDWR) else real(p, f, *a, **k)
    )
    monkeypatch.setattr(os, "utime", refuse)
    build = Builder()
    assert EngineCache(folder).get_or_build(ingredients(), build).data == engine()
    assert build.calls == 0
    assert warnings(caplog) == []


def test_file_in_the_place_of_the_folder_costs_the_cache_not_the_engine(folder, caplog):
    folder.write_text("a file")
    entry = EngineCache(folder).get_or_build(ingredients(), Builder())
    assert entry.path is None
    assert len(warnings(caplog)) == 1
    assert folder.read_text() == "a file"


def test_file_system_without_locks_still_caches(folder, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(cache_files.fcntl, "flock", unsupported)
    build = Builder()
    EngineCache(folder).get_or_build(ingredients(), build)
    assert EngineCache(folder).get_or_build(ingredients(), build).data == engine()
    assert build.calls == 1
    assert any("has no file locks" in w for w in warnings(caplog))


# Size.


def entry_size(cache: EngineCache) -> int:
    return max(e.size for e in cache.list())


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
    user.close()
    put(other, 3)
    assert [e.key for e in other.list()] == [key_of(3)]


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
    both_building = threading.Barrier(2, timeout=20)
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
