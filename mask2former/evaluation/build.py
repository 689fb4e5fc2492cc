"""Which evaluators a data set needs, by the evaluator_type of its metadata."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..data.datasets.catalog import require_paths, require_registered
from .cityscapes import build_cityscapes_evaluator, require_scripts
from .formats import LVISSegEvaluator, SemSegEvaluator
from .instance_evaluation import InstanceSegEvaluator
from .overlapped import OverlappedEvaluators, PerImageMixin, number_of_threads
from .panoptic_evaluation import PanopticEvaluator


def _semantic(name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(name, distributed=True, output_dir=folder)


def _require_lvis(name: str) -> None:
    if importlib.util.find_spec("lvis") is None:
        raise ImportError(f"evaluating {name} needs LVIS's API: pip install lvis")


def _lvis(name: str, folder: str) -> DatasetEvaluator:
    _require_lvis(name)
    return LVISSegEvaluator(name, output_dir=folder)


def _cityscapes_semantic(name: str, folder: str) -> DatasetEvaluator:
    return build_cityscapes_evaluator("sem_seg", name)


def _cityscapes_instance(name: str, folder: str) -> DatasetEvaluator:
    return build_cityscapes_evaluator("instance", name)


# For each evaluator_type: (key below MODEL.MASK_FORMER.TEST that must be on, or None for always; evaluator).
# What is evaluated when is the release's choice.
_EVALUATORS: dict[str, tuple[tuple[str | None, Callable[[str, str], DatasetEvaluator]], ...]] = {
    "sem_seg": ((None, _semantic),),
    "coco": ((None, InstanceSegEvaluator),),
    "lvis": ((None, _lvis),),
    "cityscapes_sem_seg": ((None, _cityscapes_semantic),),
    "cityscapes_instance": ((None, _cityscapes_instance),),
    "coco_panoptic_seg": (
        ("PANOPTIC_ON", PanopticEvaluator),
        ("INSTANCE_ON", InstanceSegEvaluator),
        ("SEMANTIC_ON", _semantic),
    ),
    "mapillary_vistas_panoptic_seg": (
        ("PANOPTIC_ON", PanopticEvaluator),
        ("INSTANCE_ON", InstanceSegEvaluator),
        ("SEMANTIC_ON", _semantic),
    ),
    "ade20k_panoptic_seg": (
        (None, _semantic),
        ("PANOPTIC_ON", PanopticEvaluator),
        ("INSTANCE_ON", InstanceSegEvaluator),
    ),
    "cityscapes_panoptic_seg": (
        ("PANOPTIC_ON", PanopticEvaluator),
        ("SEMANTIC_ON", _cityscapes_semantic),
        ("INSTANCE_ON", _cityscapes_instance),
    ),
}
# What raises ImportError where an evaluator's package is missing.
_REQUIRE = {
    _lvis: _require_lvis,
    _cityscapes_semantic: require_scripts,
    _cityscapes_instance: require_scripts,
}
# Fields of metadata that name files or directories.
_PATHS = ("image_root", "image_dir", "gt_dir", "json_file", "panoptic_root", "panoptic_json", "sem_seg_root")
# What an evaluator reads of the model's output: the task that must be on for it.
_NEEDS = {
    "sem_seg": "SEMANTIC_ON",
    "cityscapes_sem_seg": "SEMANTIC_ON",
    "ade20k_panoptic_seg": "SEMANTIC_ON",
    "coco": "INSTANCE_ON",
    "lvis": "INSTANCE_ON",
    "cityscapes_instance": "INSTANCE_ON",
}


def check_test_sets(cfg: CfgNode) -> None:
    """Fail early where a data set of DATASETS.TEST cannot be evaluated on, without reading it.

    Raises:
        ValueError: DATASETS.TEST is empty.
        KeyError: a data set is not registered.
        FileNotFoundError: files of it are missing; the message says which, and how to get them.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name at least one data set to evaluate on")
    for name in cfg.DATASETS.TEST:
        require_registered(name, "DATASETS.TEST")
        metadata = MetadataCatalog.get(name)
        needed = [path for attribute in _PATHS if (path := metadata.get(attribute))]
        if metadata.get("panoptic_json") and not cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON:
            # Only AP reads the instances of a panoptic data set.
            needed = [path for path in needed if path != metadata.get("json_file")]
        require_paths(name, needed)


def check_evaluators(cfg: CfgNode) -> None:
    """Fail early where a data set of DATASETS.TEST has no evaluator under this config, without reading a file.

    Raises:
        KeyError, ValueError, ImportError: as `build_evaluator`.
    """
    number_of_threads(cfg.TEST.EVALUATION_THREADS)
    for name in cfg.DATASETS.TEST:
        for make in _chosen(cfg, name):
            if make in _REQUIRE:
                _REQUIRE[make](name)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """The evaluator of a data set: PQ, AP, mIoU, as its evaluator_type and MODEL.MASK_FORMER.TEST.*_ON say.

    Args:
        dataset_name: registered, with evaluator_type in its metadata.
        output_folder: where predictions are written; OUTPUT_DIR/inference where left out.

    Returns:
        An evaluator; OverlappedEvaluators with TEST.EVALUATION_THREADS threads where it can work on images beside the model.
        AP is computed in as many processes at most.

    Raises:
        KeyError: the data set is not registered.
        ValueError: it has no evaluator_type or an unknown one, the tasks that it evaluates are off, or
            TEST.EVALUATION_THREADS is below -1.
        ImportError: a package that its evaluator needs is missing.
    """
    makers = _chosen(cfg, dataset_name)
    threads = number_of_threads(cfg.TEST.EVALUATION_THREADS)
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluators = [
        InstanceSegEvaluator(dataset_name, folder, max_processes=cfg.TEST.EVALUATION_THREADS)
        if make is InstanceSegEvaluator
        else make(dataset_name, folder)
        for make in makers
    ]
    if any(isinstance(evaluator, PerImageMixin) for evaluator in evaluators):
        return OverlappedEvaluators(evaluators, threads)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _chosen(cfg: CfgNode, dataset_name: str) -> list[Callable[[str, str], DatasetEvaluator]]:
    """What makes the evaluators of a data set, at least one; raises KeyError and ValueError as `build_evaluator`."""
    require_registered(dataset_name, "DATASETS.TEST")
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in _EVALUATORS:
        raise ValueError(
            f"no evaluator for {dataset_name}: the evaluator_type of its metadata is {evaluator_type!r}, "
            "known are " + ", ".join(sorted(_EVALUATORS))
        )
    tasks = cfg.MODEL.MASK_FORMER.TEST
    needed = _NEEDS.get(evaluator_type)
    if needed is not None and not tasks[needed]:
        raise ValueError(
            f"{dataset_name} (evaluator_type {evaluator_type!r}) needs MODEL.MASK_FORMER.TEST.{needed} True"
        )
    makers = [make for task, make in _EVALUATORS[evaluator_type] if task is None or tasks[task]]
    if not makers:
        choices = ", ".join(f"MODEL.MASK_FORMER.TEST.{task}" for task, _ in _EVALUATORS[evaluator_type])
        raise ValueError(f"nothing to evaluate on {dataset_name}: set at least one of {choices} to True")
    return makers
