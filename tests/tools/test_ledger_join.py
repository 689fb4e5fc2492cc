"""Standard errors of the ledger's differences, and its files of several processes as one table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import accuracy_ledger
import ledger_images
import ledger_join
import numpy as np
import pytest
from ledger_images import ImageTables, standard_errors
from ledger_join import TABLES, joined, row_folder, without_engine_keys
from ledger_markdown import table
from measurements import MeasurementFile

from mask2former.evaluation import processes
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.tools.shapes_checkpoint import CONFIG, REPO, make_checkpoint, overrides
from tests.tools.shapes_checkpoint import one_thread as one_thread

PREFIX = "ledgerjoin"
DATASET = f"{PREFIX}_val_panoptic"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("join"), PREFIX)


@pytest.fixture
def run(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)

    def call(*words: str, opts=()) -> int:
        quick = ["--config-file", CONFIG, "--weights", str(weights), "--device", "cpu", "--compare", "1"]
        quick += ["--warmup", "0", "--iterations", "1", "--work", str(tmp_path / "work"), "--size", "64/80"]
        quick += ["--output", str(tmp_path / "results")]
        return accuracy_ledger.main([*quick, *words, "--", *overrides(PREFIX), *opts])

    return call


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_counts_of_single_images_give_the_metrics(run, tmp_path, weights):
    path = tmp_path / "a.csv"
    assert run("--backend", "torch", "--precision", "fp32", "bf16", "--resume", str(path)) == 0
    for row in rows_of(path):
        folder = Path(row_folder(str(tmp_path / "work"), row))
        tables = ImageTables.load(folder / TABLES)
        assert len(tables.images) == 3 and set(tables.images) == {"1000001", "1000002", "1000003"}
        told = json.loads((folder / "inference" / "results.json").read_text())[DATASET]
        values = tables.metrics(np.ones((1, 3)))
        assert values["PQ"][0] == pytest.approx(told["panoptic_seg"]["PQ"], abs=1e-9)
        assert values["AP"][0] == pytest.approx(told["segm"]["AP"], abs=1e-9)
        assert values["mIoU"][0] == pytest.approx(told["sem_seg"]["mIoU"], abs=1e-9) and values["mIoU"][0] > 0
        # An image twice is that image's share twice.
        twice = tables.metrics(np.array([[2.0, 2.0, 2.0], [2.0, 0.0, 1.0]]))
        assert twice["mIoU"][0] == pytest.approx(values["mIoU"][0]) and twice["mIoU"][1] != twice["mIoU"][0]
    first, second = rows_of(path)
    assert first["se_mIoU"] == "" and float(second["se_mIoU"]) >= 0


def test_counts_of_several_processes_are_those_of_one(run, tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    assert run("--backend", "torch", "--precision", "fp32", "--resume", str(path)) == 0
    folder = Path(row_folder(str(tmp_path / "work"), rows_of(path)[0])) / "inference"
    alone = ImageTables.of_predictions(DATASET, folder, 0).arrays
    monkeypatch.setattr(processes, "_IMAGES_PER_PROCESS", 1)
    shared_out = []
    in_processes = processes.in_processes

    def told(work, count):
        shared_out.append(count)
        return in_processes(work, count)

    monkeypatch.setattr(ledger_images, "in_processes", told)
    together = ImageTables.of_predictions(DATASET, folder, 2).arrays
    assert shared_out == [2, 2]  # PQ and mIoU
    assert together.keys() == alone.keys() and len(alone) == 7
    for name, array in alone.items():
        np.testing.assert_array_equal(together[name], array, err_msg=name, strict=True)


def drawn_tables(generator: np.random.Generator, images: int, skill: float) -> ImageTables:
    """Of images with four detections each, of two categories, which are right more often with more skill."""
    category = np.repeat([0, 1], 2 * images).astype(np.int16)
    matched = generator.random(4 * images) < skill
    order = np.concatenate([generator.permutation(np.repeat(np.arange(images), 2)) for _ in range(2)])
    right = np.bincount(order, matched, images)
    counts = np.stack([0.8 * right, right, 4 - right, 4 - right], axis=-1)[:, None]
    pixels = np.stack([25 * right, np.full(images, 100), np.full(images, 100)], axis=-1)[:, None]
    return ImageTables(
        [str(i) for i in range(images)],
        {
            "PQ": counts,
            "mIoU": pixels.astype(np.int64),
            "AP_image": order,
            "AP_category": category,
            "AP_matched": np.tile(matched, (10, 1)),
            "AP_counted": np.ones((10, 4 * images), bool),
            "AP_instances": np.full((images, 2), 2),
        },
    )


def test_standard_error_is_the_spread_over_sets_of_images():
    """Of many drawn sets of images the differences spread as the bootstrap of one of them says."""
    generator = np.random.default_rng(7)
    ones = np.ones((1, 150))
    spread = {name: [] for name in ("PQ", "AP", "mIoU")}
    for _ in range(150):
        one, other = drawn_tables(generator, 150, 0.7), drawn_tables(generator, 150, 0.6)
        for name, values in spread.items():
            values.append(one.metrics(ones)[name][0] - other.metrics(ones)[name][0])
    told = standard_errors(drawn_tables(generator, 150, 0.7), drawn_tables(generator, 150, 0.6))
    for name, values in spread.items():
        assert told[name] == pytest.approx(np.std(values), rel=0.3), name


def test_equal_predictions_have_no_error_and_other_images_none_that_could_be_told():
    generator = np.random.default_rng(1)
    tables = drawn_tables(generator, 20, 0.5)
    assert standard_errors(tables, tables) == {"PQ": 0, "AP": 0, "mIoU": 0}
    assert standard_errors(tables, drawn_tables(generator, 21, 0.5)) == {}


def plain_average_precision(tables: ImageTables, weights: np.ndarray) -> float:
    """Of one choice of images, with every detection looked at."""
    found = []
    for category, instances in enumerate(weights @ tables.arrays["AP_instances"]):
        mine = tables.arrays["AP_category"] == category
        weight = weights[tables.arrays["AP_image"][mine]]
        for matched, counted in zip(
            tables.arrays["AP_matched"][:, mine], tables.arrays["AP_counted"][:, mine]
        ):
            if instances == 0:
                continue
            right = np.cumsum(matched * weight)
            precision = right / np.maximum(np.cumsum(counted * weight), np.spacing(1))
            points = []
            for recall in np.linspace(0, 1, 101):
                reached = precision[right / instances >= recall]
                points.append(reached.max() if len(reached) else 0.0)
            found.append(np.mean(points))
    return 100 * np.mean(found) if found else np.nan


def ragged_tables(generator: np.random.Generator, images: int) -> ImageTables:
    """Detections that do not count, categories without instances or detections, and images without either."""
    detections = 40 * images
    category = np.sort(generator.choice([0, 1, 3, 4], detections)).astype(np.int16)
    image = generator.integers(0, images - 1, detections).astype(np.int32)
    matched = generator.random((10, detections)) < np.linspace(0.4, 0.0, 10)[:, None]
    counted = matched | (generator.random((10, detections)) < 0.9)
    instances = np.zeros((images, 5), np.int32)
    for c in (0, 2, 4):
        instances[:, c] = generator.integers(0, 3, images)
        if c != 2:  # no more can be right than there are
            instances[:, c] += np.bincount(image[(category == c) & matched.any(0)], minlength=images).astype(
                np.int32
            )
    matched[:, (category == 1) | (category == 3)] = False
    arrays = {"AP_image": image, "AP_category": category, "AP_matched": matched, "AP_counted": counted}
    return ImageTables([str(i) for i in range(images)], {**arrays, "AP_instances": instances})


@pytest.mark.parametrize("at_once", [1, 5_000, ledger_images._AT_ONCE])
def test_average_precision_of_many_choices_is_that_of_each(monkeypatch, at_once):
    monkeypatch.setattr(ledger_images, "_AT_ONCE", at_once)
    generator = np.random.default_rng(5)
    tables = ragged_tables(generator, 12)
    weights = np.concatenate(
        [
            generator.multinomial(12, np.full(12, 1 / 12), size=20),
            generator.random((3, 12)),
            np.eye(12, dtype=int)[[0, 11]],  # one image alone, the last without a detection
            np.zeros((1, 12), int),
        ]
    )
    actual = tables.metrics(weights)["AP"]
    expected = np.array([plain_average_precision(tables, row) for row in weights.astype(float)])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9)
    assert np.ptp(actual[:20]) > 1 and np.isnan(actual[-1]) and not np.isnan(actual[:-1]).any()


def test_average_precision_of_doubled_images_is_cocos(tmp_path):
    """Weights of 2 and 0 against COCO's evaluation of a set that has the images so often."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    generator = np.random.default_rng(3)
    images, per_image = 6, 5
    times = np.array([2, 0, 1, 1, 0, 2])
    boxes = generator.uniform(0, 60, (images, per_image, 2))
    moved = boxes + generator.normal(0, 1.5, boxes.shape)
    scores = generator.random((images, per_image))

    def evaluate(copies: np.ndarray) -> COCOeval:
        truth, found = {"images": [], "annotations": [], "categories": [{"id": 1}]}, []
        for image in np.repeat(np.arange(images), copies):
            image_id = len(truth["images"]) + 1
            truth["images"].append({"id": image_id, "of": int(image)})
            for box, near, score in zip(boxes[image], moved[image], scores[image]):
                about = {"image_id": image_id, "category_id": 1}
                annotation_id = len(truth["annotations"]) + 1
                truth["annotations"].append(
                    {**about, "id": annotation_id, "bbox": [*box, 10, 10], "area": 100, "iscrowd": 0}
                )
                found.append({**about, "bbox": [*near, 10, 10], "score": float(score)})
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation

    once = evaluate(np.ones(images, int))
    results = [one for one in once.evalImgs[:images] if one is not None]
    order = np.argsort(-np.concatenate([one["dtScores"] for one in results]), kind="mergesort")
    image = np.repeat(np.arange(images), [len(one["dtScores"]) for one in results])[order]
    matched = np.concatenate([one["dtMatches"] for one in results], axis=1)[:, order] > 0
    arrays = {"AP_image": image, "AP_category": np.zeros(len(image), int), "AP_matched": matched}
    arrays.update(AP_counted=np.ones_like(matched), AP_instances=np.full((images, 1), per_image))
    tables = ImageTables([str(i) for i in range(images)], arrays)
    values = tables.metrics(np.stack([np.ones(images), times]))["AP"]
    assert values[0] == pytest.approx(100 * once.stats[0], abs=1e-9) and 5 < values[0] < 95
    # Copies of a detection have one score: between them COCO sees one more point of the curve.
    assert values[1] == pytest.approx(100 * evaluate(times).stats[0], abs=1.5)
    assert abs(values[1] - values[0]) > 2


