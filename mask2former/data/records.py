"""The records of data sets by their names; what keeps them from being read is said with the name of the file."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import MetadataCatalog, get_detection_dataset_dicts

from .annotations import check_instances
from .errors import UNREADABLE, AnnotationError, read_json

# What a registration reads annotations from.
_FILES = ("panoptic_json", "json_file", "sem_seg_root", "gt_dir")


def load_records(names: Sequence[str], filter_empty: bool) -> list[dict]:
    """detectron2's get_detection_dataset_dicts.

    Args:
        names: of registered data sets.
        filter_empty: leave out images without instances.

    Raises:
        FileNotFoundError: a file of a data set is missing.
        AnnotationError: annotations are damaged, or there are no images; names file, and where it is one's fault image and
            annotation.
    """
    try:
        return get_detection_dataset_dicts(list(names), filter_empty=filter_empty)
    except (AnnotationError, FileNotFoundError):
        raise
    # detectron2 asserts that there are images, and that ids are unique.
    except (*UNREADABLE, AssertionError) as error:
        for name in names:
            _look_for_the_cause(name)
        files = [path for name in names for path in _files(name)[:1]]
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        if str(error).endswith("is empty!"):
            reason += " Allowed: at least one image"
        if str(error).startswith("No valid data found"):
            reason += " Allowed: images with instances, no crowds; others with DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        where = f" ({', '.join(files)})" if files else ""
        raise AnnotationError(
            f"the annotations of {', '.join(names)}{where} cannot be used: {reason}"
        ) from error


def _look_for_the_cause(name: str) -> None:
    """Raise AnnotationError for what is wrong in a data set's JSON; nothing where it is not found there."""
    metadata = MetadataCatalog.get(name)
    files = _files(name)
    if not files or not files[0].endswith(".json"):
        return
    content = read_json(files[0])
    if not metadata.get("panoptic_json"):
        check_instances(files[0], content, evaluated=False)


def _files(name: str) -> list[str]:
    metadata = MetadataCatalog.get(name)
    return [path for key in _FILES if (path := metadata.get(key))]
