"""pycocotools' evaluation of boxes and masks in several processes."""

from __future__ import annotations

import contextlib
import copy
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from .processes import in_processes, number_of_processes

# What COCOeval tells of an image's detections (of a category and area range, with the highest scores first) and instances;
# those by threshold are (IoU thresholds, detections or instances), the others lists.
_OF_DETECTIONS = {"dtIds": np.int64, "dtScores": np.float64}
_OF_INSTANCES = {"gtIds": np.int64, "gtIgnore": np.int64}
_OF_DETECTIONS_BY_THRESHOLD = ("dtMatches", "dtIgnore")
_OF_INSTANCES_BY_THRESHOLD = ("gtMatches",)


class ParallelCOCOeval(COCOeval):
    """COCOeval whose processes share the images out, and then the categories; its results and what it prints are the same.

    Each process runs COCOeval itself. Where there are several, `ious` are not kept, and `evalImgs` makes its results when
    they are asked for.
    """

    def __init__(self, truth: COCO, results: COCO, iou_type: str, max_processes: int = -1):
        """
        Args:
            iou_type: "bbox" or "segm".
            max_processes: TEST.EVALUATION_THREADS; few images are evaluated in this process.
        """
        super().__init__(truth, results, iou_type)
        self._max_processes = max_processes
        self._shared_out: _ImageResults | None = None

    def evaluate(self) -> None:
        super().evaluate()
        if self._shared_out is not None:
            self.evalImgs, self._shared_out = self._shared_out, None

    def _prepare(self) -> None:
        """`evaluate` calls it when its parameters are set, and then goes through all images: nothing is left to do there."""
        count = number_of_processes(self._max_processes, len(self.params.imgIds))
        if count == 1:
            super()._prepare()
            return
        self.eval = {}
        parts = in_processes(lambda i: self._evaluated_images(i, count), count)
        self._shared_out = _ImageResults(self.params, parts)

    def computeIoU(self, imgId, catId):
        return super().computeIoU(imgId, catId) if self._shared_out is None else []

    def evaluateImg(self, imgId, catId, aRng, maxDet):
        return super().evaluateImg(imgId, catId, aRng, maxDet) if self._shared_out is None else None

    def accumulate(self, p: Params | None = None) -> None:
        categories = len(self.params.catIds)
        count = min(number_of_processes(self._max_processes, len(self.params.imgIds)), categories)
        if count == 1 or p is not None or not self.params.useCats or not self.evalImgs:
            super().accumulate(p)
            return
        print("Accumulating evaluation results...")
        start = time.time()
        parts = in_processes(lambda i: self._accumulated_categories(i, count), count)
        order = np.argsort(np.concatenate([np.arange(i, categories, count) for i in range(count)]))
        # (thresholds, recalls, categories, area ranges, numbers of detections); of recall, without recalls
        axes = {"precision": 2, "recall": 1, "scores": 2}
        together = {
            name: np.concatenate([part[name] for part in parts], axis).take(order, axis)
            for name, axis in axes.items()
        }
        counts = list(parts[0]["counts"])
        counts[2] = categories
        self.eval = {"params": self.params, "counts": counts, "date": parts[0]["date"], **together}
        print(f"DONE (t={time.time() - start:0.2f}s).")

    def _evaluated_images(self, first: int, step: int) -> dict[str, np.ndarray]:
        alone = self._alone()
        alone.params.imgIds = self.params.imgIds[first::step]
        with contextlib.redirect_stdout(io.StringIO()):
            alone.evaluate()
        return _packed(alone.evalImgs)

    def _accumulated_categories(self, first: int, step: int) -> dict[str, Any]:
        alone = self._alone()
        alone.params.catIds = self.params.catIds[first::step]
        alone._paramsEval = alone.params
        of_category = len(self.params.areaRng) * len(self.params.imgIds)
        alone.evalImgs = [
            one
            for category in range(first, len(self.params.catIds), step)
            for one in self.evalImgs[category * of_category : (category + 1) * of_category]
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            alone.accumulate()
        return {name: value for name, value in alone.eval.items() if name != "params"}

    def _alone(self) -> COCOeval:
        alone = COCOeval(self.cocoGt, self.cocoDt, self.params.iouType)
        alone.params = copy.deepcopy(self.params)
        return alone


def _packed(results: Sequence[Mapping | None]) -> dict[str, np.ndarray]:
    """Results of images in one array of each kind: thousands of small ones would take longer to pickle than to make."""
    there = [one for one in results if one is not None]
    packed = {
        "there": np.array([one is not None for one in results]),
        "detections": np.array([0 if one is None else len(one["dtIds"]) for one in results]),
        "instances": np.array([0 if one is None else len(one["gtIds"]) for one in results]),
    }
    if there:
        for name, dtype in {**_OF_DETECTIONS, **_OF_INSTANCES}.items():
            packed[name] = np.concatenate([np.asarray(one[name], dtype) for one in there])
        for name in (*_OF_DETECTIONS_BY_THRESHOLD, *_OF_INSTANCES_BY_THRESHOLD):
            packed[name] = np.concatenate([one[name] for one in there], axis=1)
    return packed


class _ImageResults(Sequence):
    """What COCOeval has in `evalImgs`, by category, area range and image, of several processes.

    Process i of n had the images i, i + n, i + 2n and so on.
    """

    def __init__(self, params: Params, parts: Sequence[Mapping[str, np.ndarray]]):
        self._images, self._max_detections = params.imgIds, params.maxDets[-1]
        self._blocks = [
            (category, area)
            for category in (params.catIds if params.useCats else [-1])
            for area in params.areaRng
        ]
        self._parts = parts
        self._ends = [{name: np.cumsum(part[name]) for name in ("detections", "instances")} for part in parts]

    def __len__(self) -> int:
        return len(self._blocks) * len(self._images)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        block, image = divmod(range(len(self))[index], len(self._images))
        image_there, process = divmod(image, len(self._parts))
        part, ends = self._parts[process], self._ends[process]
        images_there = len(part["there"]) // len(self._blocks)
        place = block * images_there + image_there
        if not part["there"][place]:
            return None
        detections, instances = (
            slice(end[place] - part[name][place], end[place]) for name, end in ends.items()
        )
        category, area = self._blocks[block]
        return {
            "image_id": self._images[image],
            "category_id": category,
            "aRng": area,
            "maxDet": self._max_detections,
            "dtIds": part["dtIds"][detections].tolist(),
            "gtIds": part["gtIds"][instances].tolist(),
            "dtMatches": part["dtMatches"][:, detections],
            "gtMatches": part["gtMatches"][:, instances],
            "dtScores": part["dtScores"][detections].tolist(),
            "gtIgnore": part["gtIgnore"][instances],
            "dtIgnore": part["dtIgnore"][:, detections],
        }
