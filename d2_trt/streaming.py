"""Many images through a predictor, with the stages of several images at work at a time.

    reader      next(images); decoders read files                           1 + workers threads
    runner      upload and resize on one CUDA stream, the network on another, batch by batch     1 thread
    caller      waits for the network by an event, post-processes, yields

Beyond `prefetch`, an image is read only when a result is yielded: that alone bounds all queues.

Closing tells all threads to stop and waits for them, though not for ever. It may happen wherever garbage is collected,
in one of these threads too: what it shares with them are SimpleQueues, which bear that, and no locks.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from torch import Tensor

from mask2former.data.depth import check_depth
from mask2former.postprocessing import postprocess

from .errors import D2TRTError, ImageError
from .logging import get_logger
from .shape_range import is_int, round_up
from .upload import PinnedRing

if TYPE_CHECKING:
    from .predictor import TensorRTPredictor

logger = get_logger(__name__)

DEFAULT_PREFETCH = 8
# How long closing waits for what nothing can interrupt: `next` of the caller's iterator, a file, the network.
CLOSE_SECONDS = 5.0
_POLL_SECONDS = 0.1
_UPLOADS = 3  # pinned buffers


@dataclasses.dataclass
class _Read:
    """An image that was asked for: its place, its name for messages, and a queue for its pixels when it is read."""

    index: int
    name: str
    pixels: queue.SimpleQueue


@dataclasses.dataclass
class _Pixels:
    """What reading an image gave: anything, or an error."""

    value: Any = None
    error: BaseException | None = None


@dataclasses.dataclass
class _Loaded:
    """An image on the model's device."""

    index: int
    name: str
    inputs: dict[str, Any]
    padded_size: tuple[int, int]


@dataclasses.dataclass
class _Failed:
    """An image without a result."""

    index: int
    name: str
    error: BaseException


@dataclasses.dataclass
class _Done:
    """The network's outputs for a batch; on a GPU complete after `ready`."""

    images: list[_Loaded]
    logits: Tensor
    masks: Tensor
    padded_size: tuple[int, int]
    image_sizes: list[tuple[int, int]]
    output_sizes: list[tuple[int, int]]
    ready: torch.cuda.Event | None

    def one_by_one(self) -> list[_Done]:
        """The same for each image alone."""
        return [
            _Done(
                [image],
                self.logits[i : i + 1],
                self.masks[i : i + 1],
                self.padded_size,
                [self.image_sizes[i]],
                [self.output_sizes[i]],
                self.ready,
            )
            for i, image in enumerate(self.images)
        ]


_END = object()

# Those that were started and that a thread or a caller still has.
_pipelines: weakref.WeakSet[_Pipeline] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what callers left open. Python ends a daemon thread at work in PyTorch's C++ by aborting the process."""
    for pipeline in list(_pipelines):
        pipeline.end()


