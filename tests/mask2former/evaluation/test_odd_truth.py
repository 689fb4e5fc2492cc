"""Ground truth in COCO's panoptic form that does not fit itself: what is counted all the same, and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from mask2former import get_mask2former_cfg
from mask2former.data.annotations import drawn_pixels, undrawn
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.data.errors import AnnotationError
from mask2former.evaluation import PanopticEvaluator, evaluate_model, panoptic_evaluation, pq_compute

CONFIG = Path(__file__).resolve().parents[3] / "configs/shapes/maskformer2_mini_shapes.yaml"
IMAGES = 4
FOREIGN = 5_000_000  # no id of the maps is so high


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=1, val=IMAGES, seed=3, min_size=48, max_size=64))
    return root


@pytest.fixture
def register(drawn, tmp_path):
    """The prefix of a copy of the data set after a function has changed the JSON's content."""

    def register(change) -> str:
        shutil.copytree(drawn, tmp_path / "shapes")
        path = tmp_path / "shapes" / "annotations" / "panoptic_val.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))
        prefix = f"oddtruth_{tmp_path.name}"
        register_shapes(str(tmp_path / "shapes"), prefix)
        return prefix

    return register


@pytest.fixture
def evaluate(tmp_path, oracle_of):
    """Results of the truth as prediction, and the warnings."""

    def evaluate(prefix: str, *opts) -> dict:
        words = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (), "DATASETS.TEST", (f"{prefix}_val_panoptic",)]
        words += ["DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path / "out")]
        words += ["MODEL.MASK_FORMER.TEST.INSTANCE_ON", False, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False]
        return evaluate_model(get_mask2former_cfg(CONFIG, [*words, *opts]), oracle_of(prefix))["panoptic_seg"]

    return evaluate


def warnings(caplog) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelname == "WARNING" and r.name.startswith("mask2former")
    ]


def each_image(change):
    def changed(content: dict) -> None:
        for place, annotation in enumerate(content["annotations"]):
            change(place, annotation["segments_info"])

    return changed


def foreign(segments: list[dict], **fields) -> dict:
    """A segment that the map does not show."""
    thing = next(s for s in segments if not s["iscrowd"])
    return {**thing, "id": FOREIGN, "area": 9, **fields}


@pytest.mark.parametrize("threads", [0, 2])
def test_segment_that_the_map_does_not_show_is_missed_and_told(register, evaluate, caplog, tmp_path, threads):
    def change(place, segments):
        if place != 1:
            segments.append(foreign(segments))

    prefix = register(each_image(change))
    with caplog.at_level("WARNING", "mask2former"):
        results = evaluate(prefix, "TEST.EVALUATION_THREADS", threads)
    assert results["SQ"] == 100 and 50 < results["PQ"] < 100
    (told,) = warnings(caplog)
    assert "3 segments of 3 images" in told and str(FOREIGN) in told and "1000001.png" in told
    root = tmp_path / "shapes"
    alone = pq_compute(
        str(root / "annotations/panoptic_val.json"),
        str(tmp_path / "out/inference/predictions.json"),
        str(root / "val/panoptic"),
        str(tmp_path / "out/inference/panoptic_predictions"),
    )
    assert results["PQ"] == 100 * alone["All"]["pq"]


@pytest.mark.parametrize("fields", [{"area": 0}, {"iscrowd": 1}])
def test_segments_that_say_so_and_crowds_are_not_told(register, evaluate, caplog, fields):
    with caplog.at_level("WARNING", "mask2former"):
        evaluate(register(each_image(lambda place, segments: segments.append(foreign(segments, **fields)))))
    assert not warnings(caplog)


def test_map_of_other_segments_is_an_error(register):
    prefix = register(each_image(lambda place, segments: [s.update(id=s["id"] ^ 4194304) for s in segments]))
    records = DatasetCatalog.get(f"{prefix}_val_panoptic")
    evaluator = PanopticEvaluator(f"{prefix}_val_panoptic", distributed=False)
    message = r"panoptic/1000001.png \(image_id 1000001\) .*has none of .*allowed: .*R \+ 256 G"
    empty = [{"panoptic_seg": (np.zeros((r["height"], r["width"]), int), [])} for r in records]
    with pytest.raises(AnnotationError, match=message):
        evaluator.process(records, empty)


