"""Training mappers, by the release's INPUT.DATASET_MAPPER_NAME."""

from detectron2.config import CfgNode

from .base import TrainMapper
from .instance import COCOInstanceNewBaselineDatasetMapper, MaskFormerInstanceDatasetMapper
from .panoptic import COCOPanopticNewBaselineDatasetMapper, MaskFormerPanopticDatasetMapper
from .semantic import MaskFormerSemanticDatasetMapper

__all__ = [
    "MAPPERS",
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "TrainMapper",
    "build_train_mapper",
]

MAPPERS: dict[str, type[TrainMapper]] = {
    "mask_former_semantic": MaskFormerSemanticDatasetMapper,
    "mask_former_panoptic": MaskFormerPanopticDatasetMapper,
    "mask_former_instance": MaskFormerInstanceDatasetMapper,
    "coco_instance_lsj": COCOInstanceNewBaselineDatasetMapper,
    "coco_panoptic_lsj": COCOPanopticNewBaselineDatasetMapper,
}


def build_train_mapper(cfg: CfgNode) -> TrainMapper:
    """The mapper that INPUT.DATASET_MAPPER_NAME names; ValueError lists the names where it is unknown."""
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in MAPPERS:
        raise ValueError(f"INPUT.DATASET_MAPPER_NAME is {name!r}; allowed: {', '.join(map(repr, MAPPERS))}")
    return MAPPERS[name](cfg, True)
