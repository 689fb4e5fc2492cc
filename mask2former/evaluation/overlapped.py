"""Evaluators whose work on an image runs in threads while the model has the next images.

An evaluator does this work in three steps. `fetch` starts copying what it reads of an output to the host, in the caller's
thread and without waiting; `examine` makes of that what is to be kept of the image, in any thread; `add` keeps it, in the
caller's thread and in the images' order, so that results do not depend on the threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor

from .kept_images import KeptImages

# More would mostly wait for Python's lock, which the model's thread needs too.
_MOST_THREADS = 8
# Images under way for each thread: one that it works on, one that waits.
_IMAGES_PER_THREAD = 2


class HostCopies:
    """Tensors on their way to the host. They may be read after `wait`, which any thread may call."""

    def __init__(self) -> None:
        self._devices: set[torch.device] = set()
        self._events: list[torch.cuda.Event] = []

    def start(self, value: Any) -> Any:
        """A tensor, Boxes or Instances on the CPU, those of a GPU in pinned memory; what is there already, as it is."""
        if isinstance(value, Instances):
            fields = {name: self.start(field) for name, field in value.get_fields().items()}
            return Instances(value.image_size, **fields)
        if isinstance(value, Boxes):
            return Boxes(self.start(value.tensor))
        if not isinstance(value, Tensor):
            return value.to("cpu") if hasattr(value, "to") else value
        if value.is_cuda:
            self._devices.add(value.device)
        return value.to("cpu", non_blocking=True)

    def started(self) -> None:
        """No more are to come."""
        for device in self._devices:
            event = torch.cuda.Event(blocking=True)  # spinning would take a core from the others
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def wait(self) -> None:
        for event in self._events:
            event.synchronize()


class PerImageMixin:
    """Before an evaluator of detectron2: its `process` by way of `fetch`, `examine` and `add`."""

    def fetch(self, output: Mapping[str, Any], copies: HostCopies) -> Any:
        """What `examine` reads of the model's output for an image, on its way to the host."""
        raise NotImplementedError

    def examine(self, image: Mapping[str, Any], fetched: Any) -> Any:
        """What is to be kept of an image. Changes nothing of the evaluator, since several threads call it."""
        raise NotImplementedError

    def add(self, examined: Any) -> None:
        """Keep what `examine` returned."""
        raise NotImplementedError

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            copies = HostCopies()
            fetched = self.fetch(output, copies)
            copies.started()
            copies.wait()
            self.add(self.examine(image, fetched))


class OverlappedEvaluators(DatasetEvaluators):
    """Several evaluators as one; those with PerImageMixin examine images in threads, the others in the caller's.

    `process` returns before the images have been examined, and waits where more than a few are under way: until then, the
    outputs must not be changed. An error in a thread is raised by a later call of `process`, or by `wait` or `evaluate`;
    the images after it are dropped.
    """

    def __init__(self, evaluators: Sequence[DatasetEvaluator], num_threads: int):
        """
        Args:
            num_threads: 0 for none; everything is then done before `process` returns.
        """
        super().__init__(list(evaluators))
        self._num_threads = num_threads
        self._per_image = [e for e in evaluators if isinstance(e, PerImageMixin)]
        self._others = [e for e in evaluators if not isinstance(e, PerImageMixin)]
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[Future, dict | None]] = deque()
        # Where it is set: keeps the images in files, and has those of an evaluation that ended early.
        self.kept: KeptImages | None = None

    @property
    def can_keep(self) -> bool:
        """Whether all that is known of an image passes through here, and not by an evaluator without `add`."""
        return not self._others

    @property
    def most_pending(self) -> int:
        """How many images are under way at most."""
        return _IMAGES_PER_THREAD * self._num_threads

    def reset(self) -> None:
        self.close()
        super().reset()
        for examined in self.kept.earlier if self.kept else ():
            self._add(examined)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        runner = self.kept.batch_runner() if self.kept else None
        if not self._num_threads and self.kept:
            for image, output in zip(inputs, outputs, strict=True):
                copies = HostCopies()
                fetched = [evaluator.fetch(output, copies) for evaluator in self._per_image]
                copies.started()
                examined = self._examine(image, fetched, copies)
                self.kept.add(examined, runner)
                self._add(examined)
                runner = None
            return
        if not self._num_threads:
            super().process(inputs, outputs)
            return
        try:
            for evaluator in self._others:
                evaluator.process(inputs, outputs)
            for image, output in zip(inputs, outputs, strict=True):
                self._add_examined(self.most_pending - 1)
                copies = HostCopies()
                fetched = [evaluator.fetch(output, copies) for evaluator in self._per_image]
                copies.started()
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="evaluation")
                # No evaluator reads the pixels.
                record = {k: v for k, v in image.items() if k != "image"}
                self._pending.append((self._pool.submit(self._examine, record, fetched, copies), runner))
                runner = None
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Return when all images have been examined; no thread is left then."""
        try:
            self._add_examined(0)
        finally:
            self.close()

    def evaluate(self) -> dict:
        self.wait()
        return super().evaluate()

    def close(self) -> None:
        """Drop the images that have not been examined, and end the threads."""
        self._pending.clear()
        if self.kept:
            self.kept.flush()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _examine(self, image: dict, fetched: list, copies: HostCopies) -> list:
        copies.wait()
        return [
            evaluator.examine(image, part) for evaluator, part in zip(self._per_image, fetched, strict=True)
        ]

    def _add_examined(self, most: int) -> None:
        """Keep what is known of the first images, and wait until at most `most` are under way."""
        while self._pending and (len(self._pending) > most or self._pending[0][0].done()):
            future, runner = self._pending[0]
            examined = future.result()
            if self.kept:
                self.kept.add(examined, runner)
            self._add(examined)
            self._pending.popleft()

    def _add(self, examined: list) -> None:
        for evaluator, part in zip(self._per_image, examined, strict=True):
            evaluator.add(part)


def number_of_threads(wanted: int) -> int:
    """TEST.EVALUATION_THREADS as a number of threads: -1 is this process's share of the CPUs, at most 8.

    Raises:
        ValueError: it is below -1.
    """
    if wanted < -1:
        raise ValueError(
            f"TEST.EVALUATION_THREADS is {wanted}; allowed are 0, positive numbers and -1 (automatic)"
        )
    if wanted != -1:
        return wanted
    return max(1, min(available_cpus() // comm.get_local_size(), _MOST_THREADS))


def available_cpus() -> int:
    """Those that the process may run on, where the system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
