"""What each image adds to PQ, AP and mIoU, from the predictions of an evaluation, and so the noise that few images leave."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from mask2former.evaluation.coco_eval import ParallelCOCOeval
from mask2former.evaluation.panoptic_quality import match_segments, read_panoptic_png
from mask2former.evaluation.processes import in_processes, number_of_processes

# Resamples of the images. The standard error that so many give is itself known to 5 %.
RESAMPLES = 200
# Weights of detections that are held at once, 8 bytes each.
_AT_ONCE = 4_000_000


class ImageTables:
    """Counts of single images, of which any choice of images gives the metrics.

    Attributes:
        images: names of the images, (I,).
        arrays: by metric, what `save` writes. "PQ": (I, C, 4) IoU sum, true positives, false positives and false negatives.
            "mIoU": (I, C, 3) pixels right, of the ground truth, and predicted. "AP" in four arrays, of the detections in the
            order of their scores, the C categories one after another: image (D,), matched and counted (T, D) bool for each
            IoU threshold, category (D,), and instances to be found (I, C).
    """

    def __init__(self, images: Sequence[str], arrays: Mapping[str, np.ndarray]):
        self.images = np.asarray(images)
        self.arrays = dict(arrays)
        self._resampled: dict[str, np.ndarray] | None = None

    @classmethod
    def of_predictions(cls, dataset: str, folder: str | os.PathLike, max_processes: int = -1) -> ImageTables:
        """
        Args:
            dataset: registered, as in DATASETS.TEST.
            folder: OUTPUT_DIR/inference of an evaluation on it. Metrics whose predictions it does not hold are left out.
            max_processes: TEST.EVALUATION_THREADS.
        """
        folder = Path(folder)
        records = DatasetCatalog.get(dataset)
        names = [str(record.get("image_id", os.path.basename(record["file_name"]))) for record in records]
        arrays: dict[str, np.ndarray] = {}
        if (folder / "predictions.json").is_file():
            arrays["PQ"] = _panoptic(dataset, folder, names, max_processes)
        if (folder / "coco_instances_results.json").is_file():
            arrays.update(_instances(dataset, folder, names, max_processes))
        if (folder / "sem_seg_predictions.json").is_file():
            arrays["mIoU"] = _semantic(dataset, folder, records, max_processes)
        return cls(names, arrays)

    def save(self, path: str | os.PathLike) -> None:
        """Write a file; it is there whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, images=self.images, **self.arrays)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> ImageTables:
        """
        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged, or another file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return cls(arrays.pop("images"), arrays)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """PQ, AP and mIoU, as far as the tables are there, where each image counts so many times.

        Args:
            weights: (B, I).

        Returns:
            (B,) each, in percent.
        """
        weights = np.asarray(weights, dtype=float)
        values = {}
        if "PQ" in self.arrays:
            iou, tp, fp, fn = np.moveaxis(np.tensordot(weights, self.arrays["PQ"], 1), -1, 0)
            values["PQ"] = _mean_ratio(iou, tp + (fp + fn) / 2)
        if "AP_image" in self.arrays:
            values["AP"] = self._average_precision(weights)
        if "mIoU" in self.arrays:
            counts = np.tensordot(weights, self.arrays["mIoU"].astype(float), 1)
            right, true, predicted = np.moveaxis(counts, -1, 0)
            # A class that the images do not have does not count, whatever is predicted.
            values["mIoU"] = _mean_ratio(right, np.where(true > 0, true + predicted - right, 0))
        return values

    def resampled(self) -> dict[str, np.ndarray]:
        """`metrics` of RESAMPLES choices of the images, as many with replacement; the same ones for as many images."""
        if self._resampled is None:
            count = len(self.images)
            weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
            self._resampled = self.metrics(weights)
        return self._resampled

    def _average_precision(self, weights: np.ndarray) -> np.ndarray:
        """COCO's, over its ten thresholds and 101 recalls: (B, I) -> (B,)."""
        instances = weights @ self.arrays["AP_instances"]  # (B, C)
        ends = np.searchsorted(self.arrays["AP_category"], np.arange(instances.shape[1] + 1))
        total = np.zeros(len(weights))
        for index, (start, end) in enumerate(itertools.pairwise(ends)):
            there = np.flatnonzero(instances[:, index] > 0)
            size = max(1, _AT_ONCE // max(1, end - start))
            for few in (there[first : first + size] for first in range(0, len(there), size)):
                total[few] += self._precision_of(slice(start, end), weights[few], instances[few, index])
        categories = np.count_nonzero(instances > 0, axis=1)
        return 100 * np.divide(total, categories, out=np.full(len(total), np.nan), where=categories > 0)

    def _precision_of(self, mine: slice, weights: np.ndarray, instances: np.ndarray) -> np.ndarray:
        """Average precision of one category's detections: (B, I), (B,) -> (B,), 0 .. 1.

        Precision rises at detections that are right and nowhere else, and so does recall: only these are looked at, and for
        each of them how much counts up to it.
        """
        image, recalls = self.arrays["AP_image"][mine], np.linspace(0, 1, 101)
        so_far = np.cumsum(weights[:, image], axis=1)  # (B, D)
        total = np.zeros(len(weights))
        for right, counted in zip(self.arrays["AP_matched"][:, mine], self.arrays["AP_counted"][:, mine]):
            right, ignored = np.flatnonzero(right), np.flatnonzero(~counted)
            if not len(right):
                continue
            matched = np.cumsum(weights[:, image[right]], axis=1)  # (B, right ones)
            below = so_far[:, right]
            if len(ignored):
                left_out = np.cumsum(weights[:, image[ignored]], axis=1)
                before = np.searchsorted(ignored, right)
                below = below - np.where(before > 0, left_out[:, before - 1], 0)
            precision = matched / np.maximum(below, np.spacing(1))
            # The best precision at this recall or a higher one; none where the recall is not reached.
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            precision = np.append(precision, np.zeros((len(weights), 1)), axis=1)
            recall = matched / instances[:, None]
            place = np.array([np.searchsorted(reached, recalls, side="left") for reached in recall])
            total += np.take_along_axis(precision, place, axis=1).mean(axis=1)
        return total / len(self.arrays["AP_matched"])


class Resampled:
    """What standard errors need of tables, without the counts of single images, which take much memory.

    Attributes:
        images: names of the images, (I,).
        whole: the metrics of all images, in percent.
    """

    def __init__(self, tables: ImageTables):
        self.images = tables.images
        weights = np.ones((1, len(tables.images)))
        self.whole = {name: float(value[0]) for name, value in tables.metrics(weights).items()}
        self._resampled = tables.resampled()

    def resampled(self) -> dict[str, np.ndarray]:
        """That of the tables."""
        return self._resampled


def standard_errors(tables: ImageTables | Resampled, reference: ImageTables | Resampled) -> dict[str, float]:
    """How far the difference of each metric may be off for the choice of the images: its standard deviation over resamples.

    In each of them both are evaluated on the same images (the paired bootstrap).

    Returns:
        by metric, in points; empty where the tables are of other images.
    """
    if not np.array_equal(tables.images, reference.images):
        return {}
    mine, theirs = tables.resampled(), reference.resampled()
    return {name: float(np.std(mine[name] - theirs[name], ddof=1)) for name in mine if name in theirs}


def _mean_ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """(B, C), (B, C) -> (B,): percent, the mean of the ratios over the classes that have one."""
    there = below > 0
    ratio = np.divide(above, below, out=np.zeros_like(above), where=there)
    return 100 * ratio.sum(1) / np.maximum(there.sum(1), 1)


def _rows(row: Callable[[int], np.ndarray], count: int, max_processes: int) -> np.ndarray:
    """Rows of a table, one for each image, which several processes make: (count, ...)."""
    processes = number_of_processes(max_processes, count)
    if processes == 1:
        return np.array([row(i) for i in range(count)])
    parts = in_processes(
        lambda process: np.array([row(i) for i in range(process, count, processes)]), processes
    )
    table = np.empty((count, *parts[0].shape[1:]), parts[0].dtype)
    for process, part in enumerate(parts):
        table[process::processes] = part
    return table


def _panoptic(dataset: str, folder: Path, names: Sequence[str], max_processes: int) -> np.ndarray:
    metadata = MetadataCatalog.get(dataset)
    truth = json.loads(Path(metadata.panoptic_json).read_text())
    annotations = truth["annotations"]
    categories = {category["id"]: category for category in truth["categories"]}
    predictions = json.loads((folder / "predictions.json").read_text())["annotations"]
    predicted = {prediction["image_id"]: prediction for prediction in predictions}

    def row(index: int) -> np.ndarray:
        annotation = annotations[index]
        prediction = predicted[annotation["image_id"]]
        stat = match_segments(
            read_panoptic_png(os.path.join(metadata.panoptic_root, annotation["file_name"])),
            annotation["segments_info"],
            read_panoptic_png(folder / "panoptic_predictions" / prediction["file_name"]),
            prediction["segments_info"],
            categories,
            annotation["image_id"],
        )
        return np.array([stat[category_id] for category_id in categories], dtype=float)

    place = {name: i for i, name in enumerate(names)}
    table = np.zeros((len(names), len(categories), 4))
    table[[place[str(one["image_id"])] for one in annotations]] = _rows(row, len(annotations), max_processes)
    return table


def _instances(dataset: str, folder: Path, names: Sequence[str], max_processes: int) -> dict[str, np.ndarray]:
    """COCO's matching of all sizes of instances, in its order."""
    predictions = json.loads((folder / "coco_instances_results.json").read_text())
    if not predictions:
        return {}
    for prediction in predictions:
        prediction.pop("bbox", None)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(MetadataCatalog.get(dataset).json_file)
        evaluation = ParallelCOCOeval(truth, truth.loadRes(predictions), "segm", max_processes)
        params = evaluation.params
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
        evaluation.evaluate()
    place = {name: i for i, name in enumerate(names)}
    categories, image_ids = len(params.catIds), len(params.imgIds)
    instances = np.zeros((len(names), categories), dtype=np.int32)
    parts: dict[str, list[np.ndarray]] = {"image": [], "category": [], "matched": [], "counted": []}
    for category in range(categories):
        mine = evaluation.evalImgs[category * image_ids : (category + 1) * image_ids]
        results = [one for one in mine if one is not None]
        for one in results:
            instances[place[str(one["image_id"])], category] = np.count_nonzero(one["gtIgnore"] == 0)
        if not results:
            continue
        scores = np.concatenate([one["dtScores"] for one in results])
        order = np.argsort(-scores, kind="mergesort")
        ignored = np.concatenate([one["dtIgnore"] for one in results], axis=1)[:, order].astype(bool)
        matched = np.concatenate([one["dtMatches"] for one in results], axis=1)[:, order] > 0
        image = [np.full(len(one["dtScores"]), place[str(one["image_id"])], np.int32) for one in results]
        parts["image"].append(np.concatenate(image)[order])
        parts["category"].append(np.full(len(order), category, np.int16))
        parts["matched"].append(matched & ~ignored)
        parts["counted"].append(~ignored)
    tables = {f"AP_{name}": np.concatenate(arrays, axis=-1) for name, arrays in parts.items()}
    return {**tables, "AP_instances": instances}


def _semantic(dataset: str, folder: Path, records: Sequence[Mapping], max_processes: int) -> np.ndarray:
    metadata = MetadataCatalog.get(dataset)
    classes = len(metadata.stuff_classes)
    contiguous = metadata.get("stuff_dataset_id_to_contiguous_id") or {i: i for i in range(classes)}
    segments: dict[str, list[Mapping]] = {}
    for one in json.loads((folder / "sem_seg_predictions.json").read_text()):
        segments.setdefault(one["file_name"], []).append(one)

    def row(index: int) -> np.ndarray:
        counts = np.zeros((classes, 3), dtype=np.int64)
        truth = np.asarray(Image.open(records[index]["sem_seg_file_name"])).astype(np.int64)
        counted = truth != metadata.ignore_label
        counts[:, 1] = np.bincount(truth[counted], minlength=classes)[:classes]
        for one in segments[records[index]["file_name"]]:
            label = contiguous[one["category_id"]]
            mask = mask_util.decode(one["segmentation"]).astype(bool) & counted
            counts[label, 0] = np.count_nonzero(truth[mask] == label)
            counts[label, 2] = np.count_nonzero(mask)
        return counts

    return _rows(row, len(records), max_processes)
