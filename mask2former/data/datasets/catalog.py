"""What the registrations share: category tables, paths, and the loader of COCO-style panoptic annotations."""

import json
import os
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..annotations import check_panoptic, read_panoptic_json
from ..errors import AnnotationError

ROOT_VARIABLE = "DETECTRON2_DATASETS"

_PATH_ATTRIBUTES = (
    "image_root",
    "image_dir",
    "gt_dir",
    "json_file",
    "panoptic_root",
    "panoptic_json",
    "sem_seg_root",
)

# Parts of the official layout that no download contains, and the script that makes each.
_MADE_BY = {
    "panoptic_semseg_": "prepare_coco_semantic_annos_from_panoptic_annos.py of the official release",
    "annotations_detectron2": "prepare_ade20k_sem_seg.py of the official release",
    "ade20k_panoptic_": "prepare_ade20k_pan_seg.py of the official release",
    "ade20k_instance_": "prepare_ade20k_ins_seg.py of the official release",
    "cityscapes_panoptic_": "createPanopticImgs.py of cityscapesscripts",
}


def datasets_root() -> str:
    """Folder under which the data sets lie: $DETECTRON2_DATASETS, else ./datasets."""
    return os.path.expanduser(os.getenv(ROOT_VARIABLE, "datasets"))


