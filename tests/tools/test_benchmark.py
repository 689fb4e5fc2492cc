"""tools/benchmark.py with a mini model on the CPU: rows, table, CSV, and what it says of what fails."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from mask2former.backend import BACKEND_REGISTRY, TorchBackend
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from tests.d2_trt import backend_helpers
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.tools.loading import REPO, load_tool
from tests.tools.test_demo import MINI

OPTS = [word for pair in MINI.items() for word in pair]


@pytest.fixture(scope="module")
def benchmark():
    return load_tool("benchmark")


@pytest.fixture
def run(benchmark, tmp_path, monkeypatch):
    """Exit status, and the rows of the CSV file."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: str, opts=(), device="cpu") -> tuple[int, list[dict]]:
        quick = ["--warmup", "0", "--iterations", "2", "--rounds", "2", "--stream-images", "3"]
        argv = [*words, *quick, "--device", device, "--output", str(tmp_path)]
        status = benchmark.main([*argv, "--", *OPTS, *opts])
        rows = []
        for path in tmp_path.glob("*.csv"):
            with open(path, newline="") as file:
                rows += list(csv.DictReader(file))
        return status, rows

    return call


STAGES = ("core", "throughput", "postprocess", "forward", "predictor", "trt_predictor", "stream", "host")
STREAMS = ("stream", "stream_files")


def timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row["error"] and not row["stage"].startswith("ceiling")]


def tells_memory(row: dict) -> bool:
    """Whether a row has figures of memory, all of them; there is none where the GPU was seen to be used by others."""
    figures = [row[name] for name in ("resident_mib", "peak_mib", "weights_mib")]
    if "memory is not told: it fell by" in row["note"]:
        assert not any(figures), row
        return False
    peak, resident, weights = float(row["peak_mib"]), float(row["resident_mib"]), float(row["weights_mib"])
    assert peak >= resident >= weights > 0, row
    return True


@pytest.mark.slow
def test_sizes_batches_precisions_and_stages(run, capsys):
    status, rows = run(
        *("--image-size", "48x64", "--size", "64x96", "--batch", "1", "2"),
        *("--precision", "fp32", "bf16", "--all-tasks"),
    )
    assert status == 0 and all(not row["error"] for row in rows)
    ceilings = {r["stage"] for r in rows if r["stage"].startswith("ceiling")}
    assert ceilings == {"ceiling_copy", "ceiling_matmul_fp32", "ceiling_matmul_bf16"}
    rows = timed(rows)
    stages = [r["stage"] for r in rows]
    # Four stages for each size, batch and precision; predictors resize, and take one image; a stream takes batches.
    assert len(rows) == 2 * (2 * 2 * 4 + 2 + 2 * 2)
    assert stages.count("predictor") == stages.count("trt_predictor") == 2
    assert stages.count("stream") == stages.count("stream_files") == 4
    assert {(r["image"], r["padded"]) for r in rows} == {("48x64", "64x96"), ("64x96", "64x96")}
    for row in rows:
        assert float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"])
        images = 1 if row["stage"] in STREAMS else int(row["batch"])
        assert float(row["images_per_s"]) == pytest.approx(1e3 * images / float(row["median_ms"]), rel=1e-2)
        assert row["backend"] == "torch" and int(row["instances"]) > 0 and row["iterations"] == "2"
        assert int(row["segments"]) >= 3 and row["weights"] == "random, 5 of 10 queries kept"
        assert row["tasks"] == "semantic+instance+panoptic" and "HIDDEN_DIM 32" in row["options"]
        error = float(row["mask_error"])
        assert error == 0 if row["precision"] == "fp32" else 1e-4 < error < 0.5
        assert float(row["class_agreement"]) == 1 or row["precision"] == "bf16"
        if row["stage"] in ("core", "throughput", "postprocess"):
            ratio = float(row["median_ms"]) / float(row["limit_ms"])
            assert float(row["times_limit"]) == pytest.approx(ratio, rel=1e-2)
    printed = capsys.readouterr().out
    assert "measured ceiling: copy" in printed and "build_s" not in printed and "sign_agreement" in printed


