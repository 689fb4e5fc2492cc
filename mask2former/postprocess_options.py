"""What to make of the network's outputs: the keys of MODEL.MASK_FORMER.TEST in one value."""

from __future__ import annotations

from dataclasses import dataclass

INSTANCE_FORMATS = ("bitmask", "rle")
SEMANTIC_FORMATS = ("scores", "labels")


@dataclass(frozen=True)
class PostprocessOptions:
    """What to make of the network's outputs; from_config names the config key of each."""

    num_classes: int
    semantic_on: bool = True
    instance_on: bool = False
    panoptic_on: bool = False
    object_mask_threshold: float = 0.0
    overlap_threshold: float = 0.0
    topk: int = 100
    resize_before_inference: bool = True
    boxes_from_masks: bool = False
    instance_format: str = "bitmask"  # or "rle"
    semantic_format: str = "scores"  # or "labels"

    def __post_init__(self):
        for key, value, allowed in (
            ("INSTANCE_FORMAT", self.instance_format, INSTANCE_FORMATS),
            ("SEMANTIC_FORMAT", self.semantic_format, SEMANTIC_FORMATS),
        ):
            if value not in allowed:
                raise ValueError(
                    f"MODEL.MASK_FORMER.TEST.{key} is {value!r}; expected one of auto, {', '.join(allowed)}"
                )

    @classmethod
    def from_config(cls, cfg) -> PostprocessOptions:
        test = cfg.MODEL.MASK_FORMER.TEST
        pairs = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES * cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if test.INSTANCE_ON and not 1 <= cfg.TEST.DETECTIONS_PER_IMAGE <= pairs:
            raise ValueError(
                f"TEST.DETECTIONS_PER_IMAGE is {cfg.TEST.DETECTIONS_PER_IMAGE}; instances are drawn from {pairs} pairs of "
                "query and class (MODEL.MASK_FORMER.NUM_OBJECT_QUERIES x MODEL.SEM_SEG_HEAD.NUM_CLASSES), so it must be "
                f"between 1 and {pairs}"
            )
        return cls(
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            semantic_on=test.SEMANTIC_ON,
            instance_on=test.INSTANCE_ON,
            panoptic_on=test.PANOPTIC_ON,
            object_mask_threshold=test.OBJECT_MASK_THRESHOLD,
            overlap_threshold=test.OVERLAP_THRESHOLD,
            topk=cfg.TEST.DETECTIONS_PER_IMAGE,
            # As in the release: only a purely semantic model may resize its scores instead of the masks.
            resize_before_inference=test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE
            or test.PANOPTIC_ON
            or test.INSTANCE_ON,
            boxes_from_masks=test.BOXES_FROM_MASKS,
            # "auto" is for tools/train_net.py to settle; everyone else gets the release's outputs.
            instance_format="bitmask" if test.INSTANCE_FORMAT == "auto" else test.INSTANCE_FORMAT,
            semantic_format="scores" if test.SEMANTIC_FORMAT == "auto" else test.SEMANTIC_FORMAT,
        )
