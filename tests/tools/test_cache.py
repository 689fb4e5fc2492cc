"""tools/cache.py from its arguments to its exit status."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2_trt.cache import EngineCache
from d2_trt.cache_timing import TimingCache
from tests.d2_trt.cache_helpers import Builder, files, files_of, ingredients, key_of, put
from tests.tools.loading import REPO, load_tool

TOOL = load_tool("cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Three engines in the default folder, number 2 the last used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = EngineCache(tmp_path / "d2_trt")
    for number in range(3):
        put(cache, number)
    return cache


def timing(cache: EngineCache) -> TimingCache:
    return TimingCache(cache.directory, tensorrt="8.6.0", gpu="NVIDIA H200", compute_capability=(9, 0))


def damage(cache: EngineCache, number: int) -> None:
    path = cache.directory / f"{key_of(number)}.engine"
    path.write_bytes(b"x" * path.stat().st_size)


def test_list_shows_what_tells_engines_apart(cache, capsys):
    timing(cache).merge(b"timings", None)
    os.truncate(cache.directory / f"{key_of(0)}.engine", 5)
    assert TOOL.main(["list"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [key_of(n)[:12] for n in (2, 1, 0)]
    for text in ("NVIDIA H200", "8.6.0", "fp16", "256..1344", "ok", time.strftime("%Y-%m-%d")):
        assert text in lines[2], text
    assert "has 5 bytes instead of 4,000" in lines[4]
    assert f"3 engines, 0.0 MB, in {cache.directory}" in out
    assert "1 timing cache," in out


def test_list_as_json(cache, capsys):
    user = EngineCache(cache.directory)
    user.get_or_build(ingredients(1), Builder(1))
    assert TOOL.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [e["key"] for e in listed] == [key_of(1), key_of(2), key_of(0)]
    assert [e["in_use"] for e in listed] == [True, False, False]
    assert listed[0]["sidecar"]["ingredients"] == ingredients(1)
    assert Path(listed[0]["path"]).stat().st_size == 4000


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_folder(tmp_path, capsys, order):
    put(EngineCache(tmp_path / "other"))
    words = ["--dir", str(tmp_path / "other")]
    assert TOOL.main([*words, "list"] if order == "before" else ["list", *words]) == 0
    assert "1 engine," in capsys.readouterr().out


def test_list_of_a_folder_that_is_not_there_makes_none(tmp_path, capsys):
    assert TOOL.main(["list", "--dir", str(tmp_path / "none")]) == 0
    assert "0 engines" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_verify_of_sound_engines(cache, capsys):
    assert TOOL.main(["verify"]) == 0
    assert "3 engines checked" in capsys.readouterr().out


def test_verify_finds_and_removes_damaged_engines(cache, capsys):
    damage(cache, 1)
    assert TOOL.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "sha256 does not match" in out
    assert key_of(1)[:12] in out
    assert key_of(0)[:12] not in out
    assert len(cache.list()) == 3
    assert TOOL.main(["verify", "--remove"]) == 1
    assert "Removed 1 engine\n" in capsys.readouterr().out
    assert TOOL.main(["verify"]) == 0
    assert files(cache) == files_of(key_of(0), key_of(2))


def test_prune_to_a_size(cache, capsys):
    gigabytes = 1.5 * cache.list()[0].size / 1e9
    assert TOOL.main(["prune", "--max-gb", f"{gigabytes}", "--dry-run"]) == 0
    assert "Would remove 2 engines" in capsys.readouterr().out
    assert len(cache.list()) == 3
    assert TOOL.main(["prune", "--max-gb", f"{gigabytes}"]) == 0
    assert [e.key for e in cache.list()] == [key_of(2)]


@pytest.mark.parametrize(
    ("age", "left"), [("3", 2), ("3d", 2), ("49h", 2), ("1d", 1), ("90m", 0), ("1w", 3), ("0.5d", 1)]
)
def test_prune_by_age(cache, age, left):
    for number, days in enumerate((4, 2, 0.1)):
        used = time.time() - days * 86400
        os.utime(cache.directory / f"{key_of(number)}.json", (used, used))
    assert TOOL.main(["prune", "--older-than", age]) == 0
    assert len(cache.list()) == left


def test_prune_alone_removes_only_what_is_useless(cache):
    os.truncate(cache.directory / f"{key_of(1)}.json", 5)
    (cache.directory / f".{key_of(5)}.engine.1-aa.tmp").write_bytes(b"half")
    assert TOOL.main(["prune"]) == 0
    assert files(cache) == files_of(key_of(0), key_of(2))


def test_prune_all_takes_timing_caches_too(cache, capsys):
    timing(cache).merge(b"timings", None)
    assert TOOL.main(["prune", "--all", "--dry-run"]) == 0
    assert "Would remove 3 engines" in capsys.readouterr().out
    assert timing(cache).load() == b"timings"
    assert TOOL.main(["prune", "--all"]) == 0
    assert files(cache) == set()


def test_prune_tells_of_engines_in_use(cache, capsys):
    user = EngineCache(cache.directory)
    user.get_or_build(ingredients(1), Builder(1))
    assert TOOL.main(["prune", "--all"]) == 1
    assert "1 engine remains, 1 of them in use" in capsys.readouterr().err
    assert [e.key for e in cache.list()] == [key_of(1)]
    user.close()
    assert TOOL.main(["prune", "--max-gb", "0"]) == 0
    assert cache.list() == []


def test_path(cache, capsys):
    assert TOOL.main(["path"]) == 0
    assert TOOL.main(["path", key_of(1)[:12].upper()]) == 0
    assert capsys.readouterr().out == f"{cache.directory}\n{cache.directory / key_of(1)}.engine\n"
    assert TOOL.main(["path", "zz"]) == 2
    assert "no engine's key begins with 'zz'" in capsys.readouterr().err
    assert TOOL.main(["path", ""]) == 2
    assert "3 engines' keys begin with ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["clean"], "invalid choice: 'clean'"),
        (["prune", "--max-gb", "-1"], "'-1' is not a number of GB"),
        (["prune", "--max-gb", "nan"], "'nan' is not a number of GB"),
        (["prune", "--max-gb", "much"], "'much' is not a number of GB"),
        (["prune", "--older-than", "30 days"], "'30 days' is not an age such as 30d"),
    ],
)
def test_wrong_words_end_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        TOOL.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_that_cannot_be_read_ends_with_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert TOOL.main(["list", "--dir", str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_as_a_program(cache):
    command = [sys.executable, str(REPO / "tools" / "cache.py"), "path"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert (result.returncode, result.stdout) == (0, f"{cache.directory}\n"), result.stderr
