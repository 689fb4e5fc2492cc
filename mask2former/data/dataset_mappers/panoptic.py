"""Training on panoptic annotations: a PNG of segment ids, and a list that gives each id its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils

from ...evaluation.panoptic_quality import rgb_to_ids
from ..annotations import check_segment, drawn_pixels, undrawn
from .base import (
    LargeScaleJitterMapper,
    Segments,
    TrainMapper,
    category_crop,
    read_semantic_map,
    resize_and_crop,
)

# Of which ids with three equal channels are multiples.
_GREY = 1 + 256 + 65536


class _PanopticMapper(TrainMapper):
    def _segments(self, record, size, transforms, inputs):
        if "pan_seg_file_name" not in record or "segments_info" not in record:
            raise ValueError(
                "the record has no pan_seg_file_name and segments_info, which a panoptic INPUT.DATASET_MAPPER_NAME needs; "
                "name a panoptic data set in DATASETS.TRAIN, or another mapper"
            )
        rgb = detection_utils.read_image(record["pan_seg_file_name"], "RGB")
        if rgb.shape[:2] != tuple(size):
            raise ValueError(
                f"the panoptic map {record['pan_seg_file_name']} is {rgb.shape[0]}x{rgb.shape[1]} (height x width), the "
                f"image {size[0]}x{size[1]}"
            )
        ids = rgb_to_ids(transforms.apply_segmentation(rgb))  # (H, W)
        seen: set[int] = set()
        for place, segment in enumerate(record["segments_info"]):
            check_segment(segment, place, seen)
        segments = [s for s in record["segments_info"] if not s.get("iscrowd", 0)]
        if any(s["id"] % _GREY == 0 for s in segments):
            # Padding is a shade of grey (0, or 255 in detectron2 from 2022 on), and so are these segments.
            inside = transforms.apply_segmentation(np.ones(size, dtype=np.uint8)) == 1
            ids = np.where(inside, ids, -1)
        masks = _masks(ids, segments)
        lost: set[int] = set()
        if not masks.any((1, 2)).all():
            # As in the release, a segment that the crop removed stays, with an empty mask. One that the whole map does not
            # show, as after images were made smaller, would teach that its class is where nothing is to be seen.
            pixels = drawn_pixels(rgb_to_ids(rgb))
            lost = set(undrawn(record["pan_seg_file_name"], pixels, record["segments_info"]))
        told = [s["id"] for s in segments if s["id"] in lost and s.get("area") != 0]
        if lost:
            segments = [s for s in segments if s["id"] not in lost]
            masks = _masks(ids, segments)
        return Segments([s["category_id"] for s in segments], torch.from_numpy(masks), told)


def _masks(ids: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(H, W) ids -> (N, H, W) bool."""
    wanted = np.array([s["id"] for s in segments], dtype=ids.dtype)
    return ids[None] == wanted[:, None, None]


class MaskFormerPanopticDatasetMapper(_PanopticMapper):
    """Things and stuff, resized and cropped (INPUT.DATASET_MAPPER_NAME mask_former_panoptic).

    Source: the Mask2Former release, whose augmentations and segments these are.
    """

    @staticmethod
    def build_augmentations(cfg):
        return resize_and_crop(cfg, category_crop(cfg))

    @property
    def _crop_reads_categories(self) -> bool:
        return any(getattr(a, "single_category_max_area", 1.0) < 1.0 for a in self.augmentations.augs)

    def _semantic_map(self, record, size):
        return read_semantic_map(record, size) if self._crop_reads_categories else None


class COCOPanopticNewBaselineDatasetMapper(LargeScaleJitterMapper, _PanopticMapper):
    """Things and stuff with large-scale jitter (INPUT.DATASET_MAPPER_NAME coco_panoptic_lsj).

    Source: the Mask2Former release, whose augmentations and segments these are.
    """
