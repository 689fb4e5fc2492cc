"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019), by panopticapi's rules.

Beside the paper's formula, panopticapi's figures depend on these rules, and so do ours:

- A predicted and a true segment of one category match where IoU > 0.5; void pixels of the ground truth do
  not count in the union. At exactly 0.5 they do not match.
- A crowd is never matched and never a false negative.
- An unmatched prediction is no false positive where more than half of it lies on void or on a crowd of its
  category (on the last listed one, should the image have several).
- Areas of true segments are those of the JSON.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

VOID = 0
_ID_RANGE = 256**3
_GROUPS = (("All", None), ("Things", 1), ("Stuff", 0))


class PQStat:
    """Sum of IoUs and numbers of true positives, false positives and false negatives, per category."""

    def __init__(self) -> None:
        self._per_category: dict[int, list[float]] = {}

    def add(self, category_id: int, *, iou: float = 0.0, tp: int = 0, fp: int = 0, fn: int = 0) -> None:
        row = self._per_category.setdefault(category_id, [0.0, 0, 0, 0])
        for i, value in enumerate((iou, tp, fp, fn)):
            row[i] += value

    def __getitem__(self, category_id: int) -> tuple[float, int, int, int]:
        """(iou, tp, fp, fn) of a category."""
        iou, tp, fp, fn = self._per_category.get(category_id, (0.0, 0, 0, 0))
        return iou, int(tp), int(fp), int(fn)

    def __iadd__(self, other: PQStat) -> PQStat:
        for category_id, (iou, tp, fp, fn) in other._per_category.items():
            self.add(category_id, iou=iou, tp=int(tp), fp=int(fp), fn=int(fn))
        return self

    def average(self, categories: Mapping[int, Mapping], isthing: int | None) -> tuple[dict, dict]:
        """Mean over the categories that occur in ground truth or prediction.

        Args:
            categories: by id, with "isthing".
            isthing: 1 for things, 0 for stuff, None for both.

        Returns:
            {"pq", "sq", "rq", "n"}, 0..1 and the number of categories, NaN where that is 0; and {"pq", "sq",
            "rq"} by category id, zeros for one that does not occur.
        """
        per_class, counted = {}, []
        for category_id, category in categories.items():
            if isthing is not None and bool(category["isthing"]) != bool(isthing):
                continue
            iou, tp, fp, fn = self[category_id]
            if tp + fp + fn == 0:
                per_class[category_id] = {"pq": 0.0, "sq": 0.0, "rq": 0.0}
                continue
            weight = tp + 0.5 * fp + 0.5 * fn
            row = {"pq": iou / weight, "sq": iou / tp if tp else 0.0, "rq": tp / weight}
            per_class[category_id] = row
            counted.append(row)
        n = len(counted)
        mean = {k: sum(row[k] for row in counted) / n if n else float("nan") for k in ("pq", "sq", "rq")}
        return {**mean, "n": n}, per_class

    def results(self, categories: Mapping[int, Mapping]) -> dict[str, dict]:
        """As panopticapi's pq_compute gives them: "All", "Things", "Stuff", "per_class"."""
        results = {}
        for name, isthing in _GROUPS:
            results[name], per_class = self.average(categories, isthing)
            if isthing is None:
                results["per_class"] = per_class
        return results


def pair_runs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in two maps of one shape, read row by row, runs of one pair of values start; and their lengths in pixels.

    Rows are long runs of one pair: what is counted over the runs takes a fraction of what is counted over the pixels.
    """
    first, second = first.ravel(), second.ravel()
    changed = first[1:] != first[:-1]
    changed |= second[1:] != second[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changed) + 1])
    return starts, np.diff(starts, append=first.size)


def count_overlaps(gt_ids: np.ndarray, pred_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True id, predicted id and pixels of each pair in two (H, W) maps with ids of 0 .. 2^24 - 1."""
    starts, lengths = pair_runs(gt_ids, pred_ids)
    pairs = gt_ids.ravel()[starts].astype(np.int64) * _ID_RANGE + pred_ids.ravel()[starts]
    unique, inverse = np.unique(pairs, return_inverse=True)
    pixels = np.bincount(inverse.ravel(), weights=lengths, minlength=unique.size).astype(np.int64)
    return unique // _ID_RANGE, unique % _ID_RANGE, pixels


