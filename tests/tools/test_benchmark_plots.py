"""tools/benchmark_plots.py: what it draws of which rows."""

from __future__ import annotations

import benchmark_plots
import pytest
from benchmark_table import Report
from PIL import Image

COMMON = {"gpu": "a GPU", "torch": "2", "tensorrt": "", "config": "coco/r50.yaml"}


def row(stage="core", backend="torch", padded="64x64", batch=1, median=2.0, **more) -> dict:
    columns = {"implementation": "d2_trt", "backend": backend, "precision": "fp16", "image": padded}
    columns |= {"padded": padded, "batch": batch, "stage": stage}
    return {**columns, "median_ms": median, "p10_ms": median - 1, "p90_ms": median + 2, **more}


@pytest.fixture
def write(tmp_path):
    def call(*rows: dict):
        report = Report(tmp_path, COMMON)
        for one in rows:
            report.row(one)
        report.failure("compile", {"backend": "compile"}, "no compiler")
        report.ceiling({"stage": "ceiling_copy", "gb_per_s": 5.0})
        return report.path

    return call


def test_stage_is_drawn_by_batch_by_size_and_by_backend(write):
    rows = benchmark_plots.measured(
        [
            write(
                row(limit_ms=0.5),
                row(batch=4, median=6.0, limit_ms=2.0),
                row(padded="64x128", median=3.0),
                row(stage="predictor"),
                row(stage="predictor", backend="tensorrt", variant="static", median=1.5),
                row(stage="forward"),
            )
        ]
    )
    found = benchmark_plots.drawings(rows)
    assert sorted(found) == [
        "core_r50_a-GPU_batch_64x64",
        "core_r50_a-GPU_size_1",
        "predictor_r50_a-GPU_64x64",  # and forward, which has nothing beside it, not at all
    ]
    batches = found["core_r50_a-GPU_batch_64x64"]
    assert batches["series"] == {"torch fp16": [(1, 2.0, 1.0, 4.0), (4, 6.0, 5.0, 8.0)]}
    assert batches["floors"] == {"fp16": [(1, 0.5), (4, 2.0)]}
    sizes = found["core_r50_a-GPU_size_1"]["series"]["torch fp16"]
    assert [x for x, *_ in sizes] == [64 * 64 / 1e6, 64 * 128 / 1e6]
    assert set(found["predictor_r50_a-GPU_64x64"]["series"]) == {"torch fp16", "tensorrt static fp16"}


def test_last_of_repeated_measurements_counts(write):
    (kept,) = benchmark_plots.measured([write(row(median=2.0), row(median=5.0))])
    assert kept["median_ms"] == "5.0"


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_files_are_drawn(write, tmp_path, capsys, kind):
    path = write(row(), row(batch=2), row(stage="predictor"), row(stage="predictor", backend="tensorrt"))
    assert benchmark_plots.main([str(path), "--output", str(tmp_path / "p"), "--format", kind]) == 0
    drawn = sorted((tmp_path / "p").iterdir())
    assert [str(p) for p in drawn] == sorted(capsys.readouterr().out.split()) and len(drawn) == 2
    for one in drawn:
        assert one.stat().st_size < 100_000
        if kind == "png":
            assert Image.open(one).size[0] > 400
        else:
            assert one.read_text().rstrip().endswith("</svg>")


def test_mistakes_are_said(write, tmp_path, capsys):
    path = write(row())
    assert benchmark_plots.main([str(path)]) == 1
    assert "nothing to compare" in capsys.readouterr().err
    assert benchmark_plots.main([str(path), "--stages", "stream"]) == 2
    assert "no row has the stage stream; there are core" in capsys.readouterr().err
    assert benchmark_plots.main([str(tmp_path / "none.csv")]) == 2
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert benchmark_plots.main([str(tmp_path / "other.csv")]) == 2
    assert "It is of another tool or version" in capsys.readouterr().err