def test_files_of_several_processes_are_one_table(run, workshop, tmp_path, capsys):
    one, parts = tmp_path / "one.csv", [tmp_path / name for name in ("engine.csv", "half.csv", "torch.csv")]
    opts = ("MODEL.TENSORRT.VERIFY.ENABLED", "False")
    workshop.disturb = lambda logits, masks: (logits.roll(1, -1), masks)
    batches = ("--batch", "1", "2")
    every = ("--backend", "torch", "tensorrt", "--precision", "fp32", "bf16", *batches)
    assert run(*every, "--resume", str(one), opts=opts) == 0
    alone = (*batches, "--no-reference")
    engine = ("--backend", "tensorrt", "--precision", "fp32", "bf16", *alone)
    assert run(*engine, "--resume", str(parts[0]), opts=opts) == 0
    assert run("--backend", "torch", "--precision", "bf16", *alone, "--resume", str(parts[1]), opts=opts) == 0
    assert all(
        row["d_PQ"] == "" and row["backend"] + row["precision"] != "torchfp32" for row in rows_of(parts[0])
    )
    # PyTorch reads none of the engine's keys: its rows may come without them.
    assert run("--backend", "torch", "--precision", "fp32", *batches, "--resume", str(parts[2])) == 0

    whole = tmp_path / "whole.csv"
    words = [
        "--from-csv",
        *map(str, parts),
        "--csv",
        str(whole),
        "--work",
        str(tmp_path / "work"),
        "--limits",
        "AP",
    ]
    capsys.readouterr()
    accuracy_ledger.main(words)
    captured = capsys.readouterr()
    assert "no row of PyTorch" not in captured.err and " ± " in captured.out
    made, expected = rows_of(whole), rows_of(one)
    measured = [name for name in accuracy_ledger.FIELDS if name.startswith(("d_", "se_"))]
    measured += ["backend", "precision", "batch", *ledger_join.COLUMNS, *accuracy_ledger.AGREEMENT]
    assert [[row[name] for name in measured] for row in made] == [
        [row[name] for name in measured] for row in expected
    ]
    assert any(float(row["d_mIoU"] or 0) and float(row["se_mIoU"]) for row in made)
    # Once more, from the joined file alone, where the predictions are no more.
    again = tmp_path / "again.csv"
    accuracy_ledger.main(["--from-csv", str(whole), "--csv", str(again), "--work", str(tmp_path / "nowhere")])
    assert again.read_bytes() == whole.read_bytes()
    with pytest.raises(SystemExit):
        accuracy_ledger.main(["--from-csv", str(whole), "--csv", str(again)])


