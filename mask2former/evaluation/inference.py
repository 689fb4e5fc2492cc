"""Runs a model over the test sets of a config."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn

from ..backend import name_runners
from ..maskformer_model import MaskFormer
from .ahead import ImagesAhead
from .build import build_evaluator, check_test_sets
from .kept_images import KeptImages, forget_images, keep_images
from .overlapped import OverlappedEvaluators
from .whole_files import remove_leftovers

logger = logging.getLogger(__name__)


def evaluate_model(cfg: CfgNode, model: nn.Module, *, resume: bool | None = None) -> OrderedDict:
    """Evaluate a model on every data set of DATASETS.TEST, and print and save the results.

    The model's `prepare()`, where it has one, runs first, so that detectron2's timing does not count it; a MaskFormer's is
    told of the images that are to come. The results of all data sets go to OUTPUT_DIR/inference/results.json, with what ran
    the network under "backend"; predictions to OUTPUT_DIR/inference, or with several data sets to a directory of each there.
    results.json of an earlier evaluation is removed first and written last: where it is, the evaluation has come to its end.

    Args:
        resume: go on with the evaluation of the same weights, data and keys that did not come to its end in OUTPUT_DIR; its
            results are those of an evaluation that was not interrupted. Where not None, what is known of the images is kept
            there while this one runs, for the next. Cityscapes' own evaluators and remote stores begin anew.

    Returns:
        {task: {metric: value}}, or with several data sets {data set: {task: {metric: value}}}. Empty on other
        ranks than the main one.

    Raises:
        ValueError, KeyError, FileNotFoundError: a data set cannot be evaluated on, see `check_test_sets` and
            `build_evaluator`.
        AnnotationError: an image or annotation cannot be used; the message names it.
    """
    check_test_sets(cfg)
    names = list(cfg.DATASETS.TEST)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    # All evaluators first: what is missing for the last data set should not show after hours on the first.
    evaluators = {
        name: build_evaluator(cfg, name, os.path.join(folder, name) if len(names) > 1 else folder)
        for name in names
    }
    path = os.path.join(folder, "results.json")
    if comm.is_main_process():
        _clean(folder, path, names)
    tests = cfg.MODEL.MASK_FORMER.TEST
    if tests.INSTANCE_ON and not tests.BOXES_FROM_MASKS:
        logger.info(
            "MODEL.MASK_FORMER.TEST.BOXES_FROM_MASKS is False: predicted boxes are zeros, as the release's, and "
            "so is their AP (bbox); the AP of masks (segm) is not affected"
        )
    ahead = ImagesAhead(cfg, names)
    unfinished = None
    if resume is not None:
        records = {name: ahead.records(name) for name in names}
        unfinished = keep_images(cfg, model, records, folder, resume=resume)
    if isinstance(model, MaskFormer):
        model.prepare(ahead)
    elif hasattr(model, "prepare"):
        model.prepare()
    results, earlier_runners = OrderedDict(), []
    for name in names:
        skip = 0
        if unfinished is not None and (
            kept := _kept_images(cfg, model, evaluators[name], ahead, name, unfinished)
        ):
            skip = len(kept.earlier)
            earlier_runners += kept.earlier_runners
        if skip:
            logger.info(
                "%s: going on behind the %d images that this process has evaluated before", name, skip
            )
        loader = ahead.take_loader(name, skip)
        logger.info(
            "Evaluating on %s: %d images on this process, %d a batch",
            name,
            len(loader.batch_sampler.sampler),
            cfg.TEST.BATCH_SIZE,
        )
        try:
            results[name] = inference_on_dataset(model, loader, evaluators[name])
        finally:
            if isinstance(evaluators[name], OverlappedEvaluators):
                evaluators[name].close()  # no threads are left where the model fails
        if comm.is_main_process():
            logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results[name])
    backend = describe_backend(model, None if unfinished is None else earlier_runners)
    if comm.is_main_process():
        logger.info("The network was run by %s", backend["backend"])
        save_results(path, {**results, "backend": backend})
        logger.info("Saved the results to %s", path)
    forget_images(unfinished)
    if not comm.is_main_process():
        return OrderedDict()
    return results[names[0]] if len(names) == 1 else results


def _kept_images(
    cfg: CfgNode, model: nn.Module, evaluator: DatasetEvaluator, ahead: ImagesAhead, name: str, folder: str
) -> KeptImages | None:
    """Have an evaluator keep its images in a folder; None where it cannot."""
    if not isinstance(evaluator, OverlappedEvaluators) or not evaluator.can_keep:
        return None
    evaluator.kept = KeptImages(
        folder,
        name,
        lambda: _runner(model),
        total=ahead.number_of_images(name),
        batch_size=cfg.TEST.BATCH_SIZE,
    )
    return evaluator.kept


def _clean(folder: str, results: str, names: list[str]) -> None:
    if "://" in folder:
        return
    for part in (folder, *(os.path.join(folder, name) for name in names)):
        remove_leftovers(part)
    if os.path.isfile(results):
        os.unlink(results)


def _runner(model: nn.Module) -> dict:
    backend = getattr(model, "backend", None)
    return backend.describe() if hasattr(backend, "describe") else {"backend": "torch"}


def describe_backend(model: nn.Module, earlier: Sequence[dict] | None = None) -> dict:
    """What ran the network on all processes: the main one's description with everyone's images and reasons.

    Every process must call it; only the main one gets them all.

    Args:
        earlier: what had run it for batches of this process that an evaluation before this one kept; for all processes, or
            None for all.
    """
    told = _runner(model)
    everyone = comm.gather(told) or [told]
    if earlier is not None:
        everyone += itertools.chain.from_iterable(comm.gather(list(earlier)))
    # A rank that fell back while the others did not must show; one that had no images ran nothing.
    ran = [one for one in everyone if sum(one.get("images", {}).values())] or everyone
    told["backend"] = "; ".join(dict.fromkeys(one["backend"] for one in ran))
    if "images" in told:
        counts = Counter()
        for one in everyone:
            counts.update(one["images"])
        told["images"] = dict(counts)
        if sum(map(bool, counts.values())) > 1:
            told["backend"] = name_runners(counts)
    if "reasons" in told:
        told["reasons"] = list(dict.fromkeys(reason for one in everyone for reason in one["reasons"]))
    return told


def save_results(path: str, results: Mapping) -> None:
    """Write results as JSON, whole or not at all. What cannot be computed (NaN) becomes null."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".results-", suffix=".json")
    try:
        with os.fdopen(handle, "w") as f:
            json.dump(_jsonable(results), f, indent=2, allow_nan=False)
            f.write("\n")
            f.flush()
            os.fsync(f.fileno())
        # mkstemp's file is its owner's alone; results are as readable as the rest of the output.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
