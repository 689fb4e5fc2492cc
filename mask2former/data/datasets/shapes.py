"""Registers the synthetic "shapes" data set, which everyone can draw: `python tools/make_shapes_dataset.py`.

For each split, train and val, under $DETECTRON2_DATASETS/shapes (datasets/shapes without the variable):

    shapes_{split}_panoptic     segments and semantic maps; evaluates PQ, AP and mIoU, as the config says
    shapes_{split}_instance     boxes and masks of the things; evaluates AP
    shapes_{split}_sem_seg      semantic maps of all 13 classes; evaluates mIoU

Classes 0..7 (contiguous ids) are things, 8..12 are stuff.
"""

from __future__ import annotations

import os
from typing import Any

from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from ..annotations import check_panoptic, read_panoptic_json
from ..errors import AnnotationError
from .catalog import datasets_root, register
from .shapes_files import SPLITS
from .shapes_scene import CATEGORIES, THINGS, VOID_LABEL, Scene, draw_scene

__all__ = ["Scene", "draw_scene", "register_all", "register_shapes", "shapes_root"]


def shapes_root() -> str:
    """Where the data set lies unless told otherwise."""
    return os.path.join(datasets_root(), "shapes")


def register_all(root: str) -> None:
    """Register the data set below `root`/shapes."""
    register_shapes(os.path.join(root, "shapes"))


def register_shapes(root: str, prefix: str = "shapes") -> None:
    """Register the splits below `root` as {prefix}_{split}_{panoptic,instance,sem_seg}; reads no file yet."""
    for split in SPLITS:
        _register_split(root, prefix, split)


def _register_split(root: str, prefix: str, split: str) -> None:
    paths = {
        "image_root": os.path.join(root, split, "images"),
        "panoptic_root": os.path.join(root, split, "panoptic"),
        "sem_seg_root": os.path.join(root, split, "semantic"),
        "panoptic_json": os.path.join(root, "annotations", f"panoptic_{split}.json"),
        "json_file": os.path.join(root, "annotations", f"instances_{split}.json"),
    }
    things = {
        "thing_classes": [c.name for c in THINGS],
        "thing_colors": [list(c.color) for c in THINGS],
        "thing_dataset_id_to_contiguous_id": {c.dataset_id: c.contiguous_id for c in THINGS},
    }
    # As the COCO registration of the release: the "stuff" fields name all classes, so that SemSegEvaluator,
    # which knows no others, counts things too.
    stuff = {
        "stuff_classes": [c.name for c in CATEGORIES],
        "stuff_colors": [list(c.color) for c in CATEGORIES],
        "stuff_dataset_id_to_contiguous_id": {c.dataset_id: c.contiguous_id for c in CATEGORIES},
        "ignore_label": VOID_LABEL,
    }

    register(
        f"{prefix}_{split}_panoptic",
        lambda: _load_panoptic(root, paths),
        evaluator_type="coco_panoptic_seg",
        label_divisor=1000,
        **paths,
        **things,
        **stuff,
    )
    register(
        f"{prefix}_{split}_instance",
        lambda: _load_instances(root, paths),
        evaluator_type="coco",
        json_file=paths["json_file"],
        image_root=paths["image_root"],
        **things,
    )
    register(
        f"{prefix}_{split}_sem_seg",
        lambda: _load_sem_seg(root, paths),
        evaluator_type="sem_seg",
        image_root=paths["image_root"],
        sem_seg_root=paths["sem_seg_root"],
        **stuff,
    )


def _read_json(root: str, path: str) -> dict:
    try:
        return read_panoptic_json(path)
    except FileNotFoundError as error:
        raise _missing(root, path) from error


def _missing(root: str, path: str) -> FileNotFoundError:
    command = "python tools/make_shapes_dataset.py"
    if os.path.abspath(root) != os.path.abspath(shapes_root()):
        command += f" --output {root}"
    return FileNotFoundError(
        f"the shapes data set is not there: no {path}. Draw it with `{command}`, or set DETECTRON2_DATASETS "
        "to the directory that holds shapes/"
    )


def _load_panoptic(root: str, paths: dict[str, str]) -> list[dict[str, Any]]:
    contiguous = {c.dataset_id: c for c in CATEGORIES}
    content = _read_json(root, paths["panoptic_json"])
    check_panoptic(paths["panoptic_json"], content.get("annotations"))
    images = {image["id"]: image for image in content["images"]}
    records = []
    for annotation in content["annotations"]:
        image, name = images[annotation["image_id"]], annotation["file_name"]
        segments = []
        for segment in annotation["segments_info"]:
            category = _known(contiguous, segment["category_id"], name, paths["panoptic_json"])
            segments.append({**segment, "category_id": category.contiguous_id, "isthing": category.isthing})
        records.append(
            {
                "file_name": os.path.join(paths["image_root"], name),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "pan_seg_file_name": os.path.join(paths["panoptic_root"], name),
                "sem_seg_file_name": os.path.join(paths["sem_seg_root"], name),
                "segments_info": segments,
            }
        )
    return records


def _load_instances(root: str, paths: dict[str, str]) -> list[dict[str, Any]]:
    if not PathManager.isfile(paths["json_file"]):
        raise _missing(root, paths["json_file"])
    records = load_coco_json(paths["json_file"], paths["image_root"])
    contiguous = {c.dataset_id: c.contiguous_id for c in THINGS}
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] = _known(
                contiguous, annotation["category_id"], record["file_name"], paths["json_file"]
            )
    return records


def _known(categories: dict[int, Any], category: int, file_name: str, path: str) -> Any:
    if category not in categories:
        raise AnnotationError(
            f"category_id {category} of {file_name} in {path} is unknown; known are {sorted(categories)}"
        )
    return categories[category]


def _load_sem_seg(root: str, paths: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if k not in ("pan_seg_file_name", "segments_info")}
        for record in _load_panoptic(root, paths)
    ]