def load_categories(name: str) -> list[dict]:
    """Rows of categories/<name>.json as dicts, in the order of the contiguous ids."""
    text = (resources.files(__package__) / "categories" / f"{name}.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def panoptic_metadata(categories: list[dict], colored_things: list[dict]) -> dict:
    """Class names, colours and id maps of a panoptic data set with one contiguous id per category.

    The stuff_* entries cover every category, things too: SemSegEvaluator and the visualizer look up any
    contiguous id there. `colored_things` are the categories of thing_classes and thing_colors, which the
    release fills differently per data set.
    """
    contiguous = {category["id"]: i for i, category in enumerate(categories)}
    return {
        "thing_classes": [category["name"] for category in colored_things],
        "thing_colors": [category["color"] for category in colored_things],
        "stuff_classes": [category["name"] for category in categories],
        "stuff_colors": [category["color"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {
            c["id"]: contiguous[c["id"]] for c in categories if c["isthing"]
        },
        "stuff_dataset_id_to_contiguous_id": contiguous,
    }


def register(name: str, load: Callable[[], list[dict]], **metadata) -> None:
    """Register a data set and its metadata, unless the name is taken: then both stay as they are."""
    if name in DatasetCatalog.list():
        return
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def require_paths(name: str, paths: Iterable[str]) -> None:
    """Raise FileNotFoundError that names every path of data set `name` that is missing, and what to set."""
    missing = [path for path in paths if not PathManager.exists(path)]
    if not missing:
        return
    lines = [f"Data set '{name}' is not on disk. Missing:"]
    for path in missing:
        maker = next((script for part, script in _MADE_BY.items() if part in path), None)
        lines.append(f"  {path}" + (f"  (made by {maker})" if maker else ""))
    root = os.getenv(ROOT_VARIABLE)
    now = f"it is '{root}'" if root is not None else "it is not set, so ./datasets is searched"
    lines.append(f"Set {ROOT_VARIABLE} to the folder that holds the data sets before Python starts; {now}.")
    if name.startswith("shapes_"):
        lines.append("To draw it: python tools/make_shapes_dataset.py")
    raise FileNotFoundError("\n".join(lines))


def require_registered(name: str, key: str) -> None:
    """Raise KeyError where the data set `name`, which config key `key` names, is not registered."""
    if name not in DatasetCatalog.list():
        raise KeyError(
            f"{key} names {name!r}, which is not registered. Registered: "
            + ", ".join(sorted(DatasetCatalog.list()))
        )


def check_dataset_on_disk(name: str) -> None:
    """Check every path that a data set's metadata names, those of detectron2's own data sets too.

    Raises:
        KeyError: the name is not registered.
        FileNotFoundError: files or folders are missing; names them and the variable to set.
    """
    if name not in DatasetCatalog.list():
        raise KeyError(
            f"Data set '{name}' is not registered. Registered: {', '.join(sorted(DatasetCatalog.list()))}."
        )
    metadata = MetadataCatalog.get(name)
    require_paths(name, [path for key in _PATH_ATTRIBUTES if (path := metadata.get(key, None))])


def load_panoptic(
    name: str,
    *,
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str,
    metadata: dict,
    image_id: Callable = lambda value: value,
) -> list[dict]:
    """Read COCO-style panoptic annotations that come with semantic label maps.

    Args:
        metadata: with the two *_dataset_id_to_contiguous_id maps.
        image_id: converts the annotation's image id, which is a number in COCO and a string elsewhere.

    Returns:
        One dict an image: file_name, image_id, pan_seg_file_name, sem_seg_file_name, and segments_info, whose
        category_id is contiguous and which has "isthing"; height and width where the JSON tells the image's.

    Raises:
        FileNotFoundError: a folder, the JSON, or a file of the first annotation is missing.
        ValueError: the JSON has no annotations.
        AnnotationError: it is damaged, or has a category that the data set does not define.
    """
    require_paths(name, [image_root, panoptic_root, panoptic_json, sem_seg_root])
    content = read_panoptic_json(panoptic_json)
    annotations = content.get("annotations")
    if not annotations:
        raise ValueError(f"Data set '{name}': {panoptic_json} lists no annotations.")
    check_panoptic(panoptic_json, annotations)

    things = metadata["thing_dataset_id_to_contiguous_id"]
    contiguous = {**metadata["stuff_dataset_id_to_contiguous_id"], **things}

    def convert(segment: dict, file_name: str) -> dict:
        category = segment["category_id"]
        if category not in contiguous:
            raise AnnotationError(
                f"Data set '{name}': category_id {category} of {file_name} in {panoptic_json} is unknown; "
                f"known are {len(contiguous)} ids from {min(contiguous)} to {max(contiguous)}."
            )
        return {**segment, "category_id": contiguous[category], "isthing": category in things}

    sizes = _image_sizes(content.get("images"), image_id)
    records = []
    for annotation in annotations:
        png = annotation["file_name"]
        records.append(
            {
                # The annotation names its own PNG; the image has the same stem and is a JPEG in all of these.
                "file_name": os.path.join(image_root, os.path.splitext(png)[0] + ".jpg"),
                "image_id": image_id(annotation["image_id"]),
                **sizes.get(image_id(annotation["image_id"]), {}),
                "pan_seg_file_name": os.path.join(panoptic_root, png),
                "sem_seg_file_name": os.path.join(sem_seg_root, png),
                "segments_info": [convert(segment, png) for segment in annotation["segments_info"]],
            }
        )
    # One image is enough to notice a wrong folder; checking all would be slow on network disks.
    require_paths(name, [records[0][key] for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name")])
    return records


def _image_sizes(images: list[dict] | None, image_id: Callable) -> dict[Any, dict[str, int]]:
    """{"height", "width"} by image id; without the images that do not tell both.

    Args:
        image_id: converts the JSON's ids.
    """
    keys = ("height", "width")
    return {
        image_id(image["id"]): {key: image[key] for key in keys}
        for image in images or ()
        if "id" in image and all(isinstance(image.get(key), int) for key in keys)
    }


def register_panoptic(
    name: str,
    *,
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str,
    classes: dict,
    image_id: Callable = lambda value: value,
    **metadata,
) -> None:
    """Register a data set that `load_panoptic` reads. `classes` is from `panoptic_metadata`."""
    paths = {
        "image_root": image_root,
        "panoptic_root": panoptic_root,
        "panoptic_json": panoptic_json,
        "sem_seg_root": sem_seg_root,
    }

    def load() -> list[dict]:
        return load_panoptic(name, **paths, metadata=classes, image_id=image_id)

    register(name, load, **paths, label_divisor=1000, **classes, **metadata)
