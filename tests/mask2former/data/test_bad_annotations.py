"""Training on annotations that cannot be used: what is said of them, before anything is learned from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from mask2former import get_mask2former_cfg
from mask2former.data import build_train_loader
from mask2former.data.annotations import check_instances, check_panoptic
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.data.errors import AnnotationError

CONFIGS = Path(__file__).resolve().parents[3] / "configs/shapes"
# Of the data set's form: the config, and where its annotations lie.
FORMS = {
    "panoptic": ("maskformer2_mini_shapes.yaml", "annotations/panoptic_train.json"),
    "instance": ("maskformer2_mini_shapes_instance.yaml", "annotations/instances_train.json"),
    "sem_seg": ("maskformer2_mini_shapes_semantic.yaml", "train/semantic"),
}


@pytest.fixture(scope="module")
def good_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=1, val=1, seed=5, min_size=48, max_size=64))
    return root


@pytest.fixture
def load(good_root, tmp_path):
    """Loads the first batch of a damaged copy of the data set."""

    def load(form: str, damage: Callable[[Path], None], *opts):
        config, file = FORMS[form]
        shutil.copytree(good_root, tmp_path / "shapes")
        damage(tmp_path / "shapes" / file)
        # A name that no other test has.
        prefix = "badtrain_" + tmp_path.parent.name + tmp_path.name
        register_shapes(str(tmp_path / "shapes"), prefix)
        words = ["DATASETS.TRAIN", (f"{prefix}_train_{form}",), "DATALOADER.NUM_WORKERS", 0, "SEED", 1]
        words += ["SOLVER.IMS_PER_BATCH", 1, "INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SIZE_TRAIN", (64,), *opts]
        return next(iter(build_train_loader(get_mask2former_cfg(CONFIGS / config, words))))

    return load


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def segments(change: Callable[[list], object]) -> Callable[[Path], None]:
    return edited(lambda content: change(content["annotations"][0]["segments_info"]))


def instances(**changes) -> Callable[[Path], None]:
    """Of the first annotation that is no crowd; None removes a key."""

    def change(content: dict) -> None:
        first = next(a for a in content["annotations"] if not a["iscrowd"])
        for key, value in changes.items():
            first[key] = value(content["images"][0]) if callable(value) else value

    return edited(change)


def counts(*values) -> Callable[[dict], dict]:
    return lambda image: {"size": [image["height"], image["width"]], "counts": list(values)}


def _halve(path: Path) -> None:
    path.write_text(path.read_text()[:200])


PNG = r"panoptic_train.json: image 1 \(0000001.png\): segment 0 "
IMAGE = (
    r"images/0000001.png \(image_id 1\) cannot be trained on: annotation \d+ of the image \(category \d\): "
)


@pytest.mark.parametrize(
    "damage, message",
    [
        (segments(lambda s: s[0].update(id=None)), PNG + r".*its id is null; allowed: .*0 \.\. 16777215"),
        (segments(lambda s: s[0].pop("id")), PNG + ".*its id is missing; allowed"),
        (segments(lambda s: s[0].update(id=-1)), PNG + ".*its id is -1; allowed"),
        (segments(lambda s: s[0].update(id=256**3)), PNG + ".*its id is 16777216; allowed"),
        (segments(lambda s: s[0].update(id="7")), PNG + ".*its id is '7'; allowed"),
        (segments(lambda s: s[0].update(id=1.5)), PNG + ".*its id is 1.5; allowed"),
        (segments(lambda s: s[0].update(category_id=None)), PNG + ".*its category_id is null; allowed"),
        (segments(lambda s: s[0].update(category_id=[1])), PNG + r".*its category_id is \[1\]; allowed"),
        (segments(lambda s: s[0].update(iscrowd="no")), PNG + ".*its iscrowd is 'no'; allowed: 0 or 1"),
        (segments(lambda s: s[0].update(area=None)), PNG + ".*its area is null; allowed"),
        (
            segments(lambda s: s[1].update(id=s[0]["id"])),
            r"\(0000001.png\): segment 1 .*allowed: each id once",
        ),
        (
            edited(lambda c: c["annotations"][0].update(segments_info=None)),
            r"panoptic_train.json: annotation 0, of image 1 \(0000001.png\), has no segments_info",
        ),
        (
            edited(lambda c: c.update(annotations=None)),
            "panoptic_train.json: annotations is 'None'; allowed: a list",
        ),
        (
            edited(lambda c: c["annotations"].clear()),
            r"panoptic_train.json\) .*is empty! Allowed: at least one image",
        ),
        (edited(lambda c: c.pop("images")), r"panoptic_train.json\) cannot be used: no 'images'"),
        (_halve, "panoptic_train.json is no valid JSON"),
    ],
)
def test_panoptic_annotations_are_named(load, damage, message):
    with pytest.raises(AnnotationError, match=message):
        load("panoptic", damage)


@pytest.mark.parametrize(
    "damage, message",
    [
        # Read by detectron2's loader, which stops at some without a name.
        (
            instances(segmentation=counts(-5, 10_000)),
            r"instances_train.json: annotation \d+ of image 1 \(0000001.png\): .*counts .*allowed: whole numbers from 0",
        ),
        (
            instances(segmentation={"size": [5, 5]}),
            r"instances_train.json: annotation \d+ of image 1 \(0000001.png\): .*size \(5, 5\), the image",
        ),
        (
            instances(segmentation=7),
            r"instances_train.json: annotation \d+ of image 1 .*its segmentation is 7; allowed: polygons",
        ),
        (
            instances(bbox=[]),
            r"instances_train.json: annotation \d+ of image 1 .*its bbox is \[\]; allowed: x, y,",
        ),
        (
            edited(lambda c: c["annotations"][0].pop("id")),
            r"instances_train.json: annotation without an id, number 0, of image 1 .*it has no id",
        ),
        (
            edited(lambda c: [a.update(id=1) for a in c["annotations"]]),
            r"instances_train.json: annotation 1 of image 1 .*allowed: each id once",
        ),
        (
            edited(lambda c: [a.update(segmentation=[[1, 2, 3, 4]]) for a in c["annotations"]]),
            r"instances_train.json: annotation \d+ of image 1 .*a polygon is \[1, 2, 3, 4\]; expected",
        ),
        (edited(lambda c: c["images"][0].pop("height")), r"image 0 \(id 1, 0000001.png\) has no height"),
        (
            edited(lambda c: c["annotations"].clear()),
            "Allowed: images with instances.*FILTER_EMPTY_ANNOTATIONS False",
        ),
        (_halve, "instances_train.json is no valid JSON"),
        # And through to the mapper.
        (instances(segmentation=counts(1, 2)), IMAGE + ".*counts .*allowed: whole numbers"),
        (instances(segmentation=counts(10.5, 20)), IMAGE + ".*counts .*allowed: whole numbers"),
        (
            instances(segmentation=None),
            r"\(image_id 1\) .*annotation \d+ of category \d has no segmentation; allowed",
        ),
    ],
)
def test_instances_are_named(load, damage, message):
    with pytest.raises(AnnotationError, match=message):
        load("instance", damage)


def _label(path: Path) -> None:
    for png in path.iterdir():
        with Image.open(png) as image:
            image.point(lambda label: 99).save(png)


def test_labels_that_are_no_class_are_named(load):
    message = (
        r"images/0000001.png \(image_id 1\) .*classes \[99\] \(.*semantic/0000001.png\); allowed: 0 \.\. 12 and 255 "
        "for none, from MODEL.SEM_SEG_HEAD.NUM_CLASSES 13"
    )
    with pytest.raises(AnnotationError, match=message):
        load("sem_seg", _label)


@pytest.mark.parametrize("form", FORMS)
def test_classes_that_the_model_does_not_have_are_named(load, form):
    """Beyond the losses' table of classes a GPU ends without a message."""
    with pytest.raises(AnnotationError, match=r"\(image_id 1\) .*allowed: 0 \.\. 0.*NUM_CLASSES 1"):
        load(form, lambda path: None, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1)


