"""Naming what a model returned, and painting it."""

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances

from mask2former.rle import RLEMasks
from mask2former.utils.timing import StageClock, TimedBackend, median_ms
from mask2former.utils.visualization import ClassTable, Findings, Painter, Region, interpret

METADATA = Metadata(
    thing_classes=["cat", "dog", "sky", "road"],
    stuff_classes=["cat", "dog", "sky", "road"],
    thing_colors=[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]],
    stuff_colors=[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]],
)
CLASSES = ClassTable(METADATA, 4)


def outputs() -> dict:
    """Two cats and a dog below sky on 8x10 pixels, road in the lowest row."""
    segments = torch.ones(8, 10, dtype=torch.int32)
    segments[2:6, 1:4], segments[2:6, 6:9], segments[6, :5], segments[7] = 2, 3, 4, 5
    info = [(1, 2, False), (2, 0, True), (3, 0, True), (4, 1, True), (5, 3, False)]
    instances = Instances((8, 10))
    instances.pred_masks = torch.stack([segments == 4, segments == 2, segments == 3])
    instances.pred_boxes = Boxes(torch.zeros(3, 4))
    instances.scores = torch.tensor([0.5, 0.9, 0.49])
    instances.pred_classes = torch.tensor([1, 0, 0])
    scores = torch.zeros(4, 8, 10)
    scores[2] = 1
    scores[3, 7] = 2
    return {
        "panoptic_seg": (segments, [{"id": i, "category_id": c, "isthing": t} for i, c, t in info]),
        "instances": instances,
        "sem_seg": scores,
    }


def test_panoptic_result_is_described_with_counts_and_stuff_by_area():
    findings = interpret(outputs(), CLASSES)
    assert findings.task == "panoptic"
    assert findings.describe() == "3 things (2 cat, 1 dog), 2 stuff (sky, road), 2 instances >= 0.5"
    assert findings.areas == [41, 12, 12, 5, 10]


def test_instances_are_sorted_by_score_and_cut_at_the_threshold():
    findings = interpret(outputs(), CLASSES, "instance", threshold=0.5)
    assert [(r.name, round(r.score, 2)) for r in findings.regions] == [("cat", 0.9), ("dog", 0.5)]
    assert findings.describe() == "2 instances >= 0.5 (1 dog, 1 cat)"


def test_boxes_come_from_masks_where_the_models_are_zero():
    entries = interpret(outputs(), CLASSES, "instance").to_dict()["regions"]
    assert [entry["box"] for entry in entries] == [[1, 2, 4, 6], [0, 6, 5, 7]]


def test_semantic_result_is_described_by_share_of_the_pixels():
    assert interpret(outputs(), CLASSES, "semantic").describe().startswith("2 classes (sky 88 %, road 12 %)")


@pytest.mark.parametrize("threshold", [0.5, 0.95])
def test_instances_as_run_lengths_are_those_as_masks(threshold):
    masks = outputs()["instances"]
    coded = Instances(masks.image_size, scores=masks.scores, pred_classes=masks.pred_classes)
    coded.pred_masks_rle = RLEMasks.encode(masks.pred_masks)
    expected, got = (
        interpret({"instances": instances}, CLASSES, "instance", threshold) for instances in (masks, coded)
    )
    assert got.to_dict() == expected.to_dict()
    assert len(got.regions) == (2 if threshold == 0.5 else 0)
    for a, b in zip(got.regions, expected.regions, strict=True):
        assert a.mask.dtype == bool and np.array_equal(a.mask, b.mask)


def test_semantic_labels_are_those_of_the_scores():
    scores = outputs()["sem_seg"]
    expected = interpret({"sem_seg": scores}, CLASSES)
    got = interpret({"sem_seg_labels": scores.argmax(0)}, CLASSES)
    assert got.task == "semantic" and got.to_dict() == expected.to_dict()
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(got.regions, expected.regions, strict=True))


def test_auto_takes_the_first_task_that_is_there():
    rest = {key: value for key, value in outputs().items() if key == "sem_seg"}
    assert interpret(rest, CLASSES).task == "semantic"


def test_missing_task_names_the_config_key():
    rest = {key: value for key, value in outputs().items() if key == "sem_seg"}
    with pytest.raises(ValueError, match=r"gives semantic.*MODEL\.MASK_FORMER\.TEST\.INSTANCE_ON True"):
        interpret(rest, CLASSES, "instance")