def row_of(**values) -> dict[str, str]:
    common = dict.fromkeys(accuracy_ledger.FIELDS, "")
    about = {"backend": "torch", "precision": "fp32", "min_size": "64", "max_size": "80", "batch": "1"}
    return {**common, **about, "status": "ok", "checkpoint": "c", "dataset": "d", **values}


def joined_rows(tmp_path, *files) -> list[dict[str, str]]:
    paths = []
    for rows in files:
        paths.append(str(tmp_path / f"{len(list(tmp_path.glob('*.csv')))}.csv"))
        file = MeasurementFile(paths[-1], accuracy_ledger.FIELDS, ())
        for row in rows:
            file.add(row)
    return joined(paths, accuracy_ledger.FIELDS, str(tmp_path))


def test_difference_is_to_the_reference_of_the_same_measurement(tmp_path):
    engine = {"backend": "tensorrt", "precision": "fp16"}
    rows = joined_rows(
        tmp_path,
        [
            row_of(**engine, PQ="52", checkpoint="other"),
            row_of(**engine, PQ="51", gpu="A"),
            row_of(PQ="50", gpu="B"),
        ],
        [row_of(PQ="50.5", gpu="A"), row_of(**engine, PQ="53", gpu="A", batch="4")],
    )
    told = {(row["checkpoint"], row["gpu"], row["batch"], row["precision"]): row["d_PQ"] for row in rows}
    assert told["c", "A", "1", "fp16"] == "0.5"
    assert told["other", "", "1", "fp16"] == told["c", "A", "4", "fp16"] == told["c", "A", "1", "fp32"] == ""
    lost = accuracy_ledger.without_reference(rows)
    assert len(lost) == 2 and "tensorrt fp16 64/80 batch 4" in lost[1]


