"""Evaluators that take a model's results in the form that costs least: masks as RLE, classes as labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import LVISEvaluator
from detectron2.evaluation import SemSegEvaluator as _SemSegEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor

from ..data.errors import AnnotationError, naming
from ..rle import encode_labels
from .overlapped import HostCopies, PerImageMixin
from .panoptic_quality import pair_runs
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


# Places in a flat confusion matrix, and the pixels there. An image has some tens of pairs of classes, the matrix thousands,
# with ADE20K's 847 classes hundreds of thousands; and images are kept in files while an evaluation runs.
_Confusion = tuple[np.ndarray, np.ndarray]


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


class RLEMixin(PerImageMixin):
    """Before an evaluator that keeps COCO's JSON: pred_masks_rle of the instances will do for pred_masks."""

    def fetch(self, output: Mapping[str, Any], copies: HostCopies) -> dict:
        return {key: copies.start(output[key]) for key in ("instances", "proposals") if key in output}

    def examine(self, image: Mapping[str, Any], fetched: dict) -> list[dict]:
        if "instances" in fetched and fetched["instances"].has("pred_masks_rle"):
            predictions = rle_instances_to_coco_json(fetched["instances"], image["image_id"])
            return [{"image_id": image["image_id"], "instances": predictions}]
        # detectron2's own work, on a list that no other thread sees.
        alone = copy.copy(self)
        alone._predictions = []
        super(PerImageMixin, alone).process([image], [fetched])
        return alone._predictions

    def add(self, examined: list[dict]) -> None:
        self._predictions.extend(examined)


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


class SemSegEvaluator(WholeFilesMixin, PerImageMixin, _SemSegEvaluator):
    """detectron2's SemSegEvaluator, which also takes labels, and looks at the annotations before it counts them.

    Results and files are SemSegEvaluator's. It counts runs of pixels where detectron2 counts pixels, and encodes the
    masks of all classes at once.
    """

    def __init__(self, dataset_name: str, *args, **kwargs):
        """
        Args:
            args, kwargs: SemSegEvaluator's.

        Raises:
            AnnotationError: the data set has no semantic maps.
        """
        try:
            super().__init__(dataset_name, *args, **kwargs)
        except KeyError as error:
            if error.args != ("sem_seg_file_name",):
                raise
            raise AnnotationError(
                f"{dataset_name} has no semantic maps (records without sem_seg_file_name), which mIoU is computed with. "
                "Register them, or, for a panoptic data set, set MODEL.MASK_FORMER.TEST.SEMANTIC_ON False"
            ) from error

    def fetch(self, output: Mapping[str, Any], copies: HostCopies) -> Tensor:
        labels = output["sem_seg_labels"] if "sem_seg_labels" in output else output["sem_seg"].argmax(dim=0)
        return copies.start(labels.to(torch.int32))

    def examine(
        self, image: Mapping[str, Any], fetched: Tensor
    ) -> tuple[_Confusion, _Confusion | None, list]:
        """Confusion, that of the boundaries where detectron2 has one, and the masks as JSON.

        Raises:
            AnnotationError: a semantic map that is missing, damaged, of another size than the prediction, or with labels
                that are no class. detectron2 would fail without a name, or count them for other classes.
        """
        predicted = fetched.numpy()
        path = self.input_file_to_gt_file[image["file_name"]]
        with naming({"file_name": path, "image_id": image.get("image_id")}, "evaluated on"):
            with PathManager.open(path, "rb") as f:
                labels = np.asarray(Image.open(f))
            if labels.shape != predicted.shape:
                raise ValueError(f"its shape is {labels.shape}, that of the prediction {predicted.shape}")
            starts, lengths = pair_runs(predicted, labels)
            true = labels.ravel()[starts].astype(np.int64)
            wrong = np.unique(true[(true != self._ignore_label) & (true >= self._num_classes)])
            if wrong.size:
                raise ValueError(
                    f"it holds the labels {wrong.tolist()[:5]}, but there are {self._num_classes} classes, and "
                    f"{self._ignore_label} for no class"
                )
        true[true == self._ignore_label] = self._num_classes
        confusion = self._confusion(predicted.ravel()[starts], true, lengths)
        boundaries = None
        # detectron2's main branch, where OpenCV is installed
        if getattr(self, "_compute_boundary_iou", False):
            labels = np.where(labels == self._ignore_label, self._num_classes, labels)
            maps = [self._mask_to_boundary(one.astype(np.uint8)) for one in (predicted, labels)]
            starts, lengths = pair_runs(*maps)
            boundaries = self._confusion(*(one.ravel()[starts] for one in maps), lengths)
        return confusion, boundaries, self.encode_json_sem_seg(predicted, image["file_name"])

    def add(self, examined: tuple[_Confusion, _Confusion | None, list]) -> None:
        confusion, boundaries, predictions = examined
        _add_confusion(self._conf_matrix, confusion)
        if boundaries is not None:
            _add_confusion(self._b_conf_matrix, boundaries)
        self._predictions.extend(predictions)

    def _confusion(self, predicted: np.ndarray, true: np.ndarray, lengths: np.ndarray) -> _Confusion:
        """Of predicted (rows) and true classes, 0 .. K, K for none, from runs of them (n,)."""
        pairs = (self._num_classes + 1) * predicted.astype(np.int64) + true
        pixels = np.bincount(pairs, weights=lengths)
        places = np.flatnonzero(pixels)
        return places, pixels[places].astype(np.int64)

    def encode_json_sem_seg(self, sem_seg: np.ndarray, input_file_name: str) -> list[dict]:
        """detectron2's, from one pass over the map."""
        json_list = []
        for label, rle in encode_labels(sem_seg).items():
            dataset_id = label
            if self._contiguous_id_to_dataset_id is not None:
                assert label in self._contiguous_id_to_dataset_id, (
                    f"Label {label} is not in the metadata info for {self._dataset_name}"
                )
                dataset_id = self._contiguous_id_to_dataset_id[label]
            rle["counts"] = rle["counts"].decode("ascii")
            json_list.append({"file_name": input_file_name, "category_id": dataset_id, "segmentation": rle})
        return json_list


def _add_confusion(matrix: np.ndarray, confusion: _Confusion) -> None:
    places, pixels = confusion
    matrix.reshape(-1)[places] += pixels  # a place comes once


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
