"""The double's builder and runtime, end to end on CPU tensors."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from torch.nn import functional as F

from tests.doubles.fake_tensorrt import use_tensorrt
from tests.doubles.fixtures import VERSIONS, trt_double  # noqa: F401
from tests.doubles.trt_api import Refused

STRONG = [v for v in VERSIONS if not v.startswith("8.")]
KEPT: list = []


def flags(trt, name: str) -> int:
    return 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))


class Messages:
    def __init__(self, trt):
        messages = self.list = []

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, message):
                messages.append((severity.name, message))

        self.logger = Logger()


def small_network(trt, logger, refuse=True):
    builder = trt.Builder(logger)
    builder.refuse = refuse
    name = (
        "STRONGLY_TYPED" if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") else "EXPLICIT_BATCH"
    )
    network = builder.create_network(flags(trt, name))
    x = network.add_input("images", trt.float32, (-1, 3, -1, -1))
    kernel = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).numpy()
    KEPT.append(kernel)
    layer = network.add_convolution_nd(x, 4, (3, 3), kernel)
    layer.name = "conv"
    layer.padding_nd = (1, 1)
    out = layer.get_output(0)
    out.name = "out"
    network.mark_output(out)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, 3, 8, 8), (1, 3, 16, 16), (2, 3, 32, 32))
    assert config.add_optimization_profile(profile) == 0
    return builder, network, config, torch.from_numpy(kernel)


def test_engine_runs_on_addresses_of_cpu_tensors(trt):
    messages = Messages(trt)
    builder, network, config, kernel = small_network(trt, messages.logger)
    plan = bytes(builder.build_serialized_network(network, config))
    engine = trt.Runtime(messages.logger).deserialize_cuda_engine(plan)
    assert [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)] == ["images", "out"]
    assert engine.get_tensor_mode("images") == trt.TensorIOMode.INPUT
    assert engine.get_tensor_dtype("out") == trt.float32
    low, best, high = engine.get_tensor_profile_shape("images", 0)
    assert (tuple(low), tuple(best), tuple(high)) == ((1, 3, 8, 8), (1, 3, 16, 16), (2, 3, 32, 32))
    context = engine.create_execution_context()
    assert not context.execute_async_v3(0)
    for shape in ((1, 3, 8, 12), (2, 3, 32, 8)):
        images = torch.rand(shape)
        assert context.set_input_shape("images", shape)
        out = torch.empty(tuple(context.get_tensor_shape("out")))
        assert context.set_tensor_address("images", images.data_ptr())
        assert context.set_tensor_address("out", out.data_ptr())
        assert context.execute_async_v3(stream_handle=0)
        torch.testing.assert_close(out, F.conv2d(images, kernel, padding=1))
    assert not context.set_input_shape("images", (3, 3, 8, 8))
    assert not context.set_input_shape("images", (1, 3, 64, 8))
    with pytest.raises(ValueError, match="no tensor 'x'"):
        context.set_input_shape("x", (1,))


def test_contexts_of_one_engine_run_in_several_threads(trt):
    builder, network, config, kernel = small_network(trt, trt.Logger())
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(
        builder.build_serialized_network(network, config)
    )
    failed = []

    def work(seed):
        images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        context, out = engine.create_execution_context(), torch.empty(1, 4, 8, 8)
        context.set_input_shape("images", (1, 3, 8, 8))
        context.set_tensor_address("images", images.data_ptr())
        context.set_tensor_address("out", out.data_ptr())
        context.execute_async_v3(0)
        if not torch.allclose(out, F.conv2d(images, kernel, padding=1), atol=1e-5):
            failed.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_damaged_engine_and_one_of_another_version_do_not_load(trt):
    messages = Messages(trt)
    builder, network, config, _ = small_network(trt, messages.logger)
    plan = bytes(builder.build_serialized_network(network, config))
    runtime = trt.Runtime(messages.logger)
    for damaged in (plan[:-1], plan[:-1] + b"?", b"", b"x" * 200):
        assert runtime.deserialize_cuda_engine(damaged) is None
    assert "damaged" in messages.list[-1][1]
    other = next(v for v in VERSIONS if v != trt.__version__)
    with use_tensorrt(other) as another:
        more = Messages(another)
        assert another.Runtime(more.logger).deserialize_cuda_engine(plan) is None
        assert trt.__version__ in more.list[-1][1]


def test_refused_network_builds_nothing_and_logs_why(trt):
    messages = Messages(trt)
    builder, network, config, _ = small_network(trt, messages.logger)
    layer = network.add_softmax(network.get_input(0))
    layer.axes = 3
    assert builder.build_serialized_network(network, config) is None
    assert messages.list[-1][0] == "ERROR" and "one bit" in messages.list[-1][1]
    builder.refuse = False
    with pytest.raises(Refused, match="one bit"):
        builder.build_serialized_network(network, config)


def test_profiles_must_fit_the_inputs(trt):
    builder, network, _, _ = small_network(trt, trt.Logger(), refuse=False)
    config = builder.create_builder_config()
    with pytest.raises(Refused, match="no optimization profile"):
        builder.build_serialized_network(network, config)
    profile = builder.create_optimization_profile()
    with pytest.raises(Refused, match="<= opt"):
        profile.set_shape("images", (2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8))
    assert config.add_optimization_profile(profile) == -1
    profile.set_shape("images", (1, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 8))
    config.add_optimization_profile(profile)
    with pytest.raises(Refused, match="profile shape"):
        builder.build_serialized_network(network, config)


@pytest.mark.skipif("8.6.1" not in VERSIONS, reason="there are no bindings of TensorRT 8.6 for this Python")
def test_half_layers_without_the_flag_are_refused_in_8_6():
    with use_tensorrt("8.6.1") as trt:
        builder, network, config, _ = small_network(trt, trt.Logger(), refuse=False)
        network.get_layer(0).precision = trt.float16
        with pytest.raises(Refused, match="FP16 is not set"):
            builder.build_serialized_network(network, config)
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        assert builder.build_serialized_network(network, config) is not None


def test_configuration_is_checked_and_kept(trt):
    config = trt.Builder(trt.Logger()).create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32)
    config.clear_flag(trt.BuilderFlag.TF32)
    assert not config.get_flag(trt.BuilderFlag.TF32) and config.flags == 0
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 30
    assert config.set_tactic_sources(0) and config.get_tactic_sources() == 0
    assert not config.set_tactic_sources(1 << 20)
    config.builder_optimization_level = 5
    with pytest.raises(Refused):
        config.builder_optimization_level = 6
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    with pytest.raises(TypeError):
        config.set_flag(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(AttributeError):
        config.workspace = 1


def test_timing_cache_grows_with_a_build_and_is_read_back(trt):
    builder, network, config, _ = small_network(trt, trt.Logger())
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    empty = bytes(cache.serialize())
    builder.build_serialized_network(network, config)
    full = bytes(cache.serialize())
    assert len(full) > len(empty)
    other = config.create_timing_cache(empty)
    other.combine(config.create_timing_cache(full), ignore_mismatch=False)
    assert bytes(other.serialize()) == full
    with pytest.raises(Refused):
        config.create_timing_cache(b"nonsense")


@pytest.mark.parametrize("version", STRONG)
def test_progress_monitor_sees_phases_and_can_end_the_build(version):
    with use_tensorrt(version) as trt:
        seen = []

        class Monitor(trt.IProgressMonitor):
            def __init__(self, going):
                trt.IProgressMonitor.__init__(self)
                self.going = going

            def phase_start(self, name, parent, steps):
                seen.append(("start", name))

            def step_complete(self, name, step):
                seen.append(("step", name))
                return self.going

            def phase_finish(self, name):
                seen.append(("finish", name))

        for going in (True, False):
            seen.clear()
            builder, network, config, _ = small_network(trt, trt.Logger(trt.Logger.INTERNAL_ERROR))
            config.progress_monitor = Monitor(going)
            assert (builder.build_serialized_network(network, config) is not None) == going
            assert sum(kind == "start" for kind, _ in seen) == sum(kind == "finish" for kind, _ in seen) == 2
            assert sum(kind == "step" for kind, _ in seen) == (4 if going else 1)


def test_profiler_and_inspector_name_every_layer(trt):
    builder, network, config, _ = small_network(trt, trt.Logger())
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(
        builder.build_serialized_network(network, config)
    )
    document = json.loads(
        engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    )
    assert [layer["Name"] for layer in document["Layers"]] == ["conv"]
    times = {}

    class Profiler(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name, ms):
            times[name] = ms

    context = engine.create_execution_context()
    context.profiler = Profiler()
    context.set_input_shape("images", (1, 3, 8, 8))
    images, out = torch.rand(1, 3, 8, 8), torch.empty(1, 4, 8, 8)
    context.set_tensor_address("images", images.data_ptr())
    context.set_tensor_address("out", out.data_ptr())
    assert context.execute_async_v3(0)
    assert list(times) == ["conv"]