@pytest.mark.parametrize("evaluated", [True, False])
def test_what_real_files_hold_is_accepted(evaluated):
    mask = np.zeros((12, 10), np.uint8, order="F")
    mask[3:5, 2:9] = 1
    rle = mask_util.encode(mask)
    annotations = {
        # COCO's annotation 918: a point, without an area
        "COCO": [
            {"area": 0.0, "bbox": [6.65, 8.33, 1.03, 0.0], "segmentation": [[6.65, 8.33, 6.65, 8.33] * 2]},
            # outside of the image, by parts of a pixel
            {"area": 50.5, "bbox": [0, 0, 10, 12], "segmentation": [[-0.2, 0, 10.01, 0, 10.01, 12.3]]},
            # a crowd; a run of length 0 is first where the first pixel is set
            {
                "area": 7,
                "bbox": [0, 0, 1, 7],
                "iscrowd": 1,
                "segmentation": {"counts": [0, 7, 113], "size": [12, 10]},
            },
        ],
        # the release's script for ADE20K
        "ADE20K": [
            {
                "area": 14,
                "bbox": [2, 3, 7, 2],
                "segmentation": {"size": [12, 10], "counts": rle["counts"].decode("utf-8")},
            }
        ],
    }
    for image_id, mine in zip((139, "ADE_val_00000001"), annotations.values()):
        content = {
            "images": [{"id": image_id, "file_name": "a.jpg", "height": 12, "width": 10}],
            "categories": [{"id": 0, "name": "bed"}],
            "annotations": [
                {"id": i, "image_id": image_id, "category_id": 0, "iscrowd": 0, **one}
                for i, one in enumerate(mine, start=1)
            ],
        }
        check_instances("instances.json", content, evaluated=evaluated)
    if evaluated:
        # COCO's image_info_test-dev2017.json
        check_instances("test.json", {k: content[k] for k in ("images", "categories")}, evaluated=True)
    # Cityscapes: a class without instances, a group of one with, and an instance; void has no segment.
    segments = [(7, 7, 0), (26, 26, 1), (26001, 26, 0)]
    check_panoptic(
        "cityscapes.json",
        [
            {
                "image_id": "frankfurt_000000_000294",
                "file_name": "a.png",
                "segments_info": [
                    {"id": i, "category_id": c, "area": 9, "bbox": [0, 0, 3, 3], "iscrowd": crowd}
                    for i, c, crowd in segments
                ],
            },
            {"image_id": "frankfurt_000000_000576", "file_name": "b.png", "segments_info": []},
        ],
    )
