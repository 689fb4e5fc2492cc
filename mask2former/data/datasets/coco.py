"""COCO panoptic 2017 with semantic label maps, as the official release evaluates it."""

import os

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from .catalog import panoptic_metadata, register_panoptic


def register_all(root: str) -> None:
    """Register coco_2017_{train,val}_panoptic_with_sem_seg under `root`/coco.

    Also gives coco_2017_{train,val}_panoptic of detectron2 the 80 things as thing_classes, where detectron2
    lists all 133 categories.
    """
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    for split in ("train", "val"):
        classes = panoptic_metadata(COCO_CATEGORIES, colored_things=things)
        name = f"coco_2017_{split}_panoptic"
        _keep_things_only(name, classes)

        instances = MetadataCatalog.get(f"coco_2017_{split}")
        sem_seg_root = os.path.join(root, "coco", f"panoptic_semseg_{split}2017")
        register_panoptic(
            f"{name}_with_sem_seg",
            image_root=os.path.expanduser(instances.image_root),
            panoptic_root=os.path.join(root, "coco", f"panoptic_{split}2017"),
            panoptic_json=os.path.join(root, "coco", "annotations", f"panoptic_{split}2017.json"),
            sem_seg_root=sem_seg_root,
            classes=classes,
            image_id=int,
            json_file=os.path.expanduser(instances.json_file),
            evaluator_type="coco_panoptic_seg",
            ignore_label=255,
        )


def _keep_things_only(name: str, classes: dict) -> None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes", None) != classes["stuff_classes"]:
        return  # done already, or somebody else's own
    # Metadata refuses to change a value that is set.
    for key in ("thing_classes", "thing_colors"):
        delattr(metadata, key)
        setattr(metadata, key, classes[key])
