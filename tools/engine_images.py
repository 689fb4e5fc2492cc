"""The images that tools/build_engine.py traces and compares engines with: files, or those of DATASETS.TEST."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from engine_config import UsageError
from torch import Tensor

from d2_trt.ahead import MAX_EXAMPLES
from d2_trt.logging import get_logger
from mask2former.evaluation import check_test_sets
from mask2former.evaluation.ahead import ImagesAhead
from mask2former.utils.media import MediaError, find_inputs, read_picture
from mask2former.utils.pictures_ahead import PicturesAhead, spread

logger = get_logger("d2_trt.build_engine")


def images_of(cfg: CfgNode, files: Sequence[str] | None) -> Callable[[], list[Tensor]]:
    """What gives images to build with, (3, H, W) each: those of files, read here, or of data sets, read when asked for.

    Args:
        files: pictures, folders and patterns; None takes an evaluation's images, or none where there are no data sets.

    Raises:
        UsageError: a file is missing or cannot be read.
    """
    if files is None:
        return functools.cache(lambda: _of_data_sets(cfg))
    try:
        found = [item for item in find_inputs(files).items if not item.is_stream]
    except MediaError as error:
        raise UsageError(f"--images: {error}") from error
    if not found:
        raise UsageError("--images names videos alone; allowed: images, folders and patterns of them")
    pictures = []
    for item in spread(found, MAX_EXAMPLES):
        try:
            pictures.append(read_picture(item.source)[0])
        except MediaError as error:
            raise UsageError(f"--images {item.name}: {error}") from error
    images = PicturesAhead(cfg, [lambda picture=picture: picture for picture in pictures]).examples(
        MAX_EXAMPLES
    )
    if not images:
        raise UsageError("--images: INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST leave nothing of the images")
    return lambda: images


def _of_data_sets(cfg: CfgNode) -> list[Tensor]:
    """As an evaluation takes them. Engines can be built where no data is."""
    try:
        check_test_sets(cfg)
        images = ImagesAhead(cfg, cfg.DATASETS.TEST).examples(MAX_EXAMPLES)
    except (KeyError, ValueError, OSError) as error:
        why = str(error.args[0] if isinstance(error, KeyError) else error)
        logger.warning("No images of DATASETS.TEST are at hand (%s): --images FILE names others", why)
        return []
    logger.info("Images to compare with are of %s", ", ".join(cfg.DATASETS.TEST))
    return images
