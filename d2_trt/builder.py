"""From a model to a serialized engine."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

import torch
from torch import nn

from . import compat, progress
from .build_failure import build_failure, is_about_memory, memory_hint
from .build_report import BuildReport
from .build_spec import BuildSpec, check_precision, precision_policy
from .converters import MODEL, Graph, Guard, TracedMemory, converter_table
from .errors import BuildError, ConversionError, GPUMemoryError, MissingDependencyError, first_line
from .parity import exact_float32

logger = logging.getLogger(__name__)

INPUT = "images"
OUTPUTS = ("pred_logits", "pred_masks")
_tracing = threading.RLock()


class Core(nn.Module):
    """What becomes an engine: the network with its normalisation, (B, 3, H, W) float32 -> logits and masks."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.core(images)


def trt_logger(hear: Callable[[str], None] | None = None):
    """TensorRT's messages in Python's logging, under d2_trt.tensorrt.

    Args:
        hear: called with every message of every level.
    """
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
            self.softly = False  # whether errors are no more than DEBUG to the log
            self.warnings: deque[str] = deque(maxlen=100)

        def log(self, level, message):
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(message)
            elif level == severity.WARNING:
                self.warnings.append(message)
            if hear is not None:
                hear(message)
            # Of every execution context, one for each shape that has a graph.
            often = level == severity.INFO and message.startswith(("[MS]", "[MemUsageChange]"))
            loudness = levels[severity.VERBOSE if often else level]
            target.log(min(loudness, logging.DEBUG) if self.softly else loudness, message)

    return Bridge()


@contextlib.contextmanager
def starting(log):
    """Around the making of a trt.Builder or trt.Runtime.

    Args:
        log: of trt_logger, which it is made with.

    Raises:
        MissingDependencyError: TensorRT cannot use the GPU.
        GPUMemoryError: the GPU has no memory for it.
    """
    try:
        yield
    except TypeError as error:  # how the bindings say that TensorRT made none
        said = "; ".join(log.errors[-3:]) or first_line(error)
        trt = compat.tensorrt()
        if is_about_memory(said):
            raise GPUMemoryError(
                f"the GPU has no memory left for TensorRT {trt.__version__} to start ({said}). Free some."
            ) from error
        raise MissingDependencyError(
            f"TensorRT {trt.__version__} cannot use this GPU ({said}). `nvidia-smi` tells the driver's version: install a "
            "driver that this TensorRT supports, or `pip install` a TensorRT that this driver supports."
        ) from error


def trace(network, config, core: Core, images: torch.Tensor, spec: BuildSpec) -> Graph:
    """Fill a network by running the model on real images once.

    Args:
        network, config: of TensorRT.
        images: (B, 3, H, W) float32 on the model's device, of the range's optimal shape.

    Raises:
        ConversionError: something has no converter; it names the operation, the module and the line.
    """
    with _tracing:  # it replaces PyTorch's functions, which are those of all threads
        return _trace(network, config, core, images, spec)


def _trace(network, config, core: Core, images: torch.Tensor, spec: BuildSpec) -> Graph:
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

    @contextlib.contextmanager
    def inside(module: nn.Module):
        context_box[0].module_stack.append(module)
        try:
            yield
        finally:
            context_box[0].module_stack.pop()

    graph = Graph(
        network,
        precision_policy(spec),
        current_module,
        largest_size=max(spec.max_shape[1:]),
        msda=spec.msda,
        normalization=spec.normalization,
        attention=spec.attention,
        inside=inside,
        memory=TracedMemory([*core.parameters(), *core.buffers()]),
    )
    table = converter_table(graph)
    context = t2t.ConversionContext(network, converters=table, torch2trt_kwargs=kwargs, builder_config=config)
    context_box.append(context)
    graph.network = context.network  # names every layer after its module
    batch, height, width = (a if a == b else -1 for a, b in zip(spec.min_shape, spec.max_shape))
    images = images.detach().clone()
    images._trt = network.add_input(INPUT, trt.float32, (batch, 3, height, width))
    graph.memory.add(images)
    with compat.converting(context, table), torch.no_grad(), Guard(context, graph, table, spec.dynamic):
        outputs = core(images)
    graph.network = network  # torch2trt names layers of modules only
    for name, output in zip(OUTPUTS, outputs, strict=True):
        if not hasattr(output, "_trt"):
            raise ConversionError(
                f"the output {name} of module '{MODEL}' was not computed of the images by "
                "functions that have converters: an engine would return the same for every image"
            )
        result = network.add_identity(graph.cast(output._trt, torch.float32)).get_output(0)
        if not graph.strong:
            result.dtype = trt.float32
        result.name = name
        network.mark_output(result)
    _name_layers(network)
    return graph


