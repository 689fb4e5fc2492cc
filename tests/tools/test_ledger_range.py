"""The range of the engine that tools/accuracy_ledger.py asks for, and images outside of it."""

from __future__ import annotations

import json

from detectron2.data import MetadataCatalog
from ledger_evaluation import engine_cfg, images_outside
from PIL import Image

from mask2former import get_mask2former_cfg
from mask2former.data.datasets.catalog import load_panoptic
from tests.tools.shapes_checkpoint import CONFIG, REPO


def test_range_of_the_engine_covers_all_sizes():
    cfg = get_mask2former_cfg(REPO / CONFIG, [])
    made = engine_cfg(cfg, [(320, 512), (224, 384)], [4, 1])
    low, opt, high = ([int(n) for n in text.split("x")] for text in made.MODEL.TENSORRT.SHAPES)
    assert made.MODEL.TENSORRT.MAX_BATCH_SIZE == 4 and made.MODEL.TENSORRT.OPT_BATCH_SIZE == 1
    assert high == [512, 512] and all(a <= b <= c for a, b, c in zip(low, opt, high)) and max(low) <= 224
    assert made.MODEL.TENSORRT.ON_OUT_OF_RANGE == made.MODEL.TENSORRT.ON_ERROR == "raise"
    asked = get_mask2former_cfg(REPO / CONFIG, ["MODEL.TENSORRT.SHAPES", ["512x512"]])
    assert engine_cfg(asked, [(320, 512)], [1]).MODEL.TENSORRT.SHAPES == ["512x512"]
    assert cfg.MODEL.TENSORRT.SHAPES == []


def test_long_images_are_outside_of_a_derived_range():
    cfg = engine_cfg(get_mask2former_cfg(REPO / CONFIG, []), [(800, 1333)], [1])
    records = [{"height": 480, "width": 640}, {"height": 1000, "width": 100}, {"file_name": "of no size"}]
    assert images_outside(cfg, [(800, 1333)], records[::2], 32) == ""
    message = images_outside(cfg, [(800, 1333)], records, 32)
    assert "1344x160" in message and "['256x160', '800x1088', '1344x1344']" in message


def test_long_images_of_coco_are_outside_too(tmp_path):
    """Of the data set that MODEL_ZOO.md's command for COCO names, read as it is."""
    for folder, name in (("images", "a.jpg"), ("panoptic", "a.png"), ("labels", "a.png")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (640, 100)).save(tmp_path / folder / name)
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": []}
    images = [{"id": 1, "height": 100, "width": 640}]
    (tmp_path / "panoptic.json").write_text(json.dumps({"images": images, "annotations": [annotation]}))
    metadata = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    records = load_panoptic(
        "long",
        image_root=str(tmp_path / "images"),
        panoptic_root=str(tmp_path / "panoptic"),
        panoptic_json=str(tmp_path / "panoptic.json"),
        sem_seg_root=str(tmp_path / "labels"),
        metadata=metadata.as_dict(),
    )
    cfg = engine_cfg(get_mask2former_cfg(REPO / CONFIG, []), [(800, 1333)], [1])
    assert "such as 224x1344, are outside the engine's range" in images_outside(
        cfg, [(800, 1333)], records, 32
    )