def test_differences_of_before_do_not_stay(tmp_path):
    (row,) = joined_rows(tmp_path, [row_of(precision="fp16", PQ="52", d_PQ="7")])
    assert row["d_PQ"] == ""


def test_rows_come_in_the_order_of_a_whole_run(tmp_path):
    kinds = [("tensorrt", "fp16"), ("torch", "tf32"), ("tensorrt", "fp32"), ("torch", "fp32")]
    files = [
        [row_of(backend=b, precision=p, batch=n, min_size=s) for s in ("64", "48") for n in ("4", "1")]
        for b, p in kinds
    ]
    rows = joined_rows(tmp_path, *files)
    assert list(dict.fromkeys((row["backend"], row["precision"]) for row in rows)) == [
        *(("torch", "fp32"), ("torch", "tf32"), ("tensorrt", "fp32"), ("tensorrt", "fp16"))
    ]
    assert [(row["min_size"], row["batch"]) for row in rows[:4]] == [
        ("64", "1"),
        ("64", "4"),
        ("48", "1"),
        ("48", "4"),
    ]


def test_failure_does_not_replace_what_was_measured(tmp_path):
    good, bad = row_of(PQ="50"), row_of(status="failed: no memory")
    assert [row["status"] for row in joined_rows(tmp_path, [good], [bad])] == ["ok"]
    assert [row["PQ"] for row in joined_rows(tmp_path, [bad], [good], [row_of(PQ="51")])] == ["51"]
    assert [row["status"] for row in joined_rows(tmp_path, [bad], [bad])] == ["failed: no memory"]


def test_counts_of_another_measurement_give_no_error(tmp_path):
    """A folder of --work is written anew by each evaluation of its kind."""
    generator = np.random.default_rng(0)
    rows = []
    for precision, skill in (("fp32", 0.5), ("fp16", 0.6)):
        tables = drawn_tables(generator, 10, skill)
        values = {name: str(value[0]) for name, value in tables.metrics(np.ones((1, 10))).items()}
        rows.append(row_of(precision=precision, **values))
        Path(row_folder(str(tmp_path), rows[-1])).mkdir(parents=True)
        tables.save(Path(row_folder(str(tmp_path), rows[-1])) / TABLES)
    made = joined_rows(tmp_path, rows)[1]
    assert all(float(made[f"se_{name}"]) > 0 for name in ("PQ", "AP", "mIoU"))
    rows[1]["AP"] = "1.0"
    made = joined_rows(tmp_path, rows)[1]
    assert made["se_AP"] == "" and made["se_PQ"] != ""


