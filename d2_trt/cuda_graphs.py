"""CUDA graphs of an engine: the launches of one input shape, recorded once, replayed with one call.

An engine's kernels are launched one by one, a graph's together. A graph is bound to addresses: it has an execution context,
an input and outputs of its own. Images are copied in and results out, so that callers own what they get.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .build_failure import is_memory_error
from .errors import first_line
from .logging import get_logger

logger = get_logger(__name__)

Shape = tuple[int, ...]

# A shape is captured when it comes for the second time while there is room, and for this many times where another one must
# go for it: images of ever new sizes run as they are, without a capture for each.
RUNS_TO_REPLACE = 8
# A shape that no memory was left for is tried again after this many runs.
RUNS_TO_RETRY = 256
# Shapes without a graph whose runs are counted; the least recently seen is forgotten first.
MAX_COUNTED = 64


class CapturedRun:
    """One input shape's work as a graph, with the buffers that it reads and writes."""

    def __init__(
        self,
        enqueue: Callable[[int], None],
        images: Tensor,
        outputs: list[Tensor],
        stream: torch.cuda.Stream,
    ):
        """Run the work once, then record it.

        Args:
            enqueue: puts the work on the stream with the handle that it is given; reads `images`, writes `outputs`, and
                keeps alive whatever else the work needs.
            images, outputs: fixed buffers.
            stream: to record on; nobody else's.

        Raises:
            RuntimeError: the work cannot be recorded.
        """
        self._enqueue, self._images, self._outputs = enqueue, images, outputs
        self.driver_bytes = 0  # what the driver keeps for it, where somebody measured that
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            enqueue(stream.cuda_stream)  # sets up and loads what must not be set up or loaded while recording
            with _no_garbage_collection():
                try:
                    # thread_local: calls of other threads (allocations, another build) neither fail nor end the recording.
                    self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    enqueue(stream.cuda_stream)
                    self._graph.capture_end()
                except BaseException:
                    # Otherwise what waits for the stream would become part of the recording.
                    with contextlib.suppress(RuntimeError):  # broken too; the reason is the first error
                        if torch.cuda.is_current_stream_capturing():
                            self._graph.capture_end()
                    _end_allocations(images.device, pool)
                    raise

    @property
    def nbytes(self) -> int:
        """GPU memory that it keeps: its buffers', and the driver's."""
        tensors = (self._images, *self._outputs)
        return sum(t.numel() * t.element_size() for t in tensors) + self.driver_bytes

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Results for images of the recorded shape, on the current stream, in new tensors."""
        with torch.no_grad():
            self._images.copy_(images)
            self._graph.replay()
            return [output.clone() for output in self._outputs]


def _end_allocations(device: torch.device, pool) -> None:
    """Tell PyTorch's allocator that a broken recording is over, which capture_end leaves out where it raises.

    Otherwise it would wait for the recording's end for ever, and meanwhile give back no memory that crossed streams.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with contextlib.suppress(RuntimeError):  # where it is over after all
            end(device.index, pool)


