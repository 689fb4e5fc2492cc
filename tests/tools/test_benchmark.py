"""tools/benchmark.py with a mini model on the CPU: rows, table, CSV, and what it says of backends that fail."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.test_demo import MINI

REPO = Path(__file__).resolve().parents[2]
OPTS = [word for pair in MINI.items() for word in pair]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_tool", REPO / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(benchmark, tmp_path, monkeypatch):
    """Exit status, and the rows of the CSV file."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: str, opts=()) -> tuple[int, list[dict]]:
        quick = ["--warmup", "0", "--iterations", "2", "--device", "cpu", "--output", str(tmp_path)]
        status = benchmark.main([*words, *quick, "--", *OPTS, *opts])
        rows = []
        for path in tmp_path.glob("*.csv"):
            with open(path, newline="") as file:
                rows += list(csv.DictReader(file))
        return status, rows

    return call


def test_sizes_batches_precisions_and_stages(run, capsys):
    status, rows = run(
        *("--image-size", "48x64", "--size", "64x96", "64x64", "--batch", "1", "2"),
        *("--precision", "fp32", "bf16", "--all-tasks"),
    )
    assert status == 0
    # The predictor takes one image and resizes it; the other stages are timed for every size and batch.
    assert len(rows) == 2 * (3 * 2 * 3 + 1)
    assert {(r["image"], r["padded"]) for r in rows} == {
        ("48x64", "64x96"),
        ("64x96", "64x96"),
        ("64x64", "64x64"),
    }
    assert [r["stage"] for r in rows].count("predictor") == 2
    for row in rows:
        assert (
            float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"])
            or row["iterations"] == "2"
        )
        assert row["backend"] == "torch" and int(row["instances"]) > 0
        error = float(row["mask_error"])
        assert error == 0 if row["precision"] == "fp32" else 1e-4 < error < 0.5
        assert float(row["class_agreement"]) == 1 or row["precision"] == "bf16"
    printed = capsys.readouterr().out
    assert "mask_error" in printed and "build_s" not in printed and printed.count("predictor") == 2


def test_backend_that_fails_leaves_the_rows_of_the_others(run, capsys):
    status, rows = run("--image-size", "48x64", "--backend", "torch", "tensorrt", "--stages", "core")
    error = capsys.readouterr().err
    assert status == 1 and [r["backend"] for r in rows] == ["torch"]
    assert "benchmark.py: error: tensorrt fp32: MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU" in error


@pytest.mark.parametrize(
    "words, opts, message",
    [
        (["--backend", "tensorflow"], [], "MODEL.BACKEND is 'tensorflow', which is not registered"),
        (["--backend", "tensorrt"], ["MODEL.TENSORRT.MSDA", "x"], "MODEL.TENSORRT.MSDA is 'x'; allowed"),
    ],
)
def test_mistakes_end_before_anything_is_timed(run, capsys, words, opts, message):
    status, rows = run("--image-size", "48x64", *words, opts=opts)
    assert status == 2 and rows == [] and message in capsys.readouterr().err


def test_nothing_to_time_is_said(run, capsys):
    status, rows = run("--size", "64x64", "--stages", "predictor")
    assert status == 1 and rows == [] and "none of --stages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--size", "800"], ["--size", "0x4"], ["--batch", "0"], ["--precision", "int4"]]
)
def test_wrong_arguments(benchmark, words):
    with pytest.raises(SystemExit) as error:
        benchmark.parse_args(words)
    assert error.value.code == 2


def test_options_without_meaning_for_the_release_are_left_out(benchmark):
    words = ["--release", "../R", "--backend", "torch", "tensorrt", "--batch", "1", "2", "--", "A.B", "3"]
    assert benchmark._without_ours(words) == ["--batch", "1", "2", "--", "A.B", "3"]


def test_json_is_the_last_line_of_stdout():
    words = ["--image-size", "48x64", "--warmup", "0", "--iterations", "1", "--stages", "core", "--json"]
    done = subprocess.run(
        [sys.executable, "tools/benchmark.py", *words, "--device", "cpu", "--", *OPTS],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])
    assert row["stage"] == "core" and row["median_ms"] > 0
