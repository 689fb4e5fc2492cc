"""Evaluators give the same figures for RLE and labels as for bool masks and scores."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2sSemSegEvaluator
from detectron2.structures import Instances
from PIL import Image

from mask2former.evaluation import InstanceSegEvaluator, with_evaluation_formats
from mask2former.evaluation.formats import DecodingMixin, RLEMixin, SemSegEvaluator
from mask2former.rle import RLEMasks


@pytest.fixture
def records(shapes) -> list[dict]:
    return DatasetCatalog.get(f"{shapes}_val_panoptic")


def as_rle(instances: Instances) -> Instances:
    fields = dict(instances.get_fields())
    fields["pred_masks_rle"] = RLEMasks.encode(fields.pop("pred_masks"))
    return Instances(instances.image_size, **fields)


def evaluate(evaluator, records, outputs) -> dict:
    evaluator.reset()
    evaluator.process([{"image_id": r["image_id"], "file_name": r["file_name"]} for r in records], outputs)
    return evaluator.evaluate()


def test_rle_gives_the_ap_of_bool_masks(shapes, records, make_oracle):
    outputs = make_oracle(shift=2)(records)
    evaluator = InstanceSegEvaluator(f"{shapes}_val_panoptic", distributed=False)
    expected = evaluate(evaluator, records, outputs)
    predictions = evaluator._predictions
    actual = evaluate(evaluator, records, [{"instances": as_rle(o["instances"])} for o in outputs])
    assert evaluator._predictions == predictions
    for task in ("bbox", "segm"):
        assert actual[task] == pytest.approx(expected[task], nan_ok=True)
    assert 5 < actual["segm"]["AP"] < 95


def test_instances_of_an_rle_result_are_left_as_they_are(shapes, records, make_oracle):
    instances = as_rle(make_oracle()(records[:1])[0]["instances"])
    evaluator = InstanceSegEvaluator(f"{shapes}_val_panoptic", distributed=False)
    evaluator.reset()
    evaluator.process([{"image_id": records[0]["image_id"]}], [{"instances": instances}])
    assert instances.has("pred_masks_rle") and len(instances) == len(instances.pred_masks_rle)


def test_image_without_instances_is_kept():
    class Base:
        _predictions: list = []  # noqa: RUF012

        def process(self, inputs, outputs):
            raise AssertionError("an RLE result was not taken")

    class Evaluator(RLEMixin, Base):
        pass

    empty = Instances(
        (4, 5),
        pred_masks_rle=RLEMasks([]),
        scores=torch.zeros(0),
        pred_classes=torch.zeros(0, dtype=torch.int64),
    )
    evaluator = Evaluator()
    evaluator.process([{"image_id": 7}], [{"instances": empty}])
    assert evaluator._predictions == [{"image_id": 7, "instances": []}]


def test_labels_give_the_miou_of_scores(shapes, records, make_oracle):
    outputs = make_oracle(shift=2)(records)
    name = f"{shapes}_val_panoptic"
    expected = evaluate(SemSegEvaluator(name, distributed=False), records, outputs)["sem_seg"]
    labels = [{"sem_seg_labels": o["sem_seg"].argmax(0)} for o in outputs]
    actual = evaluate(SemSegEvaluator(name, distributed=False), records, labels)["sem_seg"]
    assert actual == pytest.approx(expected, nan_ok=True) and 5 < actual["mIoU"] < 99


@pytest.mark.parametrize("ids", ["of the data set", "contiguous"])
def test_semantic_counts_and_masks_are_detectron2s(shapes, records, make_oracle, monkeypatch, ids):
    name = f"{shapes}_val_panoptic"
    outputs = make_oracle(shift=2)(records)
    evaluators = SemSegEvaluator(name, distributed=False), Detectron2sSemSegEvaluator(name, distributed=False)
    for evaluator in evaluators:
        if ids == "contiguous":
            monkeypatch.setattr(evaluator, "_contiguous_id_to_dataset_id", None)
        evaluate(evaluator, records, outputs)
    ours, theirs = evaluators
    assert (ours._conf_matrix == theirs._conf_matrix).all() and ours._conf_matrix.dtype == np.int64
    assert ours._conf_matrix[:, -1].any()  # void is counted
    assert json.dumps(ours._predictions) == json.dumps(theirs._predictions)


def test_of_an_image_only_pairs_of_classes_that_it_has_are_kept(shapes, records, make_oracle):
    """A matrix of ADE20K's 847 classes would be 6 MB, in files while an evaluation runs."""
    evaluator = SemSegEvaluator(f"{shapes}_val_panoptic", distributed=False)
    evaluator._num_classes = 847
    (output,) = make_oracle()(records[:1])
    examined = evaluator.examine(records[0], output["sem_seg"].argmax(0))
    assert len(pickle.dumps(examined)) < 20_000
    evaluator.reset()
    evaluator.add(examined)
    assert evaluator._conf_matrix.sum() == output["sem_seg"][0].numel()


