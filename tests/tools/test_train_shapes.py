"""tools/train_shapes.py: data, limit and resuming in one command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_shapes

from mask2former import get_mask2former_cfg
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What would be drawn and run."""
    made = []
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(
        train_shapes, "make_shapes_dataset", lambda root, options: bool(made.append((root, options)))
    )
    monkeypatch.setattr(train_shapes.train_net, "run", lambda words: made.append(words) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return made


def test_command_draws_and_hands_the_rest_to_train_net(calls):
    arguments = ["--model", "r50", "--resume", "--time-limit", "300", "--max-iter", "70", "--images", "5"]
    assert train_shapes.main([*arguments, "SOLVER.BASE_LR", "0.001"]) == 0
    (root, options), words = calls
    assert root == train_shapes.shapes_root() and options == ShapesOptions(train=5)
    assert words[:3] == ["--config-file", str(train_shapes.CONFIGS["r50"]), "--resume"]
    assert 290 < int(words[words.index("--time-limit") + 1]) <= 300
    args = train_shapes.train_net.build_parser().parse_args(words)
    cfg = get_mask2former_cfg(args.config_file, args.opts)
    assert cfg.OUTPUT_DIR == "output/shapes_r50" and cfg.MODEL.DEVICE == "cuda"
    assert cfg.SOLVER.MAX_ITER == 70 and cfg.SOLVER.BASE_LR == 0.001
    assert 1 <= cfg.DATALOADER.NUM_WORKERS <= 12


@pytest.mark.parametrize("model", ["r50", "small", "swin_t"])
def test_recipes_train_from_nothing_and_anneal_to_their_end(calls, model):
    assert train_shapes.main(["--model", model]) == 0
    args = train_shapes.train_net.build_parser().parse_args(calls[1])
    assert args.time_limit is None and not args.resume
    cfg = get_mask2former_cfg(args.config_file, args.opts)
    assert cfg.MODEL.WEIGHTS == "" and cfg.MODEL.RESNETS.NORM == "BN"
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR" and cfg.SOLVER.BACKBONE_MULTIPLIER == 1.0
    # More queries than a scene has segments.
    assert cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES > 20


@pytest.mark.parametrize("gpus, cores, workers", [(1, 64, 12), (2, 16, 8), (4, 16, 4), (4, 2, 1)])
def test_gpus_share_batch_and_cores(calls, monkeypatch, gpus, cores, workers):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(train_shapes.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert train_shapes.main(["--model", "swin_t", "--num-gpus", str(gpus)]) == 0
    args = train_shapes.train_net.build_parser().parse_args(calls[1])
    assert args.num_gpus == gpus
    cfg = get_mask2former_cfg(args.config_file, args.opts)
    # NUM_WORKERS is of each process, IMS_PER_BATCH of all of them.
    assert cfg.DATALOADER.NUM_WORKERS == workers and cfg.SOLVER.IMS_PER_BATCH == 32


@pytest.mark.parametrize("gpus", ["0", "3"])
def test_gpus_that_are_not_there_are_told_before_drawing(calls, monkeypatch, capsys, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_shapes.main(["--model", "small", "--num-gpus", gpus]) == 2
    assert f"--num-gpus {gpus}" in capsys.readouterr().err and calls == []


def test_swin_is_the_releases_swin_tiny(calls):
    assert train_shapes.main(["--model", "swin_t"]) == 0
    cfg = get_mask2former_cfg(str(train_shapes.CONFIGS["swin_t"]), [])
    release = get_mask2former_cfg(
        str(REPO / "configs/coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml"), []
    )
    assert cfg.MODEL.BACKBONE.NAME == release.MODEL.BACKBONE.NAME == "D2SwinTransformer"
    changed = {key for key, value in cfg.MODEL.SWIN.items() if value != release.MODEL.SWIN[key]}
    assert changed == {"DROP_PATH_RATE"}


def test_data_that_cannot_be_drawn_stops_it(calls, capsys, monkeypatch):
    assert train_shapes.main(["--model", "small", "--images", "0"]) == 2
    assert "each split needs at least one image" in capsys.readouterr().err and calls == []


def test_folder_that_cannot_be_written_to_ends_in_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    assert train_shapes.main(["--model", "small", "--images", "1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("train_shapes.py: ") and str(tmp_path / "file") in message


@pytest.mark.parametrize("seconds", ["0", "-5", "nan"])
def test_time_limit_that_is_none_is_refused_before_drawing(calls, capsys, seconds):
    assert train_shapes.main(["--model", "small", "--time-limit", seconds]) == 2
    assert "must be a positive number of seconds" in capsys.readouterr().err and calls == []


def test_resuming_does_not_draw_other_images(tmp_path, monkeypatch, capsys):
    runs = []
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(train_shapes.train_net, "run", lambda words: runs.append(words) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    root = tmp_path / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=2))
    before = (root / "manifest.json").read_bytes()
    assert train_shapes.main(["--model", "small", "--resume"]) == 2
    message = capsys.readouterr().err
    assert "--resume with --images 3000" in message and "has 2 training images" in message
    assert "Add --images 2" in message and not runs
    assert train_shapes.main(["--model", "small", "--resume", "--images", "2"]) == 0
    assert len(runs) == 1 and (root / "manifest.json").read_bytes() == before
    # Anew, it draws what is asked for.
    assert train_shapes.main(["--model", "small", "--images", "3", "--val", "2"]) == 0
    assert train_shapes.drawn_images(str(root)) == (3, 2)
    # The validation images that are there are good enough, whatever their number.
    assert train_shapes.main(["--model", "small", "--images", "3"]) == 0
    assert train_shapes.drawn_images(str(root)) == (3, 2)
    assert train_shapes.main(["--model", "small", "--images", "3", "--resume", "--val", "1"]) == 0
    assert train_shapes.drawn_images(str(root)) == (3, 1)


def test_images_that_are_gone_are_drawn_again_to_resume(calls):
    assert train_shapes.main(["--model", "small", "--resume", "--images", "4"]) == 0
    assert calls[0][1] == ShapesOptions(train=4)


def test_plain_command_is_the_one_of_the_weights_that_are_shipped(calls):
    assert train_shapes.main(["--model", "small"]) == 0
    args = train_shapes.train_net.build_parser().parse_args(calls[1])
    assert get_mask2former_cfg(args.config_file, args.opts).SOLVER.MAX_ITER == 4000
    assert "train_shapes.py --model small\n" in (REPO / "configs/shapes/README.md").read_text()


@pytest.mark.slow
def test_training_stops_in_time_and_goes_on(tmp_path):
    """The command as it is given, from an empty folder, on the CPU."""
    opts = (
        "SOLVER.IMS_PER_BATCH 2 INPUT.IMAGE_SIZE 64 MODEL.MASK_FORMER.TRAIN_NUM_POINTS 64 DATASETS.TEST () "
    )
    opts += "SOLVER.AMP.ENABLED False DATALOADER.NUM_WORKERS 1"
    command = [sys.executable, str(REPO / "tools/train_shapes.py"), "--model", "small", "--images", "3"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("DETECTRON2_DATASETS", None)

    def run(*arguments: str) -> str:
        words = [*command, *arguments, "--max-iter", "60", *opts.split()]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    first = run("--time-limit", "1")
    assert "drew 3 training and 100 validation images in datasets/shapes" in first
    # A second from the start: how many iterations that is, the machine decides.
    reached = int(re.search(r"the time limit is reached after (\d+) of 60 iterations", first)[1])
    folder = tmp_path / "output" / "shapes_small"
    assert (folder / "last_checkpoint").read_text() == f"model_{reached - 1:07}.pth"
    second = run("--resume")
    assert "found 3 training" in second and f"Starting training from iteration {reached}" in second
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
