"""Training on semantic maps."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog

from .base import Segments, TrainMapper, category_crop, read_semantic_map, resize_and_crop


class MaskFormerSemanticDatasetMapper(TrainMapper):
    """A segment for each class of a semantic map (INPUT.DATASET_MAPPER_NAME mask_former_semantic).

    Source: the Mask2Former release, whose augmentations and segments these are.
    """

    @configurable
    def __init__(self, is_train: bool = True, *, ignore_label: int, **options):
        """
        Args:
            ignore_label: of pixels that belong to no class.
            options: see `TrainMapper`.
        """
        super().__init__(is_train, **options)
        self.ignore_label = ignore_label

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True):
        name = cfg.DATASETS.TRAIN[0]
        ignore_label = MetadataCatalog.get(name).get("ignore_label")
        if ignore_label is None:
            raise ValueError(
                f"the metadata of {name} has no ignore_label: set it with MetadataCatalog.get({name!r}).ignore_label = 255, "
                "or name another data set in DATASETS.TRAIN"
            )
        return {**super().from_config(cfg, is_train), "ignore_label": ignore_label}

    @staticmethod
    def build_augmentations(cfg):
        return resize_and_crop(cfg, category_crop(cfg))

    def _unlabelled(self):
        return f" and {self.ignore_label} for none"

    def _semantic_map(self, record, size):
        return read_semantic_map(record, size)

    def _segments(self, record, size, transforms, inputs):
        labels = inputs.sem_seg.astype(np.int64)
        classes = np.unique(labels)
        classes = classes[classes != self.ignore_label]
        return Segments(classes, torch.from_numpy(labels[None] == classes[:, None, None]))
