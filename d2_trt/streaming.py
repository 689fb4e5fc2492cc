"""Many images through a predictor, with the stages of several images at work at a time.

    reader      next(images); a pool decodes files                          1 + workers threads
    runner      upload and resize on one CUDA stream, the network on another, batch by batch     1 thread
    caller      waits for the network by an event, post-processes, yields

A permit is taken for every image before it is read and given back when its result is yielded: that alone bounds all queues.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from torch import Tensor

from mask2former.postprocessing import postprocess

from .errors import ImageError
from .logging import get_logger
from .shape_range import is_int, round_up
from .upload import PinnedRing

if TYPE_CHECKING:
    from .predictor import TensorRTPredictor

logger = get_logger(__name__)

DEFAULT_PREFETCH = 8
# How long closing waits for `next` of the caller's iterator, which nothing can interrupt.
CLOSE_SECONDS = 5.0
_UPLOADS = 3  # pinned buffers


@dataclasses.dataclass
class _Read:
    """An image that was asked for: its place, its name for messages, and its pixels to come."""

    index: int
    name: str
    pixels: concurrent.futures.Future


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
        self._permits = threading.Semaphore(prefetch)
        self._read: queue.SimpleQueue = queue.SimpleQueue()
        self._done: queue.SimpleQueue = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._started: torch.cuda.Event | None = None
        self._threads = [
            threading.Thread(target=self._guard, args=(work, after), name=f"d2_trt {name}", daemon=True)
            for name, work, after in (
                ("stream reader", self._read_all, self._read),
                ("stream runner", self._run_all, self._done),
            )
        ]

    # In the caller's thread

    def results(self, on_error: str) -> Iterator[dict | ImageError]:
        if self._model.device.type == "cuda":
            with _on(self._model.device):
                self._started = torch.cuda.current_stream().record_event()
        for thread in self._threads:
            thread.start()
        try:
            while (batch := self._done.get()) is not _END:
                if isinstance(batch, BaseException):
                    raise batch
                for result in self._finish(batch):
                    self._permits.release()
                    if isinstance(result, ImageError) and on_error == "raise":
                        raise result
                    yield result
        finally:
            self._close()

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
                return [_image_error(batch.images[0].index, batch.images[0].name, error)]
            return [result for image in batch.one_by_one() for result in self._finish(image)]

    def _close(self) -> None:
        self._stopping.set()
        self._permits.release()
        reader, runner = self._threads
        reader.join(CLOSE_SECONDS)
        if reader.is_alive():
            logger.warning(
                "The stream is closed, but `next` of its images has not returned for %.0f s; its thread ends when it does",
                CLOSE_SECONDS,
            )
            self._read.put(_END)
        runner.join()

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
        pool = concurrent.futures.ThreadPoolExecutor(self._workers, "d2_trt stream decoder")
        try:
            for index in range(2**63):
                self._permits.acquire()
                if self._stopping.is_set():
                    return
                pixels: concurrent.futures.Future = concurrent.futures.Future()
                try:
                    image = next(self._images)
                except StopIteration:
                    return
                except BaseException as error:
                    pixels.set_exception(error)
                    self._read.put(_Read(index, "", pixels))
                    return
                if isinstance(image, (str, PathLike)):
                    self._read.put(_Read(index, fspath(image), pool.submit(_decode, image)))
                else:
                    pixels.set_result(image)
                    self._read.put(_Read(index, "", pixels))
        finally:
            pool.shutdown(cancel_futures=self._stopping.is_set())

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
            while (read := self._read.get()) is not _END and not self._stopping.is_set():
                try:
                    image = runner.load(read)
                except BaseException as error:
                    self._run(runner, batch)
                    self._done.put(_Failed(read.index, read.name, error))
                    batch = []
                    continue
                if batch and batch[0].padded_size != image.padded_size:
                    self._run(runner, batch)
                    batch = []
                batch.append(image)
                if len(batch) == self._batch_size:
                    self._run(runner, batch)
                    batch = []
            if not self._stopping.is_set():
                self._run(runner, batch)

    def _run(self, runner: _Runner, batch: list[_Loaded]) -> None:
        """Run a batch; where it fails, its images one by one, so that the error is that of the image that causes it."""
        if not batch:
            return
        try:
            self._done.put(runner.run(batch))
        except Exception as error:
            if len(batch) == 1:
                self._done.put(_Failed(batch[0].index, batch[0].name, error))
                return
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

    def load(self, read: _Read) -> _Loaded:
        """Upload and resize an image, on the upload stream."""
        pixels = read.pixels.result()
        if not isinstance(pixels, np.ndarray):
            raise TypeError(
                f"got a {type(pixels).__name__}; expected a NumPy array (height, width, channels) or a path"
            )
        if pixels.ndim != 3:
            raise ValueError(
                f"got an array of shape {pixels.shape}; expected (height, width, channels), channels in BGR order"
            )
        with _stream(self._upload):
            inputs = self._predictor.load(pixels, self._ring)
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


def _decode(path: str | PathLike) -> np.ndarray:
    return read_image(fspath(path), format="BGR")


def _image_error(index: int, name: str, cause: Exception) -> ImageError:
    which = f"image {index} ({name})" if name else f"image {index}"
    error = ImageError(f"{which} of the stream: {type(cause).__name__}: {cause}", index)
    error.__cause__ = cause
    return error


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _stream(stream: torch.cuda.Stream | None):
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
