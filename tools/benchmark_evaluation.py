"""The `evaluation` stage of tools/benchmark.py: images a second of `tools/train_net.py --eval-only`.

A call runs the model over the images of a data set, waits for the GPU and hands each result to the evaluators, as
detectron2's inference_on_dataset does. `evaluation` has the images in memory, `evaluation_loader` reads and resizes them in
the data loader's processes meanwhile.

What is fair: both sides have the same images, weights, tasks and batch sizes, detectron2's loop, and their own order of the
images, post-processing and evaluators. The time ends when every image has been processed: this project's evaluators work in
threads beside the model (TEST.EVALUATION_THREADS), and what they have not done after the last image is waited for. What
`evaluate` does then (AP from the instances of all images, files) is in neither time. Nor is the release's comparison of
panoptic maps, which it does then; this project's does it for each image, in the time.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from benchmark_timing import Stage
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts

REPO = Path(__file__).resolve().parent.parent


class EvaluationCase:
    """The first data set of DATASETS.TEST, its images in memory."""

    def __init__(self, cfg, most_images: int, release: bool):
        """
        Args:
            most_images: take so many from the start; 0 for all.
            release: evaluate as the official checkout does.

        Raises:
            FileNotFoundError, KeyError, ValueError: there is no such data set.
        """
        self._release = release
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: name a data set to evaluate on")
        self.name = cfg.DATASETS.TEST[0]
        if release:
            if self.name not in DatasetCatalog.list():
                register_shapes()
        else:
            from mask2former.evaluation import check_test_sets

            check_test_sets(cfg)
        records = get_detection_dataset_dicts([self.name], filter_empty=False)[: most_images or None]
        if not release:
            # As build_test_loader of mask2former.evaluation does: the mapper would read and resize the semantic maps.
            records = [{k: v for k, v in record.items() if k != "sem_seg_file_name"} for record in records]
            if cfg.TEST.GROUP_BY_SIZE:
                from mask2former.evaluation.image_sizes import grouped_by_size, recorded_size

                order = grouped_by_size(range(len(records)), [recorded_size(one) for one in records], cfg)
                records = [records[i] for i in order]
        self._records = records
        self._mapper = DatasetMapper(cfg, False)
        self._inputs = [self._mapper(record) for record in self._records]
        self._folder = tempfile.TemporaryDirectory()

    def prepare(self, subject, cfg, batch: int) -> tuple[dict[str, Any], dict[str, Stage]]:
        """Columns of the rows, and what can be timed."""
        note = ""
        if self._release:
            note = stand_in_for_panopticapi()
            evaluators = release_evaluators(cfg, self.name, self._folder.name)
        else:
            from mask2former.evaluation import with_evaluation_formats
            from mask2former.evaluation.build import build_evaluator
            from mask2former.evaluation.overlapped import number_of_threads
            from mask2former.postprocessing import PostprocessOptions

            evaluators = build_evaluator(cfg, self.name, self._folder.name)
            note = f"{number_of_threads(cfg.TEST.EVALUATION_THREADS)} evaluation threads"
            options = PostprocessOptions.from_config(with_evaluation_formats(cfg))
        batches = [self._inputs[i : i + batch] for i in range(0, len(self._inputs), batch)]

        def run(batches) -> None:
            before = None if self._release else subject.model.postprocess_options
            if not self._release:
                subject.model.postprocess_options = options  # as train_net.py builds its model
            try:
                evaluators.reset()
                for inputs in batches:
                    results = subject.model(inputs)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    evaluators.process(inputs, results)
                if hasattr(evaluators, "wait"):
                    evaluators.wait()  # what its threads have not done is not done
            finally:
                if not self._release:
                    subject.model.postprocess_options = before

        run(batches[:1])
        # Columns alike in all implementations: what their evaluators read.
        columns = {
            "batch": batch,
            "image": f"{self.name} ({len(self._inputs)} images)",
            "note": note,
        }
        count = len(self._inputs)
        return columns, {
            "evaluation": Stage(lambda: run(batches), count, wall_clock=True, slow=True),
            "evaluation_loader": Stage(
                lambda: run(self.loader(cfg, batch)), count, wall_clock=True, slow=True
            ),
        }

    def loader(self, cfg, batch: int):
        """Batches as the data loader of the evaluation gives them."""
        return torch.utils.data.DataLoader(
            _Mapped(self._records, self._mapper),
            batch_size=batch,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=list,
        )


class _Mapped:
    """Records of a data set as a model's inputs."""

    def __init__(self, records, mapper):
        self._records, self._mapper = records, mapper

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int):
        return self._mapper(self._records[index])


def release_evaluators(cfg, name: str, folder: str):
    """The evaluators that the release's train_net.py takes for a data set's evaluator_type, all of detectron2's.

    Raises:
        ValueError: a type for which this tool has none.
    """
    from detectron2.evaluation import (
        COCOEvaluator,
        COCOPanopticEvaluator,
        DatasetEvaluators,
        SemSegEvaluator,
    )

    kind = MetadataCatalog.get(name).evaluator_type
    test = cfg.MODEL.MASK_FORMER.TEST
    known = {
        "sem_seg": [(True, SemSegEvaluator)],
        "coco": [(True, COCOEvaluator)],
        "coco_panoptic_seg": [
            (test.PANOPTIC_ON, COCOPanopticEvaluator),
            (test.INSTANCE_ON, COCOEvaluator),
            (test.SEMANTIC_ON, SemSegEvaluator),
        ],
    }
    if kind not in known:
        raise ValueError(
            f"{name} has the evaluator_type {kind!r}; of the release, {', '.join(known)} can be timed"
        )
    made = [evaluator(name, output_dir=folder) for wanted, evaluator in known[kind] if wanted]
    return DatasetEvaluators(made)


def register_shapes() -> None:
    """Register the shapes data set where another package has the name `mask2former`."""
    module = _of_this_project("mask2former/data/datasets", "shapes")
    module.register_all(importlib.import_module(f"{module.__package__}.catalog").datasets_root())


def stand_in_for_panopticapi() -> str:
    """Where panopticapi is missing, put the one function in its place that COCOPanopticEvaluator.process calls.

    Returns:
        what to say about it beside the figures; empty where panopticapi is there.
    """
    if importlib.util.find_spec("panopticapi") is not None:
        return "stand-in for panopticapi" if hasattr(sys.modules.get("panopticapi"), "stand_in") else ""
    package, utils = types.ModuleType("panopticapi"), types.ModuleType("panopticapi.utils")
    package.__spec__ = importlib.util.spec_from_loader("panopticapi", None, is_package=True)
    package.stand_in = True
    utils.id2rgb = _of_this_project("mask2former/evaluation", "panoptic_quality").ids_to_rgb
    package.utils = utils
    sys.modules.update({"panopticapi": package, "panopticapi.utils": utils})
    return "stand-in for panopticapi"


def _of_this_project(folder: str, name: str) -> types.ModuleType:
    """A module of this project, without its packages' __init__ and under other names."""
    package, path = "benchmarked", REPO
    for part in ("", *folder.split("/")):
        package, path = f"{package}.{part}" if part else package, path / part
        if package not in sys.modules:
            made = types.ModuleType(package)
            made.__path__ = [str(path)]
            sys.modules[package] = made
    return importlib.import_module(f"{package}.{name}")