def test_a_name_list_of_another_length_is_not_indexed():
    # As ADE20K's panoptic set: fewer thing names than ids, all names under stuff_classes.
    names = ClassTable(Metadata(thing_classes=["dog"], stuff_classes=["wall", "sky", "dog"]), 3)
    assert names.name(2, True) == "dog" and names.name(0, True) == "wall"
    assert ClassTable(Metadata(thing_classes=["dog"]), 3).name(0, True) == "class 0"
    assert ClassTable(None, 100).color(99, False) == ClassTable(None, 100).color(99, True)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 3), (60, 81), (401, 233)])
def test_painted_picture_has_the_images_size(task, size):
    scaled = outputs()
    segments, info = scaled["panoptic_seg"]
    rows, cols = torch.arange(size[0]) * 8 // size[0], torch.arange(size[1]) * 10 // size[1]
    scaled["panoptic_seg"] = (segments[rows][:, cols], info)
    scaled["sem_seg"] = scaled["sem_seg"][:, rows][:, :, cols]
    masks = scaled["instances"].pred_masks[:, rows][:, :, cols]
    scaled["instances"] = Instances(
        size,
        pred_masks=masks,
        scores=scaled["instances"].scores,
        pred_classes=scaled["instances"].pred_classes,
    )
    image = np.full((*size, 3), 128, np.uint8)
    findings = interpret(scaled, CLASSES, task)
    picture = Painter(CLASSES).paint(image, findings)
    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert (image == 128).all()
    assert (picture != image).any() == any(findings.areas)


def region(mask: np.ndarray, class_id: int = 0, isthing: bool = True) -> Region:
    return Region(class_id, CLASSES.name(class_id, isthing), isthing, mask)


def findings_of(*regions: Region) -> Findings:
    return Findings("panoptic", *regions[0].mask.shape, list(regions), 0.5)


def test_mask_is_coloured_and_its_hole_is_not():
    mask = np.zeros((300, 300), bool)
    mask[50:250, 50:250] = True
    mask[100:200, 100:200] = False
    picture = Painter(CLASSES).paint(np.full((300, 300, 3), 100, np.uint8), findings_of(region(mask)))
    assert picture[240, 70].tolist() == [178, 50, 50]  # half red
    assert picture[110:190, 110:190].tolist() == np.full((80, 80, 3), 100).tolist()
    assert picture[20, 20].tolist() == [100, 100, 100]


def test_mask_in_a_hundred_thousand_pieces_is_painted_pixel_by_pixel():
    mask = np.random.default_rng(0).random((800, 1088)) > 0.5
    picture = Painter(CLASSES).paint(np.zeros((800, 1088, 3), np.uint8), findings_of(region(mask)))
    assert picture.any(axis=2)[mask].all()


def frame(*boxes: tuple[int, int, int, int]) -> Findings:
    masks = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros((120, 160), bool)
        mask[y0:y1, x0:x1] = True
        masks.append(region(mask))
    return findings_of(*masks)


def test_things_of_a_video_keep_their_colours_when_their_order_changes():
    left, right = (10, 10, 70, 110), (90, 10, 150, 110)
    moved = (94, 12, 154, 112)
    painter, image = Painter(CLASSES), np.zeros((120, 160, 3), np.uint8)
    first = painter.paint(image, frame(left, right))
    second = painter.paint(image, frame(moved, left))
    assert first[100, 20].tolist() != first[100, 140].tolist()
    assert second[100, 20].tolist() == first[100, 20].tolist()
    assert second[100, 140].tolist() == first[100, 140].tolist()


def test_empty_masks_are_left_out():
    image = np.full((20, 20, 3), 7, np.uint8)
    assert (Painter(CLASSES).paint(image, findings_of(region(np.zeros((20, 20), bool)))) == 7).all()


def test_clock_splits_the_model_at_the_backend():
    times = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    clock = StageClock(now=lambda: next(times))
    backend = TimedBackend(lambda images: images + 1, clock)
    clock.lap("read")
    assert backend(1) == 2
    clock.lap("postprocess")
    assert clock.seconds == {"read": 1.0, "preprocess": 2.0, "network": 4.0, "postprocess": 8.0}


def test_medians_are_in_milliseconds_and_stages_in_order():
    laps = [{"write": 0.1, "read": 0.3}, {"write": 0.2, "read": 0.1}, {"write": 0.9, "read": 0.2}]
    medians = median_ms(laps)
    assert list(medians) == ["read", "write", "total"]
    assert medians == pytest.approx({"read": 200, "write": 200, "total": 400})
    assert median_ms([]) == {}
