"""PQ evaluator like detectron2's COCOPanopticEvaluator in interface and result names, without panopticapi."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch import Tensor

from ..data.annotations import (
    check_categories,
    check_panoptic,
    drawn_pixels,
    read_panoptic_json,
    undrawn,
)
from ..data.errors import AnnotationError, naming
from .overlapped import HostCopies, PerImageMixin
from .panoptic_quality import PQStat, check_all_predicted, match_segments, panoptic_png, read_panoptic_png
from .whole_files import whole_files

logger = logging.getLogger(__name__)


class _Compared(NamedTuple):
    """An image's counts, and which segments of its truth its map does not show, or shows with other areas."""

    stat: PQStat
    undrawn: list[int]
    other_areas: list[int]


class PanopticEvaluator(PerImageMixin, DatasetEvaluator):
    """Panoptic quality of "panoptic_seg" outputs.

    Each image is compared as it comes, on the rank that it is on; ranks exchange counts, not maps. With an
    output directory, the main process writes `predictions.json` and `panoptic_predictions/*.png` there, in
    COCO's panoptic form.

    As by panopticapi, a true segment that its map does not show counts as not found, and areas are those of the JSON. Both
    are told at the end.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, distributed: bool = True):
        """
        Args:
            dataset_name: its metadata must have panoptic_json, panoptic_root,
                thing_dataset_id_to_contiguous_id and stuff_dataset_id_to_contiguous_id; label_divisor too,
                where the model gives no segments_info.
            output_dir: where predictions are written, None for nowhere.
            distributed: gather from all ranks.
        """
        self._name = dataset_name
        self._metadata = MetadataCatalog.get(dataset_name)
        self._output_dir = output_dir
        self._distributed = distributed
        self._things = {v: k for k, v in self._metadata.thing_dataset_id_to_contiguous_id.items()}
        self._stuff = {v: k for k, v in self._metadata.stuff_dataset_id_to_contiguous_id.items()}

        path = self._metadata.panoptic_json
        if not PathManager.isfile(path):
            raise FileNotFoundError(
                f"panoptic ground truth of {dataset_name} is missing: {path}. Set DETECTRON2_DATASETS to the "
                "directory of the data sets, or make it (for shapes: python tools/make_shapes_dataset.py)"
            )
        self._gt = read_panoptic_json(path)
        check_categories(path, self._gt)
        self._categories = {c["id"]: c for c in self._gt["categories"]}
        check_panoptic(path, self._gt.get("annotations", []))
        # The files of a test split name images only.
        self._annotations: dict[Any, dict] = {}
        for annotation in self._gt.get("annotations", []):
            image_id = annotation["image_id"]
            if image_id in self._annotations:
                raise AnnotationError(
                    f"{path}: image {image_id!r} ({annotation['file_name']}) is annotated twice; allowed: one annotation "
                    "with all of an image's segments"
                )
            self._annotations[image_id] = annotation
        for image_id, annotation in self._annotations.items():
            unknown = {s["category_id"] for s in annotation["segments_info"]} - set(self._categories)
            if unknown:
                raise AnnotationError(
                    f"{path}: image {image_id!r} ({annotation['file_name']}) has segments of category ids "
                    f"{sorted(unknown)}, which its categories {sorted(self._categories)} do not define"
                )
        self.reset()

    def reset(self) -> None:
        self._stats: dict[Any, _Compared] = {}
        self._predictions: list[dict] = []

    def fetch(self, output: Mapping[str, Any], copies: HostCopies) -> tuple:
        """
        Args:
            output: with "panoptic_seg": ids (H, W) and segments_info, as `MaskFormer` and detectron2 give
                them, or ids of the form category_id * label_divisor + instance with -1 for void, and None.
        """
        ids, segments = output["panoptic_seg"]
        return copies.start(ids), segments

    def examine(self, image: Mapping[str, Any], fetched: tuple) -> tuple[Any, _Compared | None, dict | None]:
        """
        Args:
            image: with "image_id" and "file_name".

        Returns:
            the image's id, how it compares with the truth, and what is to be written of it; None for what there is not.
        """
        image_id = image["image_id"]
        ids, segments = self._unpack(fetched, image_id)
        compared = self._compare(image_id, ids, segments) if self._annotations else None
        if self._output_dir is None:
            return image_id, compared, None
        name = os.path.splitext(os.path.basename(image["file_name"]))[0] + ".png"
        prediction = {"image_id": image_id, "file_name": name, "segments_info": segments}
        return image_id, compared, {**prediction, "png": panoptic_png(ids)}

    def add(self, examined: tuple[Any, _Compared | None, dict | None]) -> None:
        image_id, compared, prediction = examined
        if compared is not None:
            self._stats[image_id] = compared
        if prediction is not None:
            self._predictions.append(prediction)

    def evaluate(self) -> OrderedDict | None:
        """
        Returns:
            {"panoptic_seg": {"PQ", "SQ", "RQ", and the same with _th for things and _st for stuff}} in
            percent, NaN for a group without categories; None on other ranks than the main one and where there
            are no annotations.

        Raises:
            ValueError: an image of the ground truth was not processed.
        """
        stats, predictions = self._gathered()
        if stats is None:
            return None
        if self._output_dir is not None:
            self._write(predictions)
        if not self._annotations:
            logger.info("%s has no panoptic annotations: predictions are written, not evaluated", self._name)
            return None
        check_all_predicted(self._annotations, stats)
        total = PQStat()
        # In the annotations' order, so that sums do not depend on the number of ranks.
        for image_id in self._annotations:
            total += stats[image_id].stat
        self._warn(stats)
        results = total.results(self._categories)
        _log_table(results)
        row = OrderedDict()
        for suffix, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
            for metric in ("PQ", "SQ", "RQ"):
                row[metric + suffix] = 100 * results[group][metric.lower()]
        return OrderedDict(panoptic_seg=dict(row))

    def _unpack(self, panoptic_seg: tuple, image_id: Any) -> tuple[np.ndarray, list[dict]]:
        """Ids with 0 for void, and segments with dataset category ids."""
        ids, segments = panoptic_seg
        ids = ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids)
        if segments is None:
            segments, divisor = [], self._metadata.label_divisor
            for label in np.unique(ids).tolist():
                if label != -1:
                    category = label // divisor
                    segments.append(
                        {"id": label + 1, "category_id": category, "isthing": category in self._things}
                    )
            ids = ids + 1
        return ids, [self._with_dataset_id(segment, image_id) for segment in segments]

    def _with_dataset_id(self, segment: dict, image_id: Any) -> dict:
        rest = {k: v for k, v in segment.items() if k != "isthing"}
        if segment.get("isthing") is None:
            # detectron2's convention: a segment that does not say whether it is a thing has a dataset id.
            return rest
        kind, known = ("thing", self._things) if segment["isthing"] else ("stuff", self._stuff)
        if segment["category_id"] not in known:
            raise ValueError(
                f"image {image_id}: the model predicted a {kind} segment of class {segment['category_id']}, "
                f"but the {kind} classes of {self._name} are {sorted(known)}. MODEL.SEM_SEG_HEAD.NUM_CLASSES "
                "and DATASETS.TRAIN must belong to the data set in DATASETS.TEST"
            )
        return {**rest, "category_id": known[segment["category_id"]]}

    def _compare(self, image_id: Any, ids: np.ndarray, segments: list[dict]) -> _Compared:
        annotation = self._annotations.get(image_id)
        if annotation is None:
            raise ValueError(f"image {image_id!r} is not in {self._metadata.panoptic_json}")
        path = os.path.join(self._metadata.panoptic_root, annotation["file_name"])
        with naming({"file_name": path, "image_id": image_id}, "read"), PathManager.open(path, "rb") as f:
            gt_ids = read_panoptic_png(f)
        if gt_ids.shape != ids.shape:
            raise AnnotationError(
                f"{path} (image_id {image_id!r}) is {gt_ids.shape[0]}x{gt_ids.shape[1]} (height x width), the prediction "
                f"for its image {ids.shape[0]}x{ids.shape[1]}"
            )
        truth = annotation["segments_info"]
        pixels = drawn_pixels(gt_ids)
        with naming({"file_name": path, "image_id": image_id}, "evaluated on"):
            lost = set(undrawn(path, pixels, truth))
        stat = match_segments(gt_ids, truth, ids, segments, self._categories, image_id)
        # A crowd is neither found nor missed, whatever its area.
        told = [s for s in truth if not s.get("iscrowd", 0)]
        return _Compared(
            stat,
            [s["id"] for s in told if s["id"] in lost and s.get("area") != 0],
            [
                s["id"]
                for s in told
                if s["id"] in pixels and "area" in s and int(s["area"]) != pixels[s["id"]]
            ],
        )

    def _warn(self, stats: Mapping[Any, _Compared]) -> None:
        """Tell of a truth that does not fit itself."""
        for what, meaning in (
            ("undrawn", "have no pixel in their maps: they count as not found, as in panopticapi"),
            (
                "other_areas",
                "have another area in the JSON than pixels in their maps: PQ is computed with the JSON's, as in "
                "panopticapi, and is wrong where these are",
            ),
        ):
            found = {
                image_id: ids for image_id in self._annotations if (ids := getattr(stats[image_id], what))
            }
            if not found:
                continue
            segments, images = sum(map(len, found.values())), len(found)
            first, ids = next(iter(found.items()))
            logger.warning(
                "%s: %d segment%s of %d image%s, such as %s of %s (image_id %r), %s",
                self._metadata.panoptic_json,
                *(segments, "s"[: segments != 1], images, "s"[: images != 1]),
                *(ids[:5], self._annotations[first]["file_name"], first, meaning),
            )

    def _gathered(self) -> tuple[dict[Any, _Compared] | None, list[dict]]:
        if not self._distributed:
            return self._stats, self._predictions
        comm.synchronize()
        everyone = comm.gather((self._stats, self._predictions))
        if not comm.is_main_process():
            return None, []
        stats: dict[Any, _Compared] = {}
        for part, _ in everyone:
            stats.update(part)
        return stats, list(itertools.chain.from_iterable(predictions for _, predictions in everyone))

    def _write(self, predictions: list[dict]) -> None:
        with whole_files(self._output_dir) as output_dir:
            self._write_to(output_dir, predictions)
        logger.info(
            "Wrote %d panoptic predictions to predictions.json and panoptic_predictions/ in %s",
            len(predictions),
            self._output_dir,
        )

    def _write_to(self, output_dir: str, predictions: list[dict]) -> None:
        folder = os.path.join(output_dir, "panoptic_predictions")
        PathManager.mkdirs(folder)
        predictions = _with_own_names(predictions)
        for prediction in predictions:
            with PathManager.open(os.path.join(folder, prediction["file_name"]), "wb") as f:
                f.write(prediction["png"])
        content = {k: self._gt[k] for k in ("info", "images", "categories") if k in self._gt}
        content["annotations"] = [{k: v for k, v in p.items() if k != "png"} for p in predictions]
        with PathManager.open(os.path.join(output_dir, "predictions.json"), "w") as f:
            json.dump(content, f, default=_plain_number)


def _with_own_names(predictions: list[dict]) -> list[dict]:
    """Predictions of which no two have one file: images of one name, in several folders, get their ids beside it."""
    count = Counter(prediction["file_name"] for prediction in predictions)

    def own(prediction: dict) -> str:
        name = prediction["file_name"]
        if count[name] == 1:
            return name
        return f"{name.removesuffix('.png')}-{quote(str(prediction['image_id']), safe='')}.png"

    return [{**prediction, "file_name": own(prediction)} for prediction in predictions]


def _plain_number(value: Any) -> Any:
    """numpy and torch scalars as Python's, for JSON."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def _log_table(results: dict[str, dict]) -> None:
    rows = [
        [group, *(100 * results[group][k] for k in ("pq", "sq", "rq")), results[group]["n"]]
        for group in ("All", "Things", "Stuff")
    ]
    table = tabulate(
        rows,
        headers=["", "PQ", "SQ", "RQ", "#categories"],
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )
    logger.info("Panoptic Evaluation Results:\n%s", table)
