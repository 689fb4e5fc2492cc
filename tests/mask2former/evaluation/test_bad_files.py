"""Evaluation of damaged data sets, and evaluation that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from mask2former import get_mask2former_cfg
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.data.errors import AnnotationError
from mask2former.evaluation import evaluate_model
from mask2former.evaluation.whole_files import remove_leftovers, whole_files

CONFIG = Path(__file__).resolve().parents[3] / "configs/shapes/maskformer2_mini_shapes.yaml"
SECOND = "1000002.png"
FILES = {
    "coco_instances_results.json",
    "instances_predictions.pth",
    "panoptic_predictions",
    "predictions.json",
    "results.json",
    "sem_seg_evaluation.pth",
    "sem_seg_predictions.json",
}


class OneSquare(nn.Module):
    """Sees a square in the corner of every image."""

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        return [self.predict(x["height"], x["width"]) for x in batched_inputs]

    @staticmethod
    def predict(height: int, width: int) -> dict:
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[:20, :20] = True
        return {
            "panoptic_seg": (mask.int(), [{"id": 1, "isthing": True, "category_id": 1}]),
            "sem_seg_labels": mask.long(),
            "instances": Instances(
                (height, width),
                pred_masks=mask[None],
                pred_boxes=Boxes(torch.tensor([[0.0, 0, 20, 20]])),
                scores=torch.ones(1),
                pred_classes=torch.ones(1, dtype=torch.int64),
            ),
        }


class Killed(OneSquare):
    """Kills its process in the third image, or where results are being written."""

    def __init__(self, when: str):
        super().__init__()
        self.when, self.images = when, 0

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        self.images += 1
        if self.when == "images" and self.images == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.when == "files":
            save = torch.save

            def save_and_die(*args, **kwargs):
                save(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = save_and_die  # instances_predictions.pth, the first file of the second evaluator
        return super().forward(batched_inputs)


def make_cfg(prefix: str, output: Path, *opts):
    return get_mask2former_cfg(
        CONFIG,
        [
            *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output), "DATALOADER.NUM_WORKERS", 0),
            *("DATASETS.TRAIN", (), "DATASETS.TEST", (f"{prefix}_val_panoptic",), *opts),
        ],
    )


@pytest.fixture(scope="module")
def good_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=1, val=4, seed=5, min_size=48, max_size=64))
    register_shapes(str(root), "goodfiles")
    return root


def _remove(root, kind):
    (root / "val" / kind / SECOND).unlink()


def _halve(root, kind):
    path = root / "val" / kind / SECOND
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(root, kind):
    (root / "val" / kind / SECOND).write_bytes(b"")


def _shrink(root, kind):
    path = root / "val" / kind / SECOND
    with Image.open(path) as image:
        small = image.crop((0, 0, image.width - 1, image.height))
    small.save(path)


def _foreign_label(root, kind):
    path = root / "val" / kind / SECOND
    with Image.open(path) as image:
        image.point(lambda label: 99).save(path)


def _unknown_category(root, kind):
    path = root / "annotations" / f"{kind}_val.json"
    content = json.loads(path.read_text())
    # Not through the data set's own loader, which has a check of its own: as if it were another file.
    content["categories"] = content["categories"][1:]
    path.write_text(json.dumps(content))


def _edit(root, kind, change) -> None:
    path = root / "annotations" / f"{kind}_val.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _change_segment(**changes):
    def change(content):
        content["annotations"][1]["segments_info"][0].update(changes)

    return "panoptic", change


def _change_instance(**changes):
    """Of the first annotation of the second image; a value that is a function is asked for the image's value."""

    def change(content):
        image = next(i for i in content["images"] if i["id"] == 1000002)
        annotation = next(a for a in content["annotations"] if a["image_id"] == 1000002)
        for key, value in changes.items():
            annotation[key] = value(image) if callable(value) else value

    return "instances", change


def _drop(kind, key):
    def change(content):
        annotation = next(a for a in content["annotations"] if a["image_id"] == 1000002)
        (annotation["segments_info"][0] if kind == "panoptic" else annotation).pop(key)

    return kind, change


def _counts(*counts):
    return lambda image: {"size": [image["height"], image["width"]], "counts": list(counts)}


SEGMENT = r"panoptic_val.json: image 1000002 \(1000002.png\): segment 0 \(.*\): "
INSTANCE = r"instances_val.json: annotation \d+ of image 1000002 \(1000002.png\): "


