"""A small shapes data set, registered for the session, and models whose predictions are known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util
from torch import nn

from mask2former import get_mask2former_cfg
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.evaluation.panoptic_quality import read_panoptic_png

PREFIX = "evaltest"
NUM_IMAGES = 13


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> str:
    """Prefix of the names of a registered data set: one training and 13 validation images."""
    root = tmp_path_factory.mktemp("evaluation") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=1, val=NUM_IMAGES, seed=3, min_size=40, max_size=120))
    register_shapes(str(root), PREFIX)
    return PREFIX


@pytest.fixture
def cfg(shapes, tmp_path):
    return get_mask2former_cfg(
        Path(__file__).resolve().parents[3] / "configs/shapes/maskformer2_mini_shapes.yaml",
        [
            *("MODEL.DEVICE", "cpu"),
            *("DATASETS.TRAIN", (f"{shapes}_train_panoptic",)),
            *("DATASETS.TEST", (f"{shapes}_val_panoptic",)),
            *("DATALOADER.NUM_WORKERS", 0),
            *("OUTPUT_DIR", str(tmp_path / "out")),
        ],
    )


class Oracle(nn.Module):
    """Predicts the ground truth, moved to the right by `shift` pixels."""

    def __init__(self, prefix: str, shift: int = 0):
        super().__init__()
        self.shift = shift
        self.prepared = 0
        self.batch_sizes: list[int] = []
        self.panoptic = {r["image_id"]: r for r in DatasetCatalog.get(f"{prefix}_val_panoptic")}
        self.instances = {r["image_id"]: r for r in DatasetCatalog.get(f"{prefix}_val_instance")}
        self.num_classes = len(MetadataCatalog.get(f"{prefix}_val_panoptic").stuff_classes)

    def prepare(self):
        self.prepared += 1

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        self.batch_sizes.append(len(batched_inputs))
        return [self.predict(inputs["image_id"]) for inputs in batched_inputs]

    def predict(self, image_id: int) -> dict:
        record = self.panoptic[image_id]
        ids = self._move(read_panoptic_png(record["pan_seg_file_name"]))
        segments = [
            {"id": s["id"], "isthing": s["isthing"], "category_id": s["category_id"]}
            for s in record["segments_info"]
            if (ids == s["id"]).any()
        ]
        classes = self._move(np.asarray(Image.open(record["sem_seg_file_name"])))
        # Void may be given any class.
        scores = torch.from_numpy(np.where(classes == 255, 0, classes)).long()
        return {
            "panoptic_seg": (torch.from_numpy(ids), segments),
            "sem_seg": nn.functional.one_hot(scores, self.num_classes).permute(2, 0, 1).float(),
            "instances": self._instances(self.instances[image_id]),
        }

    def _instances(self, record: dict) -> Instances:
        annotations = [a for a in record["annotations"] if not a["iscrowd"]]
        size = (record["height"], record["width"])
        masks = [self._move(mask_util.decode(a["segmentation"]).astype(bool)) for a in annotations]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        return Instances(
            size,
            pred_masks=torch.from_numpy(np.stack(masks))
            if masks
            else torch.zeros(0, *size, dtype=torch.bool),
            pred_boxes=Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)),
            scores=torch.linspace(1.0, 0.5, len(annotations)),
            pred_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        )

    def _move(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.roll(array, self.shift, axis=1))


@pytest.fixture
def oracle_of():
    """Oracle, for the validation images of a prefix."""
    return Oracle


@pytest.fixture
def make_oracle(shapes):
    return lambda shift=0: Oracle(shapes, shift)


@pytest.fixture
def instance_json(shapes) -> str:
    path = MetadataCatalog.get(f"{shapes}_val_instance").json_file
    assert os.path.isfile(path)
    return path