@pytest.mark.gpu
def test_every_stage_on_a_gpu(run):
    status, rows = run(
        *("--image-size", "480x640", "--batch", "1", "2", "--precision", "fp32", "fp16", "--all-tasks"),
        *("--stages", *STAGES),
        device="cuda",
    )
    assert status == 0
    for row in timed(rows):
        assert float(row["median_ms"]) > 0 and int(row["segments"]) > 0
        tells_memory(row)
        if row["stage"] in ("core", "throughput"):  # nothing beats the floor of the arithmetic
            assert float(row["times_limit"]) > 1
    assert {row["stage"] for row in timed(rows)} >= {"trt_predictor", "stream", "host_trt_load"}


def test_backend_that_fails_leaves_the_rows_of_the_others(run, capsys):
    status, rows = run("--image-size", "48x64", "--backend", "tensorrt", "torch", "--stages", "core")
    error = capsys.readouterr().err
    assert status == 1 and [(r["backend"], r["stage"]) for r in timed(rows)] == [("torch", "core")]
    reason = "MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU"
    assert f"benchmark.py: error: tensorrt dynamic fp32: {reason}" in error
    (failed,) = [r for r in rows if r["error"]]
    assert failed["backend"] == "tensorrt" and failed["error"].startswith(reason)


@pytest.mark.parametrize("static", [False, True])
def test_engine_is_built_first_and_its_cost_stands_in_its_rows(run, workshop, monkeypatch, static):
    """By the doubles of builder and engine: an engine that serves what it is asked for."""
    # The double keeps the model as it is, with the backend that is building for it.
    monkeypatch.setattr(backend_helpers, "copy", types.SimpleNamespace(deepcopy=lambda model: model))
    sizes = ("MODEL.TENSORRT.SHAPES", "('32x32', '64x64', '64x96')")
    words = ("--size", "64x64", "--batch", "1", "2", "--backend", "torch", "tensorrt", "--stages", "core")
    options = (*sizes, "MODEL.TENSORRT.STATIC", str(static))
    for again in (False, True):
        workshop.built.clear()
        status, rows = run(*words, "--no-limits", opts=options)
        assert status == 0
        # One engine for both batches, or one for each; from the cache the second time.
        assert len(workshop.built) == (0 if again else 2 if static else 1)
    for row in (r for r in rows if r["backend"] == "tensorrt"):
        assert row["variant"] == ("static" if static else "dynamic") and row["tensorrt"] == "10.0.1"
        assert float(row["build_s"]) >= 0 and float(row["engine_mib"]) >= 0
        assert float(row["sign_agreement"]) == float(row["class_agreement"]) == 1
    starts = [row["cached_start_s"] for row in rows if row["backend"] == "tensorrt"]
    # An engine for all sizes is loaded once more to time it; others tell where they were loaded.
    assert starts.count("") == (2 if static else 0) and len(starts) == 4


class _Failing(TorchBackend):
    """Refuses batches of two, and after a while everything."""

    calls = 0

    def __call__(self, images):
        type(self).calls += 1
        if len(images) == 2:
            raise RuntimeError("two are too many")
        if self.calls > 2:
            raise RuntimeError("worn out")
        return super().__call__(images)


