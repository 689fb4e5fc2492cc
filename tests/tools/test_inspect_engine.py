"""tools/inspect_engine.py from its arguments to its exit status: sidecars anywhere, layers with TensorRT or its double."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from d2_trt import compat, engine_source, requirements
from d2_trt.cache import EngineCache
from mask2former import get_mask2former_cfg
from tests.d2_trt.cache_helpers import key_of, put
from tests.d2_trt.test_backend_conversion import InterpretedEngine
from tests.doubles import conversion
from tests.doubles.fake_tensorrt import use_tensorrt
from tests.doubles.fixtures import VERSIONS
from tests.tools.build_engine_helpers import CONFIG
from tests.tools.build_engine_helpers import TOOL as BUILD
from tests.tools.loading import REPO, load_tool
from tests.tools.test_demo import MINI

SIZES = ("64x64", "64x96", "96x96")
MINI_WORDS = [word for pair in MINI.items() for word in pair]


TOOL = load_tool("inspect_engine")


@pytest.fixture
def no_gpu(monkeypatch):
    """Nor TensorRT, nor torch2trt."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compat.tensorrt.cache_clear()
    for name in ("tensorrt", "torch2trt"):
        monkeypatch.setitem(sys.modules, name, None)
    yield
    compat.tensorrt.cache_clear()


@pytest.fixture
def cache(kept, no_gpu):
    return kept


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Three entries that are no real engines, in the default folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = EngineCache(tmp_path / "d2_trt")
    for number in range(3):
        put(cache, number)
    return cache


def engine_file(cache: EngineCache, number: int) -> Path:
    return cache.directory / f"{key_of(number)}.engine"


