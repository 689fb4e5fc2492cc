"""The double of TensorRT's network, and its layers that compute, against torch at several sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.doubles.checking import ALIVE, check, configured, constant, first
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double  # noqa: F401


def test_dimensions_that_differ_between_examples_are_minus_one(trt):
    network = build_network(trt, {"x": [(1, 3, 8, 8), (2, 3, 8, 16)]})
    x = network.add_input("x", trt.float32, (-1, 3, -1, -1))
    assert tuple(x.shape) == (-1, 3, -1, -1)
    y = first(network.add_activation(x, trt.ActivationType.RELU))
    assert tuple(y.shape) == (-1, 3, 8, -1)
    assert isinstance(y.shape, trt.Dims) and y.shape[1] == 3
    assert y.dtype == trt.float32


def test_merged_dimensions_differ_between_the_default_examples(trt):
    network = build_network(trt)
    x = network.add_input("x", trt.float32, (-1, 3, -1, -1))
    merged = configured(network.add_shuffle(x), reshape_dims=(0, 0, -1))
    assert tuple(merged.shape) == (-1, 3, -1)


def test_a_property_that_is_set_later_changes_what_follows(trt):
    network = build_network(trt)
    x = network.add_input("x", trt.float32, (2, 3, 4))
    layer = network.add_shuffle(x)
    relu = network.add_activation(layer.get_output(0), trt.ActivationType.RELU).get_output(0)
    assert tuple(relu.shape) == (2, 3, 4)
    layer.reshape_dims = (6, 4)
    assert tuple(relu.shape) == (6, 4)
    layer.second_transpose = (1, 0)
    assert tuple(relu.shape) == (4, 6)


def test_a_network_of_thousands_of_layers_runs(trt):
    network = build_network(trt)
    t = network.add_input("x", trt.float32, (1, 2))
    for _ in range(3000):
        t = first(network.add_unary(t, trt.UnaryOperation.NEG))
    network.mark_output(t)
    x = torch.tensor([[1.0, -2.0]])
    assert torch.equal(network.evaluate({"x": x})[t.name], x)


@pytest.mark.parametrize(
    ("op", "reference"),
    [
        ("SUM", torch.add),
        ("SUB", torch.sub),
        ("PROD", torch.mul),
        ("DIV", torch.div),
        ("MAX", torch.maximum),
        ("MIN", torch.minimum),
        ("FLOOR_DIV", torch.floor_divide),
        ("EQUAL", torch.eq),
        ("GREATER", torch.gt),
        ("LESS", torch.lt),
    ],
)
def test_elementwise(trt, op, reference):
    kind = getattr(trt.ElementWiseOperation, op)
    shapes = [((2, 3, 4), (2, 3, 1)), ((1, 3, 6), (1, 3, 1)), ((4, 3, 2), (4, 3, 1))]
    check(trt, lambda n, a, b: first(n.add_elementwise(a, b, kind)), reference, shapes)


def test_power(trt):
    def add(n, x):
        base = first(n.add_unary(x, trt.UnaryOperation.ABS))
        return first(
            n.add_elementwise(base, constant(n, torch.full((1,) * 4, 1.5)), trt.ElementWiseOperation.POW)
        )

    check(trt, add, lambda x: x.abs() ** 1.5)


@pytest.mark.parametrize(
    ("op", "reference"), [("AND", torch.logical_and), ("OR", torch.logical_or), ("XOR", torch.logical_xor)]
)
def test_logic(trt, op, reference):
    def add(n, a, b):
        zero = constant(n, torch.zeros(1, 1))
        greater = trt.ElementWiseOperation.GREATER
        a, b = (first(n.add_elementwise(t, zero, greater)) for t in (a, b))
        return first(n.add_elementwise(a, b, getattr(trt.ElementWiseOperation, op)))

    check(
        trt, add, lambda a, b: reference(a > 0, b > 0), [((2, 5), (2, 5)), ((7, 5), (7, 5)), ((1, 5), (1, 5))]
    )


@pytest.mark.parametrize("a", [7, -7])
@pytest.mark.parametrize(("op", "want"), [("DIV", {7: 3, -7: -3}), ("FLOOR_DIV", {7: 3, -7: -4})])
def test_whole_numbers_divide_as_in_c_or_towards_minus_infinity(trt, op, want, a):
    network = build_network(trt)
    x = network.add_input("x", trt.int32, (1,))
    two = constant(network, torch.tensor([2], dtype=torch.int32))
    out = first(network.add_elementwise(x, two, getattr(trt.ElementWiseOperation, op)))
    network.mark_output(out)
    assert network.evaluate({"x": torch.tensor([a], dtype=torch.int32)})[out.name].item() == want[a]


@pytest.mark.parametrize(
    "op", ["EXP", "ABS", "NEG", "SIN", "COS", "CEIL", "FLOOR", "ERF", "ROUND", "SIGN", "ATAN"]
)
def test_unary(trt, op):
    reference = getattr(torch, op.lower())
    check(trt, lambda n, x: first(n.add_unary(x, getattr(trt.UnaryOperation, op))), reference)


def test_unary_of_positive_numbers_and_not(trt):
    def add(n, x):
        x = first(n.add_unary(x, trt.UnaryOperation.ABS))
        one = constant(n, torch.ones(1, 1, 1, 1))
        big = first(n.add_elementwise(x, one, trt.ElementWiseOperation.GREATER))
        names = ("SQRT", "RECIP", "LOG")
        return [
            *(first(n.add_unary(x, getattr(trt.UnaryOperation, name))) for name in names),
            first(n.add_unary(big, trt.UnaryOperation.NOT)),
        ]

    check(trt, add, lambda x: [x.abs().sqrt(), 1 / x.abs(), x.abs().log(), x.abs() <= 1], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "values", "reference"),
    [
        ("RELU", {}, F.relu),
        ("SIGMOID", {}, torch.sigmoid),
        ("TANH", {}, torch.tanh),
        ("CLIP", {"alpha": -0.5, "beta": 0.25}, lambda x: x.clamp(-0.5, 0.25)),
        ("LEAKY_RELU", {"alpha": 0.1}, lambda x: F.leaky_relu(x, 0.1)),
        ("GELU_ERF", {}, F.gelu),
        ("GELU_TANH", {}, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_activation(trt, kind, values, reference):
    if not hasattr(trt.ActivationType, kind):
        assert trt.__version__.startswith("8.")
        return
    activation = getattr(trt.ActivationType, kind)
    check(trt, lambda n, x: configured(n.add_activation(x, activation), **values), reference)


def test_scale_of_channels(trt):
    scale, shift = torch.randn(3), torch.randn(3)

    def add(n, x):
        arrays = [t.numpy() for t in (shift, scale, torch.ones(3))]
        ALIVE.extend(arrays)
        return first(n.add_scale_nd(x, trt.ScaleMode.CHANNEL, *arrays, 1))

    check(trt, add, lambda x: x * scale[:, None, None] + shift[:, None, None])


@pytest.mark.parametrize(
    ("ops", "shapes", "reference"),
    [
        (
            ("NONE", "NONE"),
            [((2, 4, 5), (2, 5, 3)), ((1, 4, 5), (1, 5, 3)), ((3, 4, 5), (3, 5, 3))],
            torch.matmul,
        ),
        (
            ("NONE", "TRANSPOSE"),
            [((2, 6, 5), (1, 3, 5)), ((4, 7, 5), (1, 3, 5)), ((1, 1, 5), (1, 3, 5))],
            lambda a, b: a @ b.mT,
        ),
        (
            ("TRANSPOSE", "NONE"),
            [((5, 4), (5, 2)), ((5, 6), (5, 2)), ((5, 1), (5, 2))],
            lambda a, b: a.mT @ b,
        ),
        (("NONE", "VECTOR"), [((4, 5), (5,)), ((2, 5), (5,)), ((1, 5), (5,))], torch.matmul),
        (("VECTOR", "NONE"), [((5,), (5, 4)), ((5,), (5, 2)), ((5,), (5, 1))], torch.matmul),
    ],
)
def test_matrix_multiply(trt, ops, shapes, reference):
    first_op, second_op = (getattr(trt.MatrixOperation, op) for op in ops)
    check(trt, lambda n, a, b: first(n.add_matrix_multiply(a, first_op, b, second_op)), reference, shapes)


def test_softmax_over_the_axis_of_its_bit_or_third_to_last(trt):
    check(trt, lambda n, x: configured(n.add_softmax(x), axes=1 << 3), lambda x: x.softmax(3))
    check(trt, lambda n, x: first(n.add_softmax(x)), lambda x: x.softmax(1))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("op", "reference"), [("SUM", torch.sum), ("AVG", torch.mean), ("MAX", torch.amax), ("MIN", torch.amin)]
)
def test_reduce(trt, op, reference, keep):
    kind = getattr(trt.ReduceOperation, op)
    add = lambda n, x: first(n.add_reduce(x, kind, 0b1100, keep))  # noqa: E731
    check(trt, add, lambda x: reference(x, (2, 3), keepdim=keep), atol=1e-5)


def test_topk(trt):
    def add(n, x):
        layer = n.add_topk(x, trt.TopKOperation.MAX, 2, 1 << 1)
        return [layer.get_output(0), layer.get_output(1)]

    check(trt, add, lambda x: list(x.topk(2, 1)), [(3, 9), (2, 5), (1, 4)])


def test_select_broadcasts(trt):
    def add(n, x, y):
        zero = constant(n, torch.zeros(1, 1))
        positive = first(n.add_elementwise(x, zero, trt.ElementWiseOperation.GREATER))
        return first(n.add_select(positive, x, y))

    shapes = [((2, 4), (2, 1)), ((3, 5), (3, 1)), ((1, 2), (1, 1))]
    check(trt, add, lambda x, y: torch.where(x > 0, x, y), shapes)


def test_cast_cuts_off_and_identity_converts_in_weak_typing(trt):
    add = lambda n, x: first(n.add_cast(first(n.add_cast(x, trt.int32)), trt.float32))  # noqa: E731
    check(trt, lambda n, x: add(n, x), torch.trunc)
    if trt.__version__.startswith("8."):

        def convert(n, x):
            layer = n.add_identity(x)
            layer.set_output_type(0, trt.int32)
            return first(layer)

        check(trt, convert, lambda x: x.int())
