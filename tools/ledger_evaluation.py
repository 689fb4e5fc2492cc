"""What tools/accuracy_ledger.py measures of a model: metrics of a data set, agreement with PyTorch, and time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from benchmark_timing import Timer, set_precision
from detectron2.config import CfgNode
from measurements import number

from d2_trt.options import TensorRTOptions
from d2_trt.parity import Comparison, exact_float32
from mask2former.evaluation import build_test_loader, evaluate_model

# (column, task of the results, name there), in points: percent.
METRICS = (
    *((name, "panoptic_seg", name) for name in ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th")),
    *((name, "panoptic_seg", name) for name in ("PQ_st", "SQ_st", "RQ_st")),
    *((name, "segm", name) for name in ("AP", "AP50", "AP75")),
    *((name, "sem_seg", name) for name in ("mIoU", "fwIoU", "mACC")),
)
AGREEMENT = ("logit_error", "mask_error", "sign_agreement", "class_agreement")


class Network:
    """A model whose network is run by one backend after another."""

    def __init__(self, model):
        self.model = model

    def use(self, backend) -> None:
        self.model.backend = backend


@contextlib.contextmanager
def pytorch_precision(precision: str, device: str) -> Iterator[None]:
    """PyTorch's arithmetic; TF32 is as before afterwards."""
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [owner.allow_tf32 for owner in owners]
    try:
        with set_precision(precision, device):
            yield
    finally:
        for owner, value in zip(owners, before):
            owner.allow_tf32 = value


def sized(cfg: CfgNode, size: tuple[int, int], batch: int, folder: str) -> CfgNode:
    """A config for one row: INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST, TEST.BATCH_SIZE and OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = size
    cfg.TEST.BATCH_SIZE = batch
    cfg.OUTPUT_DIR = folder
    cfg.freeze()
    return cfg


def engine_cfg(cfg: CfgNode, sizes: list[tuple[int, int]], batches: list[int]) -> CfgNode:
    """A config whose engine serves every size and batch of the rows, so that one build does for all of them.

    What the engine does not take is an error: PyTorch's results must not stand in TensorRT's rows.
    """
    cfg = cfg.clone()
    cfg.defrost()
    options = cfg.MODEL.TENSORRT
    options.MAX_BATCH_SIZE = max(batches)
    if not options.OPT_BATCH_SIZE:
        options.OPT_BATCH_SIZE = min(batches)
    options.ON_OUT_OF_RANGE = options.ON_ERROR = "raise"
    if not options.SHAPES:
        ranges = []
        for size in sizes:
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = size
            ranges.append(TensorRTOptions.from_cfg(cfg).shapes)
        low, high = (
            [pick(getattr(r, end)[i] for r in ranges) for i in (1, 2)]
            for end, pick in (("min", min), ("max", max))
        )
        options.SHAPES = [f"{h}x{w}" for h, w in (low, ranges[0].opt[1:], high)]
    cfg.freeze()
    return cfg


def metric_columns(results: dict) -> dict[str, float]:
    """Columns of METRICS from evaluate_model's results; what was not evaluated, or is NaN, is left out."""
    columns = {}
    for column, task, name in METRICS:
        value = results.get(task, {}).get(name)
        if value is not None and value == value:
            columns[column] = round(float(value), 4)
    return columns


def evaluate(cfg: CfgNode, model, precision: str) -> dict[str, float]:
    """Metrics of the model, as it is, on the data set of the config.

    Args:
        cfg: of `sized`; predictions and results.json go to its OUTPUT_DIR.
        precision: of PyTorch, for what it runs.
    """
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    with pytorch_precision(precision, cfg.MODEL.DEVICE):
        return metric_columns(evaluate_model(cfg, model))


class Images:
    """Some images of a data set, evenly spread over it, as padded batches."""

    def __init__(self, cfg: CfgNode, model, count: int):
        """
        Args:
            cfg: one name in DATASETS.TEST; TEST.BATCH_SIZE images make a batch.
            count: at most so many images; at least one.
        """
        self._model = model
        loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
        everything, batch = loader.dataset, cfg.TEST.BATCH_SIZE
        count = min(count, len(everything))
        places = [i * len(everything) // count for i in range(count)]
        self._inputs = [everything[place] for place in places]
        self._batch = batch
        self.count = count

    def batches(self) -> Iterator[torch.Tensor]:
        """(B, 3, H, W) float32 on the model's device, padded."""
        for first in range(0, self.count, self._batch):
            yield self._model.preprocess(self._inputs[first : first + self._batch])[0]


@torch.no_grad()
def agreement_columns(model, images: Images, precision: str, device: str) -> dict[str, float]:
    """Columns of AGREEMENT: how the model's backend agrees with PyTorch in float32 on images."""
    comparison = Comparison()
    for batch in images.batches():
        with pytorch_precision(precision, device):
            actual = [tensor.clone() for tensor in model.backend(batch)]
        with exact_float32():
            comparison.add(actual, model.core(batch))
    return {name: number(value) for name, value in comparison.numbers().items()}


@torch.no_grad()
def latency_columns(model, images: Images, precision: str, timer: Timer) -> dict:
    """Median time of the network alone on the first of the batches, and that batch's padded size."""
    batch = next(images.batches())
    with pytorch_precision(precision, timer.device):
        times = timer.measure(lambda: model.backend(batch))
    return {"core_ms": times["median_ms"], "padded": "x".join(map(str, batch.shape[-2:]))}
