"""Data sets; importing this registers them with detectron2."""

from . import datasets
from .datasets import check_dataset_on_disk

__all__ = ["check_dataset_on_disk", "datasets"]
