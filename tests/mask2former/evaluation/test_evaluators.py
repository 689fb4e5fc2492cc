"""Evaluators end to end on the shapes data set, with models whose predictions are known."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances

from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.errors import AnnotationError
from mask2former.evaluation import (
    InstanceSegEvaluator,
    PanopticEvaluator,
    build_evaluator,
    check_evaluators,
    check_test_sets,
    evaluate_model,
    instance_evaluation,
    panoptic_evaluation,
    pq_compute,
    save_results,
)
from mask2former.evaluation.formats import SemSegEvaluator
from mask2former.evaluation.panoptic_quality import read_panoptic_png


def inputs_of(records: list[dict]) -> list[dict]:
    return [{"image_id": r["image_id"], "file_name": r["file_name"]} for r in records]


@pytest.fixture
def records(shapes) -> list[dict]:
    return DatasetCatalog.get(f"{shapes}_val_panoptic")


def test_ground_truth_as_prediction_is_perfect(cfg, make_oracle):
    cfg.TEST.BATCH_SIZE = 4
    oracle = make_oracle()
    results = evaluate_model(cfg, oracle)
    assert set(results["panoptic_seg"].values()) == {100.0}
    assert results["sem_seg"]["mIoU"] == pytest.approx(100.0)
    # COCO's recall axis is sampled: 101 points, and crowds are not predicted.
    assert results["segm"]["AP"] == pytest.approx(100.0, abs=0.01)
    assert results["bbox"]["AP"] == pytest.approx(100.0, abs=0.01)
    assert results["segm"]["AP-star"] == pytest.approx(100.0, abs=0.01)
    assert oracle.prepared == 1
    assert oracle.batch_sizes == [4, 4, 4, 1]


def test_moved_prediction_is_worse(cfg, make_oracle):
    perfect, moved = evaluate_model(cfg, make_oracle()), evaluate_model(cfg, make_oracle(shift=1))
    for task, metric in (("panoptic_seg", "PQ"), ("segm", "AP"), ("sem_seg", "mIoU")):
        assert 5 < moved[task][metric] < perfect[task][metric] - 5
    # Stuff is large: a move by one pixel costs it less.
    assert moved["panoptic_seg"]["PQ_st"] > moved["panoptic_seg"]["PQ_th"]


def test_results_and_predictions_are_written(cfg, make_oracle, shapes):
    evaluate_model(cfg, make_oracle(shift=2))
    folder = cfg.OUTPUT_DIR + "/inference"
    with open(f"{folder}/results.json") as f:
        saved = json.load(f)[f"{shapes}_val_panoptic"]
    assert set(saved) == {"panoptic_seg", "segm", "bbox", "sem_seg"}
    # What was written gives the same figures when it is read again.
    metadata = MetadataCatalog.get(f"{shapes}_val_panoptic")
    again = pq_compute(
        metadata.panoptic_json,
        f"{folder}/predictions.json",
        metadata.panoptic_root,
        f"{folder}/panoptic_predictions",
    )
    assert 100 * again["Things"]["pq"] == pytest.approx(saved["panoptic_seg"]["PQ_th"])
    assert 100 * again["All"]["sq"] == pytest.approx(saved["panoptic_seg"]["SQ"])


def test_several_data_sets_keep_their_results_apart(cfg, make_oracle, shapes, tmp_path):
    cfg.DATASETS.TEST = (f"{shapes}_val_sem_seg", f"{shapes}_val_instance")
    results = evaluate_model(cfg, make_oracle())
    assert list(results) == list(cfg.DATASETS.TEST)
    assert list(results[f"{shapes}_val_sem_seg"]) == ["sem_seg"]
    assert set(results[f"{shapes}_val_instance"]) == {"bbox", "segm"}
    assert (tmp_path / "out/inference" / f"{shapes}_val_instance" / "coco_instances_results.json").is_file()


def test_panoptic_results_have_detectron2s_names_and_table(shapes, records, make_oracle, caplog):
    evaluator = PanopticEvaluator(f"{shapes}_val_panoptic", distributed=False)
    evaluator.process(inputs_of(records), make_oracle()(records))
    with caplog.at_level(logging.INFO, logger=panoptic_evaluation.logger.name):
        results = evaluator.evaluate()["panoptic_seg"]
    assert list(results) == ["PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"]
    table = caplog.text
    assert "Panoptic Evaluation Results" in table and "#categories" in table and "Things" in table


def test_panoptic_ids_without_segments_info(shapes, records, make_oracle):
    """The form of detectron2's Panoptic-DeepLab: category * label_divisor + instance, -1 for void."""
    divisor = MetadataCatalog.get(f"{shapes}_val_panoptic").label_divisor
    outputs = []
    for output in make_oracle()(records):
        ids, info = output["panoptic_seg"]
        encoded = torch.full_like(ids, -1)
        for number, segment in enumerate(info):
            encoded[ids == segment["id"]] = segment["category_id"] * divisor + number
        outputs.append({"panoptic_seg": (encoded, None)})
    evaluator = PanopticEvaluator(f"{shapes}_val_panoptic", distributed=False)
    evaluator.process(inputs_of(records), outputs)
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100.0
    # Void stays -1 in the model's own tensor.
    assert min(int(o["panoptic_seg"][0].min()) for o in outputs) == -1


