"""Times of the stages that an image goes through, split at the backend seam."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch

STAGES = ("read", "preprocess", "network", "postprocess", "draw", "write")


class StageClock:
    """A lap clock: every lap's time since the one before is added to the stage that it names.

    Args:
        device: on CUDA every lap waits for the GPU first, so that a stage is charged for its own kernels. It
            costs a little throughput: for a demo, not for serving.
    """

    def __init__(self, device: str | torch.device = "cpu", now: Callable[[], float] = time.perf_counter):
        self._device = torch.device(device)
        self._now = now
        self.start()

    def start(self) -> None:
        """Begin another image."""
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


class TimedBackend:
    """A backend that tells a StageClock when the network starts and ends; else it is the wrapped backend."""

    def __init__(self, backend, clock: StageClock):
        self._backend = backend
        self._clock = clock

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def __call__(self, images):
        self._clock.lap("preprocess")
        outputs = self._backend(images)
        self._clock.lap("network")
        return outputs


def time_backend(model, clock: StageClock) -> None:
    """Put a TimedBackend in the place of a MaskFormer's backend, which is built if it is not there yet."""
    model.backend = TimedBackend(model.backend, clock)


def median_ms(laps: Iterable[dict[str, float]]) -> dict[str, float]:
    """Median milliseconds of each stage that occurs, in the order of STAGES, and of an image's "total"."""
    laps = list(laps)
    medians = {}
    for stage in STAGES:
        seconds = [lap[stage] for lap in laps if stage in lap]
        if seconds:
            medians[stage] = 1e3 * statistics.median(seconds)
    if laps:
        medians["total"] = 1e3 * statistics.median(sum(lap.values()) for lap in laps)
    return medians