@pytest.mark.parametrize(
    "damage, message",
    [
        (_change_segment(id=None), SEGMENT + r"its id is null; allowed: a whole number, 0 \.\. 16777215"),
        (_drop("panoptic", "id"), SEGMENT + "its id is missing; allowed"),
        (_drop("panoptic", "category_id"), SEGMENT + "its category_id is missing; allowed"),
        (_change_segment(area="wide"), SEGMENT + "its area is 'wide'; allowed"),
        (_change_instance(segmentation=None), INSTANCE + "its segmentation is null; allowed: polygons"),
        (_change_instance(segmentation=[]), INSTANCE + r"its segmentation is \[\]; allowed: polygons"),
        (_change_instance(segmentation=[[1, 2, 3, 4]]), INSTANCE + r"a polygon is \[1, 2, 3, 4\]; expected"),
        (_change_instance(segmentation=[[1, 2]]), INSTANCE + r"a polygon is \[1, 2\]; expected"),
        (
            _change_instance(segmentation=_counts(1, 2)),
            INSTANCE + "a run-length code .*; allowed: whole numbers",
        ),
        (
            _change_instance(segmentation=_counts(-1, 9)),
            INSTANCE + "a run-length code .*; allowed: whole numbers",
        ),
        (_change_instance(area=None), INSTANCE + "it has no area, which AP"),
        (_change_instance(area=-1), INSTANCE + "its area is -1; allowed: a number from 0"),
        (_change_instance(bbox=[1, 2]), INSTANCE + r"its bbox is \[1, 2\]; allowed"),
        (_change_instance(iscrowd=2), INSTANCE + "its iscrowd is 2; allowed: 0 or 1"),
        *(
            (_drop("instances", key), INSTANCE + f"it has no {key}, which AP")
            for key in ("area", "bbox", "iscrowd")
        ),
        (
            _drop("instances", "id"),
            "instances_val.json: annotation without an id, .* of image 1000002 .*it has no id",
        ),
        (
            ("instances", lambda c: [a.update(id=1) for a in c["annotations"]]),
            r"instances_val.json: annotation 1 of image \d+ .*another annotation has this id",
        ),
        (("instances", lambda c: c.pop("images")), "instances_val.json has no list of images"),
        (
            ("instances", lambda c: c.update(annotations=None)),
            "instances_val.json has no list of annotations",
        ),
        (
            ("instances", lambda c: c["annotations"].insert(2, None)),
            r"instances_val.json: annotations\[2\] is 'None'; allowed: an object",
        ),
        (
            ("instances", lambda c: c["images"][1].update(id=[1])),
            r"instances_val.json: images\[1\] has the id \[1\]; allowed: a number or text",
        ),
    ],
)
def test_annotations_that_cannot_be_compared_are_named(good_root, tmp_path, damage, message):
    root = tmp_path / "shapes"
    shutil.copytree(good_root, root)
    _edit(root, *damage)
    prefix = f"badannotation_{tmp_path.name}"
    register_shapes(str(root), prefix)
    with pytest.raises(AnnotationError, match=message):
        evaluate_model(make_cfg(prefix, tmp_path / "out"), OneSquare().eval())
    assert not (tmp_path / "out" / "inference" / "results.json").exists()


def test_line_beside_a_polygon_is_evaluated_as_pycocotools_does(good_root, tmp_path):
    root = tmp_path / "shapes"
    shutil.copytree(good_root, root)
    square = [0, 0, 20, 0, 20, 20, 0, 20]
    _edit(
        root,
        *_change_instance(
            segmentation=[square, [0, 0, 20, 0]], bbox=[0, 0, 20, 20], area=400, category_id=12
        ),
    )
    register_shapes(str(root), "fournumbers")
    results = evaluate_model(make_cfg("fournumbers", tmp_path / "out"), OneSquare().eval())
    assert results["segm"]["AP"] > 0


def test_annotation_that_pycocotools_does_not_count_is_told(good_root, tmp_path, caplog):
    root = tmp_path / "shapes"
    shutil.copytree(good_root, root)
    _edit(root, *_change_instance(id=0))
    register_shapes(str(root), "idzero")
    with caplog.at_level("WARNING", "mask2former"):
        evaluate_model(make_cfg("idzero", tmp_path / "out"), OneSquare().eval())
    (told,) = [r.getMessage() for r in caplog.records if "Number annotations from 1" in r.getMessage()]
    assert "instances_val.json: annotation 0 of image 1000002 counts as never found" in told


