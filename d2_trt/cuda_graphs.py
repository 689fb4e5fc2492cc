"""CUDA graphs of an engine: the launches of one input shape, recorded once, replayed with one call.

An engine's kernels are launched one by one, a graph's together. A graph is bound to addresses: it has an execution context,
an input and outputs of its own. Images are copied in and results out, so that callers own what they get.
"""

from __future__ import annotations

import contextlib
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import first_line
from .logging import get_logger

logger = get_logger(__name__)

Shape = tuple[int, ...]

# A shape is captured when it comes for the second time while there is room, and for this many times where another one must
# go for it: images of ever new sizes run as they are, without a capture for each.
RUNS_TO_REPLACE = 8
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
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            enqueue(stream.cuda_stream)  # sets up and loads what must not be set up or loaded while recording
            with _no_garbage_collection():
                # thread_local: calls of other threads (allocations, another build) neither fail nor end the recording.
                self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    try:
                        enqueue(stream.cuda_stream)
                    except BaseException:
                        with contextlib.suppress(RuntimeError):  # broken too; the reason is the first error
                            self._graph.capture_end()
                        raise
                    self._graph.capture_end()
                except RuntimeError:
                    _end_allocations(images.device, pool)
                    raise

    @property
    def nbytes(self) -> int:
        """GPU memory of the buffers."""
        return sum(t.numel() * t.element_size() for t in (self._images, *self._outputs))

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


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection may free what another part left to it: CUDA memory and graphs, which breaks a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class GraphCache:
    """Graphs by input shape, at most `limit`; the least recently used goes. Used under its engine's lock."""

    def __init__(self, limit: int):
        if limit < 1:
            raise ValueError(f"a cache of {limit} graphs; expected at least 1")
        self._limit = limit
        self._runs: OrderedDict[Shape, CapturedRun] = OrderedDict()
        self._seen: OrderedDict[Shape, int] = OrderedDict()
        self._captures = self._replays = 0
        self.failure = ""

    def find(self, shape: Shape) -> CapturedRun | None:
        """The graph of a shape, or None."""
        run = self._runs.get(shape)
        if run is not None:
            self._runs.move_to_end(shape)
            self._replays += 1
        return run

    def wants(self, shape: Shape) -> bool:
        """Count a run of a shape without a graph; whether it came often enough to be captured now."""
        if self.failure:
            return False
        count = self._seen.pop(shape, 0) + 1
        needed = 2 if len(self._runs) < self._limit else RUNS_TO_REPLACE
        if count >= needed:
            return True
        self._seen[shape] = count
        while len(self._seen) > MAX_COUNTED:
            self._seen.popitem(last=False)
        return False

    def add(
        self, shape: Shape, capture: Callable[[], CapturedRun], retire: Callable[[], None]
    ) -> CapturedRun | None:
        """Capture a shape; None where that fails, which is said once and ends all capturing.

        Args:
            capture: makes the graph.
            retire: called before a graph goes; returns when the GPU is done with all of them.
        """
        if len(self._runs) >= self._limit:
            retire()
            while len(self._runs) >= self._limit:
                self._runs.popitem(last=False)
        try:
            run = capture()
        except RuntimeError as error:  # torch's for CUDA and for memory, BuildError for TensorRT
            self.failure = f"{type(error).__name__}: {first_line(error)}"
            logger.warning(
                "A CUDA graph for images %s (B, 3, H, W) could not be captured; the engine's kernels are launched one by "
                "one from now on (MODEL.TENSORRT.CUDA_GRAPHS False does without graphs and this message): %s",
                shape,
                error,
            )
            return None
        self._captures += 1
        self._replays += 1  # the one that it is captured for
        self._runs[shape] = run
        return run

    def describe(self) -> dict[str, Any]:
        """What there is and was, JSON-serialisable: shapes, MiB of their buffers, captures, replays, failure."""
        return {
            "shapes": [list(shape) for shape in list(self._runs)],
            "mib": round(sum(run.nbytes for run in list(self._runs.values())) / 2**20, 3),
            "captures": self._captures,
            "replays": self._replays,
            "failure": self.failure,
        }
