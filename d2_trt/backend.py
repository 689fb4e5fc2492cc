"""The "tensorrt" backend: builds, checks, caches and runs engines behind MODEL.BACKEND."""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import builder, cache_key, compat, parity
from .cache import BuiltEngine, EngineCache
from .cache_timing import TimingCache
from .engine import Engine
from .errors import D2TRTError, EngineShapeError, MissingDependencyError
from .options import TensorRTOptions
from .shape_range import ShapeRange

logger = logging.getLogger(__name__)


class TensorRTBackend:
    """Runs a MaskFormer's network from an engine that is built on first use.

    Engines are for the weights that the model has when they are needed: after load_state_dict the backend looks again.
    """

    def __init__(self, model, cfg):
        """
        Args:
            model: MaskFormer on a CUDA device.
            cfg: after add_tensorrt_config.

        Raises:
            OptionsError: a key under MODEL.TENSORRT is wrong.
            MissingDependencyError: TensorRT, torch2trt or the GPU is missing.
        """
        self._model = model
        self._cfg = cfg
        self.options = TensorRTOptions.from_cfg(cfg, size_divisibility=model.size_divisibility)
        self._cache = EngineCache.from_options(self.options.cache)
        self._engines: dict[ShapeRange, Engine] = {}
        self._lock = threading.Lock()
        self._weights: str | None = None
        self._warned: set[str] = set()
        self._failed = False
        model.register_load_state_dict_post_hook(self._weights_changed)
        try:
            self._require()
        except MissingDependencyError as error:
            self._fall_back(error)

    def prepare(self) -> None:
        """Build or load the engine of the configured range, so that the first image does not wait for it."""
        if self._failed or self.options.static:
            return  # a static engine is of a size that only the image tells
        self._engine(self.options.shapes, None)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, height, width = images.shape
        if self._failed:
            return self._model.core(images)
        try:
            shapes = self.options.engine_range(batch, height, width)
        except EngineShapeError as error:
            if self.options.on_out_of_range == "raise":
                raise
            self._warn(f"{error} PyTorch runs such images (MODEL.TENSORRT.ON_OUT_OF_RANGE torch).")
            return self._model.core(images)
        engine = self._engine(shapes, images)
        return self._model.core(images) if engine is None else engine(images)

    def _engine(self, shapes: ShapeRange, images: Tensor | None) -> Engine | None:
        with self._lock:
            if shapes not in self._engines:
                try:
                    self._engines[shapes] = self._load(shapes, images)
                except D2TRTError as error:
                    self._fall_back(error)
                    return None
            return self._engines[shapes]

    def _require(self) -> None:
        if self._model.device.type != "cuda":
            raise MissingDependencyError(
                f"MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU, but the model is on {self._model.device}. Set "
                "MODEL.DEVICE cuda, or MODEL.BACKEND torch."
            )
        compat.tensorrt()

    def _fall_back(self, error: D2TRTError) -> None:
        if self.options.on_error != "torch":
            raise error
        self._failed = True
        self._warn(f"PyTorch runs the network (MODEL.TENSORRT.ON_ERROR torch): {error}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _weights_changed(self, module, incompatible_keys) -> None:
        with self._lock:
            self._engines.clear()
            self._weights = None

    def _spec(self, shapes: ShapeRange) -> builder.BuildSpec:
        options = self.options
        msda = {"auto": "stock", "plugin": "stock"}.get(options.msda, options.msda)
        if options.msda == "plugin":
            raise MissingDependencyError(
                "MODEL.TENSORRT.MSDA is 'plugin', but this version has no plugin of its own yet. Set it to auto, stock or "
                "native."
            )
        return builder.BuildSpec(
            min_shape=shapes.min,
            opt_shape=shapes.opt,
            max_shape=shapes.max,
            precision=options.precision,
            fp32_modules=options.resolve_fp32_modules(builder.DEFAULT_FP32_MODULES),
            msda=msda,
            workspace_bytes=options.workspace_bytes,
            opt_level=options.opt_level,
        )

    def _load(self, shapes: ShapeRange, images: Tensor | None) -> Engine:
        """The engine of a range, from the cache or built, on the model's device."""
        import detectron2

        model, trt = self._model, compat.tensorrt()
        device = model.device
        gpu = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        spec = self._spec(shapes)
        if self._weights is None:
            self._weights = cache_key.weights_digest(model)
        here = Path(__file__).parent
        ingredients = cache_key.key_ingredients(
            weights=self._weights,
            config=cache_key.graph_config(self._cfg),
            options=self.options.graph_key(builder.DEFAULT_FP32_MODULES),
            shapes=shapes,
            versions={
                "d2_trt": cache_key.source_digest(here),
                "mask2former": cache_key.source_digest(here.parent / "mask2former" / "modeling"),
                "detectron2": detectron2.__version__,
                "torch": torch.__version__,
            },
            plugin=spec.msda,
            tensorrt=trt.__version__,
            gpu=gpu,
            compute_capability=capability,
        )
        timing = TimingCache(
            self._cache.directory,
            tensorrt=trt.__version__,
            gpu=gpu,
            compute_capability=capability,
            writable=self.options.timing_cache and self.options.cache.writable,
        )
        use_timings = self.options.timing_cache and self.options.cache.mode != "off"

        def build() -> BuiltEngine:
            logger.info("Building the TensorRT engine for %s; this takes minutes, once", shapes.describe())
            started = timing.load() if use_timings else b""
            plan, report, timings = builder.build_engine(
                model, spec, self._images(shapes.opt, images), started
            )
            timing.merge(timings, builder.combine_timing_caches)
            numbers = {}
            if self.options.verify.enabled:
                batches = [self._images(shape, images) for shape in self._verified_shapes(shapes)]
                numbers = parity.verify(Engine(plan, device), model.core, batches, self.options.verify)
            return BuiltEngine(plan, report=dataclasses.asdict(report), parity=numbers)

        with torch.cuda.device(device), builder.eval_mode(model):
            entry = self._cache.get_or_build(ingredients, build)
            return Engine(bytes(entry.data), device)

    def _verified_shapes(self, shapes: ShapeRange) -> list[tuple[int, int, int]]:
        """Shapes of the range to compare at: the optimal one, the ends, and between them."""
        step = max(self._model.size_divisibility, 1)
        found = [shapes.opt]
        count = self.options.verify.sizes
        for i in range(count - 1):
            share = i / max(count - 2, 1)
            size = [lo + share * (hi - lo) for lo, hi in zip(shapes.min[1:], shapes.max[1:])]
            height, width = (round(s / step) * step for s in size)
            # No larger than the optimal area: PyTorch in float32 must fit beside the engine.
            batch = shapes.max[0] if i == 0 else 1
            found.append((max(batch, shapes.min[0]), height, width))
        return list(dict.fromkeys(found))

    def _images(self, shape: tuple[int, int, int], images: Tensor | None) -> Tensor:
        """Real content at a shape: what was asked for, or scenes that the project draws, resized."""
        batch, height, width = shape
        if images is None:
            from mask2former.data.datasets.shapes_scene import draw_scene

            scenes = [torch.from_numpy(draw_scene(i, 480, 640).image.copy()) for i in range(batch)]
            images = torch.stack(scenes).permute(0, 3, 1, 2).float().to(self._model.device)
        picked = images[torch.arange(batch, device=images.device) % len(images)]
        if tuple(picked.shape[2:]) == (height, width):
            return picked.float().contiguous()
        return F.interpolate(picked.float(), size=(height, width), mode="bilinear", align_corners=False)
