"""Building: what the report tells, what failures say, and what is left when it is over."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import signal
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2_trt import builder, compat
from d2_trt.build_failure import build_failure
from d2_trt.build_spec import BuildSpec, check_precision
from d2_trt.errors import BuildError, ConversionError, MissingDependencyError
from tests.doubles import conversion
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import mini_model

SPEC = BuildSpec((1, 32, 32), (1, 32, 64), (2, 64, 64))
EXAMPLES = [(1, 3, 32, 64), (2, 3, 64, 32)]


class Model(nn.Module):
    """As much of a MaskFormer as there is something to build."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 128.0), persistent=False)
        self.between = lambda x: x
        self.eval()

    def core(self, images):
        x = self.between(F.relu(self.backbone(images - self.pixel_mean)))
        return self.head(x), x


@pytest.fixture(autouse=True)
def double(trt, monkeypatch, caplog):  # noqa: F811
    """The double of TensorRT under the builder, and its messages in caplog."""
    create = trt.Builder.create_network

    def create_network(self, flags=0):
        network = create(self, flags)
        network.examples = {"images": EXAMPLES}
        return network

    monkeypatch.setattr(trt.Builder, "create_network", create_network, raising=False)
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    caplog.set_level(logging.INFO, "d2_trt")
    conversion.use_conversion(monkeypatch)
    return trt


def build(model=None, spec=SPEC, timings=None):
    return builder.build_engine(model or Model(), spec, torch.rand(1, 3, 32, 64) * 255, timings)


def fail_with(monkeypatch, trt, *messages):  # noqa: F811
    """A build that says these things, (severity, text), and gives nothing."""

    def build_serialized_network(self, network, config):
        for severity, text in messages:
            self.logger.log(getattr(trt.ILogger.Severity, severity), text)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", build_serialized_network, raising=False)


# The report


def test_report_tells_of_the_network_and_of_the_engine(trt, caplog):  # noqa: F811
    plan, report, _ = build()
    assert report.engine_bytes == len(plan) and report.device_memory == 1 << 20
    assert report.layers["CONVOLUTION"] == 2 and report.precisions == {
        "FLOAT": sum(report.precisions.values())
    }
    assert report.engine["kinds"]["Convolution"] == 2 and report.engine["count"] == sum(
        report.layers.values()
    )
    assert report.plugin_layers == [] and report.engine["plugins"] == {}
    assert json.loads(json.dumps(dataclasses.asdict(report))) == dataclasses.asdict(report)
    text = "\n".join(caplog.messages)
    for line in ("Traced ", "Built an engine of ", "layers by kinds: ", " fp32", "layers by plugins: none"):
        assert line in text


