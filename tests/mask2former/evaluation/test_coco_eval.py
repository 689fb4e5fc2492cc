"""COCO's evaluation in several processes against pycocotools' own: the same results to the last digit."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.evaluation import COCOEvaluator
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask2former.evaluation import InstanceSegEvaluator, coco_eval, processes
from mask2former.evaluation.coco_eval import ParallelCOCOeval

SIZE = 48
CATEGORIES = (2, 3, 5, 11)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture(autouse=True)
def few_images_are_enough(monkeypatch):
    monkeypatch.setattr(processes, "_IMAGES_PER_PROCESS", 2)
    monkeypatch.setattr(processes, "available_cpus", lambda: 3)


def annotation(generator: np.random.Generator, near: dict | None = None) -> dict:
    """A box and its mask: anywhere, or near another one."""
    if near is None:
        x, y = generator.integers(0, SIZE - 20, 2)
        width, height = generator.integers(2, 20, 2)
    else:
        x, y, width, height = np.array(near["bbox"], int) + generator.integers(-1, 2, 4) * (
            generator.random() < 0.7
        )
        x, y, width, height = max(x, 0), max(y, 0), max(width, 1), max(height, 1)
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = mask_util.encode(mask)
    return {
        "bbox": [float(n) for n in (x, y, width, height)],
        "segmentation": {"size": [SIZE, SIZE], "counts": rle["counts"].decode()},
        "category_id": int(generator.choice(CATEGORIES[:3])) if near is None else near["category_id"],
    }


def drawn(images: int, seed: int = 0) -> tuple[COCO, list[dict]]:
    """Truth and predictions with crowds, instances that are to be ignored, images without one or the other, equal scores,
    boxes of all of COCO's sizes, more detections than count, and a category that does not come.
    """
    generator = np.random.default_rng(seed)
    truth, found = [], []
    # Ids without order, some very large.
    image_ids = [int(n) for n in generator.permutation(images) * 7919 + 3]
    for i, image_id in enumerate(image_ids):
        mine = [annotation(generator) for _ in range(0 if i % 5 == 0 else generator.integers(1, 7))]
        for one in mine:
            scale = generator.choice([1, 1, 30, 120])  # the area that COCO is told, not the mask's
            truth.append(
                {
                    **one,
                    "id": len(truth) + 1,
                    "image_id": image_id,
                    "iscrowd": int(generator.random() < 0.15),
                    "ignore": int(generator.random() < 0.1),
                    "area": one["bbox"][2] * one["bbox"][3] * float(scale),
                }
            )
        if i % 7 == 3:
            continue
        for _ in range(140 if i == 1 else generator.integers(1, 25)):
            near = mine[generator.integers(len(mine))] if mine and generator.random() < 0.7 else None
            one = annotation(generator, near)
            found.append({**one, "image_id": image_id, "score": float(generator.integers(1, 20) / 20)})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in image_ids],
        "annotations": truth,
        "categories": [{"id": c, "name": str(c)} for c in CATEGORIES],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco, found


def evaluated(kind: type[COCOeval], images: int, iou_type: str, change=lambda params: None, **options):
    """An evaluation that is done, and what it printed, without the times."""
    truth, found = drawn(images)
    if iou_type == "segm":
        for one in found:
            del one["bbox"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluation = kind(truth, truth.loadRes(found), iou_type, **options)
        change(evaluation.params)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation, re.sub(r"t=\s*[\d.]+s", "t", printed.getvalue())


def assert_same(actual: ParallelCOCOeval, expected: COCOeval) -> None:
    assert len(actual.evalImgs) == len(expected.evalImgs)
    for mine, plain in zip(actual.evalImgs, expected.evalImgs):
        assert (mine is None) == (plain is None)
        if plain is None:
            continue
        assert list(mine) == list(plain)
        for name, value in plain.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(mine[name], value, err_msg=name, strict=value.size > 0)
            else:
                assert mine[name] == value and type(mine[name]) is type(value), name
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(actual.eval[name], expected.eval[name], err_msg=name, strict=True)
    assert actual.eval["counts"] == expected.eval["counts"]
    assert set(actual.eval) == set(expected.eval)
    assert vars(actual.eval["params"]).keys() == vars(expected.eval["params"]).keys()
    np.testing.assert_array_equal(actual.stats, expected.stats)


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """Numbers of processes that were used."""
    counts = []

    def counting(work, count):
        counts.append(count)
        return processes.in_processes(work, count)

    monkeypatch.setattr(coco_eval, "in_processes", counting)
    return counts


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("images, wanted, shares", [(23, 3, [3, 3]), (24, 5, [5, 4]), (40, -1, [3, 3])])
def test_results_are_pycocotools_own(used, iou_type, images, wanted, shares):
    expected, told = evaluated(COCOeval, images, iou_type)
    actual, said = evaluated(ParallelCOCOeval, images, iou_type, max_processes=wanted)
    assert used == shares
    assert_same(actual, expected)
    assert said == told and "Average Precision" in told
    assert 0.05 < expected.stats[0] < 0.95 and (expected.stats[3:6] > 0).all()


@pytest.mark.parametrize("images, wanted", [(3, -1), (23, 0), (23, 1)])
def test_few_images_or_one_process_are_pycocotools_own_run(used, images, wanted):
    expected, told = evaluated(COCOeval, images, "segm")
    actual, said = evaluated(ParallelCOCOeval, images, "segm", max_processes=wanted)
    assert used == [] and said == told
    assert_same(actual, expected)
    assert actual.ious.keys() == expected.ious.keys()


def only_some_images(params):
    params.imgIds = sorted(params.imgIds)[::-2]


def one_area(params):
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]


def without_categories(params):
    params.useCats = 0


def other_thresholds(params):
    params.iouThrs, params.catIds = np.array([0.3, 0.8]), [5, 3]


@pytest.mark.parametrize("change", [only_some_images, one_area, without_categories, other_thresholds])
def test_parameters_are_heeded(used, monkeypatch, change):
    monkeypatch.setattr(
        COCOeval, "summarize", lambda self: setattr(self, "stats", [])
    )  # takes none but COCO's
    expected, told = evaluated(COCOeval, 30, "segm", change)
    actual, said = evaluated(ParallelCOCOeval, 30, "segm", change, max_processes=3)
    assert used[0] == 3 and said == told
    assert_same(actual, expected)


def test_results_of_images_are_a_sequence(used):
    evaluation, _ = evaluated(ParallelCOCOeval, 23, "bbox", max_processes=3)
    results = evaluation.evalImgs
    assert used and len(results) == len(CATEGORIES) * 4 * 23
    everything = list(results)
    for index in (0, 5, 100, -1, -len(results)):
        assert (results[index] is None) == (everything[index] is None)
        assert results[index] is None or results[index]["dtIds"] == everything[index]["dtIds"]
    part = [one and one["gtIds"] for one in results[30:90:7]]
    assert part == [one and one["gtIds"] for one in everything[30:90:7]] and any(part)
    with pytest.raises(IndexError):
        results[len(results)]


def test_evaluator_gives_what_detectron2s_gives(used, shapes, make_oracle, tmp_path, capsys):
    """Figures, what is printed, and files."""
    name = f"{shapes}_val_instance"
    oracle = make_oracle(2)
    results, printed = {}, {}
    evaluators = {
        "plain": COCOEvaluator(
            name, distributed=False, output_dir=str(tmp_path / "plain"), use_fast_impl=False
        ),
        "ours": InstanceSegEvaluator(
            name, distributed=False, output_dir=str(tmp_path / "ours"), max_processes=4
        ),
    }
    for kind, evaluator in evaluators.items():
        evaluator.reset()
        for image_id, record in oracle.instances.items():
            image = {"image_id": image_id, "file_name": record["file_name"]}
            evaluator.process([image], [oracle.predict(image_id)])
        capsys.readouterr()
        results[kind] = evaluator.evaluate()
        printed[kind] = re.sub(r"t=\s*[\d.]+s", "t", capsys.readouterr().out)
    assert used == [4, 4, 4, 4]  # images and categories, of boxes and of masks
    np.testing.assert_equal(results["ours"], results["plain"])
    assert 0 < results["ours"]["segm"]["AP"] < 100
    assert list(results["ours"]) == list(results["plain"]) == ["bbox", "segm"]
    assert printed["ours"] == printed["plain"]
    file = "coco_instances_results.json"
    assert Path(tmp_path, "ours", file).read_bytes() == Path(tmp_path, "plain", file).read_bytes()


def test_evaluator_takes_images_that_it_is_told(used, shapes, make_oracle):
    name = f"{shapes}_val_instance"
    oracle = make_oracle(2)
    chosen = list(oracle.instances)[:6]
    evaluators = (
        COCOEvaluator(name, distributed=False, use_fast_impl=False),
        InstanceSegEvaluator(name, distributed=False, max_processes=3),
    )
    results = []
    for evaluator in evaluators:
        evaluator.reset()
        for image_id in oracle.instances:
            evaluator.process([{"image_id": image_id}], [oracle.predict(image_id)])
        results.append(evaluator.evaluate(img_ids=chosen))
    assert used
    np.testing.assert_equal(*results)  # NaN is equal, other than with ==
