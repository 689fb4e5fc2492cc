"""Data sets; importing this registers them with detectron2."""

from . import datasets
from .dataset_mappers import build_train_mapper
from .datasets import check_dataset_on_disk
from .train_loader import build_train_loader, check_train_sets

__all__ = [
    "build_train_loader",
    "build_train_mapper",
    "check_dataset_on_disk",
    "check_train_sets",
    "datasets",
]
