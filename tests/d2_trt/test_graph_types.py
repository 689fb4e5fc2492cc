"""The types that Graph knows of tensors where TensorRT tells others, in the double and in real networks."""

from __future__ import annotations

import torch

from d2_trt import builder, compat, plugin
from d2_trt.converters import Graph
from tests.d2_trt.plugin_helpers import F16, F32, real
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double as trt  # noqa: F401


@real
def test_real_network_tells_types_as_the_double_does():
    """TensorRT 8.6 calls every inner tensor float32; Graph remembers what they are."""
    trt = compat.tensorrt()  # noqa: F811
    made = trt.Builder(builder.trt_logger())
    _check_moved_types(trt, made.create_network(compat.network_flags()))


@real
def test_graph_knows_the_type_that_a_plugin_gives_in_a_real_network():
    trt = compat.tensorrt()  # noqa: F811
    made = trt.Builder(builder.trt_logger())
    network = made.create_network(compat.network_flags())
    graph = Graph(network, lambda _: torch.float16, lambda: "", largest_size=64, normalization="plugin")
    x = network.add_input("x", trt.float32, (2, 3, 4))
    ones = graph.constant(torch.ones(4))
    fields = {"x_type": F32, "residual_type": -1, "position_type": -1, "out_type": F16, "epsilon": 1e-5}
    out = graph.plugin(plugin.LAYER_NORM, [x, ones, ones], fields, F16)
    assert graph.torch_dtype(out) == F16
    assert out.dtype == (trt.float16 if compat.strongly_typed() else trt.float32)


def test_graph_knows_the_type_of_a_tensor_that_was_only_moved(trt):  # noqa: F811
    _check_moved_types(trt, build_network(trt))


def _check_moved_types(trt, network):  # noqa: F811
    graph = Graph(network, lambda _: torch.float16, lambda: "", largest_size=64)
    x = network.add_input("x", trt.float32, (2, 3, 4))
    half = graph.emit(lambda t: network.add_activation(t, trt.ActivationType.RELU), x)
    moved = graph.transpose(half, (0, 2, 1))
    part = graph.slice(moved, [0, 0, 0], [1, 4, 3])
    joined = graph.concat([part, part], 0)
    wanted = trt.float16 if compat.strongly_typed() else trt.float32
    assert [t.dtype for t in (half, moved, part, joined)] == [wanted] * 4
    for tensor in (half, moved, part, joined):
        assert graph.torch_dtype(tensor) == torch.float16
        assert graph.cast(tensor, torch.float16) is tensor
    assert graph.torch_dtype(graph.transpose(x, (2, 1, 0))) == torch.float32
