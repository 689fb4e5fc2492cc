"""Evaluators that take a model's results in the form that costs least: masks as RLE, classes as labels."""

from __future__ import annotations

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import LVISEvaluator
from detectron2.evaluation import SemSegEvaluator as _SemSegEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor

from ..data.errors import naming
from .whole_files import WholeFilesMixin

# Values of evaluator_type whose evaluators of instances keep RLE; Cityscapes' write masks as images.
_RLE_TYPES = frozenset(
    {"coco", "lvis", "coco_panoptic_seg", "mapillary_vistas_panoptic_seg", "ade20k_panoptic_seg"}
)


def with_evaluation_formats(cfg: CfgNode) -> CfgNode:
    """A copy of a config, for building a model whose results only evaluators read.

    INSTANCE_FORMAT and SEMANTIC_FORMAT (below MODEL.MASK_FORMER.TEST), where they are "auto", become what is cheapest for
    the evaluators of DATASETS.TEST; other values are kept. The config that is saved and shown stays as it was written:
    the demo reads it too.
    """
    cfg = cfg.clone()
    cfg.defrost()
    test = cfg.MODEL.MASK_FORMER.TEST
    if test.INSTANCE_FORMAT == "auto":
        types = {MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TEST}
        test.INSTANCE_FORMAT = "rle" if types and types <= _RLE_TYPES else "bitmask"
    if test.SEMANTIC_FORMAT == "auto":
        test.SEMANTIC_FORMAT = "labels"  # all of them take the argmax and nothing else
    cfg.freeze()
    return cfg


class _Labels:
    """Labels where an evaluator takes the argmax of scores."""

    def __init__(self, labels: Tensor):
        self._labels = labels

    def argmax(self, dim: int) -> Tensor:
        if dim != 0:
            raise ValueError(f"argmax over dimension {dim}; only the classes' (0) is known")
        return self._labels


class LabelsMixin:
    """Before a semantic evaluator of detectron2: "sem_seg_labels" (H, W) int64 will do for "sem_seg" (K, H, W)."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        super().process(
            inputs,
            [
                {**output, "sem_seg": _Labels(output["sem_seg_labels"])}
                if "sem_seg_labels" in output
                else output
                for output in outputs
            ],
        )


class RLEMixin:
    """Before an evaluator that keeps COCO's JSON: pred_masks_rle of the instances will do for pred_masks."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" in output and output["instances"].has("pred_masks_rle"):
                predictions = rle_instances_to_coco_json(output["instances"], image["image_id"])
                self._predictions.append({"image_id": image["image_id"], "instances": predictions})
            else:
                super().process([image], [output])


class DecodingMixin:
    """Before an evaluator that needs pred_masks: pred_masks_rle are decoded for it."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        super().process(
            inputs,
            [
                {**output, "instances": _decoded(output["instances"])}
                if "instances" in output and output["instances"].has("pred_masks_rle")
                else output
                for output in outputs
            ],
        )


class SemSegEvaluator(WholeFilesMixin, LabelsMixin, _SemSegEvaluator):
    """detectron2's SemSegEvaluator, which also takes labels, and looks at the annotations before it counts them."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Raises:
            AnnotationError: a semantic map that is missing, damaged, of another size than the prediction, or with labels
                that are no class. detectron2 would fail without a name, or count them for other classes.
        """
        for image, output in zip(inputs, outputs, strict=True):
            path = self.input_file_to_gt_file[image["file_name"]]
            with naming({"file_name": path, "image_id": image.get("image_id")}, "evaluated on"):
                with PathManager.open(path, "rb") as f:
                    labels = np.asarray(Image.open(f))
                predicted = output["sem_seg_labels"] if "sem_seg_labels" in output else output["sem_seg"][0]
                if labels.shape != tuple(predicted.shape):
                    raise ValueError(
                        f"its shape is {labels.shape}, that of the prediction {tuple(predicted.shape)}"
                    )
                wrong = np.unique(labels[(labels != self._ignore_label) & (labels >= self._num_classes)])
                if wrong.size:
                    raise ValueError(
                        f"it holds the labels {wrong.tolist()[:5]}, but there are {self._num_classes} classes, and "
                        f"{self._ignore_label} for no class"
                    )
        super().process(inputs, outputs)


class LVISSegEvaluator(WholeFilesMixin, RLEMixin, LVISEvaluator):
    """detectron2's LVISEvaluator, which also takes RLE."""


def rle_instances_to_coco_json(instances: Instances, image_id) -> list[dict]:
    """What detectron2's instances_to_coco_json makes of the same instances with pred_masks."""
    instances = instances.to("cpu")
    masks = instances.pred_masks_rle.to_json()
    instances.remove("pred_masks_rle")
    results = instances_to_coco_json(instances, image_id)
    return [{**result, "segmentation": rle} for result, rle in zip(results, masks, strict=True)]


def _decoded(instances: Instances) -> Instances:
    fields = dict(instances.get_fields())
    fields["pred_masks"] = fields.pop("pred_masks_rle").decode(instances.image_size)
    return Instances(instances.image_size, **fields)
