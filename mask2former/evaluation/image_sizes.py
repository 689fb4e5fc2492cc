"""Sizes that test images have after they are resized, told from their records, and an order by them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform

Size = tuple[int, int]

# What backbones ask images to be padded to where MODEL.MASK_FORMER.SIZE_DIVISIBILITY leaves it to them.
_USUAL_DIVISIBILITY = 32


def recorded_size(record: dict) -> Size | None:
    """(height, width) of a record's image, or None where it does not tell."""
    height, width = record.get("height"), record.get("width")
    return (height, width) if height and width else None


def resizing(cfg: CfgNode) -> Callable[[Size], Size] | None:
    """(height, width) of an image -> what the test loader makes of it; None where that is left to chance, or not known."""
    augmentations = build_augmentation(cfg, is_train=False)
    for one in augmentations:
        if type(one) is not ResizeShortestEdge or one.is_range or len(set(one.short_edge_length)) != 1:
            return None

    @functools.cache
    def resized(size: Size) -> Size:
        for one in augmentations:
            # It looks at the shape alone; this array takes no memory.
            transform = one.get_transform(np.broadcast_to(np.uint8(0), (*size, 3)))
            if isinstance(transform, ResizeTransform):
                size = (int(transform.new_h), int(transform.new_w))
        return size

    return resized


def padded(sizes: Iterable[Size], multiple: int) -> Size:
    """The size of a batch of images of these sizes, padded to a multiple."""
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes))
    return height, width


def grouped_by_size(indices: Iterable[int], sizes: Sequence[Size | None], cfg: CfgNode) -> list[int]:
    """Images so that those of one padded size follow each other, the largest first, else in their order.

    Args:
        indices: of images.
        sizes: (height, width) of all images before they are resized.

    Returns:
        `indices` as they are where a size is not known or is left to chance.
    """
    indices = list(indices)
    resized = resizing(cfg)
    if resized is None or any(sizes[i] is None for i in indices):
        return indices
    multiple = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    multiple = multiple if multiple > 0 else _USUAL_DIVISIBILITY

    def size_of(index: int) -> tuple[int, Size]:
        height, width = padded([resized(sizes[index])], multiple)
        return height * width, (height, width)

    return sorted(indices, key=size_of, reverse=True)  # keeps the order of equals
