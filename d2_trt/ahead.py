"""What a backend does before an evaluation, which tells of the images that are to come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from .logging import get_logger
from .options import TensorRTOptions
from .shape_range import ShapeRange

if TYPE_CHECKING:
    from mask2former.evaluation.ahead import ImagesAhead

logger = get_logger(__name__)

# Images that are read to trace and compare with, at most.
MAX_EXAMPLES = 8


def examples_of(ahead: ImagesAhead, options: TensorRTOptions) -> Callable[[], list[Tensor]]:
    """What reads images to trace and compare engines with: once, where there is something to build."""
    count = min(options.shapes.opt[0] + options.verify.sizes * options.verify.images, MAX_EXAMPLES)
    return functools.cache(lambda: ahead.examples(count))


def static_ranges(
    ahead: ImagesAhead, options: TensorRTOptions, size_divisibility: int, most: int
) -> list[ShapeRange]:
    """With STATIC, the ranges of the images to come: up to so many that come most often. A warning tells of others."""
    sizes = ahead.sizes(max(size_divisibility, 1))
    if sizes is None:
        logger.warning(
            "MODEL.TENSORRT.STATIC: the data set's records do not tell the sizes of its images. Engines are built as sizes "
            "come, within the images' timing"
        )
        return []
    served = [size for size, _ in sizes.most_common() if options.shapes.contains(*size)]
    if len(served) > most:
        logger.warning(
            "MODEL.TENSORRT.STATIC: the images come in %d batches and padded sizes. Engines of the %d most frequent are "
            "built now, others as they come, within the images' timing",
            len(served),
            most,
        )
    return [options.engine_range(*size) for size in served[:most]]
