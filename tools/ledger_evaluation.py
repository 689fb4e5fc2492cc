"""What tools/accuracy_ledger.py measures of a model: metrics of a data set, agreement with PyTorch, and time."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from measurements import number

from d2_trt.options import TensorRTOptions
from d2_trt.parity import Comparison, exact_float32
from d2_trt.shape_range import round_up
from mask2former.backend import BackendError, build_backend
from mask2former.data.errors import AnnotationError
from mask2former.evaluation import build_test_loader, evaluate_model

# (column, task of the results, name there), in points: percent.
METRICS = (
    *((name, "panoptic_seg", name) for name in ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th")),
    *((name, "panoptic_seg", name) for name in ("PQ_st", "SQ_st", "RQ_st")),
    *((name, "segm", name) for name in ("AP", "AP50", "AP75")),
    *((name, "sem_seg", name) for name in ("mIoU", "fwIoU", "mACC")),
)
AGREEMENT = ("logit_error", "mask_error", "sign_agreement", "class_agreement")


def use_backend(model, cfg: CfgNode, backend: str, precision: str) -> dict[str, float]:
    """Have a model's network run by a backend.

    Args:
        precision: of an engine; PyTorch's is `pytorch_precision`.

    Returns:
        of TensorRT "build_s", the seconds that building the engine took, whenever that was, and "engine_mib".

    Raises:
        BackendError: the backend cannot run here, or its engine was refused.
    """
    model.backend = None
    gc.collect()  # the engine of the backend before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKEND, cfg.MODEL.TENSORRT.PRECISION = backend, precision
    made = build_backend(backend, model, cfg)
    made.prepare()
    told = made.describe()
    if backend == "tensorrt" and told["backend"] != "tensorrt":
        raise BackendError(f"nothing of TensorRT's to measure: the backend is {told['backend']}")
    model.backend = made
    if not told.get("engines"):
        return {}
    engine = told["engines"][0]
    return {"build_s": round(engine["build_seconds"], 1), "engine_mib": round(engine["mib"], 1)}


@contextlib.contextmanager
def pytorch_precision(precision: str, device: str) -> Iterator[None]:
    """PyTorch's arithmetic: fp32, tf32, or autocast to fp16 or bf16; TF32 is as before afterwards."""
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [owner.allow_tf32 for owner in owners]
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    try:
        for owner in owners:
            owner.allow_tf32 = precision != "fp32"
        with torch.autocast(device.split(":")[0], dtype=half) if half else contextlib.nullcontext():
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


def images_outside(
    cfg: CfgNode, sizes: Sequence[tuple[int, int]], records: Iterable[Mapping], divisibility: int
) -> str:
    """Which padded sizes an engine does not take, of a data set whose records tell sizes; empty where it takes them all.

    Args:
        cfg: of `engine_cfg`.
        sizes: values of INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST.
        records: of DatasetCatalog.
        divisibility: what images are padded to a multiple of.
    """
    shapes = TensorRTOptions.from_cfg(cfg, size_divisibility=divisibility).shapes
    padded = set()
    for height, width in {(r["height"], r["width"]) for r in records if "height" in r and "width" in r}:
        for shortest, longest in sizes:
            scale = min(shortest / min(height, width), longest / max(height, width))
            padded.add(tuple(round_up(int(n * scale + 0.5), max(divisibility, 1)) for n in (height, width)))
    outside = sorted(size for size in padded if not shapes.contains(1, *size))
    if not outside:
        return ""
    ends = [
        "x".join(str(pick(pair)) for pair in zip(*padded, end[1:]))
        for end, pick in ((shapes.min, min), (shapes.max, max))
    ]
    wide = str([ends[0], "x".join(map(str, shapes.opt[1:])), ends[1]])
    return (
        f"{len(outside)} of the data set's padded sizes, such as {outside[0][0]}x{outside[0][1]}, are outside the engine's "
        f"range ({shapes.describe()}). Add: MODEL.TENSORRT.SHAPES {wide!r}"
    )


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

        Raises:
            AnnotationError: one of these images cannot be read.
        """
        self._model = model
        loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
        everything, batch = loader.dataset, cfg.TEST.BATCH_SIZE
        count = min(count, len(everything))
        places = [i * len(everything) // count for i in range(count)]
        self._inputs = [everything[place] for place in places]
        for one in self._inputs:
            if isinstance(one, AnnotationError):  # which only the loader's iterator raises
                raise one
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
def latency_columns(model, images: Images, precision: str, device: str, warmup: int, iterations: int) -> dict:
    """Median time of the network alone on the first of the batches, and that batch's padded size."""
    batch = next(images.batches())
    with pytorch_precision(precision, device):
        times = call_times(lambda: model.backend(batch), device, warmup, iterations)
    return {
        "core_ms": round(statistics.median(times), 3),
        "padded": "x".join(map(str, batch.shape[-2:])),
    }


def call_times(call, device: str, warmup: int, iterations: int) -> list[float]:
    """Milliseconds of each of some calls: between CUDA events around it, on a CPU by the clock."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(iterations):
        if device.startswith("cuda"):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
    return times
