"""Images of more bits than detectron2 reads."""

from __future__ import annotations

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image


def check_depth(path: str) -> None:
    """
    Raises:
        ValueError: an image has values above 255, of which detectron2's read_image makes 255: 16 bits would be white.
    """
    if path.lower().endswith((".jpg", ".jpeg")):
        return  # 8 bits; most images are spared a second look at the file
    with PathManager.open(path, "rb") as f, Image.open(f) as image:
        if image.mode[0] not in "IF":  # I;16, I and F; RGB of 16 bits is read by its upper 8
            return
        highest = np.asarray(image).max()
    if highest > 255:
        raise ValueError(
            f"its values go up to {highest:g}; allowed: 8 bits, 0 .. 255. Convert the images, 16 bits by a division by 257"
        )
