"""Entries that are not what was written, and disks that refuse: never an error, never a wrong engine."""

import builtins
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from d2_trt import cache_entry, cache_files
from d2_trt.cache import BuiltEngine, EngineCache
from d2_trt.cache_failure import BuildFailure, read_failure, write_failure
from d2_trt.cache_key import digest
from d2_trt.errors import BuildError
from tests.d2_trt.cache_helpers import (
    SIZE,
    Builder,
    engine,
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


def rewrite_sidecar(path: Path, change) -> None:
    """Change a sidecar and make its checksum right again."""
    sidecar = json.loads(path.read_text())
    del sidecar["checksum"]
    change(sidecar)
    path.write_text(json.dumps({**sidecar, "checksum": digest(sidecar)}))


# What is damaged.


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
            found = cache.load(KEY)
            # White space between JSON's tokens says nothing.
            assert found is None or found.sidecar == json.loads(whole), position
            path.write_bytes(whole)
        assert cache.load(KEY).data == b"abc"


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
    entry, problem = cache._store.read(KEY)
    assert problem == ""
    assert len(entry.data) == SIZE + 1


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


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"kind": "BuildError"}',
        b'{"kind": "SystemExit", "message": "", "terms": {}, "by": "", "id": ""}',
        b'{"kind": [], "message": "", "terms": {}, "by": "", "id": ""}',
    ],
)
def test_damaged_failure_is_none(tmp_path, content):
    path = tmp_path / "key.failed"
    failure = BuildFailure.of(BuildError("no"), {"verify": (1, None)})
    write_failure(path, failure)
    assert read_failure(path) == failure and failure.is_for({"verify": (1, None)})
    path.write_bytes(content)
    assert read_failure(path) is None