def test_areas_that_are_not_the_pixels_are_told(register, evaluate, caplog):
    """PQ counts them, as panopticapi does: with areas of before the maps were made smaller it is wrong."""

    def change(place, segments):
        if place < 2:
            for segment in segments:
                segment["area"] *= 3 - 2.5 * place

    prefix = register(each_image(change))
    with caplog.at_level("WARNING", "mask2former"):
        results = evaluate(prefix)
    assert results["SQ"] != 100
    (told,) = warnings(caplog)
    assert "of 2 images" in told and "area" in told and "1000001.png" in told


def test_what_several_processes_found_is_told_once(register, oracle_of, monkeypatch, caplog):
    def change(place, segments):
        segments.append(foreign(segments))
        segments[0]["area"] += 1

    prefix = register(each_image(change))
    records, oracle = DatasetCatalog.get(f"{prefix}_val_panoptic"), oracle_of(prefix)
    ranks = [PanopticEvaluator(f"{prefix}_val_panoptic") for _ in range(3)]
    for evaluator, part in zip(ranks, (records[:3], records[3:], [])):  # the last had no images
        evaluator.process(part, oracle(part))
    everyone = []
    monkeypatch.setattr(panoptic_evaluation.comm, "synchronize", lambda: None)
    monkeypatch.setattr(panoptic_evaluation.comm, "gather", lambda own: everyone.append(own) or everyone)
    monkeypatch.setattr(panoptic_evaluation.comm, "is_main_process", lambda: False)
    with caplog.at_level("WARNING", "mask2former"):
        ranks[2].evaluate()
        ranks[1].evaluate()
        assert not warnings(caplog)
        monkeypatch.setattr(panoptic_evaluation.comm, "is_main_process", lambda: True)
        ranks[0].evaluate()
    told = warnings(caplog)
    assert len(told) == 2 and all("4 segments of 4 images" in text for text in told)


def test_area_of_nothing_under_pixels_is_named(register, evaluate):
    prefix = register(each_image(lambda place, segments: [s.update(area=0) for s in segments]))
    message = r"image 100000\d: the true segment \d+ has an area of 0 .* but \d+ pixels"
    with pytest.raises(AnnotationError, match=message):
        evaluate(prefix)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: [1], r"panoptic_val.json is '\[1\]'; allowed: an object"),
        (lambda c: c.pop("categories") and c, "categories is missing; allowed: a list"),
        (lambda c: c["categories"].insert(1, 5), r"categories\[1\] is 5; allowed: an object"),
        (lambda c: c["categories"][2].pop("id") and c, r"categories\[2\] .*its id is missing; allowed"),
        (
            lambda c: c["categories"][2].pop("isthing") and None,
            r"categories\[2\] .*its isthing is missing; allowed: 0 or 1",
        ),
        (
            lambda c: c["categories"][2].update(isthing=None),
            r"categories\[2\] .*its isthing is null; allowed: 0 or 1",
        ),
    ],
)
def test_categories_are_checked_before_the_first_image(register, change, message):
    prefix = register(change)
    with pytest.raises(AnnotationError, match=message):
        PanopticEvaluator(f"{prefix}_val_panoptic")


def test_image_that_is_annotated_twice_is_named(register):
    """One of the two would count, and the image's instances twice."""
    prefix = register(
        lambda content: content["annotations"].append({**content["annotations"][2], "segments_info": []})
    )
    with pytest.raises(
        AnnotationError, match=r"panoptic_val.json: image 1000003 \(.*png\) .*allowed: one annotation"
    ):
        PanopticEvaluator(f"{prefix}_val_panoptic")


def test_map_in_a_palette_is_read(register, evaluate, tmp_path):
    """Tools that make PNGs smaller store up to 256 colours as a palette; training reads it too."""
    prefix = register(lambda content: None)
    for path in (tmp_path / "shapes/val/panoptic").glob("*.png"):
        with Image.open(path) as image:
            colors, places = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_inverse=True)
            small = Image.fromarray(places.reshape(image.height, image.width).astype(np.uint8), "P")
        small.putpalette(colors.astype(np.uint8).tobytes())
        small.save(path)
    assert set(evaluate(prefix).values()) == {100.0}


def test_pixels_of_a_map_by_id():
    ids = np.array([[7, 7, 7], [3, 7, 3]])
    assert drawn_pixels(ids) == {3: 2, 7: 4}
    assert drawn_pixels(np.zeros((0, 4), int)) == {}
    listed = [{"id": 3}, {"id": 4}, {"id": 7, "area": 0}, {"id": 8, "area": 0}, {"id": 9, "area": 5}]
    assert undrawn("map.png", drawn_pixels(ids), listed) == [4, 8, 9]
    assert undrawn("map.png", {0: 6}, [{"id": 3}]) == [3]
