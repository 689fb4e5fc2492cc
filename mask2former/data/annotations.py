"""What annotations may hold: checked where they are read, and told with what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import AnnotationError, read_json

# Segment ids are the colours of a PNG: R + 256 G + 65536 B.
ID_RANGE = 256**3
# What pycocotools reads of an instance besides its segmentation.
_EVALUATED = ("iscrowd", "area", "bbox")
_MOST_CHARACTERS = 7  # of a run length in COCO's text: 5 bits each, for 32 bits and a sign


def check_run_length_code(code: Mapping[str, Any], size: Sequence[int]) -> None:
    """
    Args:
        code: {"size": [height, width], "counts": run lengths, or COCO's text of them}.
        size: (height, width) of the image.

    Raises:
        ValueError: it is of another size, or its runs do not cover the image. pycocotools would leave the rest of the mask
            as the memory was, or write beside it.
    """
    told = code.get("size")
    if not isinstance(told, (list, tuple)) or list(told) != list(size):
        told = tuple(told) if isinstance(told, list) else told
        raise ValueError(f"a run-length code is of size {told}, the image {tuple(size)} (height, width)")
    counts = code.get("counts")
    lengths = _lengths_of_text(counts) if isinstance(counts, (str, bytes)) else counts
    pixels = size[0] * size[1]
    if (
        not isinstance(lengths, (list, tuple))
        or not all(isinstance(n, (int, np.integer)) and n >= 0 for n in lengths)
        or sum(lengths) != pixels
    ):
        raise ValueError(
            f"a run-length code has the counts {str(counts)[:80]!r}; allowed: whole numbers from 0 that sum to the "
            f"{size[0]} x {size[1]} = {pixels} pixels of the image, or COCO's text of such"
        )


def _lengths_of_text(text: str | bytes) -> list[int] | None:
    """Run lengths of COCO's text (rleFrString of cocoapi); None where it is no such text."""
    try:
        codes = np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, np.uint8).astype(
            np.int64
        )
    except UnicodeEncodeError:
        return None
    codes -= 48
    if not codes.size or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > _MOST_CHARACTERS:
        return None
    places = np.arange(codes.size) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((codes & 31) << (5 * places), starts)
    numbers -= np.where(codes[ends] & 16, np.int64(1) << (5 * sizes), 0)
    # From the fourth on they are differences from the one before the last.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers.tolist()


def polygon_points(polygon: Any, fewest: int = 6) -> np.ndarray:
    """A polygon's x, y, x, y, ... as float64 (2N,).

    Raises:
        ValueError: they are no numbers, not finite, not even in number, or fewer than `fewest`.
    """
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        points = None
    if (
        points is None
        or points.ndim != 1
        or points.size < fewest
        or points.size % 2
        or not np.isfinite(points).all()
    ):
        raise ValueError(
            f"a polygon is {str(polygon)[:80]}; expected x, y of at least three points, six finite numbers or more"
        )
    return points


def check_segment(segment: Any, place: int, seen: set[int]) -> None:
    """Check an entry of segments_info, and add its id to those seen in its image.

    Raises:
        ValueError: its id, category_id, iscrowd or area is not what it may be.
    """
    if not isinstance(segment, Mapping):
        raise ValueError(
            f"segment {place} is {str(segment)[:80]!r}; allowed: an object with id and category_id"
        )
    number, category = segment.get("id"), segment.get("category_id")
    wrong = None
    if not _whole(number) or not 0 <= number < ID_RANGE:
        wrong = f"its id is {_told(segment, 'id')}; allowed: a whole number, 0 .. {ID_RANGE - 1}"
    elif number in seen:
        wrong = "another segment of the image has this id; allowed: each id once"
    elif not _whole(category):
        wrong = f"its category_id is {_told(segment, 'category_id')}; allowed: the id of a category"
    elif segment.get("iscrowd", 0) not in (0, 1):
        wrong = f"its iscrowd is {_told(segment, 'iscrowd')}; allowed: 0 or 1"
    elif "area" in segment and not (_finite(segment["area"]) and segment["area"] >= 0):
        wrong = f"its area is {_told(segment, 'area')}; allowed: its number of pixels"
    if wrong:
        raise ValueError(f"segment {place} (id {number!r}, category_id {category!r}): {wrong}")
    seen.add(number)


