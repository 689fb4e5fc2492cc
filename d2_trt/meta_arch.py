"""A meta-architecture that says outright that TensorRT runs the network."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY

from mask2former import MaskFormer
from mask2former.backend import settle_backend

from .logging import get_logger

logger = get_logger(__name__)


@META_ARCH_REGISTRY.register()
class TensorRTMaskFormer(MaskFormer):
    """A MaskFormer with the backend "tensorrt", whatever MODEL.BACKEND says."""

    @classmethod
    def from_config(cls, cfg):
        if cfg.MODEL.BACKEND not in ("torch", "tensorrt"):
            logger.warning(
                "MODEL.META_ARCHITECTURE TensorRTMaskFormer runs the network in TensorRT: MODEL.BACKEND %s is not used",
                cfg.MODEL.BACKEND,
            )
        settle_backend("tensorrt", cfg)
        return {**super().from_config(cfg), "backend": "tensorrt"}
