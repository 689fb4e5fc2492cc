"""Training on panoptic annotations that list segments of which their map has no pixel: as after maps were made smaller."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mask2former import get_mask2former_cfg
from mask2former.data import build_train_loader
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.data.errors import AnnotationError

CONFIG = Path(__file__).resolve().parents[3] / "configs/shapes/maskformer2_mini_shapes.yaml"
IMAGES = 12
FOREIGN = 5_000_000  # no id of the maps is so high


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=IMAGES, val=1, seed=5, min_size=48, max_size=64))
    return root


@pytest.fixture
def make_loader(drawn, tmp_path):
    """A loader of a copy of the data set whose annotations, in order, a function has changed, and its files."""

    def make(change, *opts, images=IMAGES):
        root = tmp_path / "shapes"
        shutil.copytree(drawn, root)
        path = root / "annotations" / "panoptic_train.json"
        content = json.loads(path.read_text())
        del content["annotations"][images:]
        for place, annotation in enumerate(content["annotations"]):
            change(place, annotation, root / "train" / "panoptic" / annotation["file_name"])
        path.write_text(json.dumps(content))
        prefix = f"undrawn_{tmp_path.name}"
        register_shapes(str(root), prefix)
        words = ["DATASETS.TRAIN", (f"{prefix}_train_panoptic",), "DATALOADER.NUM_WORKERS", 0, "SEED", 1]
        words += ["SOLVER.IMS_PER_BATCH", 1, "INPUT.IMAGE_SIZE", 64, *opts]
        return build_train_loader(get_mask2former_cfg(CONFIG, words))

    return make


def add_foreign(annotation: dict, **fields) -> None:
    """A segment that the map does not show."""
    first = annotation["segments_info"][0]
    annotation["segments_info"].append({**first, "id": FOREIGN, "iscrowd": 0, "area": 7, **fields})


def batches(loader, count: int) -> list[dict]:
    """The images of the first batches, which have one each."""
    iterator = iter(loader)
    try:
        return [next(iterator)[0] for _ in range(count)]
    finally:
        iterator.close()


def warnings(caplog) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno >= logging.WARNING and r.name.startswith("mask2former")
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["coco_panoptic_lsj", "mask_former_panoptic"])
def test_segment_is_left_out_and_told_once(make_loader, caplog, name, workers):
    def change(place, annotation, path):
        add_foreign(annotation)

    loader = make_loader(
        change, "INPUT.DATASET_MAPPER_NAME", name, "DATALOADER.NUM_WORKERS", workers, images=1
    )
    (record,) = loader.records
    with caplog.at_level("WARNING", "mask2former"):
        for image in batches(loader, 4):
            assert len(image["instances"]) == sum(not s["iscrowd"] for s in record["segments_info"]) - 1
            assert "undrawn_segments" not in image
    (told,) = warnings(caplog)
    assert f"{record['file_name']} (image_id 1)" in told and f"[{FOREIGN}]" in told
    assert record["pan_seg_file_name"] in told and "1 segment of 1 image" in told


def test_they_are_counted_over_the_images(make_loader, caplog):
    def change(place, annotation, path):
        add_foreign(annotation)
        add_foreign(annotation, id=FOREIGN + 1)

    loader = make_loader(change)
    with caplog.at_level("WARNING", "mask2former"):
        batches(loader, 3 * IMAGES)
    told = warnings(caplog)
    # After the first image and after ten of them, each of which counts once.
    assert len(told) == 2
    assert "2 segments of 1 image" in told[0] and "20 segments of 10 images" in told[1]


def test_segment_that_the_crop_removed_stays_and_is_not_told(make_loader, caplog):
    loader = make_loader(
        lambda *_: None, "INPUT.IMAGE_SIZE", 8, "INPUT.MIN_SCALE", 8.0, "INPUT.MAX_SCALE", 9.0, images=1
    )
    (record,) = loader.records
    with caplog.at_level("WARNING", "mask2former"):
        (image,) = batches(loader, 1)
    masks = image["instances"].gt_masks
    assert len(masks) == sum(not s["iscrowd"] for s in record["segments_info"])
    assert not masks.flatten(1).any(1).all()
    assert not warnings(caplog)


@pytest.mark.parametrize("fields", [{"area": 0}, {"iscrowd": 1}])
def test_what_is_no_target_anyway_is_not_told(make_loader, caplog, fields):
    def change(place, annotation, path):
        add_foreign(annotation, **fields)

    loader = make_loader(change, images=1)
    (record,) = loader.records
    with caplog.at_level("WARNING", "mask2former"):
        (image,) = batches(loader, 1)
    listed = [s for s in record["segments_info"] if s["id"] != FOREIGN and not s["iscrowd"]]
    assert len(image["instances"]) == len(listed)
    assert not warnings(caplog)


def test_image_that_lost_all_its_segments_is_trained_on(make_loader, caplog):
    def change(place, annotation, path):
        with Image.open(path) as image:
            Image.new("RGB", image.size).save(path)

    loader = make_loader(change, images=1)
    with caplog.at_level("WARNING", "mask2former"):
        (image,) = batches(loader, 1)
    assert len(image["instances"]) == 0 and image["instances"].gt_masks.shape == (0, 64, 64)
    assert len(warnings(caplog)) == 1


def _other_ids(place, annotation, path):
    with Image.open(path) as image:
        pixels = np.asarray(image).copy()
    pixels[..., 2] ^= 64
    Image.fromarray(pixels).save(path)


def _grayscale(place, annotation, path):
    """Ids as levels of grey, as of another tool."""
    with Image.open(path) as image:
        ids = np.unique(np.asarray(image).reshape(-1, 3) @ [1, 256, 65536], return_inverse=True)[1]
    levels = ids.reshape(image.height, image.width).astype(np.uint8)
    Image.fromarray(levels + 1).save(path)
    for number, segment in enumerate(annotation["segments_info"]):
        segment["id"] = number + 1


@pytest.mark.parametrize("change", [_other_ids, _grayscale])
def test_map_of_other_segments_is_an_error(make_loader, change):
    """What shows none of them shows others: it is another image's map, or codes its ids otherwise."""
    message = r"images/0000001.png \(image_id 1\) .*panoptic/0000001.png has none of .*allowed: .*R \+ 256 G"
    with pytest.raises(AnnotationError, match=message):
        batches(make_loader(change, images=1), 1)