def _name_layers(network) -> None:
    """Give the model's path to layers that no module of it was traced for: its own, and those of the outputs."""
    count = 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.name.startswith(":"):
            layer.name = MODEL + layer.name
        elif layer.name.startswith("(Unnamed"):
            layer.name = f"{MODEL}:outputs.{count}:{layer.type.name}"
            count += 1


def build_engine(
    model: nn.Module, spec: BuildSpec, images: torch.Tensor, timing_cache: bytes | None = None
) -> tuple[bytes, BuildReport, bytes]:
    """Build an engine for a model.

    Args:
        model: MaskFormer in evaluation mode, on a GPU.
        images: (B, 3, H, W) float32 of spec.opt_shape, to trace with.
        timing_cache: what an earlier build returned. One that does not fit is ignored, with a warning.

    Returns:
        the serialized engine, a report, and the timing cache.

    Raises:
        ConversionError: see trace.
        MissingDependencyError: this TensorRT or this GPU lacks the precision.
        BuildError: TensorRT built nothing, with its own messages.
        GPUMemoryError: memory ran out.
        KeyboardInterrupt: on Ctrl-C; see progress.run.
    """
    check_precision(spec.precision, images.device)
    current = torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext()
    try:
        with current:
            built = _build(model, spec, images, timing_cache or b"")
    except torch.cuda.OutOfMemoryError as error:
        raise GPUMemoryError(
            f"the GPU's memory ran out while the model was traced ({first_line(error)})"
            f"{memory_hint(spec, images.device)}"
        ) from error
    # torch2trt's context and the converter table refer to each other, and hold a copy of all weights between them.
    gc.collect()
    return built


def _build(
    model: nn.Module, spec: BuildSpec, images: torch.Tensor, timings: bytes
) -> tuple[bytes, BuildReport, bytes]:
    trt = compat.tensorrt()
    doing = progress.Progress()
    log = trt_logger(doing.hear)
    with starting(log):
        builder = trt.Builder(log)
    if spec.precision == "fp16" and not getattr(builder, "platform_has_fast_fp16", True):
        logger.warning(
            "MODEL.TENSORRT.PRECISION is 'fp16', in which this GPU is no faster than in float32: fp32 is as fast, and exact"
        )
    network = builder.create_network(compat.network_flags())
    config = builder.create_builder_config()
    configure(config, spec)
    report = BuildReport()
    cache = _use_timings(config, timings, log)
    report.timing_cache_used = bool(timings) and cache is not None
    if cache is None:
        cache = _use_timings(config, b"", log)
    timed = compat.timing_entries(cache)
    started = time.perf_counter()
    # Kept until the build is over: TensorRT reads the weights that it holds. What depends on weights alone PyTorch computes,
    # for an engine that other processes take from the cache: not by TF32, which is this one's choice.
    with exact_float32():
        graph = trace(network, config, Core(model), images, spec)
    report.trace_seconds = time.perf_counter() - started
    profile = builder.create_optimization_profile()
    shapes = [(b, 3, h, w) for b, h, w in (spec.min_shape, spec.opt_shape, spec.max_shape)]
    profile.set_shape(INPUT, *shapes)
    config.add_optimization_profile(profile)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    report.layers = dict(Counter(layer.type.name for layer in layers))
    report.precisions = _precisions(layers, graph)
    report.plugin_layers = [layer.name for layer in layers if layer.type.name.startswith("PLUGIN")]
    logger.info("Traced %d layers in %.1f s; TensorRT builds now", len(layers), report.trace_seconds)

    if images.is_cuda:
        torch.cuda.empty_cache()  # what PyTorch keeps for itself, TensorRT cannot have
    monitor = None
    if compat.has_progress_monitor():
        monitor = config.progress_monitor = progress.monitor(doing)

    def build(held=(graph, log, monitor, profile, cache)):
        return builder.build_serialized_network(network, config)

    started = time.perf_counter()
    plan = progress.run(build, doing, images.device)
    report.build_seconds = time.perf_counter() - started
    report.kernels_timed = doing.kernels
    if plan is None:
        kind = GPUMemoryError if any(map(is_about_memory, log.errors)) else BuildError
        raise kind(build_failure(log.errors, spec, log.warnings, images.device))
    plan = bytes(plan)
    report.engine_bytes = len(plan)
    if timed is not None:
        report.new_timings = compat.timing_entries(cache) - timed
    report.inspect(plan, log)
    for line in report.lines():
        logger.info(line)
    return plan, report, bytes(cache.serialize())


