"""tools/build_engine.py from its arguments to its exit status, on a CPU with doubles of what builds engines."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import engine_config
import pytest
import torch
from detectron2.engine import DefaultPredictor
from PIL import Image

from d2_trt import builder, compat, requirements
from d2_trt.backend import TensorRTBackend
from d2_trt.errors import BuildError, ConversionError, MissingDependencyError
from mask2former import get_mask2former_cfg
from mask2former.data.datasets.shapes import draw_scene
from tests.d2_trt.backend_helpers import TinyModel
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.tools.build_engine_helpers import CONFIG, SIZES, TOOL
from tests.tools.build_engine_helpers import checkpoint as checkpoint
from tests.tools.build_engine_helpers import run as run
from tests.tools.build_engine_helpers import shop as shop
from tests.tools.loading import REPO
from tests.tools.test_demo import MINI


def test_engine_is_built_once_where_the_backend_finds_it(shop, run, capsys, checkpoint):
    words = ("--shapes", *SIZES, "--batch", "4", "2", "--precision", "fp32")
    status, (built,) = run(*words)
    assert (status, built["state"]) == (0, "built")
    assert built["shapes"] == {"min": [1, 64, 64], "opt": [2, 64, 96], "max": [4, 128, 128]}
    assert Path(built["engine"]).stat().st_size == built["bytes"]
    assert json.loads(Path(built["sidecar"]).read_text())["key"] == built["key"]
    assert [row["images"] for row in built["parity"]["sizes"]] == ["2x3x64x96", "1x3x128x128", "4x3x64x64"]
    out = capsys.readouterr().out
    for text in (
        built["engine"],
        built["sidecar"],
        "built in",
        "mask error",
        "2x3x64x96",
        "1 engine: 1 built",
    ):
        assert text in out
    # With the overrides that it printed, a backend builds nothing.
    recipe = shlex.split(next(line for line in out.splitlines() if line.startswith("To run it: "))[11:])
    cfg = get_mask2former_cfg(CONFIG, recipe)
    assert cfg.MODEL.WEIGHTS == str(checkpoint)
    TensorRTBackend(TinyModel(), cfg).prepare()
    assert len(shop.built) == 1

    status, (cached,) = run(*words)
    assert (status, cached["state"], cached["key"]) == (0, "cached", built["key"])
    assert "cached (built in" in capsys.readouterr().out
    status, (rebuilt,) = run(*words, "--rebuild")
    assert (status, rebuilt["state"], rebuilt["key"]) == (0, "built", built["key"])
    assert len(shop.built) == 2


def test_several_precisions(shop, run, capsys):
    status, engines = run("--precision", "fp32", "fp16", "--shapes", *SIZES)
    assert status == 0
    assert [e["precision"] for e in engines] == [spec.precision for spec in shop.built] == ["fp32", "fp16"]
    assert len({e["key"] for e in engines}) == 2
    out = capsys.readouterr().out
    assert "2 engines: 2 built" in out and "To run fp32: " in out and "To run fp16: " in out


@pytest.mark.parametrize("how", ["argument", "config"])
def test_static_builds_an_engine_for_each_size_and_batch(shop, run, how):
    words = ("--shapes", "64x96", "96x64", "--batch", "1", "2", "--precision", "fp32")
    opts = ["MODEL.TENSORRT.SHAPES", str(list(SIZES))]
    if how == "argument":
        words = ("--static", *words)
    else:
        opts += ["MODEL.TENSORRT.STATIC", "True"]
    status, engines = run(*words, opts=opts)
    assert status == 0
    wanted = [[batch, *size] for batch in (1, 2) for size in ((64, 96), (96, 64))]
    assert [e["shapes"]["opt"] for e in engines] == wanted
    assert [list(spec.min_shape) for spec in shop.built] == wanted
    # Which is what the backend asks for when such images come.
    cfg = get_mask2former_cfg(CONFIG, [*opts, "MODEL.BACKEND", "tensorrt", "MODEL.TENSORRT.STATIC", True])
    cfg.merge_from_list(["MODEL.TENSORRT.PRECISION", "fp32", "MODEL.TENSORRT.MAX_BATCH_SIZE", 2])
    TensorRTBackend(TinyModel(), cfg)(torch.zeros(2, 3, 96, 64))
    assert len(shop.built) == 4


def test_one_size_is_an_engine_for_it_alone(shop, run):
    status, (engine,) = run("--shapes", "64x96", "--batch", "2")
    assert status == 0
    assert engine["shapes"] == {"min": [1, 64, 96], "opt": [2, 64, 96], "max": [2, 64, 96]}


@pytest.mark.parametrize("mode", ["off", "read", "require"])
def test_engine_is_kept_whatever_the_configs_cache_mode(shop, run, mode):
    status, (engine,) = run("--shapes", *SIZES, opts=["MODEL.TENSORRT.CACHE.MODE", mode])
    assert (status, engine["state"]) == (0, "built")
    assert Path(engine["engine"]).exists()


def test_failed_build_does_not_stop_the_others(shop, run, capsys, monkeypatch):
    build = builder.build_engine

    def fail_once(model, spec, *rest):
        if spec.precision == "fp16":
            raise BuildError("TensorRT built no engine: out of paper")
        return build(model, spec, *rest)

    monkeypatch.setattr(builder, "build_engine", fail_once)
    status, engines = run(
        "--precision", "fp16", "fp32", "--shapes", *SIZES, opts=["MODEL.TENSORRT.ON_ERROR", "torch"]
    )
    assert status == 1
    assert [e["state"] for e in engines] == ["failed", "built"]
    captured = capsys.readouterr()
    assert "FAILED" in captured.err and "out of paper" in captured.err
    assert "2 engines: 1 built, 1 failed" in captured.out and "To run fp16" not in captured.out


def test_inaccurate_engine_is_refused(shop, run, capsys, tmp_path):
    shop.disturb = lambda logits, masks: (logits, masks + masks.std())
    status, (engine,) = run("--precision", "fp32", "--shapes", *SIZES)
    assert (status, engine["state"]) == (1, "failed")
    assert "pred_masks: mask error is" in capsys.readouterr().err
    assert not list((tmp_path / "d2_trt").glob("*.engine"))


def test_engine_that_cannot_be_kept_is_a_failure(shop, run, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, (engine,) = run("--shapes", *SIZES, opts=["MODEL.TENSORRT.CACHE.DIR", str(tmp_path / "file")])
    assert (status, engine["state"], engine["engine"]) == (1, "failed", None)
    assert "not kept" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_finished(shop, run, capsys, monkeypatch, tmp_path):
    build = builder.build_engine

    def interrupt_second(model, spec, *rest):
        if spec.precision == "fp16":
            raise KeyboardInterrupt
        return build(model, spec, *rest)

    monkeypatch.setattr(builder, "build_engine", interrupt_second)
    status, engines = run("--precision", "fp32", "fp16", "--shapes", *SIZES)
    assert status == 130
    assert [e["precision"] for e in engines] == ["fp32"]
    assert "stopped; engines that were finished are kept" in capsys.readouterr().err
    folder = tmp_path / "d2_trt"
    assert [p.name for p in folder.glob("*.engine")] == [Path(engines[0]["engine"]).name]
    assert not [p for p in folder.rglob("*") if p.suffix == ".tmp"]


def test_missing_converter_library(shop, run, capsys):
    shop.fail = MissingDependencyError("building an engine needs torch2trt")
    status, _ = run("--shapes", *SIZES)
    assert status == 2 and "needs torch2trt" in capsys.readouterr().err
    shop.fail = ConversionError("no converter for torch.celu in module 'x'")
    status, (engine,) = run("--shapes", *SIZES)
    assert status == 1 and "no converter for torch.celu" in engine["error"]


def test_gpu_without_room_for_the_model(workshop, run, capsys, monkeypatch):
    def fail(cfg):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nAnd much more")

    monkeypatch.setattr(requirements, "require", lambda *_, **__: None)
    monkeypatch.setattr(engine_config, "build_model", fail)
    status, _ = run("--shapes", *SIZES)
    assert status == 1
    assert capsys.readouterr().err.endswith("the GPU's memory does not suffice: CUDA out of memory.\n")


def test_as_a_program():
    command = [sys.executable, str(REPO / "tools" / "build_engine.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120, cwd="/")
    assert shown.returncode == 0 and "--static" in shown.stdout
    result = subprocess.run(
        [*command, "--config-file", "none.yaml"], capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert result.returncode == 2 and "'none.yaml' does not exist" in result.stderr
    assert "Traceback" not in result.stderr


# On a GPU


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_predictor_loads_the_engine_that_was_built_ahead(tmp_path, monkeypatch, capsys):
    opts = [w for pair in MINI.items() for w in pair]
    opts += [
        "MODEL.TENSORRT.OPT_LEVEL",
        "0",
        "MODEL.TENSORRT.CACHE.DIR",
        str(tmp_path),
        "INPUT.MAX_SIZE_TEST",
        "96",
    ]
    file, photo = tmp_path / "built.json", tmp_path / "photo.png"
    Image.fromarray(draw_scene(5, 48, 72).image).save(photo)
    words = [
        "--images",
        str(photo),
        "--config-file",
        str(CONFIG),
        "--random-weights",
        "--precision",
        "fp32",
        "--batch",
        "1",
    ]
    words += ["--shapes", "64x64", "64x96", "96x96", "--json", str(file), "--opts", *opts]
    assert TOOL.main(words) == 0
    (engine,) = json.loads(file.read_text())["engines"]
    assert engine["state"] == "built" and all(row["mask_error"] < 2e-3 for row in engine["parity"]["sizes"])
    assert engine["parity"]["given_images"] == 1
    out = capsys.readouterr().out
    recipe = shlex.split(next(line for line in out.splitlines() if line.startswith("To run it: "))[11:])

    def refuse(*args, **kwargs):
        raise AssertionError("nothing was to be built")

    monkeypatch.setattr(builder, "build_engine", refuse)
    torch.manual_seed(0)  # the tool's random weights
    predictor = DefaultPredictor(get_mask2former_cfg(CONFIG, recipe))
    predictor(draw_scene(0, 48, 72).image)
    described = predictor.model.backend.describe()
    assert described["images"] == {"tensorrt": 1, "torch": 0}
    assert [e["key"] for e in described["engines"]] == [engine["key"]]
    assert compat.tensorrt().__version__ in Path(engine["sidecar"]).read_text()
