"""A checkpoint of a small model that predicts something, and a tiny data set, for the tools that measure accuracy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from mask2former import get_mask2former_cfg
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset

REPO = Path(__file__).resolve().parents[2]
CONFIG = "configs/shapes/maskformer2_mini_shapes.yaml"


@pytest.fixture(autouse=True)
def one_thread():
    """Maps of a few pixels: waiting for each other takes threads longer than the work does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def overrides(prefix: str) -> list[str]:
    """Of the config, for the data set of this prefix."""
    return [
        *("DATASETS.TEST", f"('{prefix}_val_panoptic',)", "DATASETS.TRAIN", f"('{prefix}_train_panoptic',)"),
        *("DATALOADER.NUM_WORKERS", "0", "MODEL.MASK_FORMER.DEC_LAYERS", "2"),
        *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1"),
    ]


def make_checkpoint(folder: Path, prefix: str) -> Path:
    """Draw and register three images of 48 to 80 pixels, and save weights under which mIoU is not zero."""
    make_shapes_dataset(folder / "shapes", ShapesOptions(train=1, val=3, seed=4, min_size=48, max_size=80))
    register_shapes(str(folder / "shapes"), prefix)
    torch.manual_seed(1)
    model = build_model(get_mask2former_cfg(REPO / CONFIG, ["MODEL.DEVICE", "cpu", *overrides(prefix)]))
    with torch.no_grad():
        model.sem_seg_head.predictor.class_embed.weight.mul_(20)
    path = folder / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    return path
