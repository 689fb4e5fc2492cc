"""One process's part of a benchmark: configurations of one model, the cases that they run, and their times."""

from __future__ import annotations

import argparse
import contextlib
import gc
import traceback
from typing import Any

import torch
from benchmark_model import Case, Footprint, Subject, build_cfg, weights_mib
from benchmark_timing import Stage, Timer, set_precision

# Of these an engine that was let go of is loaded from the cache again.
_KEEPING_MODES = ("readwrite", "require")
# A footprint may fall by so much when PyTorch frees what was in use before.
_SLACK_MIB = 32.0


class MeasureError(Exception):
    """A configuration could not be installed, prepared or timed; `memory` where the GPU's did not suffice."""

    def __init__(self, message: str, memory: bool = False):
        super().__init__(message)
        self.memory = memory


class _Member:
    """A configuration: its columns, its backend while it is installed, the stages of the case at hand, those timed.

    `installed` is the memory that it took before the case at hand, `case` what it has kept since.
    """

    def __init__(self, columns: dict[str, Any], cuda: bool):
        self.columns = columns
        self.backend = None
        self.installed = Footprint(cuda)
        self.case = Footprint(cuda)
        self.stages: dict[str, Stage] = {}
        self.timed: set[str] = set()


class LocalBench:
    """Configurations of this process's model. RemoteBench has the same methods for those of another process.

    A configuration and a case are named by their indices in `configurations` and in work_of(args).
    """

    def __init__(self, args: argparse.Namespace, device: str):
        """Build the model.

        Raises:
            BackendError, KeyError, ValueError: the config cannot be.
        """
        self._args = args
        self._timer = Timer(device)
        self.cfg = build_cfg(args, device)
        members = [(backend, precision) for backend in self._backends() for precision in args.precision]
        self.subject = Subject(self.cfg, args.implementation, args.stream_images, args.kept_queries)
        self._cases: dict[int, Any] = {}
        self._members = []
        for backend, precision in members:
            for mode in args.compile_mode if backend == "compile" else [""]:
                columns = {"implementation": args.implementation, "backend": backend, "precision": precision}
                if not self.subject.release:
                    from benchmark_backends import variant

                    columns["variant"] = variant(self.cfg, backend, mode)
                self._members.append(_Member(columns, self._timer.cuda))
        self._reference: tuple[tuple[int, int], Any] | None = None

    def _backends(self) -> list[str]:
        if self._args.implementation == "release":
            return ["torch"]
        from benchmark_backends import check

        backends = self._args.backend or [self.cfg.MODEL.BACKEND]
        for name in backends:
            check(name, self.cfg)
        return backends

    @property
    def configurations(self) -> list[dict[str, Any]]:
        """Columns that name each configuration: implementation, backend, precision, variant."""
        return [dict(member.columns) for member in self._members]

    def install(self, index: int) -> dict[str, Any]:
        """Make a configuration ready, build or load its engine; returns columns: versions, what starting it cost.

        Raises:
            MeasureError: it cannot run here.
        """
        member = self._members[index]
        if self.subject.release:
            return {}
        from benchmark_backends import cached_start

        name, precision = member.columns["backend"], member.columns["precision"]
        with _as_measure_error():
            self._make_backend(member)
        columns: dict[str, Any] = {}
        if name == "tensorrt":
            from d2_trt import compat

            columns["tensorrt"] = compat.tensorrt().__version__
            engines = member.backend.describe()["engines"]
            if engines and engines[0]["path"] is not None and not self._args.skip_cached_start:
                with _as_measure_error():
                    columns["cached_start_s"] = cached_start(self.subject, self.cfg, precision)
        return columns

    def _make_backend(self, member: _Member) -> None:
        from benchmark_backends import make_backend

        self.subject.use(None)
        member.installed = Footprint(self._timer.cuda)
        name, precision, variant = (member.columns[key] for key in ("backend", "precision", "variant"))
        with member.installed:
            member.backend = make_backend(self.subject, self.cfg, name, precision, variant)

    def uninstall(self, index: int) -> None:
        """Let go of a configuration and its memory."""
        self._members[index].stages = {}
        self._drop_backend(self._members[index])

    def _drop_backend(self, member: _Member) -> None:
        member.backend = None
        if not self.subject.release:
            self.subject.use(None)
        self._free()

    def _free(self) -> None:
        self._reference = None
        gc.collect()
        if self._timer.cuda:
            torch.cuda.empty_cache()

    def prepare(self, index: int, case: int, batch: int) -> dict[str, Any]:
        """Run a configuration once on a case.

        Returns:
            "columns" of its rows, and the names of "stages" that can be timed, until forget().

        Raises:
            MeasureError: it fails on it.
        """
        member = self._members[index]
        if member.backend is None and not self.subject.release:
            with _as_measure_error():
                self._make_backend(member)
        member.case = Footprint(self._timer.cuda)
        with _as_measure_error(), torch.no_grad(), self._active(member):
            subject = self._case(case)
            member.timed.clear()
            if hasattr(subject, "loader"):
                with member.case:
                    columns, member.stages = subject.prepare(self.subject, self.cfg, batch)
            else:
                columns, member.stages = self._prepare_image(member, case, subject, batch)
        return {"columns": columns, "stages": list(member.stages)}

    def measure(self, index: int, stage: str, samples: int, warmup: int) -> dict[str, Any]:
        """Time a stage of what was prepared.

        Returns:
            "times" of a call in ms (of a slow stage an image's share), "images" that this time finishes, and MiB on the
            GPU: "call_mib" that a call takes for itself at its peak, "resident_mib" that the configuration keeps for
            this case, weights included, and "weights_mib", those in PyTorch. "void" says why there are none.
        """
        member = self._members[index]
        work = member.stages[stage]
        if work.slow:
            samples, warmup = 1, 0 if stage in member.timed else min(warmup, 1)
        with _as_measure_error(), torch.no_grad(), self._active(member), member.case:
            if self._timer.cuda:
                torch.cuda.reset_peak_memory_stats()
            times = self._timer.samples(work, samples, warmup)
            member.timed.add(stage)
            images = work.images
            if work.slow:  # a call is a run over many images: an image's share of it says more
                times, images = [time / images for time in times], 1
            if self._timer.cuda:  # what it keeps from now on, such as a graph, is resident
                call = (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 2**20
        told: dict[str, Any] = {"times": times, "images": images, "void": ""}
        if not self._timer.cuda:
            return told
        parts = (member.installed.mib, member.case.mib)
        if min(parts) < -_SLACK_MIB or sum(parts) < -1:
            return {**told, "void": f"it fell by {-min(parts):.0f} MiB, which others freed"}
        weights = weights_mib(self.subject.model)
        resident = max(sum(parts), 0.0) + weights
        return {**told, "call_mib": call, "resident_mib": resident, "weights_mib": weights}

    def forget(self, index: int) -> None:
        """Let go of what prepare() and calls left: graphs, engines of one size, what was compiled for one.

        So the next case's memory is its own.
        """
        member = self._members[index]
        member.stages = {}
        backend = member.columns["backend"]
        if backend == "tensorrt" and self.cfg.MODEL.TENSORRT.CACHE.MODE in _KEEPING_MODES:
            self._drop_backend(member)  # made anew from the cache
            return
        if backend == "compile":
            torch.compiler.reset()
        self._free()

    def workload(self, case: int) -> Any:
        """What a case of an image asks of the machine: a benchmark_work.Workload."""
        from benchmark_work import Workload

        subject = self._case(case)
        self.subject.use(None)
        with _as_measure_error(), torch.no_grad():
            return Workload.count(
                self.subject.model.core, self.subject.model, self.subject.padded(subject, 1)
            )

    def close(self) -> None:
        """Nothing is left to end."""

    def _prepare_image(
        self, member: _Member, index: int, case: Case, batch: int
    ) -> tuple[dict[str, Any], dict[str, Stage]]:
        images = self.subject.padded(case, batch)
        # The tool's own tensors are not the configuration's memory.
        reference = None if self.subject.release else self._reference_outputs(index, batch, images)
        with member.case:
            outputs = self.subject.core(images)
        member.case.leave_out(_nbytes(outputs))
        stages = self.subject.stages(case, batch, images, outputs)
        results = stages["postprocess"].call()
        columns: dict[str, Any] = {
            "batch": batch,
            "image": case.name,
            "padded": "x".join(map(str, images.shape[-2:])),
            "output": case.name,
            # What there was to post-process: few segments make it easy.
            "segments": len(results[0]["panoptic_seg"][1]) if "panoptic_seg" in results[0] else "",
            "instances": len(results[0]["instances"]) if "instances" in results[0] else "",
            "postprocess_mb": round((_nbytes(_logits_and_masks(outputs)) + _nbytes(results)) / 1e6, 3),
        }
        if columns["segments"] == 0:
            columns["note"] = "no segments: post-processing had little to do"
        if not self.subject.release:
            from benchmark_backends import agreement, engine_columns

            columns.update(agreement(outputs, reference))
            if member.columns["backend"] == "tensorrt":
                columns.update(engine_columns(member.backend.describe(), batch, *images.shape[-2:]))
            elif member.columns["backend"] == "compile":
                breaks = f"{member.backend.describe()['graph_breaks']} graph breaks"
                columns["note"] = joined_notes(columns.get("note"), breaks)
        return columns, stages

    def _reference_outputs(self, case: int, batch: int, images: torch.Tensor):
        """PyTorch's outputs for a case, kept while other configurations come to the same one."""
        from benchmark_backends import reference_outputs

        if self._reference is None or self._reference[0] != (case, batch):
            self._reference = (case, batch), reference_outputs(self.subject, images)
        return self._reference[1]

    def _case(self, index: int):
        if index not in self._cases:
            kind, size = work_of(self._args)[index]
            if kind == "evaluation":
                from benchmark_evaluation import EvaluationCase

                self._cases[index] = EvaluationCase(
                    self.cfg, self._args.eval_images, release=self.subject.release
                )
            else:
                self._cases[index] = Case(self.subject.predictor, size, resize=kind == "image")
        return self._cases[index]

    @contextlib.contextmanager
    def _active(self, member: _Member):
        """The model runs by a configuration."""
        if not self.subject.release:
            self.subject.use(member.backend)
        # Of TensorRT, the engine has the precision; PyTorch keeps what is left to it in float32.
        precision = "fp32" if member.columns["backend"] == "tensorrt" else member.columns["precision"]
        with set_precision(precision, self._timer.device):
            yield


def work_of(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The cases of a run: ("image", size) that is resized, ("as it is", size), ("evaluation", None)."""
    work: list[tuple[str, Any]] = []
    if set(args.stages) - {"evaluation"}:
        work += [("image", size) for size in args.image_size] + [("as it is", size) for size in args.size]
    return work + ([("evaluation", None)] if "evaluation" in args.stages else [])


@contextlib.contextmanager
def _as_measure_error():
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MeasureError(
            f"the GPU's memory does not suffice: {_first_lines(error)}", memory=True
        ) from error
    except Exception as error:
        # By name: an official checkout's package has no BackendError to import.
        ours = any(kind.__name__ == "BackendError" for kind in type(error).__mro__)
        told = ours or isinstance(error, (FileNotFoundError, KeyError))
        message = (
            str(error.args[0]) if told and error.args else f"{type(error).__name__}: {_first_lines(error)}"
        )
        if not told:
            traceback.print_exc()
        raise MeasureError(message, memory="memory" in message and "GPU" in message) from error


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3])


def _logits_and_masks(outputs: Any) -> tuple:
    """The two of the last layer: the release's outputs hold the earlier layers' too."""
    return (outputs["pred_logits"], outputs["pred_masks"]) if isinstance(outputs, dict) else tuple(outputs)


def joined_notes(*notes: str | None) -> str:
    return "; ".join(filter(None, notes))


def _nbytes(value: Any) -> int:
    """Bytes of all tensors in nested results."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    if hasattr(value, "get_fields"):
        return _nbytes(value.get_fields())
    return _nbytes(getattr(value, "tensor", None)) if hasattr(value, "tensor") else 0
