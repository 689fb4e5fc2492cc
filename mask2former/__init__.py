"""Mask2Former on detectron2: importing this registers the model's parts and the data sets."""

from . import data, modeling
from .backend import BACKEND_REGISTRY
from .config import add_maskformer2_config, get_mask2former_cfg
from .data.dataset_mappers import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
)
from .maskformer_model import MaskFormer

__all__ = [
    "BACKEND_REGISTRY",
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MaskFormer",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "add_maskformer2_config",
    "data",
    "get_mask2former_cfg",
    "modeling",
]
