"""Registers, under the official release's names, the data sets that detectron2 itself does not, and "shapes".

detectron2 brings coco_2017_*, cityscapes_fine_* and ade20k_sem_seg_*. All of them lie under the folder
that the environment variable DETECTRON2_DATASETS names, read when this is first imported.
"""

from . import ade20k, coco, mapillary_vistas, shapes
from .catalog import check_dataset_on_disk, datasets_root

__all__ = ["ade20k", "check_dataset_on_disk", "coco", "datasets_root", "mapillary_vistas", "shapes"]

for _module in (coco, ade20k, mapillary_vistas, shapes):
    _module.register_all(datasets_root())
