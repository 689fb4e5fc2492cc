"""How tools/benchmark.py times calls, and in what arithmetic PyTorch runs them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Calls back to back make a sample of about so long: short enough for many samples, long against an event's own time.
_REPEATED_MS = 100.0
_MOST_REPEATS = 200


@dataclass(frozen=True)
class Stage:
    """Something to time.

    Attributes:
        call: does it once.
        images: how many images a call finishes.
        wall_clock: time from the host's start to the end of the GPU's work, where much of it is spent on the CPU.
        back_to_back: many calls, without waiting for the GPU between them, make a sample.
        slow: one sample a round, after at most one warm-up in the first and none in later rounds.
    """

    call: Callable[[], object]
    images: int
    wall_clock: bool = False
    back_to_back: bool = False
    slow: bool = False


def check_device(device: str, option: str) -> None:
    """
    Args:
        option: what chooses the device; empty for a tool that has no other.

    Raises:
        ValueError: it is a GPU that PyTorch does not see.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not device.startswith("cuda") or (torch.device(device).index or 0) < count:
        return
    raise ValueError(
        f"{f'{option} {device}' if option else 'this needs an NVIDIA GPU'}, but PyTorch {torch.__version__} sees "
        f"{count or 'none'}. Check nvidia-smi, and that PyTorch is a build with CUDA"
        + (f", or take {option} cpu" if option else "")
    )


class Timer:
    """Times calls one by one; on CUDA with events, or wall-clock time around a synchronised call."""

    def __init__(self, device: str):
        self.device = device
        self.cuda = device.startswith("cuda")

    def samples(self, stage: Stage, count: int, warmup: int) -> list[float]:
        """Milliseconds of a call, `count` times, after `warmup` calls that do not count."""
        for _ in range(warmup):
            stage.call()
        self._wait()
        repeats = 1
        if stage.back_to_back:
            once = max(self._time(stage, 1), 1e-3)
            repeats = min(max(round(_REPEATED_MS / once), 2), _MOST_REPEATS)
        return [self._time(stage, repeats) for _ in range(count)]

    def _time(self, stage: Stage, repeats: int) -> float:
        if self.cuda and not stage.wall_clock:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                stage.call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / repeats
        begin = time.perf_counter()
        for _ in range(repeats):
            stage.call()
        self._wait()
        return (time.perf_counter() - begin) * 1e3 / repeats

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def summary(times: Sequence[float], images: int) -> dict[str, float | int]:
    """Columns of a row: median and percentiles in ms, number of samples, images a second by the median."""
    times = sorted(times)
    median = statistics.median(times)
    return {
        "median_ms": round(median, 4),
        "p10_ms": round(_percentile(times, 0.1), 4),
        "p90_ms": round(_percentile(times, 0.9), 4),
        "iterations": len(times),
        "images_per_s": float(f"{images / median * 1e3:.5g}"),
    }


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest of ordered numbers."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def set_precision(precision: str, device: str) -> contextlib.AbstractContextManager:
    """Set PyTorch's TF32 switches; returns the context that a call runs in."""
    tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    return autocast(precision, device)


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager:
    """Autocast for the 16-bit precisions, nothing for the others."""
    if precision in ("fp16", "bf16"):
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(device.split(":")[0], dtype=dtype)
    return contextlib.nullcontext()
