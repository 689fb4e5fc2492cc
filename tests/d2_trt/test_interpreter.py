"""The double of TensorRT's network: every layer against torch, at several sizes, in every version."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double  # noqa: F401

SHAPES = [(2, 3, 8, 12), (1, 3, 6, 10), (3, 3, 16, 4)]


def check(trt, add, reference, shapes=SHAPES, dynamic=True, atol=1e-6, dtype=torch.float32):
    """Build `add(network, *inputs) -> tensor` over inputs of the given shapes and compare it with torch at each.

    shapes: one shape, or a tuple of shapes for several inputs, for each size to try. The last is not an example.
    """
    cases = [shape if isinstance(shape[0], tuple) else (shape,) for shape in shapes]
    count = len(cases[0])
    generator = torch.Generator().manual_seed(0)
    examples = {f"x{i}": [case[i] for case in (cases[:-1] if dynamic else cases[:1])] for i in range(count)}
    network = build_network(trt, examples)
    kinds = {torch.float32: trt.float32, torch.int32: trt.int32, torch.bool: trt.bool}
    inputs = []
    for i in range(count):
        sizes = zip(*(case[i] for case in cases))
        dims = tuple(s[0] if len(set(s)) == 1 or not dynamic else -1 for s in sizes)
        inputs.append(network.add_input(f"x{i}", kinds[dtype], dims))
    out = add(network, *inputs)
    outs = out if isinstance(out, (list, tuple)) else [out]
    for i, tensor in enumerate(outs):
        tensor.name = f"out{i}"
        network.mark_output(tensor)
    network.check()
    for case in cases if dynamic else cases[:1]:
        values = [torch.randn(shape, generator=generator) for shape in case]
        values = [v.to(dtype) if dtype is torch.float32 else (v * 3).to(dtype) for v in values]
        got = network.evaluate({f"x{i}": v for i, v in enumerate(values)})
        want = reference(*values)
        for i, expected in enumerate(want if isinstance(want, (list, tuple)) else [want]):
            result = got[f"out{i}"]
            assert result.shape == expected.shape
            if expected.is_floating_point():
                torch.testing.assert_close(result.float(), expected, atol=atol, rtol=1e-5)
            else:
                assert torch.equal(result.long(), expected.long())
    return network


def constant(network, value):
    value = torch.as_tensor(value)
    array = np.ascontiguousarray(value.numpy())
    ALIVE.append(array)
    return network.add_constant(tuple(value.shape), array).get_output(0)


def sizes(network, tensor):
    """The shape tensor of a tensor, and constants of its type."""
    shape = network.add_shape(tensor).get_output(0)
    kind = np.int64 if shape.dtype.name == "INT64" else np.int32

    def numbers(*values):
        ALIVE.append(np.array(values, kind))
        return network.add_constant((len(values),), ALIVE[-1]).get_output(0)

    return shape, numbers


ALIVE: list[np.ndarray] = []


def first(layer):
    return layer.get_output(0)


def configured(layer, **values):
    for name, value in values.items():
        setattr(layer, name, value)
    return layer.get_output(0)


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


def test_shuffle(trt):
    def add(n, x):
        return configured(
            n.add_shuffle(x),
            first_transpose=(0, 2, 3, 1),
            reshape_dims=(0, -1, 3),
            second_transpose=(0, 2, 1),
        )

    check(trt, add, lambda x: x.flatten(2))
    check(
        trt,
        lambda n, x: configured(n.add_shuffle(x), first_transpose=trt.Permutation([1, 0])),
        torch.t,
        [(2, 3)] * 3,
    )


def test_shuffle_to_a_shape_of_the_network(trt):
    def add(n, x):
        shape, numbers = sizes(n, x)
        parts = [first(n.add_slice(shape, (i,), (1,), (1,))) for i in range(4)]
        area = first(n.add_elementwise(parts[2], parts[3], trt.ElementWiseOperation.PROD))
        layer = n.add_shuffle(x)
        layer.set_input(1, first(n.add_concatenation([parts[0], area, numbers(3)])))
        return first(layer)

    check(trt, add, lambda x: x.reshape(x.shape[0], -1, 3))


def test_concatenation_of_inputs_of_different_size(trt):
    shapes = [((2, 3, 4), (2, 5, 4)), ((1, 3, 6), (1, 5, 6)), ((3, 3, 2), (3, 5, 2))]
    add = lambda n, a, b: configured(n.add_concatenation([a, b]), axis=1)  # noqa: E731
    check(trt, add, lambda a, b: torch.cat([a, b], 1), shapes)
    check(trt, lambda n, a, b: first(n.add_concatenation([a, a])), lambda a, b: torch.cat([a, a], 0), shapes)


def test_slice_with_strides_and_repeated_elements(trt):
    add = lambda n, x: first(n.add_slice(x, (0, 1, 0), (3, 2, 4), (0, 2, 1)))  # noqa: E731
    check(trt, add, lambda x: x[:, 1:4:2].expand(3, 2, 4), [(1, 4, 4), (1, 4, 4), (1, 4, 4)])


def test_slice_to_a_shape_of_the_network(trt):
    def add(n, x):
        shape, numbers = sizes(n, x)
        less = first(n.add_elementwise(shape, numbers(0, 0, 2, 2), trt.ElementWiseOperation.SUB))
        layer = n.add_slice(x, (0, 0, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1))
        layer.set_input(2, less)
        return first(layer)

    check(trt, add, lambda x: x[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize(
    ("mode", "reference"),
    [
        ("FILL", lambda x: F.pad(x, (1, 2))),
        ("CLAMP", lambda x: F.pad(x, (1, 2), mode="replicate")),
        ("REFLECT", lambda x: F.pad(x, (1, 2), mode="reflect")),
        ("WRAP", lambda x: F.pad(x, (1, 2), mode="circular")),
    ],
)
def test_slice_past_the_ends(trt, mode, reference):
    def add(n, x):
        shape, numbers = sizes(n, x)
        layer = n.add_slice(x, (0, 0, -1), (0, 0, 0), (1, 1, 1))
        layer.set_input(2, first(n.add_elementwise(shape, numbers(0, 0, 3), trt.ElementWiseOperation.SUM)))
        layer.mode = getattr(trt.SampleMode, mode)
        return first(layer)

    check(trt, add, reference, [(2, 3, 5), (1, 3, 8), (3, 3, 4)])


def test_slice_with_a_fill_value(trt):
    def add(n, x):
        layer = n.add_slice(x, (0, 0), (2, 6), (1, 1))
        layer.mode = trt.SampleMode.FILL
        layer.set_input(4, constant(n, torch.tensor(7.0)))
        return first(layer)

    check(trt, add, lambda x: F.pad(x, (0, 6 - x.shape[1]), value=7.0), [(2, 4), (2, 5), (2, 1)])


def test_gather(trt):
    at = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    add = lambda n, x: first(n.add_gather(x, constant(n, at), 1))  # noqa: E731
    check(trt, add, lambda x: x[:, at.long()])


def test_gather_by_image(trt):
    def add(n, x, y):
        at = first(n.add_topk(y, trt.TopKOperation.MAX, 2, 1 << 1)).name and n[n.num_layers - 1].get_output(1)
        return configured(n.add_gather_v2(x, at, trt.GatherMode.DEFAULT), axis=1, num_elementwise_dims=1)

    def reference(x, y):
        return torch.stack([image[index] for image, index in zip(x, y.topk(2, 1).indices)])

    check(trt, add, reference, [((2, 5, 3), (2, 5)), ((1, 7, 3), (1, 7)), ((3, 4, 3), (3, 4))])


def test_gather_elements_and_tuples(trt):
    at = torch.tensor([[0, 2, 1], [1, 1, 0]], dtype=torch.int32)
    add = lambda n, x: configured(n.add_gather_v2(x, constant(n, at), trt.GatherMode.ELEMENT), axis=0)  # noqa: E731
    check(trt, add, lambda x: x.gather(0, at.long()), [(4, 3), (3, 3), (5, 3)])
    pairs = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    add = lambda n, x: first(n.add_gather_v2(x, constant(n, pairs), trt.GatherMode.ND))  # noqa: E731
    check(trt, add, lambda x: x[pairs[:, 0].long(), pairs[:, 1].long()], [(4, 3, 2), (3, 3, 6), (5, 3, 1)])


def test_gather_of_tuples_in_each_image_and_head(trt):
    at = torch.tensor([[[[1], [0]], [[3], [3]]]], dtype=torch.int32)  # (1, 2, 2, 1)

    def add(n, x):
        layer = n.add_gather_v2(x, constant(n, at), trt.GatherMode.ND)
        return configured(layer, num_elementwise_dims=2)

    def reference(x):
        return torch.stack([torch.stack([x[0, h, at[0, h, :, 0].long()] for h in range(2)])])

    check(trt, add, reference, [(1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 6, 3)])


def test_shape_is_int32_in_8_and_int64_later(trt):
    network = check(trt, lambda n, x: first(n.add_shape(x)), lambda x: torch.tensor(x.shape))
    assert network.get_output(0).dtype.name == ("INT32" if trt.__version__.startswith("8.") else "INT64")


def test_fill_counts_up(trt):
    def add(n, x):
        shape, _ = sizes(n, x)
        width = first(n.add_slice(shape, (3,), (1,), (1,)))
        layer = n.add_fill((1,), trt.FillOperation.LINSPACE)
        layer.set_input(0, width)
        layer.alpha, layer.beta = 0.5, 2.0
        return first(layer)

    check(trt, add, lambda x: torch.arange(x.shape[3]) * 2 + 0.5)


def test_fill_of_two_dimensions_from_tensors(trt):
    def add(n, x):
        shape, _ = sizes(n, x)
        layer = n.add_fill((1, 1), trt.FillOperation.LINSPACE)
        layer.set_input(0, first(n.add_slice(shape, (2,), (2,), (1,))))
        layer.set_input(1, constant(n, torch.tensor(1.0)))
        layer.set_input(2, constant(n, torch.tensor([10.0, 0.5])))
        return first(layer)

    def reference(x):
        return 1 + torch.arange(x.shape[2])[:, None] * 10.0 + torch.arange(x.shape[3]) * 0.5

    check(trt, add, reference)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(trt, groups):
    weight, bias = torch.randn(6, 4 // groups, 3, 2), torch.randn(6)

    def add(n, x):
        layer = n.add_convolution_nd(x, 6, (3, 2), weight.numpy(), bias.numpy())
        return configured(layer, stride_nd=(2, 1), padding_nd=(1, 2), dilation_nd=(2, 1), num_groups=groups)

    reference = lambda x: F.conv2d(x, weight, bias, (2, 1), (1, 2), (2, 1), groups)  # noqa: E731
    check(trt, add, reference, [(2, 4, 8, 12), (1, 4, 9, 7), (3, 4, 5, 6)], atol=1e-5)


def test_deconvolution(trt):
    weight = torch.randn(3, 5, 2, 2)

    def add(n, x):
        return configured(n.add_deconvolution_nd(x, 5, (2, 2), weight.numpy()), stride_nd=(2, 2))

    check(trt, add, lambda x: F.conv_transpose2d(x, weight, stride=2), atol=1e-5)


def test_pooling(trt):
    def pool(kind, **values):
        return lambda n, x: configured(n.add_pooling_nd(x, getattr(trt.PoolingType, kind), (3, 3)), **values)

    values = {"stride_nd": (2, 2), "padding_nd": (1, 1)}
    check(trt, pool("MAX", **values), lambda x: F.max_pool2d(x, 3, 2, 1))
    check(trt, pool("AVERAGE", **values), lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))
    values["average_count_excludes_padding"] = False
    check(trt, pool("AVERAGE", **values), lambda x: F.avg_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize("size", [(5, 9), (16, 20), (1, 3)])
@pytest.mark.parametrize(
    ("mode", "transformation", "options"),
    [
        ("LINEAR", "HALF_PIXEL", {"mode": "bilinear", "align_corners": False}),
        ("LINEAR", "ALIGN_CORNERS", {"mode": "bilinear", "align_corners": True}),
        ("NEAREST", "ASYMMETRIC", {"mode": "nearest"}),
    ],
)
def test_resize(trt, mode, transformation, options, size):
    def add(n, x):
        shape, numbers = sizes(n, x)
        layer = n.add_resize(x)
        head = first(n.add_slice(shape, (0,), (2,), (1,)))
        layer.set_input(1, first(n.add_concatenation([head, numbers(*size)])))
        layer.resize_mode = getattr(trt.InterpolationMode, mode)
        layer.coordinate_transformation = getattr(trt.ResizeCoordinateTransformation, transformation)
        return first(layer)

    check(trt, add, lambda x: F.interpolate(x, size, **options), atol=1e-5)


def test_resize_by_scales(trt):
    def add(n, x):
        mode = trt.InterpolationMode.LINEAR
        half_pixel = trt.ResizeCoordinateTransformation.HALF_PIXEL
        layer = n.add_resize(x)
        return configured(layer, scales=[1, 1, 2, 2], resize_mode=mode, coordinate_transformation=half_pixel)

    check(trt, add, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), atol=1e-5)


def test_layer_normalisation(trt):
    weight, bias = torch.randn(6), torch.randn(6)

    def add(n, x):
        scale, shift = (constant(n, t.reshape(1, 1, 6)) for t in (weight, bias))
        return configured(n.add_normalization(x, scale, shift, 1 << 2), epsilon=1e-3)

    check(
        trt,
        add,
        lambda x: F.layer_norm(x, (6,), weight, bias, 1e-3),
        [(2, 5, 6), (1, 3, 6), (3, 1, 6)],
        atol=1e-5,
    )


def test_group_normalisation(trt):
    weight, bias = torch.randn(6), torch.randn(6)

    def add(n, x):
        if hasattr(n, "add_normalization_v2"):
            scale, shift = (constant(n, t.reshape(1, 6, 1, 1)) for t in (weight, bias))
            return configured(n.add_normalization_v2(x, scale, shift, 0b1100), num_groups=3)
        ones, zeros = constant(n, torch.ones(1, 3, 1, 1)), constant(n, torch.zeros(1, 3, 1, 1))
        x = configured(n.add_normalization(x, ones, zeros, 0b1100), num_groups=3)
        for op, value in ((trt.ElementWiseOperation.PROD, weight), (trt.ElementWiseOperation.SUM, bias)):
            x = first(n.add_elementwise(x, constant(n, value.reshape(1, 6, 1, 1)), op))
        return x

    shapes = [(2, 6, 4, 5), (1, 6, 3, 3), (3, 6, 2, 7)]
    check(trt, add, lambda x: F.group_norm(x, 3, weight, bias), shapes, atol=1e-5)


def test_quantisation_and_back(trt):
    def add(n, x):
        scale = constant(n, torch.tensor(0.05))
        more = () if trt.__version__.startswith("8.") else (trt.int8,)
        q = first(n.add_quantize(x, scale, *more))
        more = () if trt.__version__.startswith("8.") else (trt.float32,)
        return first(n.add_dequantize(q, scale, *more))

    check(trt, add, lambda x: (x / 0.05).round().clamp(-128, 127) * 0.05)


def test_padding_and_einsum(trt):
    check(trt, lambda n, x: first(n.add_padding_nd(x, (1, 0), (0, 2))), lambda x: F.pad(x, (0, 2, 1, 0)))
    shapes = [((2, 3), (3, 4)), ((5, 3), (3, 4)), ((1, 3), (3, 4))]
    check(trt, lambda n, a, b: first(n.add_einsum([a, b], "ij,jk->ik")), torch.matmul, shapes)
