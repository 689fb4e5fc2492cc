"""Writes the synthetic "shapes" data set: COCO panoptic, COCO instances and semantic maps, and a manifest.

ROOT/manifest.json                            options, and size and sha256 of every other file
ROOT/annotations/panoptic_{split}.json        COCO panoptic
ROOT/annotations/instances_{split}.json       COCO instances, masks as RLE, the visible part only as in the
panoptic maps ROOT/{split}/images/NAME.png                  RGB
ROOT/{split}/panoptic/NAME.png                segment ids, id = R + 256 G + 65536 B, 0 for void
ROOT/{split}/semantic/NAME.png                contiguous class ids, 255 for void
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from .shapes_scene import CATEGORIES, THINGS, VOID_LABEL, Scene, SceneRandom, draw_scene, scene_size

logger = logging.getLogger(__name__)

# Raised whenever the same options would give other files.
FORMAT_VERSION = 1
SPLITS = ("train", "val")
MANIFEST = "manifest.json"
_OWN_ENTRIES = frozenset({MANIFEST, "annotations", *SPLITS})
# image_id of the first image of a split: ids stay unique over the splits.
_FIRST_IMAGE_ID = {"train": 1, "val": 1_000_001}
_CATEGORY_BY_DATASET_ID = {c.dataset_id: c for c in CATEGORIES}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ShapesOptions:
    """What decides the files: image numbers of the splits, seed, and the range of image sides in pixels."""

    train: int = 300
    val: int = 100
    seed: int = 0
    min_size: int = 96
    max_size: int = 512

    def __post_init__(self):
        if self.train < 1 or self.val < 1:
            raise ValueError(f"each split needs at least one image, got train={self.train}, val={self.val}")
        if self.seed < 0:
            raise ValueError(f"the seed must not be negative, got {self.seed}")
        if not 16 <= self.min_size <= self.max_size:
            raise ValueError(
                f"need 16 <= min_size <= max_size, got min_size={self.min_size}, max_size={self.max_size}"
            )

    def describe(self) -> dict[str, Any]:
        return {"dataset": "shapes", "version": FORMAT_VERSION, **asdict(self)}


def make_shapes_dataset(
    root: str | os.PathLike,
    options: ShapesOptions = ShapesOptions(),
    *,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> bool:
    """Have the data set under `root`, drawing it unless it is there whole and with the same options.

    It is drawn into a directory beside `root` and renamed when complete, so that `root` never holds half a
    data set.

    Args:
        force: draw even where the same data set is there.
        workers: processes, or threads where there are few images; None for one per CPU. The files do not depend on it.
        progress: called as progress(images done, images in all).

    Returns:
        True if it was drawn, False if it was there.

    Raises:
        FileExistsError: `root` holds files that are not of this data set; nothing is touched then.
    """
    root = Path(os.path.abspath(root))
    problem = _why_not_reusable(root, options)
    if problem is None and not force:
        return False
    _refuse_foreign_files(root)
    if problem is not None and root.exists() and any(root.iterdir()):
        logger.warning("Drawing %s again: %s", root, problem)
    root.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        new = staging / "new"
        _write(new, options, workers, progress)
        _swap_in(new, root, staging / "old", options, force)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def check_shapes_dataset(root: str | os.PathLike) -> str | None:
    """Compare every file with the manifest: None where all are there and whole, else what is wrong."""
    root = Path(root)
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        files = manifest["files"].items()
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    for name, expected in files:
        try:
            if _fingerprint(root / name) != expected:
                return f"{name} is damaged"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def _why_not_reusable(root: Path, options: ShapesOptions) -> str | None:
    problem = check_shapes_dataset(root)
    if problem is not None:
        return problem
    found = json.loads((root / MANIFEST).read_text())
    wanted = options.describe()
    other = [f"{k} is {found.get(k)}, asked for {v}" for k, v in wanted.items() if found.get(k) != v]
    return "; ".join(other) or None


def _refuse_foreign_files(root: Path) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise FileExistsError(f"{root} is a file; name a directory for the shapes data set")
    foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in _OWN_ENTRIES)
    if foreign:
        raise FileExistsError(
            f"{root} holds files that are not of the shapes data set ({', '.join(foreign[:5])}), and drawing "
            "would delete them. Name another directory, or remove them"
        )


def _swap_in(new: Path, root: Path, old: Path, options: ShapesOptions, force: bool) -> None:
    if root.exists():
        # Another process may have drawn the same meanwhile.
        if not force and _why_not_reusable(root, options) is None:
            return
        root.rename(old)
    try:
        new.rename(root)
    except OSError:
        # Another process came in between the two renames; its data set serves if it is the one asked for.
        if _why_not_reusable(root, options) is not None:
            raise


def _fingerprint(path: Path) -> list:
    data = path.read_bytes()
    return [len(data), hashlib.sha256(data).hexdigest()]


def _write(root: Path, options: ShapesOptions, workers: int | None, progress: Progress | None) -> None:
    jobs = [(split, index) for split in SPLITS for index in range(getattr(options, split))]
    for split in SPLITS:
        for kind in ("images", "panoptic", "semantic"):
            (root / split / kind).mkdir(parents=True)
    (root / "annotations").mkdir()

    records: dict[str, list[dict]] = {split: [] for split in SPLITS}
    files: dict[str, list] = {}
    with _pool(workers or os.cpu_count() or 1, len(jobs)) as pool:
        results = pool.map(partial(_write_job, root, options), jobs, chunksize=8)
        for done, ((split, _), (record, written)) in enumerate(zip(jobs, results, strict=True), start=1):
            records[split].append(record)
            files.update(written)
            if progress is not None:
                progress(done, len(jobs))

    for split in SPLITS:
        for name, content in (
            (f"annotations/panoptic_{split}.json", _panoptic_json(records[split])),
            (f"annotations/instances_{split}.json", _instances_json(records[split])),
        ):
            (root / name).write_text(json.dumps(content, sort_keys=True) + "\n")
            files[name] = _fingerprint(root / name)
    manifest = {**options.describe(), "files": dict(sorted(files.items()))}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _pool(workers: int, jobs: int) -> Executor:
    # Much of the drawing holds Python's global lock. Processes that have to import everything anew are not worth it, and
    # for a few images none are.
    if workers > 1 and jobs >= 64 and "fork" in multiprocessing.get_all_start_methods():
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))
    return ThreadPoolExecutor(workers)


def _write_job(root: Path, options: ShapesOptions, job: tuple[str, int]) -> tuple[dict, dict[str, list]]:
    return _write_image(root, options, *job)


def _write_image(root: Path, options: ShapesOptions, split: str, index: int) -> tuple[dict, dict[str, list]]:
    # Each image has a seed of its own: a longer split starts with the images of a shorter one.
    random = SceneRandom(options.seed, SPLITS.index(split), index)
    scene = draw_scene(random, *scene_size(random, options.min_size, options.max_size))
    image_id = _FIRST_IMAGE_ID[split] + index
    name = f"{image_id:07d}.png"
    files = {}
    for kind, array in (
        ("images", scene.image),
        ("panoptic", _ids_to_rgb(scene.panoptic)),
        ("semantic", semantic_map(scene)),
    ):
        path = root / split / kind / name
        Image.fromarray(array).save(path, compress_level=1)
        files[f"{split}/{kind}/{name}"] = _fingerprint(path)
    height, width = scene.panoptic.shape
    record = {"id": image_id, "file_name": name, "height": height, "width": width, "segments": scene.segments}
    record["masks"] = {
        s["id"]: _rle(scene.panoptic == s["id"], compressed=not s["iscrowd"])
        for s in scene.segments
        if s["isthing"]
    }
    return record, files


def semantic_map(scene: Scene) -> np.ndarray:
    """(H, W) uint8 contiguous class ids of a scene, 255 for void."""
    semantic = np.full(scene.panoptic.shape, VOID_LABEL, dtype=np.uint8)
    for segment in scene.segments:
        contiguous = _CATEGORY_BY_DATASET_ID[segment["category_id"]].contiguous_id
        semantic[scene.panoptic == segment["id"]] = contiguous
    return semantic


def _ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def _image_entries(records: list[dict]) -> list[dict]:
    return [{k: record[k] for k in ("id", "file_name", "height", "width")} for record in records]


def _category_entries(categories) -> list[dict]:
    return [
        {"id": c.dataset_id, "name": c.name, "isthing": int(c.isthing), "color": list(c.color)}
        for c in categories
    ]


def _panoptic_json(records: list[dict]) -> dict:
    annotations = []
    for record in records:
        segments = [{k: v for k, v in s.items() if k != "isthing"} for s in record["segments"]]
        annotations.append(
            {"image_id": record["id"], "file_name": record["file_name"], "segments_info": segments}
        )
    return {
        "info": {"description": "synthetic shapes"},
        "images": _image_entries(records),
        "annotations": annotations,
        "categories": _category_entries(CATEGORIES),
    }


def _instances_json(records: list[dict]) -> dict:
    annotations: list[dict] = []
    for record in records:
        for segment in record["segments"]:
            if not segment["isthing"]:
                continue
            annotations.append(
                {
                    # COCO's evaluation takes the id 0 for "not matched".
                    "id": len(annotations) + 1,
                    "image_id": record["id"],
                    "category_id": segment["category_id"],
                    "iscrowd": segment["iscrowd"],
                    "area": segment["area"],
                    "bbox": segment["bbox"],
                    "segmentation": record["masks"][segment["id"]],
                }
            )
    return {
        "info": {"description": "synthetic shapes"},
        "images": _image_entries(records),
        "annotations": annotations,
        "categories": _category_entries(THINGS),
    }


def _rle(mask: np.ndarray, compressed: bool) -> dict:
    """COCO's run-length code of a (H, W) bool mask; crowds have theirs uncompressed, as in COCO's files."""
    if compressed:
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + runs}