def test_model_outputs_are_left_as_they_are(shapes, records, make_oracle):
    outputs = make_oracle()(records)
    before = [(ids.clone(), [dict(s) for s in info]) for ids, info in (o["panoptic_seg"] for o in outputs)]
    classes = [o["instances"].pred_classes.clone() for o in outputs]
    for evaluator in (
        PanopticEvaluator(f"{shapes}_val_panoptic", distributed=False),
        InstanceSegEvaluator(f"{shapes}_val_panoptic", distributed=False),
    ):
        evaluator.reset()
        evaluator.process(inputs_of(records), outputs)
    for output, (ids, info), kept in zip(outputs, before, classes, strict=True):
        assert torch.equal(output["panoptic_seg"][0], ids) and output["panoptic_seg"][1] == info
        assert torch.equal(output["instances"].pred_classes, kept)


@pytest.mark.parametrize(
    "segment", [{"isthing": True, "category_id": 8}, {"isthing": False, "category_id": 40}]
)
def test_panoptic_class_of_another_data_set_is_refused(shapes, records, segment):
    ids = torch.ones(records[0]["height"], records[0]["width"], dtype=torch.int32)
    evaluator = PanopticEvaluator(f"{shapes}_val_panoptic", distributed=False)
    with pytest.raises(ValueError, match=rf"class {segment['category_id']}.*NUM_CLASSES"):
        evaluator.process(inputs_of(records[:1]), [{"panoptic_seg": (ids, [{"id": 1, **segment}])}])


def test_image_without_prediction_is_refused(shapes, records, make_oracle):
    evaluator = PanopticEvaluator(f"{shapes}_val_panoptic", distributed=False)
    evaluator.process(inputs_of(records[1:]), make_oracle()(records[1:]))
    with pytest.raises(ValueError, match=rf"no prediction for 1 images.*{records[0]['image_id']}"):
        evaluator.evaluate()


def test_ranks_are_gathered(shapes, records, make_oracle, monkeypatch, tmp_path):
    oracle = make_oracle(shift=3)
    whole = PanopticEvaluator(f"{shapes}_val_panoptic", distributed=False)
    whole.process(inputs_of(records), oracle(records))

    ranks = []
    for part in (records[:6], records[6:]):
        evaluator = PanopticEvaluator(f"{shapes}_val_panoptic", str(tmp_path))
        evaluator.process(inputs_of(part), oracle(part))
        ranks.append(evaluator)
    # What comm.gather gives the main process, and an empty list elsewhere.
    everyone = [(e._stats, e._predictions) for e in ranks]
    monkeypatch.setattr(panoptic_evaluation.comm, "gather", lambda own: everyone)
    assert ranks[0].evaluate() == whole.evaluate()
    assert len(list((tmp_path / "panoptic_predictions").glob("*.png"))) == len(records)

    monkeypatch.setattr(panoptic_evaluation.comm, "gather", lambda own: [])
    monkeypatch.setattr(panoptic_evaluation.comm, "is_main_process", lambda: False)
    assert ranks[1].evaluate() is None


