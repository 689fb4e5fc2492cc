"""Constants of a network: in the type that is wanted of them, so that an engine converts none when it runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2_trt import builder, compat
from d2_trt.build_spec import BuildSpec
from d2_trt.converters import Graph
from mask2former.modeling import shape_ops
from mask2former.modeling.transformer_decoder.position_encoding import PositionEmbeddingSine
from tests.d2_trt.plugin_helpers import real
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, random_images, trace
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double as trt  # noqa: F401

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Ties to even in half precision, both ways; half's subnormals, one of them a tie; too large for half; and too small.
VALUES = torch.tensor(
    [1 + 2**-11, 1 + 3 * 2**-11, -0.1, 0.0, 3e-5, 2**-25, 3 * 2**-25, 65519.0, 65520.0, 1e-9]
)


def graph_of(network, dtype=F16) -> Graph:
    return Graph(network, lambda _: dtype, lambda: "", largest_size=64)


def kinds(network) -> list[str]:
    return [network.get_layer(i).type.name for i in range(network.num_layers)]


def half_types() -> list[torch.dtype]:
    return [F16, BF16] if compat.strongly_typed() else [F16]


def test_cast_of_a_constant_is_a_constant_of_the_same_bits(trt):  # noqa: F811
    for dtype in half_types():
        network = build_network(trt)
        graph = graph_of(network)
        out = graph.cast(graph.constant(VALUES), dtype)
        assert graph.torch_dtype(out) == dtype and set(kinds(network)) == {"CONSTANT"}
        network.mark_output(out)
        (made,) = network.evaluate({}).values()
        assert made.dtype == dtype and torch.equal(made, VALUES.to(dtype))


def test_constant_is_made_once_in_each_type(trt):  # noqa: F811
    network = build_network(trt)
    graph = graph_of(network)
    exact = graph.constant(VALUES)
    half = graph.cast(exact, F16)
    assert (
        graph.cast(exact, F16) is half and graph.cast(exact, F32) is exact and graph.cast(half, F16) is half
    )
    # Of the values as they were given.
    network.mark_output(graph.cast(half, F32))
    assert torch.equal(next(iter(network.evaluate({}).values())), VALUES)


def test_cast_of_a_constant_that_was_moved_moves_another(trt):  # noqa: F811
    for dtype in half_types():
        network = build_network(trt)
        graph = graph_of(network, dtype)
        rows = VALUES.view(2, 5)
        moved = graph.transpose(graph.slice(graph.constant(rows), [0, 1], [2, 3]), (1, 0))
        joined = graph.concat([moved, graph.constant(torch.ones(1, 2))], 0)
        out = graph.expand(graph.reshape(graph.cast(joined, dtype), [1, 4, 2]), [3, 4, 2])
        network.mark_output(out)
        assert "CAST" not in kinds(network)
        (made,) = network.evaluate({}).values()
        expected = torch.cat([rows[:, 1:4].T, torch.ones(1, 2)]).to(dtype)
        assert made.dtype == dtype and torch.equal(made, expected.expand(3, 4, 2))


def test_what_was_computed_or_given_is_cast(trt):  # noqa: F811
    network = build_network(trt)
    graph = graph_of(network)
    given = network.add_input("x", trt.float32, (10,))
    mixed = graph.concat([given, graph.constant(VALUES)], 0)
    total = graph.elementwise("SUM", graph.constant(VALUES), 1.0, compute=F32, out=F32)
    for tensor in (given, mixed, total):
        before = kinds(network).count("CAST")
        assert graph.torch_dtype(graph.cast(tensor, F16)) == F16
        assert kinds(network).count("CAST") == before + 1


class Repeated(nn.Module):
    """A parameter for each image, less the image's position encodings and the mask of shifted windows."""

    def __init__(self):
        super().__init__()
        self.pe_layer = PositionEmbeddingSine(2)
        self.weight = nn.Parameter(torch.rand(1, 4, 1, 1, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        rows = images.permute(0, 2, 3, 1)
        windows = shape_ops.shifted_window_mask(rows, 8, 3)
        positions = self.pe_layer(images)
        repeated = shape_ops.expand_batch_like(self.weight, images)
        return images[:, 0:1] * positions + repeated, shape_ops.window_partition(rows, 8)[..., 0:1] + windows

    core = forward


@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_what_fixed_sizes_decide_is_constant(trt, shapes, monkeypatch):  # noqa: F811
    model = Repeated()
    network = trace(trt, model, BuildSpec(**shapes), monkeypatch)
    of_constants = {layer.type.name for layer in network._layers if network._is_constant(layer.get_output(0))}
    assert of_constants == {"CONSTANT"}
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        for actual, expected in zip(network.evaluate({"images": images}).values(), model(images)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


# Real engines


class OfConstants(nn.Module):
    """An output that is a parameter, repeated and moved, times ones that are computed of the images."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(0)))

    def core(self, images):
        ones = images * 0 + 1
        repeated = shape_ops.expand_batch_like(self.weight, images)
        return ones * 2, repeated.transpose(1, 2)[:, :, 1:2, None] * ones

    forward = core


def test_half_constants_have_the_bits_of_casts(trt, monkeypatch):  # noqa: F811
    model = OfConstants()
    network = trace(trt, model, BuildSpec(**DYNAMIC, precision="fp16", fp32_modules=()), monkeypatch)
    for shape in (TRACED, *OTHERS):
        images = random_images(shape)
        actual = list(network.evaluate({"images": images}).values())[1]
        assert torch.equal(actual.float(), model(images)[1].half().float())


@real
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_real_engine_takes_half_constants(shapes):
    """Moved or not, for a layer in half precision: of the same bits as casts in the engine."""
    from d2_trt.engine import Engine

    model = OfConstants().cuda()
    spec = BuildSpec(**shapes, precision="fp16", fp32_modules=())
    plan, _, _ = builder.build_engine(model, spec, random_images(TRACED).cuda())
    engine = Engine(plan, torch.device("cuda"))
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape).cuda()
        assert torch.equal(engine(images)[1], model.core(images)[1].half().float())
