"""What the training mappers share: read, augment, pad, and pack image and segments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from ..depth import check_depth

# Grey, with which the release pads images here. (The model pads batches with the pixel mean.)
PAD_VALUE = 128
# Fields of a record that tell of segments; the model gets "instances" instead.
_ANNOTATION_KEYS = ("annotations", "segments_info", "pan_seg_file_name", "sem_seg_file_name")


# What a mapped record tells of segments that its map does not show, for the loader: {"map": file, "ids": [...]}.
UNDRAWN = "undrawn_segments"


class Segments(NamedTuple):
    """Segments of an image after augmentation."""

    classes: Sequence[int]  # (N,) contiguous ids
    masks: Tensor  # (N, H, W) bool
    undrawn: Sequence[int] = ()  # ids of those that were left out since no pixel of the image is theirs


class TrainMapper(ABC):
    """Turns a record of a data set into an input of the model in training.

    Subclasses say how a record becomes classes and masks. The random numbers come from Python's and numpy's global
    generators, as everywhere in detectron2.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        size_divisibility: int = -1,
        num_classes: int | None = None,
    ):
        """
        Args:
            is_train: must be True; evaluation uses detectron2's DatasetMapper.
            augmentations: applied in this order to image and segments.
            image_format: of INPUT.FORMAT.
            size_divisibility: side of the square that images are padded to at the right and the bottom, or -1.
            num_classes: of MODEL.SEM_SEG_HEAD.NUM_CLASSES; None for any number.
        """
        if not is_train:
            raise ValueError(
                f"{type(self).__name__} is for training; use detectron2's DatasetMapper to evaluate"
            )
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.size_divisibility = size_divisibility
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            "is_train": is_train,
            "augmentations": cls.build_augmentations(cfg),
            "image_format": cfg.INPUT.FORMAT,
            "size_divisibility": cfg.INPUT.SIZE_DIVISIBILITY,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        }

    @staticmethod
    @abstractmethod
    def build_augmentations(cfg: CfgNode) -> list[T.Augmentation | T.Transform]:
        """The release's augmentations for this mapper."""

    @property
    def fixed_size(self) -> bool:
        """Whether all images come out in one size, so that batches need no padding."""
        return self.size_divisibility > 0

    def __call__(self, record: dict) -> dict:
        """
        Args:
            record: in detectron2's format; not changed.

        Returns:
            the record without its annotations, with "image" (3, H, W) uint8 and "instances", which have gt_classes (N,)
            int64 and gt_masks (N, H, W) bool; where segments were left out since their map does not show them, also UNDRAWN.

        Raises:
            ValueError: annotations that are missing or damaged, or of classes that the model does not have; an image of more
                than 8 bits.
            detectron2's SizeMismatchError: the image is not of the size that the record says.
        """
        result = {key: value for key, value in record.items() if key not in _ANNOTATION_KEYS}
        check_depth(record["file_name"])
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(result, image)
        inputs = T.AugInput(image, sem_seg=self._semantic_map(record, image.shape[:2]))
        transforms = self.augmentations(inputs)
        classes, masks, lost = self._segments(record, image.shape[:2], transforms, inputs)
        self._check_classes(record, classes)
        # The array may be a view that runs backwards.
        image = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        result["image"], masks = self._pad(image, masks)
        result["instances"] = Instances(
            tuple(result["image"].shape[-2:]),
            gt_classes=torch.tensor(classes, dtype=torch.int64),
            gt_masks=masks,
        )
        if lost:
            result[UNDRAWN] = {"map": record["pan_seg_file_name"], "ids": list(lost)}
        return result

    def _semantic_map(self, record: dict, size: tuple[int, int]) -> np.ndarray | None:
        """(H, W) labels that augmentations may look at and change along; `size` is the image's."""
        return None

    @abstractmethod
    def _segments(
        self, record: dict, size: tuple[int, int], transforms: T.TransformList, inputs: T.AugInput
    ) -> Segments:
        """Segments of an image after augmentation.

        Args:
            size: (height, width) of the image before it.
            inputs: image and semantic map after it.
        """

    def _check_classes(self, record: dict, classes: Sequence[int]) -> None:
        if self.num_classes is None:
            return
        wrong = sorted({int(c) for c in classes if not 0 <= c < self.num_classes})
        if wrong:
            source = next(
                (record[k] for k in ("sem_seg_file_name", "pan_seg_file_name") if k in record), None
            )
            raise ValueError(
                f"its segments are of the classes {wrong[:5]}{f' ({source})' if source else ''}; allowed: 0 .. "
                f"{self.num_classes - 1}{self._unlabelled()}, from MODEL.SEM_SEG_HEAD.NUM_CLASSES {self.num_classes}"
            )

    def _unlabelled(self) -> str:
        """What stands for no class, for messages."""
        return ""

    def _pad(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        side = self.size_divisibility
        if side <= 0:
            return image, masks
        height, width = image.shape[-2:]
        if max(height, width) > side:
            raise ValueError(
                f"the image is {height}x{width} (height x width) after augmentation, which INPUT.SIZE_DIVISIBILITY {side} "
                "does not hold: raise it to INPUT.CROP.SIZE or more, or set it to -1"
            )
        padding = (0, side - width, 0, side - height)
        return F.pad(image, padding, value=PAD_VALUE), F.pad(masks, padding, value=False)


def resize_and_crop(cfg: CfgNode, crop: T.Augmentation | None) -> list[T.Augmentation | T.Transform]:
    """Resizing of the shortest edge, crop, colours and flip: augmentations of the release's mask_former_* mappers."""
    augmentations = [
        T.ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        )
    ]
    if crop is not None:
        augmentations.append(crop)
    if cfg.INPUT.COLOR_AUG_SSD:
        # Only here: it needs OpenCV.
        from detectron2.projects.point_rend import ColorAugSSDTransform

        augmentations.append(ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT))
    return [*augmentations, T.RandomFlip()]


