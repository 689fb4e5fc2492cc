"""tools/build_engine.py from its arguments to its exit status, on a CPU with doubles of what builds engines."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from PIL import Image

from d2_trt import builder, compat, requirements
from d2_trt.backend import TensorRTBackend
from d2_trt.errors import BuildError, ConversionError, MissingDependencyError
from mask2former import get_mask2former_cfg
from mask2former.data.datasets.shapes import draw_scene
from tests.d2_trt.backend_helpers import TinyModel, workshop  # noqa: F401
from tests.tools.loading import REPO, load_tool
from tests.tools.test_demo import MINI

CONFIG = REPO / "configs" / "coco" / "panoptic-segmentation" / "maskformer2_R50_bs16_50ep.yaml"
SIZES = ("64x64", "64x96", "128x128")


TOOL = load_tool("build_engine")

import engine_config  # noqa: E402 - beside the tool
import engine_images  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "model.pth"
    torch.save({"model": {}}, path)
    return path


@pytest.fixture
def shop(workshop, monkeypatch):  # noqa: F811
    """A workshop for a model of a moment."""
    monkeypatch.setattr(requirements, "require", lambda *_, **__: None)
    monkeypatch.setattr(engine_config, "load_model", lambda cfg: TinyModel())
    return workshop


@pytest.fixture
def run(checkpoint, tmp_path):
    """Exit status, and what was written as JSON."""

    def call(*words: str, opts=(), weights=True) -> tuple[int, list[dict]]:
        file = tmp_path / "built.json"
        chosen = ["--weights", str(checkpoint)] if weights else []
        words = ["--config-file", str(CONFIG), *chosen, "--json", str(file), *words]
        status = TOOL.main([*words, "--opts", "MODEL.DEVICE", "cpu", *opts])
        return status, json.loads(file.read_text())["engines"] if file.exists() else []

    return call


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


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """No data sets, whatever this machine has."""

    def fail(cfg):
        raise FileNotFoundError("data set 'x' lacks its files")

    monkeypatch.setattr(engine_images, "check_test_sets", fail)


def make_pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((60, 90, 3), (10 + i, 100, 200), np.uint8)).save(folder / f"{i}.png")
    return folder


def values(batch: torch.Tensor) -> set[tuple[int, ...]]:
    """The colours of plain images of a batch."""
    return {
        tuple(round(x) for x in image.mean((1, 2)).tolist()) for image in batch if image.std((1, 2)).max() < 1
    }


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_engine_is_traced_and_compared_with_the_images_that_are_named(
    shop, run, no_data, tmp_path, capsys, order
):
    make_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    words = ("--shapes", *SIZES, "--batch", "1", "--precision", "fp32", "fp16")
    opts = ["INPUT.FORMAT", order]
    status, engines = run(*words, "--images", str(tmp_path / "pictures"), opts=opts)
    assert status == 0
    for engine in engines:
        assert (engine["parity"]["given_images"], engine["parity"]["drawn_scenes"]) == (3, 0)
    colours = {(10 + i, 100, 200) if order == "RGB" else (200, 100, 10 + i) for i in range(3)}
    seen = set().union(*map(values, shop.traced))
    assert len(seen) == 1 and seen <= colours
    assert capsys.readouterr().out.count("  on 3 real images\n") == 2


def test_images_are_of_the_test_set_where_it_is(shop, run, tmp_path, capsys, monkeypatch):
    folder = make_pictures(tmp_path / "pictures", 2)
    records = [{"file_name": str(folder / f"{i}.png"), "image_id": i} for i in range(2)]
    DatasetCatalog.register("build_engine_pictures", lambda: records)
    try:
        opts = ["DATASETS.TEST", "('build_engine_pictures',)", "DATALOADER.NUM_WORKERS", "0"]
        status, (engine,) = run("--shapes", *SIZES, "--batch", "1", opts=opts)
    finally:
        DatasetCatalog.remove("build_engine_pictures")
    assert status == 0 and engine["parity"]["given_images"] == 2
    assert values(shop.traced[0]) and values(shop.traced[0]) <= {(10, 100, 200), (11, 100, 200)}
    assert "on 2 real images" in capsys.readouterr().out


def test_drawn_scenes_are_told_where_there_are_no_images(shop, run, no_data, capsys, caplog):
    with caplog.at_level("WARNING", logger="d2_trt"):
        status, (engine,) = run("--shapes", *SIZES)
    assert status == 0 and engine["parity"]["given_images"] == 0
    printed = capsys.readouterr()
    assert "on drawn scenes alone: the first image that comes is compared, too\n" in printed.out
    told = printed.out + printed.err + caplog.text
    assert "No images of DATASETS.TEST are at hand (data set 'x' lacks its files): --images FILE" in told
    run("--shapes", *SIZES)
    printed = capsys.readouterr()
    assert "is compared, too (or with --images FILE --rebuild now)\n" in printed.out
    assert "No images of DATASETS.TEST" not in printed.out + printed.err  # nothing was to be built


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "--images: no such file or folder"),
        ("damaged.png", "damaged.png: cannot identify image file"),
        ("empty", "holds no image or video"),
        ("clip.mp4", "--images names videos alone"),
    ],
)
def test_images_that_cannot_be_used_end_with_status_2(shop, run, tmp_path, capsys, name, message):
    (tmp_path / "damaged.png").write_text("no picture")
    (tmp_path / "clip.mp4").write_text("a video")
    (tmp_path / "empty").mkdir()
    status, _ = run("--shapes", *SIZES, "--images", str(tmp_path / name))
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("build_engine.py: --images") and message in err
    assert not shop.built


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


@pytest.mark.parametrize(
    ("words", "opts", "message"),
    [
        (["--shapes", "64x64", "64x96"], [], "2 sizes; allowed: one, or three"),
        (
            ["--shapes", "60x64"],
            [],
            r"has '60x64'; allowed: heights and widths above 0 that are multiples of 32",
        ),
        (["--shapes", "96x96", "64x64", "128x128"], [], "allowed: no height and no width smaller"),
        (["--batch", "1", "2", "4"], [], "--batch has 3 numbers"),
        (["--batch", "2", "4"], [], "OPT_BATCH_SIZE is 4; allowed: a whole number from 0 to 2"),
        (["--static"], [], "name the padded sizes, --shapes HxW"),
        (["--static", "--shapes", "64x60"], [], "padded to multiples of 32"),
        (["--static", "--shapes", "64x64", "64x64"], [], "--shapes names one twice"),
        (["--static", "--shapes", "64x2048"], [], "outside this engine's range"),
        (["--static", "--shapes", "64x64"], ["MODEL.TENSORRT.STATIC", "False"], "leave one out"),
        (["--precision", "fp16"], ["MODEL.TENSORRT.PRECISION", "fp32"], "PRECISION is given twice"),
        ([], ["MODEL.WEIGHTS", "x"], "MODEL.WEIGHTS is given twice"),
        ([], ["MODEL.TENSORRT.PRECISION", "fp7"], "PRECISION is 'fp7'; allowed: 'fp32'"),
        ([], ["MODEL.TENSORRT.PRECISON", "fp32"], "did you mean PRECISION?"),
        ([], ["MODEL.TENSORRT.STATIC", "1"], "MODEL.TENSORRT.STATIC is 1; allowed: True or False"),
        ([], ["MODEL.TENSORRT.OPT_LEVEL"], "KEY VALUE pairs"),
    ],
)
def test_wrong_requests_end_with_status_2(shop, run, capsys, words, opts, message):
    status, engines = run(*words, opts=opts)
    assert (status, engines, shop.built) == (2, [], [])
    err = capsys.readouterr().err
    assert err.startswith("build_engine.py: ") and message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config-file"),
        (["--config-file", "a", "--shapes", "64"], "'64' is not a padded size"),
        (["--config-file", "a", "--shapes", "0x64"], "'0x64' is not a padded size"),
        (["--config-file", "a", "--batch", "0"], "'0' is not a whole number"),
        (["--config-file", "a", "--precision", "int4"], "invalid choice: 'int4'"),
        (["--config-file", "a", "--precision", "fp16", "fp16"], "--precision names one twice"),
        (["--config-file", "a", "--weights", "b", "--random-weights"], "not allowed with"),
        (["--config-file", "a", "--json", "no/such/folder/file"], "there is no folder"),
    ],
)
def test_wrong_words_end_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        TOOL.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(workshop, run, capsys, tmp_path, checkpoint, monkeypatch):  # noqa: F811
    status, _ = run("--weights", str(tmp_path / "none.pth"), weights=False)
    assert status == 2 and "none.pth: there is no such file" in capsys.readouterr().err
    status, _ = run(weights=False)
    assert status == 2 and "is a backbone to start training from" in capsys.readouterr().err
    assert TOOL.main(["--config-file", "none.yaml"]) == 2
    assert "'none.yaml' does not exist" in capsys.readouterr().err
    monkeypatch.setattr(requirements, "require", lambda *_, **__: None)
    checkpoint.write_bytes(b"no checkpoint")
    status, _ = run()
    err = capsys.readouterr().err
    assert status == 2 and f"MODEL.WEIGHTS {checkpoint} cannot be loaded (" in err and "Traceback" not in err


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_machine_without_gpu_tensorrt_and_torch2trt_is_one_error(
    checkpoint, capsys, monkeypatch, tmp_path, device
):
    """Before the model is built, which takes the GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine_config, "build_model", lambda cfg: pytest.fail("a model was built"))
    compat.tensorrt.cache_clear()
    for name in ("tensorrt", "torch2trt"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--config-file", str(CONFIG), "--weights", str(checkpoint), "--opts", "MODEL.DEVICE", device]
    for more in ([], ["MODEL.TENSORRT.CACHE.MODE", "require"]):  # which is not what decides here
        assert TOOL.main([*words, *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith(
            "build_engine.py: Building engines takes a GPU, TensorRT and torch2trt. Missing: "
        )
        for text in ("PyTorch", "`pip install tensorrt`", "`pip install --no-build-isolation git+"):
            assert text in err
        assert "MODEL.BACKEND" not in err and "Traceback" not in err


def test_missing_converter_library(shop, run, capsys):
    shop.fail = MissingDependencyError("building an engine needs torch2trt")
    status, _ = run("--shapes", *SIZES)
    assert status == 2 and "needs torch2trt" in capsys.readouterr().err
    shop.fail = ConversionError("no converter for torch.celu in module 'x'")
    status, (engine,) = run("--shapes", *SIZES)
    assert status == 1 and "no converter for torch.celu" in engine["error"]


def test_gpu_without_room_for_the_model(workshop, run, capsys, monkeypatch):  # noqa: F811
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
