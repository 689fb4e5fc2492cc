"""The images that tools/precision_search.py compares on: of a data set, or files without annotations."""

from __future__ import annotations

from collections.abc import Sequence

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from engine_config import UsageError
from ledger_evaluation import Images, sized

from mask2former.data.depth import check_depth
from mask2former.evaluation import check_test_sets


def search_batches(
    cfg: CfgNode, model, sizes: Sequence[tuple[int, int]], batch: int, count: int, files: Sequence[str] | None
) -> list[torch.Tensor]:
    """Padded batches (B, 3, H, W) float32 on the model's device, of each image at each size.

    Args:
        sizes: values of INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST.
        batch: images in one; the last one of a size may have fewer.
        count: at most so many images, evenly spread over what there is.
        files: images to take instead of the data set's.

    Raises:
        UsageError: they are not there.
    """
    if files is None:
        _check_data_set(cfg)
    else:
        files = [files[i * len(files) // count] for i in range(count)] if len(files) > count else files
        pictures = [_read(path, cfg) for path in files]
    batches = []
    for size in sizes:
        if files is None:
            batches += Images(sized(cfg, size, batch, cfg.OUTPUT_DIR), model, count).batches()
            continue
        resize = T.ResizeShortestEdge([size[0], size[0]], size[1])
        inputs = [{"image": _resized(picture, resize)} for picture in pictures]
        batches += [model.preprocess(inputs[i : i + batch])[0] for i in range(0, len(inputs), batch)]
    return batches


def source_name(cfg: CfgNode, files: Sequence[str] | None) -> str:
    """The data set, or the files."""
    return cfg.DATASETS.TEST[0] if files is None else " ".join(files)


def _check_data_set(cfg: CfgNode) -> None:
    try:
        check_test_sets(cfg)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UsageError(f"{error.args[0]}. Or give images with --input") from error
    if len(cfg.DATASETS.TEST) != 1:
        raise UsageError(
            f"DATASETS.TEST is {tuple(cfg.DATASETS.TEST)}: name one of them, or give images with --input"
        )


def _read(path: str, cfg: CfgNode):
    try:
        check_depth(path)
        return read_image(path, format=cfg.INPUT.FORMAT)
    except (OSError, ValueError) as error:
        raise UsageError(f"--input {path}: {error}") from error


def _resized(picture, resize) -> torch.Tensor:
    """(3, H, W)."""
    pixels = resize.get_transform(picture).apply_image(picture)
    return torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))