def _half_json(root, kind):
    path = root / "annotations" / f"{kind}_val.json"
    path.write_text(path.read_text()[:200])


@pytest.mark.parametrize(
    "damage, kind, message",
    [
        (_remove, "images", r"images/1000002.png \(image_id 1000002\) cannot be read: .*No such file"),
        (_halve, "images", r"images/1000002.png \(image_id 1000002\) cannot be read: .*truncated"),
        (
            _shrink,
            "images",
            r"images/1000002.png \(image_id 1000002\) cannot be read: Mismatched image shape",
        ),
        (_empty, "images", r"images/1000002.png \(image_id 1000002\) cannot be read: .*cannot identify"),
        (_empty, "panoptic", r"panoptic/1000002.png \(image_id 1000002\) cannot be read: .*cannot identify"),
        (_remove, "panoptic", r"panoptic/1000002.png \(image_id 1000002\) cannot be read: .*No such file"),
        (_halve, "panoptic", r"panoptic/1000002.png \(image_id 1000002\) cannot be read: "),
        (
            _shrink,
            "panoptic",
            r"panoptic/1000002.png \(image_id 1000002\) is \d+x\d+ \(height x width\), the prediction",
        ),
        (
            _unknown_category,
            "panoptic",
            r"panoptic_val.json: image \d+ \(\d+.png\) has segments of category ids \[",
        ),
        (_half_json, "panoptic", r"panoptic_val.json is no valid JSON"),
        (
            _unknown_category,
            "instances",
            r"instances_val.json: annotation \d+ of image \d+ \(\d+.png\) is of category id \d+, which",
        ),
        (_half_json, "instances", r"instances_val.json is no valid JSON"),
    ],
)
def test_damage_is_named_with_file_and_image(good_root, tmp_path, damage, kind, message):
    root = tmp_path / "shapes"
    shutil.copytree(good_root, root)
    damage(root, kind)
    prefix = f"bad{damage.__name__}_{kind}"
    register_shapes(str(root), prefix)
    # In a worker, whose errors would come out with its traceback for a message.
    cfg = make_cfg(prefix, tmp_path / "out", "DATALOADER.NUM_WORKERS", int(kind == "images"))
    with pytest.raises(AnnotationError, match=message) as error:
        evaluate_model(cfg, OneSquare().eval())
    assert "Traceback" not in str(error.value)
    assert not (tmp_path / "out" / "inference" / "results.json").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (_remove, r"semantic/1000002.png \(image_id 1000002\) cannot be evaluated on: .*No such file"),
        (_halve, r"semantic/1000002.png \(image_id 1000002\) cannot be evaluated on: "),
        (_shrink, r"semantic/1000002.png \(image_id 1000002\) cannot be evaluated on: its shape is"),
        (
            _foreign_label,
            r"semantic/1000002.png \(image_id 1000002\) .*holds the labels \[99\], but there are 13 classes",
        ),
    ],
)
def test_damaged_semantic_map_is_named(good_root, tmp_path, damage, message):
    root = tmp_path / "shapes"
    shutil.copytree(good_root, root)
    damage(root, "semantic")
    prefix = f"badsemantic{damage.__name__}"
    register_shapes(str(root), prefix)
    cfg = make_cfg(prefix, tmp_path / "out", "DATASETS.TEST", (f"{prefix}_val_sem_seg",))
    with pytest.raises(AnnotationError, match=message):
        evaluate_model(cfg, OneSquare().eval())


def _only_squares(root: Path, without: str) -> None:
    """Truth that `OneSquare` sees, but in the second image, which has no segments.

    Args:
        without: what the panoptic map of that image shows instead: "void", or "unlisted", a segment that nothing tells of.
    """
    square = {"category_id": 12, "iscrowd": 0, "area": 400, "bbox": [0, 0, 20, 20]}

    def panoptic(content):
        for annotation in content["annotations"]:
            path = root / "val" / "panoptic" / annotation["file_name"]
            with Image.open(path) as image:
                drawn = Image.new("RGB", image.size)
            empty = annotation["image_id"] == 1000002
            if not empty or without == "unlisted":
                drawn.paste((7, 0, 0), (0, 0, 20, 20))
            drawn.save(path)
            annotation["segments_info"] = [] if empty else [{**square, "id": 7}]

    def instances(content):
        polygon = [[0, 0, 20, 0, 20, 20, 0, 20]]
        content["annotations"] = [
            {**square, "id": i, "image_id": image["id"], "segmentation": polygon}
            for i, image in enumerate(content["images"], start=1)
            if image["id"] != 1000002
        ]

    _edit(root, "panoptic", panoptic)
    _edit(root, "instances", instances)


