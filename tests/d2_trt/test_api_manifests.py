"""What the project uses of TensorRT's Python API, against the API of every version from 8.6.1 to 11.4.0."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles.api_uses import find_uses, find_uses_below
from tests.doubles.trt_api import manifest, versions

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("d2_trt",)
SINCE_10 = ("8.6.1",)
UNTIL_11 = ("11.0.0.114", "11.4.0.106")

# Uses that some versions lack: the versions, and what keeps the use from running there.
GATED = {
    "BuilderFlag.FP16": (UNTIL_11, "set for weakly typed networks only (compat.strongly_typed)"),
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": (UNTIL_11, "set for weakly typed networks only"),
    "IConstantLayer.precision": (UNTIL_11, "of weakly typed networks only"),
    "IConstantLayer.set_output_type": (UNTIL_11, "of weakly typed networks only"),
    "ILayer.precision": (UNTIL_11, "of weakly typed networks only"),
    "ILayer.precision_is_set": (UNTIL_11, "of weakly typed networks only"),
    "ILayer.set_output_type": (UNTIL_11, "of weakly typed networks only"),
    "ITensor.dtype": (UNTIL_11, "set in weakly typed networks only; reading it is fine everywhere"),
    "INormalizationLayer.compute_precision": (UNTIL_11, "of weakly typed networks only"),
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": (UNTIL_11, "for 8.6 only (compat.network_flags)"),
    "PreviewFeature.PROFILE_SHARING_0806": (UNTIL_11, "for 8.6 only (builder.configure)"),
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": (SINCE_10, "from 10 on only (compat.network_flags)"),
    "IPluginRegistry.get_plugin_creator": (
        UNTIL_11,
        "where get_creator is missing (compat.plugin_creator)",
    ),
    "IPluginRegistry.get_creator": (SINCE_10, "behind hasattr (compat.plugin_creator)"),
    "INetworkDefinition.add_plugin_v3": (SINCE_10, "from 10 on only (plugin.add_layer)"),
    "TensorRTPhase": (SINCE_10, "from 10 on only (plugin.add_layer)"),
    "TensorRTPhase.BUILD": (SINCE_10, "from 10 on only (plugin.add_layer)"),
    "INetworkDefinition.add_normalization_v2": (
        ("8.6.1", "10.0.1", "10.3.0", "10.13.3.9"),
        "behind hasattr: version 1 of group normalisation is used there",
    ),
    "IProgressMonitor": (SINCE_10, "where it exists only (compat.has_progress_monitor)"),
    "IProgressMonitor.__init__": (SINCE_10, "where it exists only (compat.has_progress_monitor)"),
    "IBuilderConfig.progress_monitor": (SINCE_10, "where it exists only (compat.has_progress_monitor)"),
    "ICudaEngine.device_memory_size_v2": (("8.6.1", "10.0.1"), "behind hasattr (compat.device_memory)"),
    "ICudaEngine.device_memory_size": (
        UNTIL_11,
        "where device_memory_size_v2 is missing (compat.device_memory)",
    ),
    "ICudaEngine.create_execution_context_without_device_memory": (
        UNTIL_11,
        "behind hasattr (compat.context_in)",
    ),
    "ICudaEngine.create_execution_context": (SINCE_10, "with a strategy in 11 only (compat.context_in)"),
    "ExecutionContextAllocationStrategy": (SINCE_10, "in 11 only (compat.context_in)"),
    "ExecutionContextAllocationStrategy.USER_MANAGED": (SINCE_10, "in 11 only (compat.context_in)"),
    "IExecutionContext.set_device_memory": (("8.6.1", "10.0.1"), "behind hasattr (compat.context_in)"),
    "Builder.platform_has_fast_fp16": (UNTIL_11, "with a default; 11 has no GPU without"),
    "bfloat16": (SINCE_10, "behind hasattr"),
    "int64": (SINCE_10, "from 10 on only (compat.shape_dtype)"),
}


def all_uses():
    return [use for folder in FOLDERS for use in find_uses_below(ROOT / folder)]


def test_every_use_exists_in_every_version_or_is_gated():
    problems = []
    for use in all_uses():
        missing, gated = use.missing(), GATED.get(use.name, ((), ""))[0]
        if set(missing) - set(gated):
            problems.append(f"{use.place}: {use.how} of {use.name} fails in TensorRT {', '.join(missing)}")
    assert not problems, "\n".join(
        ["add a gate to the code and an entry to GATED, or use something else:", *problems]
    )


def test_every_gate_is_needed():
    missing = {}
    for use in all_uses():
        missing.setdefault(use.name, set()).update(use.missing())
    stale = [name for name, (gated, _) in GATED.items() if missing.get(name, set()) != set(gated)]
    assert not stale


def test_the_scan_reaches_the_whole_project():
    names = {use.name for use in all_uses()}
    assert len(names) > 100
    # one of each kind: a layer's property, a method, an enum's member, a constant, an argument named in a helper
    assert {
        "IShuffleLayer.reshape_dims",
        "INetworkDefinition.add_resize",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.create_execution_context",
        "IBuilderConfig.set_memory_pool_limit",
        "SampleMode.FILL",
        "float32",
        "UnaryOperation.SIN",
    } <= names


def test_manifests_cover_the_supported_range():
    assert versions()[0] == "8.6.1" and versions()[-1] == "11.4.0.106"
    assert all(len(manifest(version)) > 1000 for version in versions())


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("trt.SliceMode.FILL", "SliceMode.FILL"),
        ("self.trt.NoSuchThing", "NoSuchThing"),
        ("compat.tensorrt().fp7", "fp7"),
        ("kinds = g.trt.UnaryOperation\nkinds.SQUARE", "UnaryOperation.SQUARE"),
        ("layer = network.add_softmax(x)\nlayer.axis = 1", "ISoftMaxLayer.axis"),
        ("layer = g.network.add_softmax(x)\nlayer.type = 1", "ISoftMaxLayer.type"),
        ("g.network.add_squeeze(x)", "INetworkDefinition.add_squeeze"),
        ("g.network.add_topk(x, op, k=1)", "INetworkDefinition.add_topk"),
        ("g.network.add_softmax(x, 1)", "INetworkDefinition.add_softmax"),
        ("g.network.add_slice(x, a, b, strides=c)", "INetworkDefinition.add_slice"),
        ("g.network.add_fill(s, op, t)", "INetworkDefinition.add_fill"),
        ("g.network.add_quantize(x, s)", "INetworkDefinition.add_quantize"),
        ("t = network.add_shape(x).get_output(0)\nt.size", "ITensor.size"),
        ("def f(config):\n    trt\n    config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size"),
        ("def f(engine):\n    trt\n    engine.num_bindings", "ICudaEngine.num_bindings"),
        (
            "c = trt.Runtime(l).deserialize_cuda_engine(p).create_execution_context()\nc.execute_v4()",
            "IExecutionContext.execute_v4",
        ),
        (
            "class A:\n def f(s): self.e.device_memory_size\n"
            " def g(self): self.e = trt.Runtime(l).deserialize_cuda_engine(b)",
            "ICudaEngine.device_memory_size",
        ),
        ("trt\ng.unary('SQUARE', x)", "UnaryOperation.SQUARE"),
        ("trt\ndef f(layer):\n    layer.set_inputs(1, x)", "ILayer.set_inputs"),
        (
            "class Log(trt.ILogger):\n    def __init__(self): trt.ILogger.__init__(self, 1)",
            "ILogger.__init__",
        ),
    ],
)
def test_scan_finds_what_a_version_lacks(source, name):
    assert name in {use.name for use in find_uses(source) if use.missing()}


@pytest.mark.parametrize(
    "source",
    [
        "trt.SampleMode.FILL",
        "layer = g.network.add_softmax(x)\nlayer.axes = 1\nlayer.name = 'a'",
        "g.network.add_slice(x, a, b, stride=c)",
        "g.network.add_convolution_nd(x, 1, k, w)",
        "g.network.add_convolution_nd(*arguments)",
        "context = torch2trt.ConversionContext(network)\ncontext.module_stack",
        "def f(layer):\n    trt\n    layer.reshape_dims = (1,)",
        "class Log(trt.ILogger):\n    def __init__(self): trt.ILogger.__init__(self)",
    ],
)
def test_scan_lets_pass_what_every_version_has(source):
    assert [use for use in find_uses(source) if use.missing()] == []


def test_files_without_tensorrt_are_left_alone():
    assert find_uses("def f(config, engine):\n    return config.anything, engine.whatever") == []