def stream_results(
    predictor: TensorRTPredictor,
    images: Iterator,
    *,
    batch_size: int,
    prefetch: int,
    workers: int,
    on_error: str,
) -> Iterator[dict | ImageError]:
    """TensorRTPredictor.stream, which see."""
    for name, value in (("batch_size", batch_size), ("prefetch", prefetch), ("workers", workers)):
        if not is_int(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
    if prefetch < batch_size:
        raise ValueError(
            f"prefetch is {prefetch}, batch_size {batch_size}: a batch of which not all images may be read would never be "
            f"full. Expected a prefetch of at least {batch_size}"
        )
    if on_error not in ("raise", "return"):
        raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'return'")
    model = predictor.model
    if model.training:
        raise ValueError("the predictor's model is in training mode; call predictor.model.eval() first")
    options = getattr(
        model.backend, "options", None
    )  # what the backend cannot do is said here, not for an image
    if options is not None and batch_size > options.shapes.max[0]:
        raise ValueError(
            f"batch_size is {batch_size}; the engine takes batches of 1 to {options.shapes.max[0]}. Lower it, or raise "
            "MODEL.TENSORRT.MAX_BATCH_SIZE"
        )
    return _Pipeline(predictor, images, batch_size, prefetch, workers).results(on_error)


class _Pipeline:
    """The threads of one stream, and what they pass on. `results` starts and ends them."""

    def __init__(
        self, predictor: TensorRTPredictor, images: Iterator, batch_size: int, prefetch: int, workers: int
    ):
        self._predictor, self._model = predictor, predictor.model
        self._images, self._batch_size, self._workers = images, batch_size, workers
        self._prefetch = prefetch
        self._permits: queue.SimpleQueue = queue.SimpleQueue()
        self._files: queue.SimpleQueue = queue.SimpleQueue()
        self._read: queue.SimpleQueue = queue.SimpleQueue()
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._stopping = False
        self._started: torch.cuda.Event | None = None
        self._reader = self._thread("reader", self._guard, self._read_all, self._read)
        self._runner = self._thread("runner", self._guard, self._run_all, self._done)
        # What each thread does that closing may have to wait for; decoders say so themselves.
        self._jobs = {self._reader: "`next` of its images", self._runner: "the network"}

    @staticmethod
    def _thread(name: str, target, *args) -> threading.Thread:
        return threading.Thread(target=target, args=args, name=f"d2_trt stream {name}", daemon=True)

    # In the caller's thread

    def results(self, on_error: str) -> Iterator[dict | ImageError]:
        if self._model.device.type == "cuda":
            with _on(self._model.device):
                self._started = torch.cuda.current_stream().record_event()
        _pipelines.add(self)
        try:
            self._reader.start()
            self._runner.start()
            while (batch := self._done.get()) is not _END and not self._stopping:
                if isinstance(batch, BaseException):
                    raise batch
                for result in self._finish(batch):
                    self._permits.put(None)
                    if isinstance(result, ImageError) and on_error == "raise":
                        raise result
                    yield result
            if self._stopping:  # not by this generator, which would not be here any more
                raise D2TRTError("the stream was closed before its last image, since the process ends")
        finally:
            self._close()

    def end(self) -> None:
        """Close the stream at the process's end, from any thread. The network is waited for, however long that takes."""
        self._close()
        if self._runner.is_alive():
            self._runner.join()

    def _finish(self, batch: _Done | _Failed) -> list[dict | ImageError]:
        if isinstance(batch, _Failed):
            if not isinstance(batch.error, Exception):  # not an image's: SystemExit and the like
                raise batch.error
            return [_image_error(batch.index, batch.name, batch.error)]
        # As in _run: where a batch fails, its images one by one, so that the error is that of the image that causes it.
        try:
            with torch.no_grad(), _on(self._model.device):
                if batch.ready is not None:
                    stream = torch.cuda.current_stream()
                    stream.wait_event(batch.ready)
                    for tensor in (batch.logits, batch.masks):
                        tensor.record_stream(stream)  # made on the runner's stream, read on this one
                return postprocess(
                    batch.logits,
                    batch.masks,
                    padded_size=batch.padded_size,
                    image_sizes=batch.image_sizes,
                    output_sizes=batch.output_sizes,
                    options=self._model.postprocess_options,
                    thing_classes=self._model.thing_classes,
                )
        except Exception as error:
            if len(batch.images) == 1:
                return [_image_error(batch.images[0].index, batch.images[0].name, _let_go(error))]
        return [result for image in batch.one_by_one() for result in self._finish(image)]

    def _close(self) -> None:
        """Stop the threads. What is at work is waited for, but no longer than CLOSE_SECONDS."""
        if self._stopping:
            return
        self._stopping = True
        for waited_for in (self._permits, self._files, self._read):
            waited_for.put(_END)
        deadline = time.monotonic() + CLOSE_SECONDS
        others = [t for t in list(self._jobs) if t is not threading.current_thread() and t.is_alive()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        busy = [self._jobs[thread] for thread in others if thread.is_alive()]
        if busy:
            logger.warning(
                "The stream is closed, but not all of its threads have ended in %.3g s; they end when this returns: %s",
                CLOSE_SECONDS,
                ", ".join(busy),
            )

    # In threads

    def _guard(self, work, after: queue.SimpleQueue) -> None:
        """Run a thread's work; what it did not expect ends the stream, in the caller."""
        try:
            work()
        except BaseException as error:
            self._done.put(error)
        finally:
            after.put(_END)

    def _read_all(self) -> None:
        decoders = 0
        try:
            for index in range(2**63):
                if index >= self._prefetch:
                    self._permits.get()
                if self._stopping:
                    return
                pixels: queue.SimpleQueue = queue.SimpleQueue()
                try:
                    image = next(self._images)
                except StopIteration:
                    return
                except BaseException as error:
                    pixels.put(_Pixels(error=error))
                    self._read.put(_Read(index, "", pixels))
                    return
                if isinstance(image, (str, PathLike)):
                    read = _Read(index, fspath(image), pixels)
                    if decoders < self._workers:
                        thread = self._thread(f"decoder {decoders}", self._decode_all)
                        self._jobs[thread] = ""
                        thread.start()
                        decoders += 1
                    self._files.put(read)
                else:
                    pixels.put(_Pixels(image))
                    read = _Read(index, "", pixels)
                self._read.put(read)
        finally:
            self._files.put(_END)

    def _decode_all(self) -> None:
        while (read := self._files.get()) is not _END and not self._stopping:
            self._jobs[threading.current_thread()] = f"the reading of {_which(read.index, read.name)}"
            try:
                read.pixels.put(_Pixels(_decode(read.name)))
            except BaseException as error:
                read.pixels.put(_Pixels(error=error))
            del read  # the pixels, which waiting for the next file would keep
        self._files.put(_END)  # for the other decoders

    def _wait(self, read: _Read) -> _Pixels | None:
        """Wait until an image is read; None where the stream is closed meanwhile."""
        while not self._stopping:
            with contextlib.suppress(queue.Empty):
                return read.pixels.get(timeout=_POLL_SECONDS)
        return None

    def _run_all(self) -> None:
        device = self._model.device
        with torch.no_grad(), _on(device):
            streams = [torch.cuda.Stream() for _ in range(2)] if device.type == "cuda" else [None, None]
            if (
                self._started is not None
            ):  # what the caller has asked of the GPU before, such as to load weights
                for stream in streams:
                    stream.wait_event(self._started)
            runner = _Runner(self._predictor, *streams)
            batch: list[_Loaded] = []
            while (read := self._read.get()) is not _END and (pixels := self._wait(read)) is not None:
                try:
                    image = runner.load(read, pixels)
                except BaseException as error:
                    self._run(runner, batch)
                    self._done.put(_Failed(read.index, read.name, _let_go(error)))
                    batch = []
                    continue
                if batch and batch[0].padded_size != image.padded_size:
                    self._run(runner, batch)
                    batch = []
                batch.append(image)
                if len(batch) == self._batch_size:
                    self._run(runner, batch)
                    batch = []
            self._run(runner, batch)

    def _run(self, runner: _Runner, batch: list[_Loaded]) -> None:
        """Run a batch; where it fails, its images one by one, so that the error is that of the image that causes it."""
        if not batch or self._stopping:
            return
        try:
            self._done.put(runner.run(batch))
            return
        except Exception as error:
            if len(batch) == 1:
                self._done.put(_Failed(batch[0].index, batch[0].name, _let_go(error)))
                return
        # The error is gone, and with it the frames that held the batch's memory, which may be what did not suffice.
        for image in batch:
            self._run(runner, [image])


class _Runner:
    """What the runner's thread does with images."""

    def __init__(
        self,
        predictor: TensorRTPredictor,
        upload: torch.cuda.Stream | None,
        compute: torch.cuda.Stream | None,
    ):
        self._predictor, self._model = predictor, predictor.model
        self._upload, self._compute = upload, compute
        self._ring = None if upload is None else PinnedRing(self._model.device, _UPLOADS)

    def load(self, read: _Read, pixels: _Pixels) -> _Loaded:
        """Upload and resize an image, on the upload stream."""
        if pixels.error is not None:
            raise pixels.error
        image = pixels.value
        if not isinstance(image, np.ndarray):
            raise TypeError(
                f"got a {type(image).__name__}; expected a NumPy array (height, width, channels) or a path"
            )
        if image.ndim != 3:
            raise ValueError(
                f"got an array of shape {image.shape}; expected (height, width, channels), channels in BGR order"
            )
        with _stream(self._upload):
            inputs = self._predictor.load(image, self._ring)
        image = inputs["image"]
        if self._compute is not None and image.is_cuda:
            self._compute.wait_stream(self._upload)
            image.record_stream(self._compute)
        multiple = max(self._model.size_divisibility, 1)
        padded_size = tuple(round_up(int(n), multiple) for n in image.shape[-2:])
        return _Loaded(read.index, read.name, inputs, padded_size)

    def run(self, batch: list[_Loaded]) -> _Done:
        """Run the network on images of one padded size, on the compute stream."""
        with _stream(self._compute):
            images, image_sizes, output_sizes = self._model.preprocess([image.inputs for image in batch])
            logits, masks = self._model.backend(images)
            ready = None if self._compute is None else self._compute.record_event()
        return _Done(batch, logits, masks, tuple(images.shape[-2:]), image_sizes, output_sizes, ready)


def _decode(path: str) -> np.ndarray:
    check_depth(path)
    return read_image(path, format="BGR")


def _which(index: int, name: str) -> str:
    return f"image {index} ({name})" if name else f"image {index}"


def _let_go(error: BaseException) -> BaseException:
    """An error that was just caught, without what its frames hold: images on the GPU, as long as the caller keeps it."""
    traceback.clear_frames(error.__traceback__)
    # From below the frame that caught it, which is at work still.
    return error.with_traceback(error.__traceback__.tb_next)


def _image_error(index: int, name: str, cause: Exception) -> ImageError:
    error = ImageError(f"{_which(index, name)} of the stream: {type(cause).__name__}: {cause}", index)
    error.__cause__ = cause
    return error


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _stream(stream: torch.cuda.Stream | None):
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
