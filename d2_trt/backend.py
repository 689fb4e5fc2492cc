"""The "tensorrt" backend: what runs the network behind MODEL.BACKEND, an engine or PyTorch in its place."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from mask2former.backend import name_runners

from . import requirements
from .ahead import examples_of, static_ranges
from .build_failure import explained
from .cache import CacheEntry
from .engine import Engine
from .engine_source import EngineSource, Images
from .errors import (
    BuildError,
    D2TRTError,
    EngineShapeError,
    GPUMemoryError,
    MissingDependencyError,
    OptionsError,
    ParityError,
    first_line,
)
from .logging import follow_detectron2, get_logger
from .network_digest import NetworkChanged, NetworkDigest, NetworkWatch, call_on_load
from .options import TensorRTOptions
from .run_record import RunRecord
from .shape_range import ShapeRange

if TYPE_CHECKING:
    from mask2former.evaluation.ahead import ImagesAhead

logger = get_logger(__name__)

# Engines kept in memory with STATIC, where every padded size has one; the least recently used is loaded again from the
# cache when its size comes back.
MAX_LOADED = 8

# How often a build begins anew because the model has become another on the way.
MAX_TRIES = 3


@dataclasses.dataclass
class _Loaded:
    """An engine in memory, and what is told of it."""

    engine: Engine
    about: dict[str, Any]
    used: int = 0  # the higher, the later
    met_real: bool = False  # it is known that the gate has seen images of the caller's, or need not

    def describe(self) -> dict[str, Any]:
        graphs = self.engine.graphs
        return {**self.about, "cuda_graphs": None if graphs is None else graphs.describe()}


# A padded range and the GPU that runs it.
_Where = tuple[ShapeRange, torch.device]


class TensorRTBackend:
    """Runs a MaskFormer's network from an engine that is built on first use. Safe to call from several threads.

    Engines are for the weights that the model has when they are needed. load_state_dict on the model or on a part of it
    is noticed, and the next call looks again: the same weights keep their engines, others get their own. Edits that
    PyTorch does not announce (`parameter.copy_`, an optimizer's step, a module put in the place of another) are
    noticed when an engine is built, which is never kept as that of another network; call weights_changed() after them.
    """

    def __init__(self, model, cfg):
        """
        Args:
            model: MaskFormer, on a CUDA device unless ON_ERROR is "torch".
            cfg: after add_tensorrt_config.

        Raises:
            OptionsError: a key under MODEL.TENSORRT is wrong.
            MissingDependencyError: the GPU, TensorRT or torch2trt is missing, and MODEL.TENSORRT.ON_ERROR is "raise".
        """
        follow_detectron2()
        self._model = model
        self.options = TensorRTOptions.from_cfg(cfg, size_divisibility=model.size_divisibility)
        self._lock = threading.RLock()
        # Read without the lock, so that no image waits for another range's build; changed under it.
        self._loaded: dict[_Where, _Loaded] = {}
        self._failures: dict[_Where, D2TRTError] = {}
        self._clock = itertools.count()
        self._watch = NetworkWatch(model)
        self._source = EngineSource(model, cfg, self.options, self._watch)
        self._network: NetworkDigest | None = None
        # A change of the model is a new object here. The network is known again once it was read after it.
        self._change, self._known_change = object(), None
        self._announced = False
        self._unavailable: D2TRTError | None = None
        self._record = RunRecord()
        call_on_load(model, self._notice_load)
        try:
            self._require()
        except MissingDependencyError as error:
            if self.options.on_error != "torch":
                raise
            self._unavailable = error
            self._say_fallback(error)

    def __reduce__(self):
        """A copied or unpickled model has no backend yet, and makes its own when it needs one."""
        return type(None), ()

    def prepare(self, ahead: ImagesAhead | None = None) -> None:
        """Build or load the engine of the configured range, so that the first image does not wait for it.

        With STATIC it is the engines of the sizes that come most often, as many as are kept in memory. Where no images are
        known ahead, there is nothing to do before one tells its size, unless SHAPES has only one.

        Args:
            ahead: the images that are to come; some of them are traced and compared with.
        """
        if self._unavailable is not None:
            return
        shapes = self.options.shapes
        examples = None if ahead is None else examples_of(ahead, self.options)
        ranges = [shapes]
        if self.options.static and not shapes.is_static:
            divisibility = self._model.size_divisibility
            ranges = [] if ahead is None else static_ranges(ahead, self.options, divisibility, MAX_LOADED)
        for wanted in ranges:
            self._engine(wanted, examples)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: (B, 3, H, W) float32, padded, not normalised, on the model's device.

        Returns:
            pred_logits (B, Q, K + 1) and pred_masks (B, Q, H/4, W/4), float32.

        Raises:
            EngineShapeError: the images are outside the range, and ON_OUT_OF_RANGE is "raise".
            D2TRTError: there is no engine, or it does not run, and ON_ERROR is "raise".
        """
        engine = None
        if self._unavailable is None:
            batch, _, height, width = images.shape
            try:
                shapes = self.options.engine_range(batch, height, width)
            except EngineShapeError as error:
                if self.options.on_out_of_range == "raise":
                    raise
                self._record.warn_once(
                    "range", f"{error} PyTorch runs such images (MODEL.TENSORRT.ON_OUT_OF_RANGE torch)."
                )
            else:
                engine = self._engine(shapes, images)
        outputs = None if engine is None else self._run(engine, shapes, images)
        ran = "torch" if outputs is None else "tensorrt"
        if outputs is None:
            outputs = self._model.core(images)
        self._record.count(ran, len(images))
        return outputs

    def weights_changed(self) -> None:
        """Tell the backend that the model's weights or modules may be others now; the next call looks."""
        self._announced = True
        self._notice_load()

    def _notice_load(self) -> None:
        self._change = object()

    @property
    def _stale(self) -> bool:
        return self._change is not self._known_change

    def entry(self, shapes: ShapeRange, images: Images = None) -> CacheEntry:
        """The cache entry of the engine for a range: its path, bytes and sidecar. Built, checked and kept where missing.

        Args:
            shapes: padded sizes that the engine is to serve.
            images: (3, H, W) each, or what reads them, to trace and check with; None takes scenes that the project draws.

        Raises:
            D2TRTError: see D2TRTError's kinds; ON_ERROR is not asked.
        """
        if self._unavailable is not None:
            raise self._unavailable
        with self._lock:
            try:
                self._refresh()
                return self._obtain(shapes, images, run=False)[0]
            except D2TRTError:
                raise
            except Exception as error:
                _raise(explained(error, "build", self._source.limits(shapes), self._model.device), error)

    def describe(self) -> dict[str, Any]:
        """What has run the network so far, JSON-serialisable.

        Returns:
            "backend" ("tensorrt", "torch (fallback: why)", or both with their images; before the first image, what would
            run it), "precision", "engines" (key, path, range, times, parity, CUDA graphs), "images" (how many each of the
            two ran), and "reasons" for PyTorch running any.
        """
        # Without the lock, which a build holds for minutes: each is copied in one step.
        failure = self._unavailable or next(iter(list(self._failures.values())), None)
        loaded = list(self._loaded.values())
        record = self._record.describe()
        name = name_runners(record["images"]) or (
            "torch" if failure is not None and not loaded else "tensorrt"
        )
        if name == "torch":
            why = failure or next(iter(record["reasons"]), "no engine")
            name = f"torch (fallback: {first_line(why)})"
        return {
            "backend": name,
            "precision": self.options.precision,
            "engines": [one.describe() for one in loaded],
            **record,
        }

    def _run(self, engine: Engine, shapes: ShapeRange, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """An engine's outputs; None where it fails and PyTorch is to run instead, this time."""
        try:
            return engine(images)
        except Exception as error:
            failure = self._failure(error, "run", shapes)
            if self.options.on_error != "torch":
                _raise(failure, error)
        self._say_fallback(failure, about=("run", type(failure)))
        return None

    # Which engine

    def _engine(self, shapes: ShapeRange, images: Images) -> Engine | None:
        """The engine of a range, loaded or built; None where PyTorch is to run instead."""
        where = (shapes, self._model.device)
        loaded = None if self._stale else self._loaded.get(where)
        if loaded is None:
            with self._lock:
                loaded = self._find_or_load(where, images)
            if loaded is None:
                return None
        loaded.used = next(self._clock)
        if images is not None and not loaded.met_real:
            return self._meet_real(where, loaded, images)
        return loaded.engine

    def _find_or_load(self, where: _Where, images: Images) -> _Loaded | None:
        try:
            self._refresh()
            if where not in self._loaded and where not in self._failures:
                self._require()  # the model may have been moved
                loaded = self._load(where[0], images)
                while len(self._loaded) >= MAX_LOADED:
                    self._unload(min(self._loaded, key=lambda w: self._loaded[w].used))
                self._loaded[where] = loaded
        except OptionsError:
            raise  # a mistake in the config is one with a fallback, too
        except Exception as error:
            failure = self._failure(error, "build or load", where[0])
            falls_back = self.options.on_error == "torch"
            # Minutes of building would end the same way. Memory may be there when it is asked for again, and so may
            # weights that could not be read.
            if not self._stale and (falls_back or not isinstance(failure, GPUMemoryError)):
                self._failures[where] = type(failure)(*failure.args)
            if not falls_back:
                _raise(failure, error)
        else:
            if where in self._loaded:
                return self._loaded[where]
            failure = self._failures[where]
            if self.options.on_error != "torch":
                raise type(failure)(*failure.args)
        self._say_fallback(failure, about=("load", str(failure)))
        return None

    def _unload(self, where: _Where) -> None:
        torch.cuda.synchronize(where[1])  # the engine may be at work
        del self._loaded[where]

    def _look_again(self) -> None:
        logger.warning("The model changed before its engine was done: one of what it is now is to follow")
        self._notice_load()

    def _refresh(self) -> None:
        """Digest the network where it may have changed; engines of others go. Under the lock."""
        if not self._stale:
            return
        change = self._change  # before reading: what is loaded meanwhile is another
        if self._announced:
            self._announced = False
            self._watch.forget()
        network = self._watch.read()
        if network != self._network:
            for where in list(self._loaded):
                self._unload(where)
            self._failures.clear()
            self._network = network
        self._known_change = change  # last: until here no thread takes an engine without the lock

    def _require(self) -> None:
        requirements.require(self._model.device, builds=self.options.cache.mode != "require")

    def _failure(self, error: Exception, doing: str, shapes: ShapeRange) -> D2TRTError:
        """The error as build_failure.explained has it; this project's own, without a fallback, as it is."""
        if self.options.on_error != "torch" and isinstance(error, D2TRTError):
            return error
        return explained(error, doing, self._source.limits(shapes), self._model.device)

    def _meet_real(self, where: _Where, loaded: _Loaded, images: Images) -> Engine | None:
        """Compare an engine of which only drawn scenes were compared on the first images that come, once.

        Returns:
            what is to run; None for PyTorch. An engine that disagrees with PyTorch is used no more.
        """
        with self._lock:
            if self._loaded.get(where) is loaded and not self._stale:
                try:
                    self._compare_real(where[0], loaded, images)
                    return loaded.engine
                except NetworkChanged:
                    self._look_again()
                except Exception as error:
                    failure = self._failure(error, "run", where[0])
                    if isinstance(failure, ParityError):  # others may not come again
                        self._unload(where)
                        self._failures[where] = ParityError(*failure.args)
                    if self.options.on_error != "torch":
                        _raise(failure, error)
                    if not isinstance(failure, ParityError):
                        self._say_fallback(failure, about=("run", type(failure)))
                        return None
            return self._engine(where[0], images)  # of the model as it is now, or what is told of a failure

    def _compare_real(self, shapes: ShapeRange, loaded: _Loaded, images: Images) -> None:
        before = loaded.about["parity"]
        if self.options.verify.enabled and not loaded.met_real and not before.get("given_images"):
            numbers = self._source.compare_given(self._network, loaded.engine, shapes, images)
            if numbers is None:
                return
            loaded.about["parity"] = {
                **before,
                "sizes": [*before.get("sizes", ()), *numbers["sizes"]],
                "given_images": numbers["given_images"],
                "drawn_scenes": before.get("drawn_scenes", 0) + numbers["drawn_scenes"],
            }
        loaded.met_real = True

    def _say_fallback(self, error: Exception, about: Hashable = None) -> None:
        self._record.warn_once(
            about or error,
            f"PyTorch runs the network on {self._model.device} (MODEL.TENSORRT.ON_ERROR torch): {error}",
        )

    # Loading

    def _load(self, shapes: ShapeRange, images: Images) -> _Loaded:
        """An engine in memory, from the cache or built."""
        started = time.perf_counter()
        entry, engine = self._obtain(shapes, images, run=True)
        seconds = time.perf_counter() - started
        engine_info = entry.sidecar["engine"]
        logger.info(
            "TensorRT engine ready in %.1f s: %s, %s, %.1f MiB",
            seconds,
            self.options.precision,
            shapes.describe(),
            engine_info["size"] / 2**20,
        )
        about = {
            "key": entry.key,
            "path": None if entry.path is None else str(entry.path),
            "shapes": shapes.to_json(),
            "built": entry.built,
            "ready_seconds": round(seconds, 3),
            "build_seconds": entry.sidecar["built_by"]["seconds"],
            "mib": round(engine_info["size"] / 2**20, 3),
            "parity": entry.parity,
        }
        return _Loaded(engine, about, next(self._clock))

    def _obtain(self, shapes: ShapeRange, images: Images, run: bool) -> tuple[CacheEntry, Engine | None]:
        """See EngineSource.obtain; where the model becomes another meanwhile, that one's. Under the lock."""
        for _ in range(MAX_TRIES):
            try:
                return self._source.obtain(self._network, shapes, images, run)
            except NetworkChanged:
                self._look_again()
                self._refresh()
        self._notice_load()  # the next call tries again
        raise BuildError(
            f"the model changed {MAX_TRIES} times while its engine was built. Load weights, and edit the model, before "
            "or after."
        )


def _raise(failure: D2TRTError, error: Exception) -> NoReturn:
    """What an error is told as, with the error itself as its cause where they are two."""
    if failure is error:
        raise failure
    raise failure from error
