"""The backends that tools/benchmark.py compares, how far they agree with PyTorch, and what they cost to start."""

from __future__ import annotations

import gc
import time

import torch
from benchmark_model import Subject

from mask2former.backend import BackendError, build_backend


def install(subject: Subject, cfg, backend: str, precision: str) -> dict:
    """Run the subject's network by a backend.

    Returns:
        columns of the table: for TensorRT its version, and where one engine serves all sizes the seconds that building it
        took (whenever that was), the seconds of a start from the cache in this process, and the engine's size.

    Raises:
        BackendError: the backend cannot run here, or its engine was refused.
    """
    subject.use(None)
    gc.collect()  # engines of the backend before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if backend == "torch":
        subject.use(build_backend("torch", subject.model, cfg))
        return {}
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["MODEL.BACKEND", backend])
    if backend == "tensorrt":
        cfg.MODEL.TENSORRT.PRECISION = precision
    made = build_backend(backend, subject.model, cfg)
    made.prepare()
    subject.use(made)
    told = made.describe()
    if backend != "tensorrt":
        return {}
    if told["backend"] != "tensorrt":
        raise BackendError(f"nothing of TensorRT's to time: the backend is {told['backend']}")
    from d2_trt import compat

    columns = {"tensorrt": compat.tensorrt().__version__}
    if told["engines"]:
        columns.update(engine_columns(told["engines"][0]))
        if told["engines"][0]["path"] is not None:
            columns["cached_start_s"] = cached_start(subject, cfg)
    return columns


def engine_columns(engine: dict) -> dict:
    return {"build_s": round(engine["build_seconds"], 1), "engine_mib": round(engine["mib"], 1)}


def cached_start(subject: Subject, cfg) -> float:
    """Seconds from a loaded model to a loaded engine that lies in the cache: digests, reading, deserializing."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    another = build_backend("tensorrt", subject.model, cfg)
    another.prepare()
    torch.cuda.synchronize()
    return round(time.perf_counter() - started, 2)


def agreement(outputs, reference) -> dict:
    """How far (pred_logits, pred_masks) agree with PyTorch's in float32."""
    from d2_trt.parity import compare

    return {name: float(f"{value:.6g}") for name, value in compare(outputs, reference).items()}


def reference_outputs(subject: Subject, images: torch.Tensor):
    """PyTorch's outputs in float32, without TF32."""
    from d2_trt.parity import exact_float32

    with exact_float32():
        return subject.model.core(images)