def test_counts_of_a_row_are_resampled_once(tmp_path, monkeypatch):
    """The reference's too, however many rows are compared with it."""
    generator = np.random.default_rng(0)
    batches = [str(n) for n in range(1, 7)]
    rows = []
    for precision in ("fp32", "tf32", "fp16"):
        for batch in batches:
            tables = drawn_tables(generator, 10, 0.5)
            values = {name: str(value[0]) for name, value in tables.metrics(np.ones((1, 10))).items()}
            rows.append(row_of(precision=precision, batch=batch, **values))
            folder = Path(row_folder(str(tmp_path), rows[-1]))
            folder.mkdir(parents=True)
            tables.save(folder / TABLES)
    times, resampled = [], ImageTables.resampled
    monkeypatch.setattr(ImageTables, "resampled", lambda self: times.append(1) or resampled(self))
    made = joined_rows(tmp_path, rows)
    assert len(times) == len(rows)
    assert [row["se_AP"] != "" for row in made] == [row["precision"] != "fp32" for row in made]


@pytest.mark.parametrize("kept", [0, 10, 0.5, -30])
def test_counts_that_were_cut_off_give_no_error(tmp_path, capsys, kept):
    """kept: bytes of the file, or the part of it."""
    generator = np.random.default_rng(0)
    rows = []
    for precision in ("fp32", "fp16"):
        tables = drawn_tables(generator, 10, 0.5)
        values = {name: str(value[0]) for name, value in tables.metrics(np.ones((1, 10))).items()}
        rows.append(row_of(precision=precision, **values))
        folder = Path(row_folder(str(tmp_path), rows[-1]))
        folder.mkdir(parents=True)
        tables.save(folder / TABLES)
        assert [one.name for one in folder.iterdir()] == [TABLES]
    content = (folder / TABLES).read_bytes()
    (folder / TABLES).write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])
    made = joined_rows(tmp_path, rows)[1]
    assert made["d_PQ"] != "" and made["se_PQ"] == ""
    assert (
        capsys.readouterr().err.count(f"no standard errors of {folder / TABLES}, which cannot be read") == 1
    )


def test_counts_with_a_damaged_member_are_told_as_damaged(tmp_path):
    drawn_tables(np.random.default_rng(0), 10, 0.5).save(tmp_path / TABLES)
    content = bytearray((tmp_path / TABLES).read_bytes())
    middle = len(content) // 3
    content[middle : middle + 20] = bytes(20)
    (tmp_path / TABLES).write_bytes(content)
    with pytest.raises(ValueError, match=r"^(error|BadZipFile): "):
        ImageTables.load(tmp_path / TABLES)


def test_files_from_before_the_standard_errors_are_joined(tmp_path):
    rows = [row_of(PQ="50"), row_of(precision="fp16", PQ="51")]
    fields = [name for name in accuracy_ledger.FIELDS if not name.startswith("se_")]
    file = MeasurementFile(tmp_path / "old.csv", fields, ())
    for row in rows:
        file.add({name: row[name] for name in fields})
    made = joined([str(file.path)], accuracy_ledger.FIELDS, str(tmp_path))
    assert [row["d_PQ"] for row in made] == ["", "1.0"] and made[1]["se_PQ"] == ""


def test_error_stands_behind_the_difference():
    row = row_of(precision="fp16", PQ="50.1", SQ="80", RQ="60", d_PQ="0.1", se_PQ="0.0444")
    assert "| 50.10 [+0.100 ± 0.044] (80.00, 60.00) |" in table([row_of(PQ="50", SQ="80", RQ="60"), row])


@pytest.mark.parametrize(
    "overrides, kept",
    [
        ("", ""),
        ("MODEL.TENSORRT.MSDA plugin", ""),
        ("MODEL.TENSORRT.SHAPES ['64x64', '64x80'] TEST.BATCH_SIZE 2", "TEST.BATCH_SIZE 2"),
        ("DATASETS.TEST ('A',) MODEL.TENSORRT.CACHE.DIR x", "DATASETS.TEST ('A',)"),
    ],
)
def test_engines_keys_are_told_from_the_others(overrides, kept):
    assert without_engine_keys(overrides) == kept


def test_processes_that_differ_in_any_override_write_to_folders_of_their_own():
    rows = [
        row_of(),
        row_of(overrides="A.B 1"),
        row_of(overrides="A.B 2"),
        row_of(batch="4"),
        row_of(dataset="e"),
    ]
    assert len({row_folder("work", row) for row in rows}) == len(rows)