def category_crop(cfg: CfgNode) -> T.Augmentation | None:
    """The crop of semantic and panoptic training, drawn again while one category covers too much of it."""
    crop = cfg.INPUT.CROP
    if not crop.ENABLED:
        return None
    return T.RandomCrop_CategoryAreaConstraint(
        crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    )


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Flip, a random scale, and a crop or padding to INPUT.IMAGE_SIZE: augmentations of the release's coco_*_lsj mappers.

    Source: Simple Copy-Paste (Ghiasi et al. 2021).
    """
    side = cfg.INPUT.IMAGE_SIZE
    augmentations = []
    if cfg.INPUT.RANDOM_FLIP not in ("none", "horizontal", "vertical"):
        raise ValueError(
            f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r}; allowed: 'horizontal', 'vertical', 'none'"
        )
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    return [
        *augmentations,
        T.ResizeScale(
            min_scale=cfg.INPUT.MIN_SCALE,
            max_scale=cfg.INPUT.MAX_SCALE,
            target_height=side,
            target_width=side,
        ),
        T.FixedSizeCrop(crop_size=(side, side)),
    ]


class LargeScaleJitterMapper(TrainMapper):
    """A mapper whose images are jittered in scale and then cropped and padded to one size; a first base class."""

    @staticmethod
    def build_augmentations(cfg):
        return large_scale_jitter(cfg)

    @classmethod
    def from_config(cls, cfg, is_train=True):
        # The crop has padded to INPUT.IMAGE_SIZE already.
        return {**super().from_config(cfg, is_train), "size_divisibility": -1}

    @property
    def fixed_size(self) -> bool:
        return True


def read_semantic_map(record: dict, size: tuple[int, int]) -> np.ndarray:
    """The semantic map of a record, (H, W) float64.

    Floating as in the release: detectron2 resizes such maps by torch's nearest neighbours, and uint8 ones by PIL's, which
    take other pixels.

    Raises:
        ValueError: the record names none, or it is not of the image's size.
    """
    if "sem_seg_file_name" not in record:
        raise ValueError(
            "the record has no sem_seg_file_name, which INPUT.DATASET_MAPPER_NAME (mask_former_semantic, or a crop with "
            "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA below 1) needs; name a data set with semantic maps in DATASETS.TRAIN"
        )
    labels = detection_utils.read_image(record["sem_seg_file_name"]).astype("double")
    if labels.ndim == 3 and labels.shape[2] == 1:
        labels = labels[:, :, 0]
    if labels.shape != tuple(size):
        raise ValueError(
            f"the semantic map {record['sem_seg_file_name']} has shape {labels.shape}, the image {tuple(size)}; expected "
            "one label for each pixel, (height, width)"
        )
    return labels