def test_case_or_stage_that_fails_leaves_the_others(run, capsys, monkeypatch):
    monkeypatch.setitem(BACKEND_REGISTRY._obj_map, "failing", _Failing)
    status, rows = run(
        *("--size", "64x64", "--batch", "2", "1", "--backend", "failing", "torch", "--stages"),
        *("postprocess", "core", "--no-limits"),
    )
    assert status == 1
    errors = {(r["batch"], r["stage"]): r["error"] for r in rows if r["error"]}
    assert errors == {
        ("2", ""): "RuntimeError: two are too many",
        ("1", "core"): "RuntimeError: worn out",
    }
    assert [(r["backend"], r["batch"], r["stage"]) for r in timed(rows)] == [
        ("torch", "2", "postprocess"),
        ("torch", "2", "core"),
        ("failing", "1", "postprocess"),
        ("torch", "1", "postprocess"),
        ("torch", "1", "core"),
    ]
    assert "benchmark.py: error: failing fp32 batch 1 at 64x64, core: RuntimeError: worn out" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_release_is_timed_with_the_same_weights(run):
    """This project stands for an official checkout: what is asked of one is a subset of what it has."""
    status, rows = run(
        *("--image-size", "48x64", "--stages", "core", "postprocess", "predictor", "stream", "--all-tasks"),
        *("--release", str(REPO), "--no-limits"),
    )
    assert status == 0
    found = [(r["implementation"], r["stage"]) for r in timed(rows)]
    assert found == [
        *(("d2_trt", "core"), ("release", "core"), ("d2_trt", "postprocess"), ("release", "postprocess")),
        *(
            ("d2_trt", "predictor"),
            ("release", "predictor"),
            ("d2_trt", "stream"),
            ("d2_trt", "stream_files"),
        ),
    ]
    assert len({(r["segments"], r["instances"], r["padded"]) for r in rows}) == 1
    assert int(rows[0]["segments"]) >= 3


@pytest.mark.slow
def test_release_that_does_not_start_leaves_our_rows(run, tmp_path, capsys):
    (tmp_path / "mask2former").mkdir()
    (tmp_path / "mask2former" / "__init__.py").write_text("raise SystemExit(3)")
    status, rows = run("--size", "64x64", "--stages", "core", "--release", str(tmp_path), "--no-limits")
    assert status == 1 and [r["implementation"] for r in timed(rows)] == ["d2_trt"]
    assert f"the process of the release in {tmp_path} ended with status 3" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_of_both_implementations(tmp_path):
    """In a process of its own: data sets are registered below DETECTRON2_DATASETS when Python starts."""
    make_shapes_dataset(tmp_path / "shapes", ShapesOptions(train=1, val=3, max_size=128))
    words = ["--stages", "evaluation", "--release", str(REPO), "--all-tasks", "--eval-images", "2"]
    words += [
        "--warmup",
        "0",
        "--iterations",
        "1",
        "--device",
        "cpu",
        "--no-limits",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "tools/benchmark.py", *words, "--", *OPTS, "DATALOADER.NUM_WORKERS", "0"],
        cwd=REPO,
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("*.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["implementation"], r["stage"]) for r in rows] == [
        (implementation, stage)
        for stage in ("evaluation", "evaluation_loader")
        for implementation in ("d2_trt", "release")
    ]
    assert {r["image"] for r in rows} == {"shapes_val_panoptic (2 images)"}
    assert all(float(r["images_per_s"]) > 0 for r in rows)