def test_instances_of_stuff_are_refused(shapes, records):
    size = (records[0]["height"], records[0]["width"])
    instances = Instances(
        size,
        pred_masks=torch.ones(2, *size, dtype=torch.bool),
        pred_boxes=Boxes(torch.zeros(2, 4)),
        scores=torch.ones(2),
        pred_classes=torch.tensor([3, 11]),
    )
    evaluator = InstanceSegEvaluator(f"{shapes}_val_panoptic", distributed=False)
    evaluator.reset()
    with pytest.raises(ValueError, match=r"classes \[11\].*\[0, 1, 2, 3, 4, 5, 6, 7\].*PANOPTIC_ON"):
        evaluator.process(inputs_of(records[:1]), [{"instances": instances}])


def test_thing_ids_with_gaps_are_mapped(shapes, records, make_oracle, instance_json):
    """As in ADE20K's panoptic form, where things and stuff alternate: here the ids of things are 3, 6, 9, ..."""
    known = MetadataCatalog.get(f"{shapes}_val_instance").thing_dataset_id_to_contiguous_id
    name = "evaltest_gaps"
    if name not in MetadataCatalog.list():
        MetadataCatalog.get(name).set(
            json_file=instance_json,
            thing_dataset_id_to_contiguous_id={k: 3 * v + 3 for k, v in known.items()},
        )
    outputs = make_oracle()(records)
    for output in outputs:
        output["instances"].pred_classes = 3 * output["instances"].pred_classes + 3
    evaluator = InstanceSegEvaluator(name, distributed=False)
    evaluator.reset()
    evaluator.process(inputs_of(records), outputs)
    results = evaluator.evaluate()["segm"]
    assert results["AP"] == pytest.approx(100.0, abs=0.01)
    assert results["AP-bar"] == pytest.approx(100.0, abs=0.01)


def test_no_instances_at_all_still_names_every_metric(shapes, records):
    evaluator = InstanceSegEvaluator(f"{shapes}_val_panoptic", distributed=False)
    evaluator.reset()
    for record in records:
        size = (record["height"], record["width"])
        nothing = Instances(
            size,
            pred_masks=torch.zeros(0, *size, dtype=torch.bool),
            pred_boxes=Boxes(torch.zeros(0, 4)),
            scores=torch.zeros(0),
            pred_classes=torch.zeros(0, dtype=torch.int64),
        )
        evaluator.process(inputs_of([record]), [{"instances": nothing}])
    results = evaluator.evaluate()
    assert set(results) == {"bbox", "segm"} and np.isnan(results["segm"]["AP"])


def test_fast_coco_evaluation_is_used_only_where_it_is_compiled(monkeypatch):
    from detectron2.evaluation import fast_eval_api
    from pycocotools.cocoeval import COCOeval

    class StandIn(COCOeval):
        pass

    class Compiled(COCOeval):
        def evaluate(self):
            pass

    monkeypatch.setattr(fast_eval_api, "COCOeval_opt", StandIn)
    assert not instance_evaluation._has_fast_coco_eval()
    monkeypatch.setattr(fast_eval_api, "COCOeval_opt", Compiled)
    assert instance_evaluation._has_fast_coco_eval()


def kinds(evaluator) -> list[type]:
    parts = evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]
    return [type(part) for part in parts]


def test_panoptic_data_set_evaluates_the_tasks_that_are_on(cfg, shapes):
    name = f"{shapes}_val_panoptic"
    assert kinds(build_evaluator(cfg, name)) == [PanopticEvaluator, InstanceSegEvaluator, SemSegEvaluator]
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    assert kinds(build_evaluator(cfg, name)) == [PanopticEvaluator, SemSegEvaluator]
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    assert kinds(build_evaluator(cfg, name)) == [PanopticEvaluator]
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    with pytest.raises(ValueError, match=r"at least one of MODEL.MASK_FORMER.TEST.PANOPTIC_ON"):
        build_evaluator(cfg, name)


