"""Pictures that are going to be run, told to the backend before the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor

from .media import MediaError


class PicturesAhead:
    """In the place of an ImagesAhead, where it is no data set that is run."""

    def __init__(self, cfg: CfgNode, readers: Sequence[Callable[[], np.ndarray]]):
        """
        Args:
            readers: each reads a picture, (H, W, 3) uint8 BGR. They are called when images are asked for.
        """
        size = cfg.INPUT.MIN_SIZE_TEST
        self._resize = ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)
        self._rgb = cfg.INPUT.FORMAT == "RGB"
        self._readers = list(readers)

    def examples(self, count: int) -> list[Tensor]:
        """Up to so many pictures, from all over the list: (3, height, width), as DefaultPredictor resizes them.

        What cannot be read or resized is left out: the run will name it.
        """
        images = []
        for reader in spread(self._readers, count):
            try:
                picture = reader()
                pixels = self._resize.get_transform(picture).apply_image(picture)
            except (MediaError, ValueError, OverflowError, cv2.error):
                continue
            if self._rgb:
                pixels = pixels[:, :, ::-1]
            images.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        return images

    def sizes(self, multiple: int) -> Counter[tuple[int, int, int]]:
        """None, without reading all pictures: engines of one size each are built with the picture that asks for one."""
        return Counter()


def spread(items: Sequence, count: int) -> list:
    """Up to so many items, evenly from all over."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