def check_categories(path: str, content: Mapping[str, Any]) -> None:
    """Check the categories of a JSON in COCO's panoptic form, which PQ is computed with.

    Raises:
        AnnotationError: one is not what it may be; names the JSON and the category.
    """
    categories = content.get("categories")
    if not isinstance(categories, list):
        raise AnnotationError(f"{path}: categories is {_told(content, 'categories')}; allowed: a list")
    for place, category in enumerate(categories):
        wrong = None
        if not isinstance(category, Mapping):
            wrong = f"is {str(category)[:80]}; allowed: an object with id and isthing"
        elif not _whole(category.get("id")):
            wrong = f"({category.get('name')!r}): its id is {_told(category, 'id')}; allowed: a whole number"
        elif category.get("isthing") not in (0, 1):
            wrong = (
                f"({category.get('name')!r}): its isthing is {_told(category, 'isthing')}; allowed: 0 or 1"
            )
        if wrong:
            raise AnnotationError(f"{path}: categories[{place}] {wrong}")


def read_panoptic_json(path: str) -> dict[str, Any]:
    """The content of a JSON in COCO's panoptic form, of which nothing is checked but that it is an object.

    Raises:
        FileNotFoundError: there is none.
        AnnotationError: it is something else.
    """
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise AnnotationError(f"{path} is {str(content)[:80]!r}; allowed: an object in COCO's panoptic form")
    return content


def check_panoptic(path: str, annotations: Any) -> None:
    """Check the annotations of a JSON in COCO's panoptic form.

    Raises:
        AnnotationError: one is not what it may be; names the JSON, the image and the segment.
    """
    if not isinstance(annotations, list):
        raise AnnotationError(f"{path}: annotations is {str(annotations)[:80]!r}; allowed: a list")
    for place, annotation in enumerate(annotations):
        if not isinstance(annotation, Mapping):
            raise AnnotationError(
                f"{path}: annotation {place} is {str(annotation)[:80]!r}; allowed: an object"
            )
        lacking = [key for key in ("file_name", "image_id", "segments_info") if annotation.get(key) is None]
        if lacking:
            raise AnnotationError(
                f"{path}: annotation {place}, of image {annotation.get('image_id')!r} ({annotation.get('file_name')}), has "
                f"no {' and no '.join(lacking)}"
            )
        where = f"{path}: image {annotation['image_id']!r} ({annotation['file_name']})"
        if not isinstance(annotation["segments_info"], list):
            raise AnnotationError(
                f"{where}: segments_info is {str(annotation['segments_info'])[:80]!r}; allowed: a list"
            )
        seen: set[int] = set()
        try:
            for i, segment in enumerate(annotation["segments_info"]):
                check_segment(segment, i, seen)
        except ValueError as error:
            raise AnnotationError(f"{where}: {error}") from error


def drawn_pixels(ids: np.ndarray) -> dict[int, int]:
    """How many pixels of a map (H, W) each of its ids has."""
    flat = ids.ravel()
    if not flat.size:
        return {}
    # Rows are long runs of one id: they are fewer than the pixels by far.
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values, places = np.unique(flat[starts], return_inverse=True)
    pixels = np.bincount(places.ravel(), weights=np.diff(starts, append=flat.size))
    return dict(zip(values.tolist(), pixels.astype(np.int64).tolist()))


