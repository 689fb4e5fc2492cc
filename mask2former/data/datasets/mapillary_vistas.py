"""Mapillary Vistas with 65 categories: panoptic and semantic data sets."""

import os

from detectron2.data.datasets import load_sem_seg

from .catalog import load_categories, panoptic_metadata, register, register_panoptic, require_paths

# Label 65 is "unlabeled" in the label maps, so that they need no conversion.
_IGNORE_LABEL = 65
_SPLITS = {"train": "training", "val": "validation"}


def register_all(root: str) -> None:
    """Register mapillary_vistas_{panoptic,sem_seg}_{train,val} under `root`/mapillary_vistas."""
    categories = load_categories("mapillary_vistas")
    for split, folder in _SPLITS.items():
        base = os.path.join(root, "mapillary_vistas", folder)
        image_root = os.path.join(base, "images")
        sem_seg_root = os.path.join(base, "labels")
        # thing_classes lists every category here, unlike COCO and ADE20K: so does the release.
        classes = panoptic_metadata(categories, colored_things=categories)
        register_panoptic(
            f"mapillary_vistas_panoptic_{split}",
            image_root=image_root,
            panoptic_root=os.path.join(base, "panoptic"),
            panoptic_json=os.path.join(base, "panoptic", "panoptic_2018.json"),
            sem_seg_root=sem_seg_root,
            classes=classes,
            json_file=None,
            evaluator_type="mapillary_vistas_panoptic_seg",
            ignore_label=_IGNORE_LABEL,
        )
        _register_sem_seg(f"mapillary_vistas_sem_seg_{split}", image_root, sem_seg_root, classes)


def _register_sem_seg(name: str, image_root: str, sem_seg_root: str, classes: dict) -> None:
    def load() -> list[dict]:
        require_paths(name, [image_root, sem_seg_root])
        return load_sem_seg(sem_seg_root, image_root, gt_ext="png", image_ext="jpg")

    register(
        name,
        load,
        image_root=image_root,
        sem_seg_root=sem_seg_root,
        evaluator_type="sem_seg",
        ignore_label=_IGNORE_LABEL,
        stuff_classes=classes["stuff_classes"],
        stuff_colors=classes["stuff_colors"],
    )