def _use_timings(config, timings: bytes, log):
    """The timing cache of a build, made from what an earlier one left; None, with a warning, where that does not fit."""
    problem = "it is damaged, or of another TensorRT"
    cache = None
    log.softly = True
    try:
        cache = config.create_timing_cache(timings)
        if cache is not None:
            if config.set_timing_cache(cache, ignore_mismatch=False):
                if log.errors:
                    # 8.6.0 says of every cache that it will not be used: what it cannot read are the timings of fused
                    # regions. It uses the others, of another network too.
                    logger.info("TensorRT on an earlier build's timings: %s", "; ".join(log.errors))
                return cache
            problem = "it is of another GPU or another TensorRT"
    except (RuntimeError, TypeError, ValueError) as error:
        problem = str(error)
    finally:
        log.softly = False
        log.errors.clear()  # a build that fails does so for other reasons
    if not timings:
        raise BuildError(f"TensorRT makes no empty timing cache: {problem}")
    logger.warning("The timing cache is not used, so that this build takes longer: %s", problem)
    return None


def timing_combiner() -> Callable[[bytes, bytes], bytes] | None:
    """combine_timing_caches; None where this TensorRT cannot do it safely."""
    return combine_timing_caches if compat.timing_caches_combine() else None


def combine_timing_caches(old: bytes, new: bytes) -> bytes:
    """Both timing caches in one, the newer timings winning.

    Raises:
        BuildError: they are not of one TensorRT and GPU, one is damaged, or this TensorRT cannot do it safely.
    """
    trt = compat.tensorrt()
    if not compat.timing_caches_combine():
        raise BuildError(f"TensorRT {trt.__version__} may crash when it combines timing caches")
    log = trt_logger()
    with starting(log):
        config = trt.Builder(log).create_builder_config()
    try:
        caches = [config.create_timing_cache(timings) for timings in (new, old)]
        combined = None not in caches and caches[0].combine(caches[1], ignore_mismatch=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BuildError(f"the timing caches do not combine: {error}") from error
    if not combined:
        raise BuildError(
            "the timing caches do not combine: they are damaged, or of different GPUs or TensorRTs"
        )
    return bytes(caches[0].serialize())


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
    if compat.version() < (10, 0):
        # 8.6 lends a profile to one context alone, unless told so; every CUDA graph has a context.
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if spec.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    else:
        config.set_flag(trt.BuilderFlag.TF32)
    if spec.dtype is not torch.float32 and not compat.strongly_typed():
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def _precisions(layers: Iterable, graph: Graph) -> dict[str, int]:
    count: Counter = Counter()
    for layer in layers:
        output = layer.get_output(0)
        if output is not None and graph.is_float(output):
            kind = output.dtype if graph.strong or not layer.precision_is_set else layer.precision
            count[kind.name] += 1
    return dict(count)


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """The model in evaluation mode, and back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parts may have had another than the whole
            module.training = training
