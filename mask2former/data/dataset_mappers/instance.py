"""Training on instance annotations: polygons or run-length codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from pycocotools import mask as mask_util

from ..annotations import check_run_length_code, polygon_points
from .base import LargeScaleJitterMapper, Segments, TrainMapper, resize_and_crop


def transform_mask(
    segmentation: Any, size: tuple[int, int], transforms: T.TransformList, new_size
) -> np.ndarray:
    """Mask of an instance after augmentation.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], a run-length code {"size", "counts"}, or a mask (H, W).
        size, new_size: (height, width) of the image before and after.

    Returns:
        (new height, new width) bool.

    Raises:
        ValueError: a segmentation of another kind, of another size, with polygons of less than three points, or with runs
            that do not cover the image.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("a segmentation has no polygon")
        polygons = []
        for polygon in segmentation:
            points = polygon_points(polygon)
            moved = transforms.apply_coords(points.reshape(-1, 2).copy())
            polygons.append(clip_polygon(moved, new_size).reshape(-1).tolist())
        polygons = [polygon for polygon in polygons if len(polygon) >= 6]
        if not polygons:
            return np.zeros(new_size, dtype=bool)
        codes = mask_util.frPyObjects(polygons, *new_size)
        return mask_util.decode(mask_util.merge(codes)).astype(bool)
    if isinstance(segmentation, dict):
        check_run_length_code(segmentation, size)
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *size)
        mask = mask_util.decode(segmentation)
    elif isinstance(segmentation, np.ndarray) and segmentation.shape == tuple(size):
        mask = (segmentation != 0).astype(np.uint8)
    else:
        raise ValueError(
            f"a segmentation is a {type(segmentation).__name__}"
            + (f" of shape {segmentation.shape}" if isinstance(segmentation, np.ndarray) else "")
            + f"; expected polygons (a list), a run-length code (a dict), or a mask of the image's size {tuple(size)}"
        )
    # Not what is not zero: detectron2 from 2022 on pads segmentations with 255.
    return transforms.apply_segmentation(mask) == 1


def clip_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part of a polygon that lies in an image (Sutherland and Hodgman 1974).

    The release clips too, by shapely. Without it pycocotools, which rounds corners to a fifth of a pixel, would draw long
    edges elsewhere. A part in several pieces comes as one polygon, the pieces joined along the border.

    Args:
        points: (N, 2), x and y.
        size: (height, width).

    Returns:
        (M, 2); no points where nothing is left.
    """
    height, width = size
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        depth = sign * (points[:, axis] - limit)  # positive inside
        if (depth >= 0).all():
            continue
        kept = []
        for i in range(len(points)):
            before, now = depth[i - 1], depth[i]
            if (before >= 0) != (now >= 0):
                kept.append(points[i - 1] + (points[i] - points[i - 1]) * (before / (before - now)))
            if now >= 0:
                kept.append(points[i])
        points = np.array(kept).reshape(-1, 2)
        if not len(points):
            break
    return points


class _InstanceMapper(TrainMapper):
    keep_empty = True

    def _segments(self, record, size, transforms, inputs):
        if "annotations" not in record:
            raise ValueError(
                "the record has no annotations, which an instance INPUT.DATASET_MAPPER_NAME needs; name an instance data "
                "set in DATASETS.TRAIN, or another mapper"
            )
        new_size = inputs.image.shape[:2]
        classes, masks = [], []
        for place, annotation in enumerate(record["annotations"]):
            if annotation.get("iscrowd", 0):
                continue
            if "segmentation" not in annotation:
                raise ValueError(
                    f"annotation {place} of category {annotation.get('category_id')} has no segmentation; allowed: "
                    "polygons or a run-length code, boxes alone do not do"
                )
            try:
                mask = transform_mask(annotation["segmentation"], size, transforms, new_size)
            except ValueError as error:
                raise ValueError(
                    f"annotation {place} of the image (category {annotation.get('category_id')}): {error}"
                ) from error
            if self.keep_empty or mask.any():
                classes.append(annotation["category_id"])
                masks.append(mask)
        stacked = np.stack(masks) if masks else np.zeros((0, *new_size), dtype=bool)
        return Segments(classes, torch.from_numpy(stacked))


class MaskFormerInstanceDatasetMapper(_InstanceMapper):
    """Instances, resized and cropped (INPUT.DATASET_MAPPER_NAME mask_former_instance).

    As in the release, an instance that the crop removed stays, with an empty mask.

    Source: the Mask2Former release.
    """

    @staticmethod
    def build_augmentations(cfg):
        crop = T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE) if cfg.INPUT.CROP.ENABLED else None
        return resize_and_crop(cfg, crop)


class COCOInstanceNewBaselineDatasetMapper(LargeScaleJitterMapper, _InstanceMapper):
    """Instances with large-scale jitter (INPUT.DATASET_MAPPER_NAME coco_instance_lsj).

    Instances that the crop removed are left out. Unlike the release's, it takes run-length codes too.

    Source: the Mask2Former release.
    """

    keep_empty = False
