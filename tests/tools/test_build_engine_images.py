"""tools/build_engine.py: the images that engines are traced and compared with."""

from __future__ import annotations

from pathlib import Path

import engine_images
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from tests.d2_trt.backend_helpers import workshop as workshop
from tests.tools.build_engine_helpers import SIZES
from tests.tools.build_engine_helpers import checkpoint as checkpoint
from tests.tools.build_engine_helpers import run as run
from tests.tools.build_engine_helpers import shop as shop


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
