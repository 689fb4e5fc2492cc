"""tools/benchmark_plots.py: what it draws of which rows."""

from __future__ import annotations

import csv

import benchmark_plots
import pytest
from benchmark_table import LATER, Report
from PIL import Image

from tests.tools.loading import REPO

COMMON = {"gpu": "a GPU", "torch": "2", "tensorrt": "", "config": "coco/r50.yaml", "tasks": "panoptic"}


def row(stage="core", backend="torch", padded="64x64", batch=1, median=2.0, **more) -> dict:
    columns = {"implementation": "d2_trt", "backend": backend, "precision": "fp16", "image": padded}
    columns |= {"padded": padded, "batch": batch, "stage": stage}
    columns |= {"median_ms": median, "p10_ms": median - 1, "p90_ms": median + 2}
    return {**columns, "images_per_s": 1e3 * batch / median, **more}


def found_in(*paths) -> dict:
    return benchmark_plots.drawings(benchmark_plots.points_of(benchmark_plots.measured(list(paths))))


@pytest.fixture
def write(tmp_path):
    def call(*rows: dict, **common: str):
        report = Report(tmp_path, {**COMMON, **common})
        for one in rows:
            report.row(one)
        report.failure("compile", {"backend": "compile"}, "no compiler")
        report.ceiling({"stage": "ceiling_copy", "gb_per_s": 5.0})
        return report.path

    return call


def test_stage_is_drawn_by_batch_by_size_and_by_backend(write):
    found = found_in(
        write(
            row(limit_ms=0.5),
            row(batch=4, median=6.0, limit_ms=2.0),
            row(padded="64x128", median=3.0),
            row(stage="predictor"),
            row(stage="predictor", backend="tensorrt", variant="static", median=1.5),
            row(stage="forward"),
        )
    )
    assert sorted(found) == [
        "core_coco-r50_a-GPU_p_batch_64x64",
        "core_coco-r50_a-GPU_p_size_1",
        "predictor_coco-r50_a-GPU_p_64x64",  # and forward, which has nothing beside it, not at all
    ]
    batches = found["core_coco-r50_a-GPU_p_batch_64x64"]
    assert batches["unit"] == "ms"
    assert batches["series"] == {"torch fp16": [(1, 2.0, 1.0, 4.0), (4, 6.0, 5.0, 8.0)]}
    assert batches["floors"] == {"fp16": [(1, 0.5), (4, 2.0)]}
    sizes = found["core_coco-r50_a-GPU_p_size_1"]["series"]["torch fp16"]
    assert [x for x, *_ in sizes] == [64 * 64 / 1e6, 64 * 128 / 1e6]
    assert set(found["predictor_coco-r50_a-GPU_p_64x64"]["series"]) == {"torch fp16", "tensorrt static fp16"}


def test_last_of_repeated_measurements_counts(write):
    (kept,) = benchmark_plots.measured([write(row(median=2.0), row(median=5.0))])
    assert kept["median_ms"] == "5.0"


def test_images_a_second_are_drawn_of_what_goes_on(write):
    found = found_in(
        write(row(stage="throughput", median=4.0, limit_ms=1.0), row(stage="throughput", batch=2, median=5.0))
    )
    rates = found["throughput_rate_coco-r50_a-GPU_p_batch_64x64"]
    assert rates["unit"] == "images a second"
    (first, second) = rates["series"]["torch fp16"]
    # An image in 4 ms, in 6 (slow) and 3 (fast); two in 5.
    assert first == pytest.approx((1, 250, 1000 / 6, 1000 / 3)) and second[:2] == pytest.approx((2, 400))
    assert rates["floors"]["fp16"] == [(1, pytest.approx(1000))]
    assert found["throughput_coco-r50_a-GPU_p_batch_64x64"]["unit"] == "ms"


def test_memory_and_build_time_are_drawn(write):
    engine = {"backend": "tensorrt", "variant": "dynamic", "build_s": 90.0}
    found = found_in(
        write(
            row(peak_mib=100),
            row(stage="forward", peak_mib=130),
            row(batch=2, peak_mib=200),
            row(peak_mib=60, **engine),
            row(batch=2, peak_mib=70, **engine),
            row(backend="tensorrt", variant="static", build_s=40.0, peak_mib=-12506),
            row(backend="tensorrt", variant="static", build_s=50.0, batch=2),
        )
    )
    memory = found["memory_coco-r50_a-GPU_p_batch_64x64"]
    assert memory["unit"] == "MiB"
    # The most of a case's stages; nothing of what cannot be.
    assert {name: [p[:2] for p in points] for name, points in memory["series"].items()} == {
        "torch fp16": [(1, 130), (2, 200)],
        "tensorrt dynamic fp16": [(1, 60), (2, 70)],
    }
    build = found["build_coco-r50_a-GPU_p"]
    assert build["unit"] == "s" and {name: points[0][1] for name, points in build["series"].items()} == {
        "tensorrt dynamic fp16": 90,
        "tensorrt static fp16, 64x64, batch 1": 40,
        "tensorrt static fp16, 64x64, batch 2": 50,
    }