def test_engine_that_does_not_load_is_still_reported(trt, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(
        trt.Runtime, "deserialize_cuda_engine", lambda self, serialized_engine: None, raising=False
    )
    _, report, _ = build()
    assert report.engine == {"problem": "the engine does not load"}
    assert any("is not known: the engine does not load" in message for message in caplog.messages)


def test_constants_are_computed_without_tf32_whatever_the_caller_uses():
    """What depends on weights alone is PyTorch's, in an engine that other processes take from the cache."""
    matmul, seen = torch.backends.cuda.matmul, []
    model = Model()
    model.between = lambda x: seen.append(matmul.allow_tf32) or x
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        build(model)
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    assert seen and not any(seen)


# Settings


@pytest.fixture
def configs(trt, monkeypatch):  # noqa: F811
    """The builder's configurations, as TensorRT is given them."""
    given = []
    build_network = trt.Builder.build_serialized_network

    def build_serialized_network(self, network, config):
        given.append(config)
        return build_network(self, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", build_serialized_network, raising=False)
    return given


def test_workspace_is_limited_where_it_is_asked_for(trt, configs):  # noqa: F811
    for size in (3 << 28, 0):
        build(spec=dataclasses.replace(SPEC, workspace_bytes=size))
    pool = trt.MemoryPoolType.WORKSPACE
    untouched = trt.Builder(trt.Logger()).create_builder_config().get_memory_pool_limit(pool)
    assert [config.get_memory_pool_limit(pool) for config in configs] == [3 << 28, untouched]


@pytest.mark.parametrize("level", [0, 3, 5])
def test_effort_is_what_is_asked_for(configs, level):
    build(spec=dataclasses.replace(SPEC, opt_level=level))
    assert [config.builder_optimization_level for config in configs] == [level]


def test_layers_can_be_inspected_in_the_engine(trt, configs):  # noqa: F811
    build()
    assert configs[0].profiling_verbosity == trt.ProfilingVerbosity.DETAILED


def test_no_kernels_of_other_libraries_are_tried(configs):
    """cuBLAS and cuDNN would have to be of TensorRT's versions."""
    build()
    assert configs[0].get_tactic_sources() == 0


def test_contexts_share_the_profile(trt, configs):  # noqa: F811
    """From TensorRT 10 on they do by themselves."""
    build()
    if compat.version() < (10, 0):
        assert configs[0].get_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_arithmetic_is_what_is_asked_for(trt, configs, precision):  # noqa: F811
    """TF32 in all but fp32, where TensorRT has it on by itself. Networks without types obey their layers' precisions."""
    if precision == "bf16" and not compat.strongly_typed():
        pytest.skip("bfloat16 needs TensorRT 10")
    build(spec=dataclasses.replace(SPEC, precision=precision))
    (config,), flags = configs, trt.BuilderFlag
    assert config.get_flag(flags.TF32) == (precision != "fp32")
    told = not compat.strongly_typed() and precision == "fp16"
    for name in ("FP16", "OBEY_PRECISION_CONSTRAINTS"):
        assert (hasattr(flags, name) and config.get_flag(getattr(flags, name))) == told


# The timing cache


def test_timings_of_an_earlier_build_are_used(trt, caplog):  # noqa: F811
    _, first, timings = build()
    _, second, again = build(timings=timings)
    assert not first.timing_cache_used and second.timing_cache_used and again == timings
    if compat.strongly_typed():
        assert first.new_timings > 0 and second.new_timings == 0
        assert caplog.messages[-1] == "0 kernels were timed anew, with an earlier build's timings"
    else:
        assert first.new_timings is second.new_timings is None


def of_another_tensorrt(timings: bytes) -> bytes:
    return timings.replace(compat.tensorrt().__version__.encode(), b"9.9.9")


@pytest.mark.parametrize("damage", [lambda timings: b"nonsense", of_another_tensorrt])
def test_timings_that_do_not_fit_are_ignored_with_a_warning(damage, caplog):
    _, _, timings = build()
    _, report, again = build(timings=damage(timings))
    assert again == timings and not report.timing_cache_used
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("The timing cache is not used, so that this build takes longer: ")


def test_timings_that_tensorrt_makes_nothing_of_are_ignored(trt, monkeypatch, caplog):  # noqa: F811
    create = trt.IBuilderConfig.create_timing_cache

    def create_timing_cache(self, serialized_timing_cache):
        return None if serialized_timing_cache else create(self, serialized_timing_cache)

    monkeypatch.setattr(trt.IBuilderConfig, "create_timing_cache", create_timing_cache)
    _, report, _ = build(timings=b"from elsewhere")
    assert not report.timing_cache_used and "damaged, or of another TensorRT" in caplog.text


def test_what_tensorrt_says_of_timings_that_it_takes_is_no_error(trt, monkeypatch, caplog):  # noqa: F811
    """8.6.0 announces of all that they will not be used, and uses them."""
    _, _, timings = build()
    said, logs = "The timing cache will not be used!", []
    trt_logger, create = builder.trt_logger, trt.IBuilderConfig.create_timing_cache

    def create_timing_cache(self, serialized_timing_cache):
        if serialized_timing_cache:
            logs[-1].log(trt.ILogger.Severity.ERROR, said)
        return create(self, serialized_timing_cache)

    monkeypatch.setattr(builder, "trt_logger", lambda *args: logs.append(trt_logger(*args)) or logs[-1])
    monkeypatch.setattr(trt.IBuilderConfig, "create_timing_cache", create_timing_cache)
    caplog.clear()
    _, report, _ = build(timings=timings)
    assert report.timing_cache_used
    told = [r for r in caplog.records if said in r.getMessage() and r.levelno >= logging.INFO]
    assert [(r.name, r.levelno) for r in told] == [("d2_trt.builder", logging.INFO)]

    fail_with(monkeypatch, trt, ("ERROR", "another reason"))
    with pytest.raises(BuildError) as error:
        build(timings=timings)
    assert "another reason" in str(error.value) and said not in str(error.value)
    assert [r.levelno for r in caplog.records if r.getMessage() == "another reason"] == [logging.ERROR]


def test_kernels_that_messages_tell_of_are_counted(trt, monkeypatch, caplog):  # noqa: F811
    build_network = trt.Builder.build_serialized_network

    def build_serialized_network(self, network, config):
        for _ in range(3):
            self.logger.log(trt.ILogger.Severity.VERBOSE, "--- Timing Runner: backbone:0:CONVOLUTION (Cask)")
        return build_network(self, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", build_serialized_network, raising=False)
    _, report, _ = build()
    assert report.kernels_timed == 3
    told = "3 kernels were timed anew, without an earlier build's timings" in caplog.messages
    assert told == (report.new_timings is None)


def test_timings_combine_only_with_their_own_kind(trt):  # noqa: F811
    _, _, timings = build()
    if not compat.timing_caches_combine():  # 8.6 crashed on the caches of full-size models
        with pytest.raises(BuildError, match="may crash"):
            builder.combine_timing_caches(timings, timings)
        return
    assert builder.combine_timing_caches(timings, timings) == timings
    for other in (of_another_tensorrt(timings), b"nonsense"):
        with pytest.raises(BuildError, match="timing caches do not combine"):
            builder.combine_timing_caches(other, timings)


# Failures


def test_what_tensorrt_says_of_every_context_is_not_for_detectron2s_loggers(trt, monkeypatch):  # noqa: F811
    """Those show DEBUG, and every shape that has a graph has a context."""
    shown = []
    monkeypatch.setattr(logging.getLogger("d2_trt.tensorrt"), "log", lambda *record: shown.append(record))
    log, level = builder.trt_logger(), trt.ILogger.Severity
    log.log(level.INFO, "[MS] Number of aux streams is 4")
    log.log(level.INFO, "[MemUsageChange] Init CUDA: CPU +1")
    log.log(level.INFO, "Detected 1 inputs and 2 output network tensors.")
    log.log(level.WARNING, "[MS] a warning")
    assert [number for number, _ in shown] == [5, 5, logging.DEBUG, logging.WARNING]


def test_failed_build_tells_tensorrts_own_messages(trt, monkeypatch):  # noqa: F811
    layer = "model.backbone:0:CONVOLUTION"
    fail_with(
        monkeypatch,
        trt,
        ("WARNING", "a warning"),
        ("ERROR", f"Could not find any implementation for {layer}"),
    )
    with pytest.raises(BuildError, match=f"(?s)BuildSpec.*implementation for {layer}") as caught:
        build()
    assert "Lower" not in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        ("ERROR", "[resizingAllocator] Requested amount of GPU memory (1024 bytes) could not be allocated."),
        (
            "ERROR",
            "2: [virtualMemoryBuffer.cpp::resizePhysical::127] Error Code 2: OutOfMemory (no further information)",
        ),
        (
            "WARNING",
            "Skipping tactic 0x0 due to insufficient memory on requested size of 268435456 detected.",
        ),
    ],
)
def test_build_that_runs_out_of_memory_tells_what_to_lower(trt, message, monkeypatch):  # noqa: F811
    fail_with(monkeypatch, trt, message, ("ERROR", "Could not find any implementation for node x."))
    spec = dataclasses.replace(SPEC, workspace_bytes=1 << 29)
    with pytest.raises(BuildError) as caught:
        build(spec=spec)
    text = str(caught.value)
    assert message[1] in text and "implementation for node x" in text
    for part in (
        "MODEL.TENSORRT.MAX_BATCH_SIZE (now 2)",
        "MODEL.TENSORRT.SHAPES (now 64x64)",
        "raise MODEL.TENSORRT.WORKSPACE (now 0.5 GiB)",
        "free memory of the GPU",
    ):
        assert part in text


def test_hint_tells_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    text = build_failure(["out of memory"], SPEC, device=torch.device("cuda"))
    assert "free memory of the GPU, of which 1.0 of 80.0 GiB are free" in text and "raise" not in text


def test_memory_that_runs_out_while_tracing_tells_what_to_lower(trt):  # noqa: F811
    model = Model()

    def between(x):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    model.between = between
    with pytest.raises(
        BuildError, match=r"(?s)while the model was traced \(CUDA.*2.00 GiB\.\).*MAX_BATCH_SIZE \(now 2\)"
    ):
        build(model)


def test_bf16_needs_tensorrt_10_and_a_gpu_that_has_it(trt, monkeypatch):  # noqa: F811
    spec = dataclasses.replace(SPEC, precision="bf16")
    if not compat.strongly_typed():
        with pytest.raises(MissingDependencyError, match=r"PRECISION is 'bf16'.*TensorRT 10.*8\.6\.1.*fp16"):
            build(spec=spec)
        return
    _, report, _ = build(spec=spec)
    assert report.precisions["BF16"] >= 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(MissingDependencyError, match=r"PRECISION is 'bf16'.*8\.0.*Tesla T4 has 7\.5.*fp16"):
        check_precision(spec.precision, torch.device("cuda"))


def test_fp16_on_a_gpu_that_gains_nothing_from_it_is_warned_of(trt, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(trt.Builder, "platform_has_fast_fp16", False, raising=False)
    build(spec=dataclasses.replace(SPEC, precision="fp16"))
    told = "MODEL.TENSORRT.PRECISION is 'fp16', in which this GPU is no faster" in caplog.text
    assert told == (compat.version() < (11, 0))  # TensorRT 11 runs on no such GPU, and does not tell


# Ctrl-C


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the shell made this process ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_ends_the_build(trt, interruptible, monkeypatch, caplog):  # noqa: F811
    """From TensorRT 10 on at its next step; 8.6 is left to itself."""
    from d2_trt import progress
    from tests.doubles import builder as double

    left, calls = [], []
    monkeypatch.setattr(progress, "_left_alone", left)
    stopping = progress.Progress.stop
    stopped = progress.threading.Event()
    monkeypatch.setattr(progress.Progress, "stop", lambda self: (stopping(self), stopped.set()))

    def work():
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.wait(10)

    monkeypatch.setattr(trt.Builder, "work", staticmethod(work))
    built = len(double.BUILT)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert all(done.wait(10) for done in left)
    if compat.has_progress_monitor():
        assert len(calls) == 1 and not left and len(double.BUILT) == built
        assert caplog.messages[-2:] == [
            "Interrupted: TensorRT ends the build. Nothing is kept of it.",
            "the progress monitor ended the build",
        ]
    else:
        assert "8.6.1 does not stop" in caplog.text
    assert build()[1].engine_bytes > 0  # another one is not disturbed


# What is left


def traces_on(model) -> list[str]:
    """Tensors of a model that are still tied to a network."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kept = [(name, x) for m in model.modules() for name, x in vars(m).items() if isinstance(x, torch.Tensor)]
    return [name for name, tensor in (*tensors, *kept) if hasattr(tensor, "_trt")]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_tracing_leaves_the_model_and_pytorch_as_they_were(trt, error):  # noqa: F811
    model = Model()

    def between(x):
        if error is not None:
            raise error
        return x

    model.between = between
    places = [(F, "relu"), (F, "conv2d"), (torch.Tensor, "view"), (torch.Tensor, "__getattribute__")]
    before = [vars(owner).get(name) for owner, name in places]
    images = torch.rand(1, 3, 32, 64)
    if error is None:
        builder.build_engine(model, SPEC, images)
    else:
        with pytest.raises(error):
            builder.build_engine(model, SPEC, images)
    assert [vars(owner).get(name) for owner, name in places] == before
    assert not traces_on(model) and not hasattr(images, "_trt")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_whole_model_keeps_no_traces_and_its_plugins_are_reported(trt):  # noqa: F811
    model = mini_model("swin-mini").cpu()
    before = {name: len(vars(module)) for name, module in model.named_modules()}
    # Of an example's size: where a map is of one size in all examples, what is traced gives the constants.
    _, report, _ = build(model, dataclasses.replace(SPEC, precision="fp16"))
    assert not traces_on(model)
    assert {name: len(vars(module)) for name, module in model.named_modules()} == before
    names = [name for name in report.plugin_layers if "self_attn.core" in name]
    assert names and len(names) == len(report.plugin_layers) == report.layers["PLUGIN_V2"]


def test_weights_live_as_long_as_the_build_and_no_longer(trt, monkeypatch):  # noqa: F811
    graphs, alive = [], []
    trace = builder.trace

    def trace_and_watch(*args):
        graph = trace(*args)
        graphs.append(weakref.ref(graph))
        return graph

    def work():
        gc.collect()
        alive.append(graphs[0]() is not None and len(graphs[0]()._alive) > 0)

    monkeypatch.setattr(builder, "trace", trace_and_watch)
    monkeypatch.setattr(trt.Builder, "work", staticmethod(work))
    model = Model()
    build(model)
    assert alive == [True] * 3
    assert graphs[0]() is None
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_failure_in_a_converter_names_the_module(trt):  # noqa: F811
    model = Model()
    model.between = lambda x: F.celu(x)
    with pytest.raises(ConversionError, match=r"celu.*in module 'model'.*test_builder\.py"):
        build(model)
