"""What tests of predictors share: a mini model's, pictures, results that must be equal."""

from __future__ import annotations

import numpy as np
import torch

from mask2former.data.datasets.shapes_scene import draw_scene
from tests.golden import mini_cfg, state_dict

OPTS = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 100, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True)
OPTS += ("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True)


def make(kind, *more):
    predictor = kind(mini_cfg("resnet50-mini", (*OPTS, *more)))
    weights = state_dict("resnet50-mini")
    weights.setdefault("criterion.empty_weight", predictor.model.criterion.empty_weight)
    predictor.model.load_state_dict(weights)
    return predictor


def picture(size, seed=0) -> np.ndarray:
    return np.ascontiguousarray(draw_scene(seed, *size).image[:, :, ::-1])


def assert_equal(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected) == {"sem_seg", "panoptic_seg", "instances"}
    assert torch.equal(actual["sem_seg"], expected["sem_seg"])
    assert torch.equal(actual["panoptic_seg"][0], expected["panoptic_seg"][0])
    assert actual["panoptic_seg"][1] == expected["panoptic_seg"][1]
    mine, theirs = actual["instances"], expected["instances"]
    assert mine.image_size == theirs.image_size
    for name in ("pred_masks", "scores", "pred_classes"):
        assert torch.equal(mine.get(name), theirs.get(name)), name
    assert torch.equal(mine.pred_boxes.tensor, theirs.pred_boxes.tensor)
