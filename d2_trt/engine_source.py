"""From a padded range to its engine: out of the cache, or built, and compared with PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import builder, engine_key, parity
from .build_failure import is_memory_error, memory_error
from .build_spec import BuildSpec
from .cache import BuiltEngine, CacheEntry, EngineCache
from .cache_timing import TimingCache, what_is_timed
from .engine import Engine
from .errors import BuildError, GPUMemoryError
from .logging import get_logger
from .network_digest import NetworkDigest, NetworkWatch
from .options import TensorRTOptions
from .sample_images import SampleImages, images_to_compare, verified_batches
from .shape_range import ShapeRange

logger = get_logger(__name__)

# Images (3, H, W) to trace and compare with, a batch of them, or what reads them; None for drawn scenes.
Images = Iterable[Tensor] | Callable[[], Iterable[Tensor]] | None


class EngineSource:
    """Finds, builds and checks a model's engines, and keeps none of them. One thread at a time, but for limits()."""

    def __init__(self, model, cfg, options: TensorRTOptions, watch: NetworkWatch):
        """
        Args:
            model: MaskFormer.
            cfg: after add_tensorrt_config.
            options: of cfg.
            watch: of model.
        """
        self._model = model
        self._cfg = cfg
        self._options = options
        self._watch = watch
        self._cache = EngineCache.from_options(options.cache)
        self._repairs: EngineCache | None = None

    def limits(self, shapes: ShapeRange) -> BuildSpec:
        """What decides how much memory an engine takes."""
        return BuildSpec(shapes.min, shapes.opt, shapes.max, workspace_bytes=self._options.workspace_bytes)

    def obtain(
        self, network: NetworkDigest, shapes: ShapeRange, images: Images, run: bool
    ) -> tuple[CacheEntry, Engine | None]:
        """A range's entry, as checked as VERIFY asks, with its engine where it is there or is wanted.

        What the cache has and TensorRT refuses is built again.

        Args:
            network: the model's, as the watch has read it.
            shapes: padded sizes that the engine is to serve.
            images: to trace and compare with.
            run: whether the engine is wanted.

        Raises:
            NetworkChanged: the model is another than `network`, or became another meanwhile.
        """
        with _on(self._model.device), builder.eval_mode(self._model):
            entry, engine = self._get_entry(network, shapes, images, self._cache)
            if engine is None and (run or not self._is_checked(entry, shapes)):
                try:
                    engine = self._make_engine(entry.data, shapes)
                except BuildError as error:
                    # Where memory does not suffice the entry is good, and a build would want more.
                    if self._cache.mode == "require" or isinstance(error, GPUMemoryError):
                        raise
                    logger.warning("The cached engine %s is built again: %s", entry.path, error)
                    entry, engine = self._get_entry(network, shapes, images, self._rebuilding())
                    engine = engine or self._make_engine(entry.data, shapes)
            if not self._is_checked(entry, shapes):
                logger.info("The cached engine %s was not compared as MODEL.TENSORRT.VERIFY asks", entry.path)
                numbers = self._compare_cached(network, engine, shapes, images)
                entry = self._cache.note_parity(entry, numbers)
            return entry, engine

    def compare_given(
        self, network: NetworkDigest, engine: Engine, shapes: ShapeRange, images: Images
    ) -> dict[str, Any] | None:
        """Compare an engine of `network` with PyTorch on a batch of the caller's images.

        Returns:
            the numbers of parity.verify, and how many images of which kind they are from; None where there was no image.

        Raises:
            ParityError: see parity.verify.
            NetworkChanged: as for obtain.
        """
        drawn = 0
        if callable(images):
            samples = self._samples(images)
            batch = samples.take(shapes.opt)
            given, drawn = samples.given, samples.drawn
            if not given:
                return None
        else:
            batch = images[: max(shapes.min[0], self._options.verify.images)]
            given = len(batch)
        with _on(self._model.device), builder.eval_mode(self._model), self._watch.unchanged(network):
            numbers = parity.verify(engine, self._model.core, [batch], self._options.verify)
        logger.info("Compared with PyTorch on the first %d given image%s", given, "s"[: given != 1])
        return numbers | {"given_images": given, "drawn_scenes": drawn}

    # Entries

    def _rebuilding(self) -> EngineCache:
        """A cache that builds once more what it is asked for, where the configured one may be written to."""
        if self._repairs is None:
            mode = "rebuild" if self._options.cache.writable else "off"
            self._repairs = EngineCache(self._cache.directory, mode, self._cache.max_bytes)
        return self._repairs

    def _get_entry(
        self, network: NetworkDigest, shapes: ShapeRange, images: Images, cache: EngineCache
    ) -> tuple[CacheEntry, Engine | None]:
        """A range's entry; with it the engine, where it was built and checked just now."""
        device = self._model.device
        identity = engine_key.identity_of(device)
        spec = engine_key.build_spec(self._options, shapes, device, identity["compute_capability"])
        ingredients = engine_key.ingredients_of(
            self._model, self._cfg, self._options, network, spec, shapes, identity
        )
        made: list[Engine] = []

        def build() -> BuiltEngine:
            made.clear()
            with self._watch.unchanged(network), self._comparing(shapes):
                built, engine = self._build(shapes, spec, identity, images)
            made.append(engine)
            return built

        terms = {"verify": dataclasses.asdict(self._options.verify)}
        entry = cache.get_or_build(ingredients, build, terms)
        return entry, made[0] if made and entry.built else None

    # Building

    def _build(
        self, shapes: ShapeRange, spec: BuildSpec, identity: dict[str, Any], images: Images
    ) -> tuple[BuiltEngine, Engine]:
        options = self._options
        logger.info("Building the TensorRT engine for %s; this takes minutes, once", shapes.describe())
        # At level 0 TensorRT times nothing, and heeds no timings.
        timed = options.timing_cache and spec.opt_level > 0
        timing = TimingCache(
            self._cache.directory,
            **identity,
            build=what_is_timed(self._cfg, spec),
            writable=timed and options.cache.writable,
        )
        earlier = timing.load() if timed and options.cache.mode != "off" else b""
        samples = self._samples(images)
        plan, report, timings = builder.build_engine(self._model, spec, samples.take(shapes.opt), earlier)
        timing.merge(timings, builder.timing_combiner())
        engine = self._make_engine(plan, shapes)
        numbers = self._compare(engine, shapes, samples) if options.verify.enabled else {}
        return BuiltEngine(plan, report=dataclasses.asdict(report), parity=numbers), engine

    def _samples(self, images: Images) -> SampleImages:
        return SampleImages(self._model.device, images() if callable(images) else images)

    def _make_engine(self, plan: bytes, shapes: ShapeRange) -> Engine:
        """
        Raises:
            GPUMemoryError: the GPU's memory does not suffice.
            BuildError: the plan does not load for another reason.
        """
        with contextlib.suppress(GPUMemoryError):
            return self._new_engine(plan, shapes)
        torch.cuda.empty_cache()  # what PyTorch keeps for itself, TensorRT cannot have
        return self._new_engine(plan, shapes)

    def _new_engine(self, plan: bytes, shapes: ShapeRange) -> Engine:
        options = self._options
        try:
            graphs = options.max_cuda_graphs if options.cuda_graphs else 0
            return Engine(plan, self._model.device, graphs, options.cuda_graph_bytes)
        except (BuildError, torch.cuda.OutOfMemoryError) as error:
            if not is_memory_error(error):
                raise
            raise memory_error(error, "load", self.limits(shapes), self._model.device) from error

    # Comparing

    @contextlib.contextmanager
    def _comparing(self, shapes: ShapeRange) -> Iterator[None]:
        """Around a build or a comparison: what the caller computes in is not what the network runs in."""
        autocast = torch.autocast(self._model.device.type, enabled=False)
        try:
            with torch.inference_mode(False), torch.no_grad(), autocast:
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise memory_error(error, "build and check", self.limits(shapes), self._model.device) from error

    def _is_checked(self, entry: CacheEntry, shapes: ShapeRange) -> bool:
        verify = self._options.verify
        if not verify.enabled:
            return True
        batches = verified_batches(shapes, self._step, verify.sizes, verify.images)
        return parity.passed(entry.parity, batches, verify)

    @property
    def _step(self) -> int:
        return max(self._model.size_divisibility, 1)

    def _compare(self, engine: Engine, shapes: ShapeRange, samples: SampleImages) -> dict[str, Any]:
        """
        Returns:
            the numbers of parity.verify, and how many images of which kind they are from.

        Raises:
            ParityError: see parity.verify.
        """
        verify = self._options.verify
        batches = images_to_compare(samples, shapes, self._step, verify.sizes, verify.images)
        numbers = parity.verify(engine, self._model.core, batches, verify)
        logger.info("Compared with PyTorch on %s", samples.describe())
        return numbers | {"given_images": samples.given, "drawn_scenes": samples.drawn}

    def _compare_cached(
        self, network: NetworkDigest, engine: Engine, shapes: ShapeRange, images: Images
    ) -> dict[str, Any]:
        with self._watch.unchanged(network), self._comparing(shapes):
            return self._compare(engine, shapes, self._samples(images))


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