@pytest.mark.parametrize("kind, task", [("instance", "INSTANCE_ON"), ("sem_seg", "SEMANTIC_ON")])
def test_task_that_the_data_set_needs_must_be_on(cfg, shapes, kind, task):
    cfg.MODEL.MASK_FORMER.TEST[task] = False
    with pytest.raises(ValueError, match=rf"MODEL.MASK_FORMER.TEST.{task} True"):
        build_evaluator(cfg, f"{shapes}_val_{kind}")
    cfg.DATASETS.TEST = (f"{shapes}_val_{kind}",)
    with pytest.raises(ValueError, match=rf"MODEL.MASK_FORMER.TEST.{task} True"):
        check_evaluators(cfg)


def test_evaluators_are_checked_without_reading_a_file(cfg, tmp_path):
    name = "evaltest_absent"
    register_shapes(str(tmp_path / "absent"), name)
    cfg.DATASETS.TEST = tuple(f"{name}_val_{kind}" for kind in ("panoptic", "instance", "sem_seg"))
    check_evaluators(cfg)
    cfg.TEST.EVALUATION_THREADS = -2
    with pytest.raises(ValueError, match=r"TEST\.EVALUATION_THREADS is -2"):
        check_evaluators(cfg)


@pytest.mark.parametrize("kind, package", [("lvis", "lvis"), ("cityscapes_instance", "cityscapesscripts")])
def test_packages_of_evaluators_are_asked_for(cfg, monkeypatch, kind, package):
    name = f"evaltest_type_{kind}"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).evaluator_type = kind
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    cfg.DATASETS.TEST = (name,)
    with pytest.raises(ImportError, match=f"{name} needs .*pip install {package}"):
        check_evaluators(cfg)


def test_unknown_evaluator_type_lists_the_known_ones(cfg):
    name = "evaltest_unknown_type"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(evaluator_type="pascal")
    with pytest.raises(
        ValueError, match=r"'pascal', known are ade20k_panoptic_seg, .*coco_panoptic_seg.*sem_seg"
    ):
        build_evaluator(cfg, name)


@pytest.mark.parametrize(
    "lacking, how, task, message",
    [
        ("sem_seg_file_name", "left_out", "SEMANTIC_ON", "no semantic maps .*sem_seg_file_name"),
        ("json_file", "left_out", "INSTANCE_ON", "no instances .*json_file"),
        ("json_file", "none", "INSTANCE_ON", "no instances .*json_file"),
    ],
)
def test_truth_that_a_panoptic_data_set_lacks_is_named(cfg, shapes, lacking, how, task, message):
    """As data sets of detectron2's register_coco_panoptic, which have no semantic maps, under COCO's config."""
    name = f"{shapes}_without_{lacking}_{how}"
    records, metadata = (
        DatasetCatalog.get(f"{shapes}_val_panoptic"),
        MetadataCatalog.get(f"{shapes}_val_panoptic"),
    )
    for fields in records if lacking == "sem_seg_file_name" else ():
        del fields[lacking]
    fields = {k: v for k, v in metadata.as_dict().items() if k not in ("name", lacking)}
    if how == "none":
        fields[lacking] = None
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**fields)
    with pytest.raises(AnnotationError, match=f"{name} .*{message}.*MODEL.MASK_FORMER.TEST.{task} False"):
        build_evaluator(cfg, name)
    cfg.MODEL.MASK_FORMER.TEST[task] = False
    assert len(build_evaluator(cfg, name)._evaluators) == 2


def test_unregistered_data_set_is_named(cfg):
    cfg.DATASETS.TEST = ("no_such_set",)
    with pytest.raises(KeyError, match=r"no_such_set.*shapes_val_panoptic"):
        check_test_sets(cfg)
    with pytest.raises(KeyError, match=r"no_such_set"):
        build_evaluator(cfg, "no_such_set")


