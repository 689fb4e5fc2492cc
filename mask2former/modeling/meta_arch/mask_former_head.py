"""Pixel decoder and transformer decoder as one detectron2 head."""

from __future__ import annotations

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ..transformer_decoder import build_transformer_decoder


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(nn.Module):
    """Backbone features -> class and mask logits of the queries.

    Source: the Mask2Former release, of which it covers TRANSFORMER_IN_FEATURE "multi_scale_pixel_decoder".
    """

    _version = 2

    @configurable
    def __init__(self, *, num_classes: int, pixel_decoder: nn.Module, transformer_predictor: nn.Module):
        super().__init__()
        self.num_classes = num_classes
        self.pixel_decoder = pixel_decoder
        self.predictor = transformer_predictor

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        in_feature = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
        if in_feature != "multi_scale_pixel_decoder":
            raise ValueError(
                f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is {in_feature!r}; Mask2Former needs "
                "'multi_scale_pixel_decoder' (the other values belong to MaskFormer, its predecessor)"
            )
        pixel_decoder = SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME)
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "pixel_decoder": pixel_decoder(cfg, input_shape),
            "transformer_predictor": build_transformer_decoder(cfg, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM),
        }

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # In checkpoints of the first version the pixel decoder's keys lack their prefix. The keys themselves tell, not
        # the version number, which a plain dict of weights does not carry.
        for key in [k for k in state_dict if k.startswith(prefix)]:
            name = key[len(prefix) :]
            if not name.startswith(("pixel_decoder.", "predictor.")):
                state_dict.setdefault(f"{prefix}pixel_decoder.{name}", state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, features: dict[str, Tensor]) -> dict:
        """Backbone features by name -> the outputs of the transformer decoder."""
        mask_features, levels = self.pixel_decoder.forward_features(features)
        return self.predictor(levels, mask_features)