def match_segments(
    gt_ids: np.ndarray,
    gt_segments: Sequence[Mapping[str, Any]],
    pred_ids: np.ndarray,
    pred_segments: Sequence[Mapping[str, Any]],
    categories: Mapping[int, Mapping],
    image_id: Any = None,
) -> PQStat:
    """Compare one image's prediction with its ground truth.

    Args:
        gt_ids, pred_ids: (H, W) integer segment ids, 0 for void.
        gt_segments: dicts with "id", "category_id" (dataset id), and where known "area" (pixels) and
            "iscrowd".
        pred_segments: dicts with "id" and "category_id" (dataset id).
        categories: by dataset id.
        image_id: for messages.

    Raises:
        ValueError: the maps differ in size, or a prediction's ids and segments do not belong together, or a
            category of it is unknown.
        AnnotationError: a true segment's area is far below its pixels.
    """
    where = f"image {image_id}"
    if gt_ids.shape != pred_ids.shape:
        raise ValueError(
            f"{where}: the prediction is {pred_ids.shape[0]}x{pred_ids.shape[1]} (height x width), the "
            f"ground truth {gt_ids.shape[0]}x{gt_ids.shape[1]}"
        )
    pair_gt, pair_pred, pixels = count_overlaps(gt_ids, pred_ids)
    pred_area = _areas(pair_pred, pixels)
    overlap = {
        (g, p): n for g, p, n in zip(pair_gt.tolist(), pair_pred.tolist(), pixels.tolist(), strict=True)
    }
    pred_category = _checked_predictions(pred_segments, pred_area, categories, where)

    gt_pixels = _areas(pair_gt, pixels)
    gt_area = {s["id"]: int(s["area"]) if "area" in s else gt_pixels.get(s["id"], 0) for s in gt_segments}
    gt_category = {s["id"]: s["category_id"] for s in gt_segments}
    crowds = {s["id"] for s in gt_segments if s.get("iscrowd", 0) == 1}

    stat = PQStat()
    gt_matched, pred_matched = set(), set()
    for (gt_id, pred_id), intersection in overlap.items():
        if gt_id not in gt_category or pred_id not in pred_category or gt_id in crowds:
            continue
        if gt_category[gt_id] != pred_category[pred_id]:
            continue
        union = pred_area[pred_id] + gt_area[gt_id] - intersection - overlap.get((VOID, pred_id), 0)
        if union <= 0:
            # Not at the top: the mappers of ..data take rgb_to_ids from this module.
            from ..data.errors import AnnotationError

            raise AnnotationError(
                f"{where}: the true segment {gt_id} has an area of {gt_area[gt_id]} in the JSON, but {gt_pixels[gt_id]} "
                "pixels in its map; allowed: its number of pixels"
            )
        iou = intersection / union
        if iou > 0.5:
            stat.add(gt_category[gt_id], iou=iou, tp=1)
            gt_matched.add(gt_id)
            pred_matched.add(pred_id)

    for gt_id, category_id in gt_category.items():
        if gt_id not in gt_matched and gt_id not in crowds:
            stat.add(category_id, fn=1)

    crowd_of_category = {gt_category[s["id"]]: s["id"] for s in gt_segments if s["id"] in crowds}
    for pred_id, category_id in pred_category.items():
        if pred_id in pred_matched:
            continue
        ignored = overlap.get((VOID, pred_id), 0)
        if category_id in crowd_of_category:
            ignored += overlap.get((crowd_of_category[category_id], pred_id), 0)
        if ignored / pred_area[pred_id] <= 0.5:
            stat.add(category_id, fp=1)
    return stat


def _areas(ids: np.ndarray, pixels: np.ndarray) -> dict[int, int]:
    unique, inverse = np.unique(ids, return_inverse=True)
    sums = np.bincount(inverse.ravel(), weights=pixels, minlength=unique.size).astype(np.int64)
    return dict(zip(unique.tolist(), sums.tolist(), strict=True))


def _checked_predictions(
    segments: Sequence[Mapping[str, Any]], areas: Mapping[int, int], categories: Mapping, where: str
) -> dict[int, int]:
    """Category of each predicted segment id."""
    category_of = {segment["id"]: segment["category_id"] for segment in segments}
    if len(category_of) != len(segments):
        raise ValueError(f"{where}: two predicted segments share an id: {[s['id'] for s in segments]}")
    unlisted = sorted(set(areas) - set(category_of) - {VOID})
    if unlisted:
        raise ValueError(f"{where}: the predicted map has ids {unlisted} that segments_info does not list")
    unseen = sorted(set(category_of) - set(areas))
    if unseen:
        raise ValueError(f"{where}: segments_info lists ids {unseen} that the predicted map does not have")
    unknown = sorted(set(category_of.values()) - set(categories))
    if unknown:
        raise ValueError(
            f"{where}: predicted category ids {unknown} are not in the ground truth's categories "
            f"{sorted(categories)}"
        )
    return category_of