@pytest.mark.parametrize("how", ["key", "short key", "file", "folder"])
def test_sidecar_is_shown_without_a_gpu(cache, capsys, tmp_path, how):
    words = {
        "key": [key_of(1)],
        "short key": [key_of(1)[:12].upper()],
        "file": [str(engine_file(cache, 1))],
        "folder": ["--dir", str(cache.directory), key_of(1)[:12]],
    }[how]
    file = tmp_path / "told.json"
    assert TOOL.main([*words, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    sidecar = json.loads(engine_file(cache, 1).with_suffix(".json").read_text())
    made_from = sidecar["ingredients"]
    for text in (
        key_of(1),
        "NVIDIA H200",
        made_from["tensorrt"],
        made_from["weights"],
        made_from["options"]["precision"],
    ):
        assert text in out
    line, *more = out[out.index("Its layers are not shown") :].splitlines()
    assert line.endswith(": Running engines takes a GPU and TensorRT. Missing: a GPU, TensorRT.")
    gpu, tensorrt = more
    assert gpu.startswith("  a GPU: PyTorch ") and tensorrt.endswith("`pip install tensorrt`")
    told = json.loads(file.read_text())
    assert told["sidecar"] == sidecar and told["problem"] == ""


def test_looking_changes_nothing(cache):
    before = {p: p.stat().st_mtime_ns for p in cache.directory.rglob("*")}
    assert TOOL.main([key_of(1)]) == 0
    assert {p: p.stat().st_mtime_ns for p in cache.directory.rglob("*")} == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def no_json(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def no_sidecar(path: Path) -> None:
    path.with_suffix(".json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: os.truncate(path, 5), "does not match the sidecar's sha256"),
        (flip, "does not match the sidecar's sha256"),
        (lambda path: flip(path.with_suffix(".json")), "PROBLEM: its sidecar is"),
        (no_json, "its sidecar is not JSON"),
        (no_sidecar, "its sidecar is not one of this cache"),
    ],
)
def test_damaged_engine_is_not_opened(cache, capsys, monkeypatch, spoil, message):
    spoil(engine_file(cache, 1))
    monkeypatch.setattr(TOOL, "find_device", lambda: pytest.fail("it was opened"))
    assert TOOL.main([str(engine_file(cache, 1))]) == 1
    out = capsys.readouterr().out
    assert message in out and "is not opened" in out


def test_another_engine_under_an_entrys_name_is_not_opened(cache, capsys, monkeypatch):
    shutil.copy(engine_file(cache, 1), engine_file(cache, 0))
    monkeypatch.setattr(TOOL, "find_device", lambda: pytest.fail("it was opened"))
    assert TOOL.main([key_of(0)]) == 1
    assert "does not match the sidecar's sha256" in capsys.readouterr().out


def test_entry_without_its_engine(cache, capsys):
    engine_file(cache, 1).unlink()
    assert TOOL.main([key_of(1)]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: the engine's file is missing" in out and "8.6.0" in out


def test_file_alone_needs_a_gpu(cache, capsys, tmp_path):
    shutil.copy(engine_file(cache, 1), tmp_path / "alone.plan")
    assert TOOL.main([str(tmp_path / "alone.plan")]) == 2
    captured = capsys.readouterr()
    assert "no sidecar is beside it" in captured.out
    assert "not even whether it is an engine" in captured.err
    assert "Missing: a GPU, TensorRT." in captured.err and "`pip install tensorrt`" in captured.err


@pytest.mark.parametrize("beside", [None, "[1, 2]", '{"name": "notes"}'], ids=["alone", "list", "dict"])
@pytest.mark.parametrize(("content", "what"), [("Buy milk. \u00fc\n", "is text"), ("", "is empty")])
def test_file_that_is_no_engine_ends_with_status_2(capsys, tmp_path, monkeypatch, content, what, beside):
    monkeypatch.setattr(TOOL, "find_device", lambda: pytest.fail("it was opened"))
    file = tmp_path / "notes.txt"
    file.write_text(content)
    if beside is not None:
        file.with_suffix(".json").write_text(beside)
    assert TOOL.main([str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"inspect_engine.py: {file} {what}, and no engine: name a file")
    assert captured.out == ""


def test_json_that_is_no_sidecar_is_no_engine(capsys, tmp_path):
    (tmp_path / "package.json").write_text('{"name": "package"}')
    assert TOOL.main([str(tmp_path / "package.json")]) == 2
    assert "package.json is text, and no engine" in capsys.readouterr().err


def test_sidecar_may_be_named_for_its_engine(cache, capsys):
    assert TOOL.main([str(engine_file(cache, 1).with_suffix(".json"))]) == 0
    out = capsys.readouterr().out
    assert str(engine_file(cache, 1)) in out and "NVIDIA H200" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fff"], "no engine's key begins with 'fff'"),
        ([""], "3 engines' keys begin with ''"),
        (["no/such.engine"], "there is no file no/such.engine"),
        (["such.engine"], "there is no file such.engine"),
        (["--config-file", "none.yaml", "--random-weights"], "'none.yaml' does not exist"),
        (["--config-file", str(CONFIG)], "is a backbone to start training from"),
        (["--config-file", str(CONFIG), "--random-weights"], "Missing: a GPU, TensorRT."),
    ],
)
def test_what_cannot_be_found_ends_with_status_2(cache, capsys, words, message):
    assert not any(key_of(n).startswith("fff") for n in range(3))
    assert TOOL.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("inspect_engine.py: ") and message in err


@pytest.mark.parametrize("words", [["--layers"], ["--profile", "64x64"], ["--csv", "layers.csv"]])
def test_layers_that_were_asked_for_need_a_gpu(cache, capsys, words):
    assert TOOL.main([key_of(1), *words]) == 2
    captured = capsys.readouterr()
    assert "layers and times cannot be shown: Running engines takes a GPU and TensorRT." in captured.err
    assert "`pip install tensorrt`" in captured.err and "NVIDIA H200" in captured.out


def test_missing_tensorrt_is_said_in_a_line(cache, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert TOOL.main([key_of(1)]) == 0
    out = capsys.readouterr().out
    assert "Its layers are not shown: Running engines takes a GPU and TensorRT. Missing: TensorRT.\n" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name an engine"),
        (["abc", "--config-file", "a"], "one of them"),
        (["abc", "--weights", "w"], "--weights goes with --config-file"),
        (["abc", "--precision", "fp16"], "--precision goes with --config-file"),
        (["abc", "--opts", "A", "1"], "--opts goes with --config-file"),
        (["--config-file", "a", "--dir", "d"], "MODEL.TENSORRT.CACHE.DIR DIR"),
        (["abc", "--profile", "64"], "'64' is not a padded size"),
        (["abc", "--runs", "0"], "'0' is not a whole number"),
        (["abc", "--csv", "no/such/folder/file"], "there is no folder no/such/folder"),
    ],
)
def test_wrong_words_end_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        TOOL.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_as_a_program(cache):
    command = [sys.executable, str(REPO / "tools" / "inspect_engine.py"), key_of(1)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", env=env)
    assert result.returncode == 0 and key_of(1) in result.stdout, result.stderr


# Engines that open: of the double of TensorRT, and real ones


@pytest.fixture
def double(monkeypatch, tmp_path):
    """The double of TensorRT 8.6 in the place of a GPU."""
    with use_tensorrt(VERSIONS[0]) as trt:
        create = trt.Builder.create_network

        def create_network(self, flags=0):
            network = create(self, flags)
            network.examples = {"images": [(1, 3, 64, 64), (1, 3, 64, 96), (1, 3, 96, 96)]}
            return network

        monkeypatch.setattr(trt.Builder, "create_network", create_network, raising=False)
        conversion.use_conversion(monkeypatch)
        monkeypatch.setattr(requirements, "require", lambda *_, **__: compat.tensorrt())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Double GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(engine_source, "Engine", InterpretedEngine)
        monkeypatch.setattr(TOOL, "find_device", lambda: torch.device("cpu"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        yield trt


def config_words(checkpoint: Path, *opts: str) -> list[str]:
    shapes = ["MODEL.TENSORRT.SHAPES", str(list(SIZES)), "MODEL.TENSORRT.OPT_LEVEL", "0"]
    words = ["--config-file", str(CONFIG), "--weights", str(checkpoint), "--precision", "fp32", "--opts"]
    return [*words, *MINI_WORDS, *shapes, *opts]


def make_checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = build_model(get_mask2former_cfg(CONFIG, [*MINI_WORDS, "MODEL.DEVICE", "cpu"]))
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def without_log(text: str) -> str:
    """What a tool prints, without the log lines that a real TensorRT adds at times of its own."""
    return "".join(
        line for line in text.splitlines(keepends=True) if not re.match(r"\S* ?\[\d\d/\d\d ", line)
    )


def check_engine(words: list[str], tmp_path: Path, capsys) -> None:
    """Build an engine with one tool, and look at it with the other."""
    assert TOOL.main(words) == 2  # it is not built for being looked at
    assert "has no engine" in capsys.readouterr().err
    assert BUILD.main(["--json", str(tmp_path / "built.json"), *words]) == 0
    (built,) = json.loads((tmp_path / "built.json").read_text())["engines"]
    capsys.readouterr()

    assert TOOL.main(words) == 0
    by_config = without_log(capsys.readouterr().out)
    assert TOOL.main([built["engine"]]) == 0
    assert without_log(capsys.readouterr().out) == by_config
    for text in (
        built["key"],
        "Against PyTorch float32",
        "1x3x64x64",
        "pred_masks",
        "layers for images of 1x3x64x96",
    ):
        assert text in by_config

    names = {name: tmp_path / f"layers.{name}" for name in ("csv", "json")}
    more = ["--layers", "--runs", "3", "--profile", "96x64", "--top", "7"]
    more += [w for name, path in names.items() for w in (f"--{name}", str(path))]
    assert TOOL.main([built["engine"], *more]) == 0
    out = capsys.readouterr().out
    assert (
        "Times for 1 image of 96x64, mean of 3 runs" in out
        and "By module:" in out
        and "(--top, --csv)" in out
    )
    told = json.loads(names["json"].read_text())
    assert told["sidecar"]["key"] == built["key"]
    assert told["summary"]["count"] == len(told["layers"]) and told["summary"]["plugins"]
    profile = told["profile"]
    assert profile["images"] == [1, 3, 96, 64] and profile["run_ms"] > 0
    for group in profile["groups"].values():
        assert sum(row["share"] for row in group) == pytest.approx(1.0)
    assert any(row["name"].startswith("sem_seg_head.") for row in profile["groups"]["module"])
    with open(names["csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    timed = {row["name"]: float(row["ms"]) for row in rows if row["ms"]}
    assert timed == pytest.approx({t["name"]: t["ms"] for t in profile["layers"]}, abs=1e-6)

    assert TOOL.main([built["engine"], "--profile", "160x64"]) == 2
    assert "outside this engine's range 1..1 (B), 64..96 (H)" in capsys.readouterr().err


def test_engine_of_a_config_is_built_and_looked_at(double, tmp_path, capsys):
    check_engine(config_words(make_checkpoint(tmp_path), "MODEL.DEVICE", "cpu"), tmp_path, capsys)


def test_static_config_needs_a_size(double, tmp_path, capsys):
    words = config_words(make_checkpoint(tmp_path), "MODEL.DEVICE", "cpu", "MODEL.TENSORRT.STATIC", "True")
    assert TOOL.main(words) == 2
    assert "name one by --profile HxW" in capsys.readouterr().err
    assert TOOL.main(["--profile", "64x96", *words]) == 2
    assert "has no engine" in capsys.readouterr().err
    assert TOOL.main(["--profile", "64x256", *words]) == 2
    assert "outside this engine's range" in capsys.readouterr().err


def test_engine_that_tensorrt_refuses(double, tmp_path, capsys):
    (tmp_path / "foreign.engine").write_bytes(b"\0of another TensorRT")
    assert TOOL.main([str(tmp_path / "foreign.engine")]) == 2
    captured = capsys.readouterr()
    assert "is no engine, or one of another TensorRT" in captured.err
    assert "the engine does not load" in captured.err and "no sidecar is beside it" in captured.out


def test_engine_with_a_sidecar_that_tensorrt_refuses(double, kept, capsys):
    assert TOOL.main([str(engine_file(kept, 1))]) == 1
    captured = capsys.readouterr()
    assert "the engine does not load" in captured.err and "NVIDIA H200" in captured.out


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_real_engine_of_a_config_is_built_and_looked_at(tmp_path, capsys):
    words = config_words(make_checkpoint(tmp_path), "MODEL.TENSORRT.CACHE.DIR", str(tmp_path / "engines"))
    check_engine(words, tmp_path, capsys)
    told = json.loads((tmp_path / "layers.json").read_text())
    assert told["summary"]["detailed"] and "fp32" in told["summary"]["precisions"]
    # The profiler knows layers by the names that the inspector gives.
    known = {layer["name"] for layer in told["layers"]}
    timed = [t for t in told["profile"]["layers"] if t["name"] in known]
    assert sum(t["share"] for t in timed) > 0.9