def test_other_tasks_and_options_are_other_measurements(write):
    all_tasks = write(row(median=9.0), row(backend="compile", median=8.0), tasks="semantic+instance+panoptic")
    one_task = write(row(median=1.0), row(backend="compile", median=0.8))
    option = write(row(median=2.0), options="A.B 3 C.D 1")
    found = found_in(all_tasks, one_task, option)
    more = found["core_coco-r50_a-GPU_sip_64x64"]["series"]
    assert {name: points[0][1] for name, points in more.items()} == {"torch fp16": 9, "compile fp16": 8}
    assert "semantic+instance+panoptic" in found["core_coco-r50_a-GPU_sip_64x64"]["title"]
    fewer = found["core_coco-r50_a-GPU_p_64x64"]["series"]
    assert {name: points[0][1] for name, points in fewer.items()} == {
        "torch fp16": 1,
        "torch fp16, A.B 3 C.D 1": 2,
        "compile fp16": 0.8,
    }


def test_sizes_of_images_and_of_the_network_are_told_apart(write):
    resized = [
        row(padded="800x1088", image=image, median=m) for image, m in (("480x640", 4.0), ("960x1280", 5.0))
    ]
    as_they_are = [row(padded=size, image=size, median=3.0) for size in ("800x1088", "1088x800", "320x320")]
    found = found_in(write(*resized, *as_they_are, row(padded="800x1088", image="800x1067", batch=2)))
    own = found["core_coco-r50_a-GPU_p_imagesize_1"]
    assert own["x"].startswith("pixels of the image")
    assert [p[:2] for p in own["series"]["torch fp16"]] == [(0.3072, 4.0), (1.2288, 5.0)]
    network = found["core_coco-r50_a-GPU_p_size_1"]
    assert [p[:2] for p in network["series"]["torch fp16"]] == [(0.1024, 3.0), (0.8704, 3.0), (0.8704, 3.0)]
    # 800x1067 is padded, not resized: it belongs to 800x1088.
    assert "core_coco-r50_a-GPU_p_batch_800x1088" in found


def test_files_of_earlier_versions_are_read(write):
    path = write(
        row(median=2.0),
        command="python tools/benchmark.py --all-tasks -- A.B 3 MODEL.TENSORRT.CACHE.DIR x MODEL.WEIGHTS y",
    )
    lines = list(csv.reader(path.read_text().splitlines()))
    kept = [place for place, name in enumerate(lines[0]) if name not in LATER]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([[line[place] for place in kept] for line in lines])
    (found,) = benchmark_plots.measured([path])
    assert (found["tasks"], found["options"]) == ("semantic+instance+panoptic", "A.B 3")


def test_the_same_rows_give_the_same_file(write, tmp_path):
    path = write(row(), row(batch=2))
    drawn = []
    for folder in ("a", "b"):
        assert benchmark_plots.main([str(path), "--output", str(tmp_path / folder), "--format", "svg"]) == 0
        (file,) = (tmp_path / folder).iterdir()
        drawn.append(file.read_text())
    assert drawn[0] == drawn[1] and "torch fp16</text>" in drawn[0]


def test_committed_files_can_be_drawn():
    paths = sorted((REPO / "results").glob("benchmark_*.csv"))
    points = benchmark_plots.points_of(benchmark_plots.measured(paths))
    assert {"ms", "images a second", "MiB", "s"} <= {point.unit for point in points}
    assert min(point.value for point in points) > 0


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


def test_options_that_all_of_a_plot_have_stand_in_its_title(write):
    kinds = ({"backend": "torch"}, {"backend": "tensorrt", "variant": "static"})
    small, large = "INPUT.MIN_SIZE_TEST 320", "INPUT.MIN_SIZE_TEST 800"
    found = found_in(
        write(
            *(row(options=small, **kind) for kind in kinds),
            *(row(options=large, padded="64x128", **kind) for kind in kinds),
            row(options=small, padded="64x192"),
            row(options=large, padded="64x192", backend="tensorrt", variant="static"),
        )
    )
    for size, option in (("64x64", small), ("64x128", large)):
        drawing = found[f"core_coco-r50_a-GPU_p_{size}"]
        assert set(drawing["series"]) == {"torch fp16", "tensorrt static fp16"}
        assert drawing["title"].endswith(f"\n{option}")
    mixed = found["core_coco-r50_a-GPU_p_64x192"]
    assert set(mixed["series"]) == {f"torch fp16, {small}", f"tensorrt static fp16, {large}"}
    assert "INPUT" not in mixed["title"]
