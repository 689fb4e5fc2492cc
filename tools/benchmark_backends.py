"""The backends that tools/benchmark.py compares, how far they agree with PyTorch, and what they cost to start."""

from __future__ import annotations

import time

import torch
from benchmark_model import Subject
from benchmark_timing import autocast

from mask2former.backend import BackendError, build_backend, check_backend

COMPILE = "compile"  # of the benchmark alone; the others are names of MODEL.BACKEND


def check(name: str, cfg) -> None:
    """Raise as check_backend does where a name or its part of the config is wrong."""
    if name != COMPILE:
        check_backend(name, cfg)


def make_backend(subject: Subject, cfg, name: str, precision: str, compile_mode: str):
    """What runs the subject's network by a backend's name at a precision; an engine is built or loaded first.

    Raises:
        BackendError: the backend cannot run here, or its engine was refused.
    """
    device = cfg.MODEL.DEVICE
    if name == COMPILE:
        from benchmark_compile import CompileBackend

        return InPrecision(CompileBackend(subject.model, device, compile_mode), precision, device)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["MODEL.BACKEND", name])
    if name == "tensorrt":
        cfg.MODEL.TENSORRT.PRECISION = precision
    made = build_backend(name, subject.model, cfg)
    if name == "torch":
        return InPrecision(made, precision, device)
    made.prepare()
    told = made.describe()
    if name == "tensorrt" and told["backend"] != "tensorrt":
        raise BackendError(f"nothing of TensorRT's to time: the backend is {told['backend']}")
    return made


class InPrecision:
    """A backend in autocast, which PyTorch keeps by thread: a stream runs its network in one of its own."""

    def __init__(self, backend, precision: str, device: str):
        self._backend, self._precision, self._device = backend, precision, device

    def describe(self) -> dict:
        return self._backend.describe()

    def __call__(self, images: torch.Tensor):
        with autocast(self._precision, self._device):
            return self._backend(images)


def variant(cfg, name: str, compile_mode: str) -> str:
    """What distinguishes configurations of one backend and precision."""
    if name == COMPILE:
        return compile_mode
    if name != "tensorrt":
        return ""
    return "static" if cfg.MODEL.TENSORRT.STATIC else "dynamic"


def engine_columns(told: dict, batch: int, height: int, width: int) -> dict:
    """Seconds that building the engine of a padded size took (whenever that was), and its size; {} without an engine.

    Of an engine for that size alone also the seconds that loading it from the cache took, where it came from there.

    Args:
        told: of a backend's describe().
    """
    from d2_trt.shape_range import ShapeRange

    engines = [
        (shapes.is_static, engine)
        for engine in told.get("engines", ())
        if (shapes := ShapeRange.from_json(engine["shapes"])).contains(batch, height, width)
    ]
    if not engines:
        return {}
    static, engine = max(engines, key=lambda pair: pair[0])
    columns = {"build_s": round(engine["build_seconds"], 1), "engine_mib": round(engine["mib"], 1)}
    if static and not engine["built"]:
        columns["cached_start_s"] = round(engine["ready_seconds"], 2)
    return columns


def cached_start(subject: Subject, cfg, precision: str) -> float:
    """Seconds from a loaded model to a loaded engine that lies in the cache: digests, reading, deserializing."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["MODEL.BACKEND", "tensorrt", "MODEL.TENSORRT.PRECISION", precision])
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
