"""ADE20K with 150 categories: panoptic and instance data sets, and colours for detectron2's semantic one."""

import os

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .catalog import load_categories, panoptic_metadata, register, register_panoptic, require_paths

_SPLITS = {"train": "training", "val": "validation"}


def register_all(root: str) -> None:
    """Register ade20k_{panoptic,instance}_{train,val} under `root`/ADEChallengeData2016."""
    categories = load_categories("ade20k")
    things = [category for category in categories if category["isthing"]]
    root = os.path.join(root, "ADEChallengeData2016")
    for split, folder in _SPLITS.items():
        image_root = os.path.join(root, "images", folder)
        instance_json = os.path.join(root, f"ade20k_instance_{split}.json")
        register_panoptic(
            f"ade20k_panoptic_{split}",
            image_root=image_root,
            panoptic_root=os.path.join(root, f"ade20k_panoptic_{split}"),
            panoptic_json=os.path.join(root, f"ade20k_panoptic_{split}.json"),
            sem_seg_root=os.path.join(root, "annotations_detectron2", folder),
            classes=panoptic_metadata(categories, colored_things=things),
            json_file=instance_json,
            evaluator_type="ade20k_panoptic_seg",
            ignore_label=255,
        )
        _register_instances(f"ade20k_instance_{split}", image_root, instance_json, things)

        sem_seg = MetadataCatalog.get(f"ade20k_sem_seg_{split}")
        if sem_seg.get("stuff_colors", None) is None:
            sem_seg.stuff_colors = [category["color"] for category in categories]


def _register_instances(name: str, image_root: str, json_file: str, things: list[dict]) -> None:
    def load() -> list[dict]:
        require_paths(name, [image_root, json_file])
        return load_coco_json(json_file, image_root, name)

    register(
        name,
        load,
        image_root=image_root,
        json_file=json_file,
        evaluator_type="coco",
        # The instance task names its categories by one word each, unlike the panoptic task.
        thing_classes=[category["instance_name"] for category in things],
        thing_dataset_id_to_contiguous_id={category["id"]: i for i, category in enumerate(things)},
    )