# Engines record one after the other: the end of a recording must not switch collections on for another thread's.
_recordings = threading.Lock()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection may free what another part left to it: CUDA memory and graphs, which breaks a recording."""
    with _recordings:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def memory_beside_pytorch() -> int:
    """Bytes of the current GPU that something else than PyTorch's allocator has: this process's contexts, graphs and kernels
    among it, and other processes.
    """
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


class GraphCache:
    """Graphs by input shape, bounded in number and in memory; the least recently used goes. Used under its engine's lock."""

    def __init__(self, limit: int, max_bytes: float = math.inf):
        """
        Args:
            limit: graphs.
            max_bytes: GPU memory that they may take together, as CapturedRun.nbytes counts it.
        """
        if limit < 1:
            raise ValueError(f"a cache of {limit} graphs; expected at least 1")
        self._limit, self._max_bytes = limit, max_bytes
        self._runs: OrderedDict[Shape, CapturedRun] = OrderedDict()
        self._seen: OrderedDict[Shape, int] = OrderedDict()  # below 0 for a shape that no memory was left for
        self._captures = self._replays = 0
        self._told: set[str] = set()
        self.failure = ""

    @property
    def nbytes(self) -> int:
        """GPU memory of all graphs."""
        return sum(run.nbytes for run in list(self._runs.values()))

    def find(self, shape: Shape) -> CapturedRun | None:
        """The graph of a shape, or None."""
        run = self._runs.get(shape)
        if run is not None:
            self._runs.move_to_end(shape)
            self._replays += 1
        return run

    def wants(self, shape: Shape, nbytes: int) -> bool:
        """Count a run of a shape without a graph; whether it came often enough to be captured now.

        Args:
            nbytes: what its images and outputs take.
        """
        if self.failure:
            return False
        count = self._seen.pop(shape, 0) + 1
        if count >= (2 if self._has_room(nbytes) else RUNS_TO_REPLACE):
            return True
        self._count(shape, count)
        return False

    def add(
        self, shape: Shape, nbytes: int, capture: Callable[[], CapturedRun], retire: Callable[[], None]
    ) -> CapturedRun | None:
        """Capture a shape; None where that fails. Kinds of failure are said once each.

        Where memory does not suffice, the least recently used graphs are given up, one after the other, and if none is left
        the shape is run without one for a while. Any other failure ends all capturing.

        Args:
            nbytes: what its images and outputs take.
            capture: makes the graph.
            retire: called before a graph goes; returns when the GPU is done with all of them.
        """
        if nbytes > self._max_bytes:
            self._refuse(
                shape,
                "limit",
                f"its images and outputs alone would take {nbytes / 2**20:.1f} of the {self._max_bytes / 2**20:.1f} MiB "
                "that an engine's graphs may take (MODEL.TENSORRT.CUDA_GRAPH_MEMORY)",
            )
            return None
        while self._runs and not self._has_room(nbytes):
            self._give_up_oldest(retire)
        emptied = False
        while True:
            try:
                run = capture()
                break
            except RuntimeError as error:  # torch's for CUDA and for memory, BuildError for TensorRT
                reason = f"{type(error).__name__}: {first_line(error)}"
                if not is_memory_error(error):
                    self._end(shape, reason, error)
                    return None
            # The error is gone, and with it the frames that held what was made so far.
            if self._runs:
                self._give_up_oldest(retire)
            elif emptied:
                self._refuse(shape, "memory", f"the GPU's memory does not suffice ({reason})")
                return None
            torch.cuda.empty_cache()  # what PyTorch keeps for itself, TensorRT and the driver cannot have
            emptied = True
        self._captures += 1
        self._replays += 1  # the one that it is captured for
        self._runs[shape] = run
        # What the driver keeps is known only now. The graph that is about to run stays in any case.
        while len(self._runs) > 1 and self.nbytes > self._max_bytes:
            self._give_up_oldest(retire)
        return run

    def describe(self) -> dict[str, Any]:
        """What there is and was, JSON-serialisable: shapes, MiB that they keep, captures, replays, shapes that no memory was
        left for, and the failure that ended capturing.
        """
        return {
            "shapes": [list(shape) for shape in list(self._runs)],
            "mib": round(self.nbytes / 2**20, 3),
            "captures": self._captures,
            "replays": self._replays,
            "refused": [list(shape) for shape, count in list(self._seen.items()) if count < 0],
            "failure": self.failure,
        }

    def _has_room(self, nbytes: int) -> bool:
        """Whether one more graph fits, if the driver keeps as much for it as for any that is there."""
        expected = nbytes + max((run.driver_bytes for run in self._runs.values()), default=0)
        return len(self._runs) < self._limit and self.nbytes + expected <= self._max_bytes

    def _give_up_oldest(self, retire: Callable[[], None]) -> None:
        retire()
        self._runs.popitem(last=False)

    def _count(self, shape: Shape, count: int) -> None:
        self._seen[shape] = count
        while len(self._seen) > MAX_COUNTED:
            self._seen.popitem(last=False)

    def _refuse(self, shape: Shape, kind: str, reason: str) -> None:
        self._count(shape, -RUNS_TO_RETRY)
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(
                "No CUDA graph for images %s (B, 3, H, W): %s. Their kernels are launched one by one, and those of other "
                "shapes that this holds for, without another message.",
                shape,
                reason,
            )

    def _end(self, shape: Shape, reason: str, error: Exception) -> None:
        self.failure = reason
        logger.warning(
            "A CUDA graph for images %s (B, 3, H, W) could not be captured; the engine's kernels are launched one by "
            "one from now on (MODEL.TENSORRT.CUDA_GRAPHS False does without graphs and this message): %s",
            shape,
            error,
        )