def test_boundaries_are_counted_where_detectron2_does(shapes, records, make_oracle):
    """As its main branch, which leaves the inside of every region 0."""
    name = f"{shapes}_val_panoptic"
    evaluator = SemSegEvaluator(name, distributed=False)
    evaluator._compute_boundary_iou = True
    evaluator._mask_to_boundary = lambda labels: labels - np.minimum(labels, np.roll(labels, 1, axis=0))
    evaluator.reset()
    evaluator._b_conf_matrix = np.zeros_like(evaluator._conf_matrix)
    outputs = make_oracle(shift=2)(records)
    evaluator.process([{"file_name": r["file_name"]} for r in records], outputs)
    expected = np.zeros_like(evaluator._conf_matrix)
    size = len(expected)
    for record, output in zip(records, outputs, strict=True):
        true = np.array(Image.open(record["sem_seg_file_name"]))
        true[true == 255] = size - 1
        predicted = output["sem_seg"].argmax(0).numpy().astype(np.uint8)
        maps = [evaluator._mask_to_boundary(labels).astype(int) for labels in (predicted, true)]
        pairs = size * maps[0] + maps[1]
        expected += np.bincount(pairs.ravel(), minlength=size * size).reshape(size, size)
    assert (evaluator._b_conf_matrix == expected).all()


def test_class_that_the_data_set_lacks_is_refused(shapes, records):
    record = records[0]
    evaluator = SemSegEvaluator(f"{shapes}_val_panoptic", distributed=False)
    evaluator.reset()
    labels = torch.full((record["height"], record["width"]), 13)
    with pytest.raises(AssertionError, match="Label 13 is not in the metadata info"):
        evaluator.process([{"file_name": record["file_name"]}], [{"sem_seg_labels": labels}])
    evaluator._contiguous_id_to_dataset_id = None
    with pytest.raises(IndexError):
        evaluator.process([{"file_name": record["file_name"]}], [{"sem_seg_labels": labels + 1}])


def test_evaluator_of_bool_masks_gets_them_decoded():
    seen = []

    class Base:
        def process(self, inputs, outputs):
            seen.extend(outputs)

    class Evaluator(DecodingMixin, Base):
        pass

    masks = torch.zeros(2, 4, 5, dtype=torch.bool)
    masks[1, 1:3] = True
    bare = Instances((4, 5), pred_masks=masks, scores=torch.ones(2))
    Evaluator().process([{}, {}], [{"instances": as_rle(bare)}, {"instances": bare}])
    assert torch.equal(seen[0]["instances"].pred_masks, masks) and not seen[0]["instances"].has(
        "pred_masks_rle"
    )
    assert seen[1]["instances"] is bare


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (["coco_panoptic_seg"], "rle"),
        (["coco", "lvis"], "rle"),
        (["coco", "cityscapes_instance"], "bitmask"),
        (["cityscapes_panoptic_seg"], "bitmask"),
        ([None], "bitmask"),
    ],
)
def test_auto_becomes_what_the_evaluators_of_the_test_sets_read(cfg, types, expected):
    names = []
    for kind in types:
        names.append(f"formats_{kind}")
        if kind is not None:
            MetadataCatalog.get(names[-1]).set(evaluator_type=kind)
    cfg.DATASETS.TEST = tuple(names)
    cfg.freeze()
    test = with_evaluation_formats(cfg).MODEL.MASK_FORMER.TEST
    assert (test.INSTANCE_FORMAT, test.SEMANTIC_FORMAT) == (expected, "labels")
    assert (cfg.MODEL.MASK_FORMER.TEST.INSTANCE_FORMAT, cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_FORMAT) == (
        "auto",
        "auto",
    )


def test_formats_that_are_asked_for_are_kept(cfg):
    test = cfg.MODEL.MASK_FORMER.TEST
    test.INSTANCE_FORMAT, test.SEMANTIC_FORMAT = "bitmask", "scores"
    kept = with_evaluation_formats(cfg).MODEL.MASK_FORMER.TEST
    assert (kept.INSTANCE_FORMAT, kept.SEMANTIC_FORMAT) == ("bitmask", "scores")
