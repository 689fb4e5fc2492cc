"""From a model to a serialized engine."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from . import compat
from .converters import Graph, Guard, converter_table
from .errors import BuildError

logger = logging.getLogger(__name__)

INPUT = "images"
OUTPUTS = ("pred_logits", "pred_masks")

# Kept in float32 at lower precisions, as patterns over module names.
DEFAULT_FP32_MODULES = (
    "sem_seg_head.predictor.class_embed",
    "*.self_attn.core",
    "*.pe_layer",
)


class Core(nn.Module):
    """What becomes an engine: the network with its normalisation, (B, 3, H, W) float32 -> logits and masks."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.core(images)


@dataclass(frozen=True)
class BuildSpec:
    """What decides an engine beside the weights. Shapes are (batch, height, width) of the padded images."""

    min_shape: tuple[int, int, int]
    opt_shape: tuple[int, int, int]
    max_shape: tuple[int, int, int]
    precision: str = "fp32"
    fp32_modules: tuple[str, ...] = DEFAULT_FP32_MODULES
    msda: str = "stock"
    workspace_bytes: int = 0
    opt_level: int = 3

    @property
    def dynamic(self) -> bool:
        return self.min_shape != self.max_shape

    @property
    def dtype(self) -> torch.dtype:
        """The type that unpinned modules compute in."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision, torch.float32)


@dataclass
class BuildReport:
    """What was built, and in what time."""

    engine_bytes: int = 0
    trace_seconds: float = 0.0
    build_seconds: float = 0.0
    layers: dict[str, int] = field(default_factory=dict)
    precisions: dict[str, int] = field(default_factory=dict)


def trt_logger():
    """TensorRT's messages in Python's logging, under d2_trt.tensorrt."""
    trt = compat.tensorrt()
    severity = trt.ILogger.Severity if hasattr(trt.ILogger, "Severity") else trt.Logger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG // 2,  # every tactic of every layer: detectron2's loggers show DEBUG
    }
    target = logging.getLogger("d2_trt.tensorrt")

    class Bridge(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level, message):
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(message)
            target.log(levels[level], message)

    return Bridge()


def precision_policy(spec: BuildSpec) -> Callable[[str], torch.dtype]:
    """Module name -> the type it computes in."""
    cache: dict[str, torch.dtype] = {}

    def dtype(name: str) -> torch.dtype:
        name = name.removeprefix("model.")  # patterns are over the model's own names, which Core prefixes
        if name not in cache:
            pinned = any(
                fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")
                for pattern in spec.fp32_modules
            )
            cache[name] = torch.float32 if pinned else spec.dtype
        return cache[name]

    return dtype


def trace(network, config, core: Core, images: torch.Tensor, spec: BuildSpec) -> Graph:
    """Fill a network by running the model on real images once.

    Args:
        network, config: of TensorRT.
        images: (B, 3, H, W) float32 on the model's device, of the range's optimal shape.

    Raises:
        ConversionError: something has no converter; it names the operation, the module and the line.
    """
    t2t = compat.torch2trt()
    trt = compat.tensorrt()
    kwargs = {
        "module": core,
        "device_types": {},
        "default_device_type": trt.DeviceType.GPU,
        "gpu_fallback": True,
    }
    context_box: list = []

    def current_module() -> str:
        stack = context_box[0].module_stack
        return context_box[0].get_module_name(stack[-1]) if stack else ""

    graph = Graph(
        network,
        precision_policy(spec),
        current_module,
        largest_size=max(spec.max_shape[1:]),
        msda=spec.msda,
    )
    context = t2t.ConversionContext(
        network, converters=converter_table(graph), torch2trt_kwargs=kwargs, builder_config=config
    )
    context_box.append(context)
    graph.network = context.network  # names every layer after its module
    batch, height, width = (a if a == b else -1 for a, b in zip(spec.min_shape, spec.max_shape))
    images = images.detach().clone()
    with context, compat.unwrapped_shapes(), torch.no_grad():
        images._trt = network.add_input(INPUT, trt.float32, (batch, 3, height, width))
        with Guard(context, graph, spec.dynamic):
            outputs = core(images)
        for name, output in zip(OUTPUTS, outputs):
            result = network.add_identity(graph.cast(output._trt, torch.float32)).get_output(0)
            if not graph.strong:
                result.dtype = trt.float32
            result.name = name
            network.mark_output(result)
    return graph


def build_engine(
    model: nn.Module, spec: BuildSpec, images: torch.Tensor, timing_cache: bytes | None = None
) -> tuple[bytes, BuildReport, bytes]:
    """Build an engine for a model.

    Args:
        model: MaskFormer in evaluation mode, on a GPU.
        images: (B, 3, H, W) float32 of spec.opt_shape, to trace with.
        timing_cache: what an earlier build returned.

    Returns:
        the serialized engine, a report, and the timing cache.

    Raises:
        ConversionError: see trace.
        BuildError: TensorRT built nothing; it holds TensorRT's own messages.
    """
    trt = compat.tensorrt()
    log = trt_logger()
    builder = trt.Builder(log)
    network = builder.create_network(compat.network_flags())
    config = builder.create_builder_config()
    configure(config, spec)
    cache = config.create_timing_cache(timing_cache or b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    report = BuildReport()

    started = time.perf_counter()
    core = Core(model)
    # Kept until the build is over: TensorRT reads the weights that it holds.
    graph = trace(network, config, core, images, spec)
    report.trace_seconds = time.perf_counter() - started
    profile = builder.create_optimization_profile()
    shapes = [(b, 3, h, w) for b, h, w in (spec.min_shape, spec.opt_shape, spec.max_shape)]
    profile.set_shape(INPUT, *shapes)
    config.add_optimization_profile(profile)
    report.layers = dict(Counter(network.get_layer(i).type.name for i in range(network.num_layers)))
    report.precisions = _precisions(network, graph)
    logger.info("Traced %d layers in %.1f s; TensorRT builds now", network.num_layers, report.trace_seconds)

    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    report.build_seconds = time.perf_counter() - started
    if plan is None:
        raise BuildError(build_failure(log.errors, spec))
    plan = bytes(plan)
    report.engine_bytes = len(plan)
    logger.info("Built an engine of %.1f MiB in %.0f s", len(plan) / 2**20, report.build_seconds)
    return plan, report, bytes(cache.serialize())


def combine_timing_caches(old: bytes, new: bytes) -> bytes:
    """Both timing caches in one, the newer timings winning."""
    trt = compat.tensorrt()
    config = trt.Builder(trt_logger()).create_builder_config()
    cache = config.create_timing_cache(new)
    cache.combine(config.create_timing_cache(old), ignore_mismatch=False)
    return bytes(cache.serialize())


def configure(config, spec: BuildSpec) -> None:
    """Set the builder's flags and limits."""
    trt = compat.tensorrt()
    if spec.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    config.builder_optimization_level = spec.opt_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(config, "set_tactic_sources"):
        # cuBLAS and cuDNN only bring versions to match: TensorRT's own kernels do as well.
        config.set_tactic_sources(0)
    if spec.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    else:
        config.set_flag(trt.BuilderFlag.TF32)
    if spec.dtype is not torch.float32 and not compat.strongly_typed():
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def _precisions(network, graph: Graph) -> dict[str, int]:
    count: Counter = Counter()
    for i in range(network.num_layers):
        output = network.get_layer(i).get_output(0)
        if output is not None and graph.is_float(output):
            layer = network.get_layer(i)
            kind = output.dtype if graph.strong or not layer.precision_is_set else layer.precision
            count[kind.name] += 1
    return dict(count)


def build_failure(messages: Sequence[str], spec: BuildSpec) -> str:
    """What to tell of a build that gave nothing."""
    text = "\n  ".join(messages[-5:]) or "TensorRT gave no reason"
    hint = ""
    if any("memory" in m.lower() for m in messages):
        hint = (
            "\nLower MODEL.TENSORRT.WORKSPACE, MODEL.TENSORRT.MAX_BATCH_SIZE or the range in MODEL.TENSORRT.SHAPES, or "
            "free memory of the GPU."
        )
    return f"TensorRT built no engine for {spec}:\n  {text}{hint}"


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """The model in evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