@pytest.mark.parametrize("without", ["void", "unlisted"])
def test_image_without_segments_is_evaluated(good_root, tmp_path, without):
    """A prediction in it is a false positive; of PQ it is none where the map is void there."""
    root = tmp_path / "shapes"
    shutil.copytree(good_root, root)
    _only_squares(root, without)
    register_shapes(str(root), f"nosegments_{without}")
    results = evaluate_model(make_cfg(f"nosegments_{without}", tmp_path / "out"), OneSquare().eval())
    false = int(without == "unlisted")
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100 * 3 / (3 + 0.5 * false))
    assert results["panoptic_seg"]["SQ"] == pytest.approx(100)
    # Four predictions of one score in the images' order, the second of them false, at 101 recalls.
    precision = [1.0 if recall <= 1 / 3 else 0.75 for recall in (i / 100 for i in range(101))]
    for task in ("segm", "bbox"):
        assert results[task]["AP50"] == pytest.approx(100 * sum(precision) / 101)


def _killed_evaluation(rank: int, root: str, output: str, when: str) -> None:
    torch.set_num_threads(1)
    register_shapes(root, "goodfiles")
    evaluate_model(make_cfg("goodfiles", Path(output)), Killed(when).eval())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["images", "files"])
def test_killed_evaluation_leaves_nothing_half_written_and_runs_again(good_root, tmp_path, when):
    cfg, folder = make_cfg("goodfiles", tmp_path), tmp_path / "inference"
    expected = evaluate_model(cfg, OneSquare().eval())
    assert {p.name for p in folder.iterdir()} == FILES
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    arguments = (str(good_root), str(tmp_path), when)
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as killed:
        torch.multiprocessing.spawn(_killed_evaluation, arguments)
    assert killed.value.exit_code == -signal.SIGKILL
    left = {p.name for p in folder.iterdir()}
    # No result that would pass for this evaluation's; files are whole ones.
    assert {name for name in left if not name.startswith(".part-")} == FILES - {"results.json"}
    for name in left & set(before):
        assert (folder / name).stat().st_size == len(before[name])
        if name.endswith(".json"):
            json.loads((folder / name).read_text())
        elif name.endswith(".pth"):
            torch.load(folder / name, weights_only=False)
    assert any(name.startswith(".part-") for name in left) == (when == "files")

    again = evaluate_model(cfg, OneSquare().eval())
    assert set(again) == set(expected)
    for task, metrics in expected.items():
        assert again[task] == pytest.approx(metrics, nan_ok=True)
    assert {p.name for p in folder.iterdir()} == FILES


def test_folder_is_replaced_at_the_end_alone(tmp_path):
    target = tmp_path / "results"
    (target / "pictures").mkdir(parents=True)
    (target / "pictures" / "old.png").write_text("old")
    (target / "kept.txt").write_text("kept")

    def write(folder: str) -> None:
        os.mkdir(os.path.join(folder, "pictures"))
        Path(folder, "pictures", "new.png").write_text("new")
        Path(folder, "numbers.json").write_text("{}")

    with pytest.raises(OSError, match="disk full"), whole_files(str(target)) as folder:
        write(folder)
        raise OSError("disk full")
    assert sorted(p.name for p in target.rglob("*")) == ["kept.txt", "old.png", "pictures"]
    with whole_files(str(target)) as folder:
        write(folder)
    assert sorted(p.name for p in target.rglob("*")) == ["kept.txt", "new.png", "numbers.json", "pictures"]
    (target / ".part-abc").mkdir()
    remove_leftovers(str(target))
    remove_leftovers(str(tmp_path / "gone"))
    assert not (target / ".part-abc").exists() and (target / "kept.txt").exists()


def test_metadata_knows_its_files(good_root):
    """The tests above damage what is read: the paths are those of the registration."""
    metadata = MetadataCatalog.get("goodfiles_val_panoptic")
    assert Path(metadata.panoptic_json) == good_root / "annotations" / "panoptic_val.json"
    assert (Path(metadata.panoptic_root) / SECOND).is_file()