def undrawn(path: str, pixels: Mapping[int, int], segments: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of segments that a map has no pixel of.

    Args:
        path: of the map, for messages.
        pixels: the map's `drawn_pixels`.
        segments: all that are listed for the image.

    Raises:
        ValueError: the map shows none of them, but others. It is another image's then, or it is coded otherwise.
    """
    lost = [s["id"] for s in segments if s["id"] not in pixels]
    others = sorted(set(pixels) - {0})
    if others and len(lost) == len(segments) and any(s.get("area") != 0 for s in segments):
        raise ValueError(
            f"the panoptic map {path} has none of the segments {lost[:5]} that are listed for it, but {others[:5]}; "
            "allowed: a map of these ids, as the colours R + 256 G + 65536 B = id"
        )
    return lost


def check_instances(path: str, content: Any, *, evaluated: bool) -> None:
    """Check a JSON in COCO's form of instances.

    Args:
        evaluated: whether pycocotools reads it, which needs more, or training alone.

    Raises:
        AnnotationError: something in it is not what it may be; names the JSON, the image and the annotation.
    """
    if evaluated and isinstance(content, Mapping) and "annotations" not in content:
        content = {**content, "annotations": []}  # the files of a test split name images only
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, Mapping) or not isinstance(content.get(key), list):
            raise AnnotationError(f"{path} has no list of {key}: it is not in COCO's form of instances")
        for place, entry in enumerate(content[key]):
            if not isinstance(entry, Mapping):
                raise AnnotationError(f"{path}: {key}[{place}] is {str(entry)[:80]!r}; allowed: an object")
            for name in ("id", "image_id"):
                if isinstance(entry.get(name), (list, Mapping)):
                    raise AnnotationError(
                        f"{path}: {key}[{place}] has the {name} {str(entry[name])[:80]}; allowed: a number or text"
                    )
    images = {}
    for place, image in enumerate(content["images"]):
        lacking = [key for key in ("id", "file_name", "height", "width") if image.get(key) is None]
        if lacking:
            raise AnnotationError(
                f"{path}: image {place} (id {image.get('id')!r}, {image.get('file_name')}) has no "
                f"{' and no '.join(lacking)}"
            )
        images[image["id"]] = image
    categories = [category.get("id") for category in content["categories"]]
    seen: set[Any] = set()
    for place, annotation in enumerate(content["annotations"]):
        image = images.get(annotation.get("image_id"))
        name = f" ({image['file_name']})" if image else ""
        where = (
            f"{path}: annotation {annotation.get('id', f'without an id, number {place},')} of image "
            f"{annotation.get('image_id')!r}{name}"
        )
        try:
            lacking = [key for key in ("id", "image_id", "category_id") if annotation.get(key) is None]
            if lacking:
                raise ValueError(f"it has no {' and no '.join(lacking)}")
            if annotation["id"] in seen:
                raise ValueError("another annotation has this id; allowed: each id once")
            seen.add(annotation["id"])
            _check_instance(annotation, image, evaluated)
        except ValueError as error:
            raise AnnotationError(f"{where}: {error}") from error
        if annotation["category_id"] not in categories:
            # COCOeval would leave it out without a word.
            raise AnnotationError(
                f"{where} is of category id {annotation['category_id']}, which the file does not define; allowed: "
                f"{categories}"
            )


def _check_instance(annotation: Mapping[str, Any], image: Mapping[str, Any] | None, evaluated: bool) -> None:
    if evaluated:
        lacking = [key for key in _EVALUATED if annotation.get(key) is None]
        if lacking:
            raise ValueError(f"it has no {' and no '.join(lacking)}, which AP is computed with")
        if not _finite(annotation["area"]) or annotation["area"] < 0:
            raise ValueError(f"its area is {annotation['area']!r}; allowed: a number from 0")
        if annotation["iscrowd"] not in (0, 1):
            raise ValueError(f"its iscrowd is {annotation['iscrowd']!r}; allowed: 0 or 1")
    box = annotation.get("bbox")
    if box is not None and not (isinstance(box, list) and len(box) == 4 and all(map(_finite, box))):
        raise ValueError(f"its bbox is {str(box)[:80]}; allowed: x, y, width and height, four numbers")
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, Mapping):
        if image is not None:
            check_run_length_code(segmentation, (image["height"], image["width"]))
    elif isinstance(segmentation, list) and segmentation:
        for place, polygon in enumerate(segmentation):
            # pycocotools takes lines too, but where the first is one it fails.
            polygon_points(polygon, fewest=4 if evaluated and place else 6)
    else:
        raise ValueError(
            f"its segmentation is {_told(annotation, 'segmentation')}; allowed: polygons (a list), or a run-length code "
            "(an object with size and counts)"
        )


def _told(entry: Mapping[str, Any], key: str) -> str:
    return "missing" if key not in entry else "null" if entry[key] is None else repr(entry[key])[:80]


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)