def test_missing_shapes_say_how_to_draw_them(cfg, monkeypatch, tmp_path):
    from mask2former.data.datasets.shapes import register_shapes

    if "shapes_absent_val_panoptic" not in DatasetCatalog.list():
        register_shapes(str(tmp_path / "absent"), "shapes_absent")
    cfg.DATASETS.TEST = ("shapes_absent_val_panoptic",)
    with pytest.raises(FileNotFoundError, match=r"python tools/make_shapes_dataset.py"):
        check_test_sets(cfg)
    with pytest.raises(FileNotFoundError, match=r"python tools/make_shapes_dataset.py"):
        PanopticEvaluator("shapes_absent_val_panoptic")


def test_empty_list_of_data_sets_is_refused(cfg, make_oracle):
    cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is empty"):
        evaluate_model(cfg, make_oracle())


def test_results_are_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    save_results(str(path), {"a": {"AP": float("nan"), "PQ": np.float64(1.5)}})
    assert json.loads(path.read_text()) == {"a": {"AP": None, "PQ": 1.5}}
    with pytest.raises(TypeError):
        save_results(str(path), {"a": object()})
    assert json.loads(path.read_text()) == {"a": {"AP": None, "PQ": 1.5}}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_written_maps_hold_the_predicted_ids(shapes, records, make_oracle, tmp_path):
    evaluator = PanopticEvaluator(f"{shapes}_val_panoptic", str(tmp_path), distributed=False)
    evaluator.process(inputs_of(records), make_oracle(shift=1)(records))
    evaluator.evaluate()
    record = records[0]
    written = read_panoptic_png(tmp_path / "panoptic_predictions" / record["file_name"].rsplit("/", 1)[1])
    np.testing.assert_array_equal(written, np.roll(read_panoptic_png(record["pan_seg_file_name"]), 1, axis=1))


def test_images_of_one_name_in_several_folders_keep_a_map_each(shapes, records, make_oracle, tmp_path):
    folders = [{**r, "file_name": f"{tmp_path}/clip{i}/0001.jpg"} for i, r in enumerate(records[:3])]
    folders += records[3:]
    evaluator = PanopticEvaluator(f"{shapes}_val_panoptic", str(tmp_path), distributed=False)
    evaluator.process(inputs_of(folders), make_oracle(shift=1)(records))
    expected = evaluator.evaluate()["panoptic_seg"]["PQ"]
    written = json.loads((tmp_path / "predictions.json").read_text())["annotations"]
    assert len({one["file_name"] for one in written}) == len(records)
    metadata = MetadataCatalog.get(f"{shapes}_val_panoptic")
    alone = pq_compute(
        metadata.panoptic_json,
        str(tmp_path / "predictions.json"),
        metadata.panoptic_root,
        str(tmp_path / "panoptic_predictions"),
    )
    assert 100 * alone["All"]["pq"] == expected


def test_instances_of_an_image_that_the_truth_lacks_are_told_at_once(
    shapes, records, make_oracle, instance_json, tmp_path
):
    """pycocotools would say so without a name, after the last image."""
    content = json.loads(Path(instance_json).read_text())
    lost = records[2]["image_id"]
    content["images"] = [image for image in content["images"] if image["id"] != lost]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != lost]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    known = MetadataCatalog.get(f"{shapes}_val_instance").thing_dataset_id_to_contiguous_id
    MetadataCatalog.get("evaltest_lost").set(json_file=str(path), thing_dataset_id_to_contiguous_id=known)
    evaluator = InstanceSegEvaluator("evaltest_lost", distributed=False)
    evaluator.reset()
    outputs = make_oracle()(records)
    evaluator.process(inputs_of(records[:2]), outputs[:2])
    with pytest.raises(AnnotationError, match=rf"image {lost} .* not in .*instances.json.*ids such as \d+"):
        evaluator.process(inputs_of(records[2:3]), outputs[2:3])
    # pycocotools does not ask for images without predictions.
    outputs[2]["instances"] = outputs[2]["instances"][:0]
    evaluator.process(inputs_of(records[2:]), outputs[2:])
    assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(100.0, abs=0.01)