def test_missing_data_set_is_said_and_leaves_the_images(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    status, rows = run(
        *("--size", "64x64", "--stages", "core", "evaluation", "--no-limits"),
        opts=("DATASETS.TEST", "('coco_2017_val_panoptic_with_sem_seg',)"),
    )
    assert status == 1 and [r["stage"] for r in timed(rows)] == ["core"]
    assert "coco_2017_val_panoptic_with_sem_seg" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, opts, message",
    [
        (["--backend", "tensorflow"], [], "MODEL.BACKEND is 'tensorflow', which is not registered"),
        (["--backend", "tensorrt"], ["MODEL.TENSORRT.MSDA", "x"], "MODEL.TENSORRT.MSDA is 'x'; allowed"),
        ([], ["MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS gone.pth: there is no such file"),
        ([], ["MODEL.WEIGHTS", "half.pth"], "the checkpoint half.pth cannot be read ("),
    ],
)
def test_mistakes_end_before_anything_is_timed(run, tmp_path, monkeypatch, capsys, words, opts, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.pth").write_bytes(b"PK")
    status, rows = run("--image-size", "48x64", *words, opts=opts)
    assert status == 2 and rows == [] and message in capsys.readouterr().err


def test_gpu_that_is_absent_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, rows = run("--image-size", "48x64", device="cuda")
    assert status == 2 and rows == [] and "--device cuda, but PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["limits", "attention", "mlp", "ms_deform_attn"])
def test_tools_of_parts_say_that_they_need_a_gpu(monkeypatch, capsys, tool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--device", "cuda"] if tool == "limits" else []
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as error:
        load_tool(f"benchmark_{tool}").main()
    assert error.value.code == 2 and "Check nvidia-smi" in capsys.readouterr().err


def test_folder_without_the_release_is_refused(benchmark, tmp_path, capsys):
    """Python would find this project's package instead, and time it under the release's name."""
    with pytest.raises(SystemExit) as error:
        benchmark.parse_args(["--release", str(tmp_path)])
    assert (
        error.value.code == 2 and f"--release {tmp_path}: there is no mask2former/" in capsys.readouterr().err
    )


def test_no_segments_are_said(run):
    status, rows = run(
        "--image-size", "48x64", "--stages", "postprocess", "stream", "--kept-queries", "0", "--no-limits"
    )
    assert status == 0 and [r["stage"] for r in rows] == ["postprocess", *STREAMS]
    for row in rows:
        assert row["segments"] == "0" and row["weights"] == "random"
        assert row["note"] == "no segments: post-processing had little to do"


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_memory_of_a_case_is_its_own_on_a_gpu(run, tmp_path):
    """A small size after larger ones, whose graphs alone take over 40 MiB: its engine is loaded anew, without them."""
    sizes = ("64x64", "512x1024", "1024x512", "1024x1024", "64x96")
    status, rows = run(
        *("--size", *sizes, "--backend", "torch", "tensorrt", "--stages", "core"),
        *("--no-limits", "--skip-cached-start"),
        opts=(
            *("MODEL.TENSORRT.SHAPES", "('64x64', '512x512', '1024x1024')", "MODEL.TENSORRT.OPT_LEVEL", "0"),
            *("MODEL.TENSORRT.CACHE.DIR", str(tmp_path / "cache")),
        ),
        device="cuda",
    )
    assert status == 0, rows
    for row in timed(rows):
        if not tells_memory(row):
            pytest.skip(f"others use the GPU: {row['note']}")
    told = {(r["backend"], r["image"]): float(r["resident_mib"]) for r in timed(rows)}
    for backend in ("torch", "tensorrt"):
        assert told[backend, "64x96"] < told[backend, "64x64"] + 24, told


def test_nothing_to_time_is_said(run, capsys):
    status, rows = run("--size", "64x64", "--stages", "predictor", "--no-limits")
    assert status == 1 and rows == [] and "none of --stages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--size", "800"],
        ["--size", "0x4"],
        ["--batch", "0"],
        ["--precision", "int4"],
        ["--rounds", "0"],
        ["--compile-mode", "fast"],
        ["--kept-queries", "-1"],
        ["--", "MODEL.WEIGHTS"],
    ],
)
def test_wrong_arguments(benchmark, words):
    with pytest.raises(SystemExit) as error:
        benchmark.parse_args(words)
    assert error.value.code == 2


def test_modes_of_torch_compile_are_those_that_the_backend_knows(benchmark):
    from benchmark_compile import MODES

    assert benchmark.COMPILE_MODES == MODES


def test_versions_are_in_every_row_and_the_command_in_the_first(run):
    _, rows = run("--size", "64x64", "--stages", "core")
    assert len({json.dumps([r["torch"], r["gpu"], r["date"], r["config"]]) for r in rows}) == 1
    assert "--size 64x64" in rows[0]["command"] and rows[0]["config"].startswith("coco/panoptic")
    assert {r["command"] for r in rows[1:]} == {""}
