"""COCO's AP for models whose classes are things and stuff together."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from pycocotools.cocoeval import COCOeval

from ..data.annotations import check_instances
from ..data.errors import UNREADABLE, AnnotationError, read_json
from .coco_eval import ParallelCOCOeval
from .formats import RLEMixin
from .whole_files import WholeFilesMixin

logger = logging.getLogger(__name__)


class InstanceSegEvaluator(WholeFilesMixin, RLEMixin, COCOEvaluator):
    """detectron2's COCOEvaluator where the contiguous ids of things need not be 0 .. N - 1.

    In a data set with things and stuff, as ADE20K's panoptic form, the things' ids have gaps. They are closed
    up here, before COCOEvaluator, which accepts none, sees them. Results and files are COCOEvaluator's; where it would run
    pycocotools' evaluation, several processes run it.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        distributed: bool = True,
        max_processes: int = -1,
    ):
        """
        Args:
            dataset_name: with json_file (COCO instances) in its metadata.
            output_dir: where predictions are written, None for nowhere.
            distributed: gather from all ranks.
            max_processes: TEST.EVALUATION_THREADS.

        Raises:
            AnnotationError: the JSON, or an annotation in it, is not what pycocotools reads, which would fail without a name
                or count something else; or there is neither a JSON nor a record with annotations.
        """
        path = MetadataCatalog.get(dataset_name).get("json_file")
        if not path and (
            # detectron2 makes a JSON of the records only where the metadata does not have the field.
            hasattr(MetadataCatalog.get(dataset_name), "json_file")
            or not any("annotations" in record for record in DatasetCatalog.get(dataset_name))
        ):
            raise AnnotationError(
                f"{dataset_name} has no instances (json_file of its metadata, in COCO's form), which AP is computed with. "
                "Register them, or, for a panoptic data set, set MODEL.MASK_FORMER.TEST.INSTANCE_ON False"
            )
        try:
            super().__init__(
                dataset_name,
                distributed=distributed,
                output_dir=output_dir,
                use_fast_impl=_has_fast_coco_eval(),
            )
        except FileNotFoundError:
            raise
        except UNREADABLE as error:
            if path:
                check_instances(path, read_json(path), evaluated=True)
            raise AnnotationError(f"{path or dataset_name} cannot be evaluated on: {error!r}") from error
        self._name = dataset_name
        self._path = path or "the JSON made of its records"
        self._max_processes = max_processes
        if path:
            check_instances(path, self._coco_api.dataset, evaluated=True)
        if 0 in self._coco_api.anns:
            # COCOeval marks what is matched by the annotation's id.
            logger.warning(
                "%s: annotation 0 of image %r counts as never found, as pycocotools takes its id for none. Number "
                "annotations from 1",
                path,
                self._coco_api.anns[0]["image_id"],
            )
        metadata = MetadataCatalog.get(dataset_name)
        mapping = metadata.get("thing_dataset_id_to_contiguous_id")
        self._closed_up: dict[int, int] | None = None
        if mapping is None:
            return
        self._closed_up = {contiguous: i for i, contiguous in enumerate(sorted(mapping.values()))}
        names = self._coco_api.loadCats(sorted(self._coco_api.getCatIds()))
        self._metadata = Metadata(
            name=dataset_name,
            thing_dataset_id_to_contiguous_id={k: self._closed_up[v] for k, v in mapping.items()},
            # COCOeval's order of categories: that of the dataset ids in the file.
            thing_classes=[category["name"] for category in names],
        )

    def examine(self, image: Mapping[str, Any], fetched: dict) -> list[dict]:
        """
        Args:
            image: with "image_id".
            fetched: with "instances": pred_masks (N, H, W) bool, or pred_masks_rle, an RLEMasks; pred_boxes, scores,
                and pred_classes as contiguous ids.

        Raises:
            ValueError: a predicted class is not a thing of the data set.
            AnnotationError: instances of an image that the JSON does not have.
        """
        if "instances" in fetched:
            known = self._coco_api.imgs
            if self._do_evaluation and len(fetched["instances"]) and image["image_id"] not in known:
                # COCO.loadRes would say so after the last image, and not of which.
                raise AnnotationError(
                    f"image {image['image_id']!r} of {self._name} is not in {self._path}, which AP is computed with; "
                    f"allowed: its {len(known)} images, with ids such as {next(iter(known), None)!r}"
                )
            instances = self._with_closed_up_classes(fetched["instances"], image["image_id"])
            fetched = {**fetched, "instances": instances}
        return super().examine(image, fetched)

    def _with_closed_up_classes(self, instances: Instances, image_id) -> Instances:
        if self._closed_up is None:
            return instances
        predicted = instances.pred_classes.tolist()
        wrong = sorted(set(predicted) - set(self._closed_up))
        if wrong:
            raise ValueError(
                f"image {image_id}: the model predicted instances of the classes {wrong}, but the things of "
                f"{self._name} are {sorted(self._closed_up)}. Where classes are things and stuff together, "
                "instances of stuff are left out only with MODEL.MASK_FORMER.TEST.PANOPTIC_ON True; else "
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES does not belong to the data set in DATASETS.TEST"
            )
        fields = dict(instances.get_fields())
        fields["pred_classes"] = instances.pred_classes.new_tensor([self._closed_up[c] for c in predicted])
        return Instances(instances.image_size, **fields)

    def _tasks_from_predictions(self, predictions: list[dict]) -> list[str]:
        # COCOEvaluator would report boxes alone: the metrics' names would depend on the model.
        return super()._tasks_from_predictions(predictions) if predictions else ["bbox", "segm"]

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence | None = None) -> None:
        """COCOEvaluator's, with ParallelCOCOeval, and without its copies of all masks."""
        results = list(itertools.chain.from_iterable(one["instances"] for one in predictions))
        tasks = sorted(self._tasks or self._tasks_from_predictions(results))
        if self._use_fast_impl or not self._do_evaluation or not set(tasks) <= {"bbox", "segm"}:
            super()._eval_predictions(predictions, img_ids=img_ids)
            return
        logger.info("Evaluating %d predicted instances with the official COCO API", len(results))
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is not None:
            dataset_ids = {v: k for k, v in contiguous.items()}
            for result in results:
                result["category_id"] = dataset_ids[result["category_id"]]
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            with PathManager.open(path, "w") as file:
                file.write(json.dumps(results))
        for task in tasks:
            evaluation = None
            if results:  # COCO takes no empty list
                # It writes to them. Where they have boxes, COCO takes the boxes' areas for the instances' own.
                mine = [{k: v for k, v in one.items() if task == "bbox" or k != "bbox"} for one in results]
                found = self._coco_api.loadRes(mine)
                evaluation = ParallelCOCOeval(self._coco_api, found, task, self._max_processes)
                if img_ids is not None:
                    evaluation.params.imgIds = img_ids
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            self._results[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )


def _has_fast_coco_eval() -> bool:
    """Whether detectron2's compiled COCOeval is there; a build without csrc has none, or a plain stand-in."""
    try:
        from detectron2.evaluation.fast_eval_api import COCOeval_opt
    except ImportError:
        return False
    return COCOeval_opt.evaluate is not COCOeval.evaluate