def rgb_to_ids(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to (H, W) int32: R + 256 G + 65536 B, COCO's coding of segment ids."""
    if rgb.ndim != 3 or rgb.shape[2] < 3:
        raise ValueError(f"expected a panoptic map of shape (height, width, 3), got {rgb.shape}")
    rgb = rgb.astype(np.int32)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """(H, W) ids of 0 .. 2^24 - 1 to (H, W, 3) uint8; the inverse of `rgb_to_ids`."""
    _check_range(ids)
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def _check_range(ids: np.ndarray) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= _ID_RANGE):
        raise ValueError(f"segment ids {ids.min()}..{ids.max()} do not fit into 0..{_ID_RANGE - 1}")


def read_panoptic_png(file) -> np.ndarray:
    """(H, W) int32 segment ids of a COCO panoptic PNG, given as a path or an open file."""
    with Image.open(file) as image:
        if image.mode == "P":  # colours in a table, as tools that make PNGs smaller write them
            image = image.convert("RGB")
        if image.mode != "RGB":
            return rgb_to_ids(np.asarray(image))
        # R, G, B and a byte of padding are the bytes of an id already.
        pixels = np.frombuffer(image.tobytes("raw", "RGBX"), dtype="<i4")
        return (pixels & (_ID_RANGE - 1)).reshape(image.height, image.width).astype(np.int32, copy=False)


def panoptic_png(ids: np.ndarray) -> bytes:
    """The PNG file of (H, W) ids of 0 .. 2^24 - 1 as RGB, for `read_panoptic_png` and panopticapi.

    The image that PIL would write, in a third of its time: each row is stored as its difference from the row above, where
    PIL tries five filters for every row, and segments leave runs of zeros.
    """
    _check_range(ids)
    height, width = ids.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = 2  # the filter "up"
    for channel in range(3):
        plane = (ids >> (8 * channel)).astype(np.uint8)
        if channel == 0 or plane.any():
            rows[0, 1 + channel :: 3] = plane[0]
            np.subtract(plane[1:], plane[:-1], out=rows[1:, 1 + channel :: 3])
    compressor = zlib.compressobj(level=1, memLevel=9, strategy=zlib.Z_RLE)
    pixels = compressor.compress(rows) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        for kind, data in chunks
    )


def pq_compute(
    gt_json_file: str,
    pred_json_file: str,
    gt_folder: str | None = None,
    pred_folder: str | None = None,
    num_workers: int | None = None,
) -> dict[str, dict]:
    """Panoptic quality of predictions on disk in COCO's panoptic form; as panopticapi's pq_compute.

    Args:
        gt_folder, pred_folder: where the PNGs lie; by default the JSON's path without ".json".
        num_workers: threads, None for one per CPU.

    Returns:
        "All", "Things" and "Stuff", each with "pq", "sq", "rq" (0..1) and "n" (categories); "per_class" by
        category id.

    Raises:
        ValueError: an image of the ground truth has no prediction, or a prediction is malformed.
    """
    with open(gt_json_file) as f:
        gt = json.load(f)
    with open(pred_json_file) as f:
        predictions = {p["image_id"]: p for p in json.load(f)["annotations"]}
    gt_folder = gt_folder or gt_json_file.removesuffix(".json")
    pred_folder = pred_folder or pred_json_file.removesuffix(".json")
    categories = {c["id"]: c for c in gt["categories"]}
    check_all_predicted((a["image_id"] for a in gt["annotations"]), predictions)

    def compare(annotation: dict) -> PQStat:
        prediction = predictions[annotation["image_id"]]
        return match_segments(
            read_panoptic_png(os.path.join(gt_folder, annotation["file_name"])),
            annotation["segments_info"],
            read_panoptic_png(os.path.join(pred_folder, prediction["file_name"])),
            prediction["segments_info"],
            categories,
            annotation["image_id"],
        )

    return _summed(compare, gt["annotations"], num_workers).results(categories)


def check_all_predicted(image_ids: Iterable, predictions: Mapping) -> None:
    """Raise ValueError if an image of the ground truth has no prediction."""
    missing = [image_id for image_id in image_ids if image_id not in predictions]
    if missing:
        raise ValueError(
            f"no prediction for {len(missing)} images of the ground truth, among them {missing[:5]}"
        )


def _summed(compare: Callable[[dict], PQStat], annotations: list[dict], num_workers: int | None) -> PQStat:
    total = PQStat()
    with ThreadPoolExecutor(max_workers=num_workers or os.cpu_count() or 1) as pool:
        for stat in pool.map(compare, annotations):
            total += stat
    return total
