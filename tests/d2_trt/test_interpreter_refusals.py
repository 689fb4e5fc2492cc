"""What TensorRT refuses, its double refuses too: a converter that passes on a CPU must not fail in a real build."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double  # noqa: F401
from tests.doubles.trt_api import Refused


def old(trt) -> bool:
    return trt.__version__.startswith("8.")


class Case:
    """A network with float, int and bool inputs of 2 x 3 x 8 x 8 or 1 x 3 x 6 x 8."""

    def __init__(self, trt, strong=None):
        self.trt = trt
        shapes = [(2, 3, 8, 8), (1, 3, 6, 8)]
        names = ("x", "y", "i", "b")
        self.n = build_network(trt, dict.fromkeys(names, shapes), strong=strong)
        kinds = (trt.float32, trt.float32, trt.int32, trt.bool)
        self.x, self.y, self.i, self.b = (
            self.n.add_input(m, k, (-1, 3, -1, 8)) for m, k in zip(names, kinds)
        )
        self.alive = []

    def constant(self, value, dtype=None):
        array = np.array(value, dtype or np.float32, order="C")
        self.alive.append(array)
        return self.n.add_constant(array.shape, array).get_output(0)

    def sizes(self, *values):
        return self.constant(values, np.int32 if old(self.trt) else np.int64)

    def elementwise(self, a, b, op):
        return self.n.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, op))

    def slice(self, start, shape, stride, tensor=None):
        return self.n.add_slice(tensor or self.x, start, shape, stride)

    def reshape(self, dims, **values):
        layer = self.n.add_shuffle(self.x)
        layer.reshape_dims = dims
        return set_all(layer, values)

    def normalization(self, shape, axes, **values):
        ones = self.constant(np.ones(shape))
        return set_all(self.n.add_normalization(self.x, ones, ones, axes), values)

    def convolution(self, weights, maps=4, bias=None, tensor=None, **values):
        self.alive.append(weights)
        layer = self.n.add_convolution_nd(tensor or self.x, maps, (1, 1), weights, bias)
        return set_all(layer, values)


def set_all(layer, values):
    for name, value in values.items():
        setattr(layer, name, value)
    return layer


def with_input(layer, index, tensor):
    layer.set_input(index, tensor)
    return layer


def resized(c, mode, dims=None, scales=None, tensor=None):
    layer = c.n.add_resize(tensor or c.x)
    layer.resize_mode = getattr(c.trt.InterpolationMode, mode)
    if dims:
        layer.shape = dims
    if scales:
        layer.scales = scales
    return layer


def filled(c, dims, **inputs):
    layer = c.n.add_fill(dims, c.trt.FillOperation.LINSPACE)
    for index, value in inputs.items():
        layer.set_input(int(index[1:]), value)
    return layer


def gathered(c, indices, mode="DEFAULT", **values):
    return set_all(c.n.add_gather_v2(c.x, indices, getattr(c.trt.GatherMode, mode)), values)


KERNEL = np.ones((4, 3, 1, 1), np.float32)
I32 = np.int32

# What is refused, a part of the reason, and the layer that is.
REFUSED = {
    "sum of float and int": ("types differ", lambda c: c.elementwise(c.x, c.i, "SUM")),
    "sum of bools": ("BOOL", lambda c: c.elementwise(c.b, c.b, "SUM")),
    "and of floats": ("bool", lambda c: c.elementwise(c.x, c.y, "AND")),
    "power of ints": ("POW", lambda c: c.elementwise(c.i, c.i, "POW")),
    "less of bools": ("LESS", lambda c: c.elementwise(c.b, c.b, "LESS")),
    "sum of unequal ranks": ("ranks", lambda c: c.elementwise(c.x, c.constant([1.0]), "SUM")),
    "sum of sizes 3 and 2": ("sizes", lambda c: c.elementwise(c.x, c.constant(np.ones((1, 2, 1, 1))), "SUM")),
    "root of an int": ("INT32", lambda c: c.n.add_unary(c.i, c.trt.UnaryOperation.SQRT)),
    "not of a float": ("bool", lambda c: c.n.add_unary(c.x, c.trt.UnaryOperation.NOT)),
    "sigmoid of an int": ("INT32", lambda c: c.n.add_activation(c.i, c.trt.ActivationType.SIGMOID)),
    "select by floats": ("bool", lambda c: c.n.add_select(c.x, c.x, c.y)),
    "select of float and int": ("types differ", lambda c: c.n.add_select(c.b, c.x, c.i)),
    "select of unequal ranks": ("ranks", lambda c: c.n.add_select(c.b, c.x, c.constant([1.0]))),
    "matrix product of ints": (
        "floating",
        lambda c: c.n.add_matrix_multiply(
            c.i, c.trt.MatrixOperation.NONE, c.i, c.trt.MatrixOperation.TRANSPOSE
        ),
    ),
    "matrix product of unequal ranks": (
        "ranks",
        lambda c: c.n.add_matrix_multiply(
            c.x, c.trt.MatrixOperation.NONE, c.constant(np.ones((8, 2))), c.trt.MatrixOperation.NONE
        ),
    ),
    "matrix product of 8 columns and 7 rows": (
        "columns",
        lambda c: c.n.add_matrix_multiply(
            c.x, c.trt.MatrixOperation.NONE, c.constant(np.ones((1, 1, 7, 2))), c.trt.MatrixOperation.NONE
        ),
    ),
    "softmax over two axes": ("one bit", lambda c: set_all(c.n.add_softmax(c.x), {"axes": 0b1100})),
    "softmax over no axis": ("axes", lambda c: set_all(c.n.add_softmax(c.x), {"axes": 0})),
    "softmax of an int": ("floating", lambda c: c.n.add_softmax(c.i)),
    "reduction of axis 4 of 4": (
        "axes",
        lambda c: c.n.add_reduce(c.x, c.trt.ReduceOperation.SUM, 1 << 4, True),
    ),
    "reduction of bools": ("BOOL", lambda c: c.n.add_reduce(c.b, c.trt.ReduceOperation.MAX, 1, True)),
    "mean of ints": ("AVG", lambda c: c.n.add_reduce(c.i, c.trt.ReduceOperation.AVG, 1, True)),
    "top 3841": (
        "3840",
        lambda c: c.n.add_topk(c.constant(np.ones((1, 5000))), c.trt.TopKOperation.MAX, 3841, 1 << 1),
    ),
    "top 9 of 8": ("1 to 8", lambda c: c.n.add_topk(c.x, c.trt.TopKOperation.MAX, 9, 1 << 3)),
    "top 1 of a vector": (
        "1-D",
        lambda c: c.n.add_topk(c.constant(np.ones(5)), c.trt.TopKOperation.MAX, 1, 1),
    ),
    "reshape to another volume": ("elements", lambda c: c.reshape((0, 0, 0, 7))),
    "reshape with two unknowns": ("more than one", lambda c: c.reshape((0, -1, -1))),
    "reshape to a part": ("cannot become", lambda c: c.reshape((0, -1, 5))),
    "reshape copies a fifth size": ("no dimension", lambda c: c.reshape((0, 0, 0, 0, 0))),
    "zero that is no placeholder": ("elements", lambda c: c.reshape((0, 3, 8, 8), zero_is_placeholder=False)),
    "transpose of three of four": (
        "permutation",
        lambda c: set_all(c.n.add_shuffle(c.x), {"first_transpose": (1, 0, 2)}),
    ),
    "concatenation of unequal sizes": (
        "differ",
        lambda c: set_all(c.n.add_concatenation([c.x, c.constant(np.ones((1, 2, 8, 8)))]), {"axis": 0}),
    ),
    "concatenation of float and int": ("types differ", lambda c: c.n.add_concatenation([c.x, c.i])),
    "concatenation along axis 4": (
        "axis 4",
        lambda c: set_all(c.n.add_concatenation([c.x, c.y]), {"axis": 4}),
    ),
    "slice past the end": ("elements", lambda c: c.slice((0, 0, 0, 4), (1, 3, 6, 5), (1, 1, 1, 1))),
    "slice before the start": ("elements", lambda c: c.slice((0, 0, 0, -1), (1, 3, 6, 2), (1, 1, 1, 1))),
    "slice of three of four": ("for 4 dimensions", lambda c: c.slice((0, 0, 0), (1, 3, 6), (1, 1, 1))),
    "slice of unknown size": ("size -1", lambda c: c.slice((0, 0, 0, 0), (-1, 3, 6, 8), (1, 1, 1, 1))),
    "fill value in a strict slice": (
        "fill value",
        lambda c: with_input(c.slice((0, 0, 0, 0), (1, 3, 6, 8), (1, 1, 1, 1)), 4, c.constant(1.0)),
    ),
    "slice to a float shape": (
        "shape tensor",
        lambda c: with_input(c.slice((0,) * 4, (1,) * 4, (1,) * 4), 2, c.constant([1.0, 3.0, 6.0, 8.0])),
    ),
    "slice to a shape that is data": (
        "values of input",
        lambda c: with_input(
            c.slice((0,), (1,), (1,), c.constant(np.ones(9))),
            2,
            set_all(
                c.n.add_shuffle(c.slice((0,) * 4, (1,) * 4, (1,) * 4, c.i).get_output(0)),
                {"reshape_dims": (1,)},
            ).get_output(0),
        ),
    ),
    "gather by floats": ("int32", lambda c: c.n.add_gather(c.x, c.constant([0.0]), 1)),
    "gather from axis 4": ("axis 4", lambda c: c.n.add_gather(c.x, c.constant([0], I32), 4)),
    "gather out of range": ("indices", lambda c: c.n.add_gather(c.x, c.constant([3], I32), 1)),
    "gather of a negative index": ("indices", lambda c: c.n.add_gather(c.x, c.constant([-1], I32), 1)),
    "gather that shares two dimensions": (
        "0 to 1",
        lambda c: gathered(c, c.constant(np.zeros((2, 3, 1)), I32), axis=2, num_elementwise_dims=2),
    ),
    "gather of elements by another rank": (
        "equal ranks",
        lambda c: gathered(c, c.constant([0], I32), "ELEMENT"),
    ),
    "gather by tuples of five": ("mode ND", lambda c: gathered(c, c.constant(np.zeros((2, 5)), I32), "ND")),
    "resize of the channels, linear": ("last 3", lambda c: resized(c, "LINEAR", (9, 3, 9, 9))),
    "resize to another rank": ("to (9, 9)", lambda c: resized(c, "LINEAR", (9, 9))),
    "resize by two scales": ("scales", lambda c: resized(c, "LINEAR", scales=[2.0, 2.0])),
    "resize of bools": ("BOOL", lambda c: resized(c, "NEAREST", (2, 3, 9, 9), tensor=c.b)),
    "resize of ints, linear": ("INT32", lambda c: resized(c, "LINEAR", (2, 3, 9, 9), tensor=c.i)),
    "fill of two dimensions from numbers": ("1-D LINSPACE", lambda c: filled(c, (2, 3))),
    "fill with a vector start": (
        "scalar",
        lambda c: filled(c, (4,), _1=c.constant([1.0]), _2=c.constant([1.0])),
    ),
    "fill with one step for two dimensions": (
        "one value for each",
        lambda c: filled(c, (2, 3), _1=c.constant(0.0), _2=c.constant([1.0])),
    ),
    "fill with a start alone": ("both be inputs", lambda c: filled(c, (2,), _1=c.constant(0.0))),
    "fill with start and step of two types": (
        "types differ",
        lambda c: filled(c, (2,), _1=c.constant(0.0), _2=c.constant([1], I32)),
    ),
    "normalisation with a scale of another rank": ("broadcast", lambda c: c.normalization((8,), 1 << 3)),
    "normalisation with a scale that is wider": (
        "broadcast",
        lambda c: c.normalization((1, 1, 1, 9), 1 << 3),
    ),
    "groups with a scale for each channel": (
        "it must be (1, 3, 1, 1)",
        lambda c: c.normalization((1, 8, 1, 1), 0b1100, num_groups=3),
    ),
    "groups over one axis": ("all axes", lambda c: c.normalization((1, 3, 1, 1), 1 << 3, num_groups=3)),
    "two groups of three channels": (
        "channels",
        lambda c: c.normalization((1, 2, 1, 1), 0b1100, num_groups=2),
    ),
    "convolution with kernel of another size": (
        "kernel weights",
        lambda c: c.convolution(KERNEL[:, :2].copy()),
    ),
    "convolution with an int kernel": ("INT32", lambda c: c.convolution(KERNEL.astype(np.int32))),
    "convolution in two groups of three": ("groups", lambda c: c.convolution(KERNEL, num_groups=2)),
    "convolution with bias of another size": (
        "bias",
        lambda c: c.convolution(KERNEL, bias=KERNEL[:3, 0, 0, 0].copy()),
    ),
    "convolution of a matrix": (
        "needs an input of 4",
        lambda c: c.convolution(KERNEL, tensor=c.constant(np.ones((3, 8)))),
    ),
    "convolution of ints": ("floating", lambda c: c.convolution(KERNEL, tensor=c.i)),
    "pooling of a window larger than the map": (
        "window",
        lambda c: c.n.add_pooling_nd(c.x, c.trt.PoolingType.MAX, (9, 9)),
    ),
    "scale of three dimensions": (
        "4 dimensions",
        lambda c: c.n.add_scale_nd(
            c.constant(np.ones((1, 4, 2))), c.trt.ScaleMode.CHANNEL, KERNEL[:, 0, 0, 0].copy(), None, None, 1
        ),
    ),
    "scale of another number of channels": (
        "needs 3",
        lambda c: c.n.add_scale_nd(c.x, c.trt.ScaleMode.CHANNEL, KERNEL[:, 0, 0, 0].copy(), None, None, 1),
    ),
    "constant of another volume": ("weights for shape", lambda c: c.n.add_constant((5,), KERNEL)),
    "quantisation by a negative scale": (
        "positive",
        lambda c: c.n.add_quantize(c.x, c.constant(-1.0), *(() if old(c.trt) else (c.trt.int8,))),
    ),
    "quantisation by a computed scale": (
        "constant",
        lambda c: c.n.add_quantize(
            c.x,
            set_all(
                c.n.add_shuffle(c.slice((0,) * 4, (1,) * 4, (1,) * 4).get_output(0)), {"reshape_dims": (1,)}
            ).get_output(0),
            *(() if old(c.trt) else (c.trt.int8,)),
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(trt, name):
    reason, add = REFUSED[name]
    case = Case(trt)
    with pytest.raises(Refused) as error:
        tensor = add(case).get_output(0)
        assert tuple(tensor.shape)
    assert reason in str(error.value)


def test_dimensions_above_eight(trt):
    case = Case(trt)
    with pytest.raises(ValueError, match="at most 8"):
        case.reshape((0, 0, 0, 1, 1, 2, 2, 2, 1))


def test_size_that_comes_from_an_input_is_a_shape_and_one_that_is_sliced_by_data_is_not(trt):
    case = Case(trt)
    shape = case.n.add_shape(case.x).get_output(0)
    layer = case.slice((0,) * 4, (1,) * 4, (1,) * 4)
    layer.set_input(2, shape)
    assert tuple(layer.get_output(0).shape) == (-1, 3, -1, 8)
    assert shape.is_shape_tensor
    # A slice of a shape whose own start is computed cannot be a shape tensor in turn.
    start = case.slice((0,), (1,), (1,), case.elementwise(shape, shape, "SUB").get_output(0)).get_output(0)
    part = case.slice((0,), (4,), (1,), shape)
    part.set_input(1, start)
    layer.set_input(2, part.get_output(0))
    with pytest.raises(Refused, match="parameters that are no constants"):
        assert tuple(layer.get_output(0).shape)


def test_shape_tensor_of_more_than_64_elements(trt):
    case = Case(trt)
    shape = case.n.add_shape(case.x).get_output(0)
    many = set_all(case.n.add_concatenation([shape] * 17), {"axis": 0}).get_output(0)
    layer = case.slice((0,) * 4, (1,) * 4, (1,) * 4)
    layer.set_input(2, case.slice((0,), (4,), (1,), many).get_output(0))
    with pytest.raises(Refused, match="more than 64"):
        assert tuple(layer.get_output(0).shape)


def test_computed_weights_cannot_be_a_convolution_kernel(trt):
    case = Case(trt)
    with pytest.raises(TypeError, match="Weights"):
        case.n.add_convolution_nd(case.x, 4, (1, 1), case.x)


def test_refusal_names_layer_and_inputs(trt):
    case = Case(trt)
    layer = case.elementwise(case.x, case.i, "SUM")
    layer.name = "model.encoder:add"
    with pytest.raises(Refused, match=r"model\.encoder:add.*\(-1, 3, -1, 8\) FLOAT; \(-1, 3, -1, 8\) INT32"):
        assert layer.get_output(0).dtype


# Arguments


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.n.add_softmax(),
        lambda c: c.n.add_softmax(c.x, 1),
        lambda c: c.n.add_softmax(tensor=c.x),
        lambda c: c.n.add_softmax("x"),
        lambda c: c.n.add_softmax(None),
        lambda c: c.n.add_reduce(c.x, c.trt.ReduceOperation.SUM, 1, 1),
        lambda c: c.n.add_reduce(c.x, c.trt.ElementWiseOperation.SUM, 1, True),
        lambda c: c.n.add_reduce(c.x, c.trt.ReduceOperation.SUM, 1.0, True),
        lambda c: c.n.add_slice(c.x, (0, 0, 0, 0.5), (1, 1, 1, 1), (1, 1, 1, 1)),
        lambda c: c.n.add_slice(c.x, np.zeros(4, int), (1, 1, 1, 1), (1, 1, 1, 1)),
        lambda c: c.n.add_concatenation(c.x),
        lambda c: c.n.add_concatenation([c.x, None]),
        lambda c: c.n.add_constant((1,), [1.0]),
        lambda c: c.n.add_constant((1,), torch.ones(1)),
        lambda c: c.n.add_input("z", torch.float32, (1,)),
        lambda c: c.n.add_topk(c.x, c.trt.TopKOperation.MAX, k=1),
    ],
)
def test_wrong_arguments(trt, call):
    with pytest.raises(TypeError):
        call(Case(trt))


def test_weights_that_are_not_contiguous_or_of_an_unknown_type(trt):
    case = Case(trt)
    with pytest.raises(ValueError, match="contiguous"):
        case.n.add_constant((3, 2), np.ones((2, 3), np.float32).T)
    with pytest.raises((ValueError, TypeError)):
        case.n.add_constant((2,), np.ones(2, np.complex64))


def test_freed_or_overwritten_weights_are_found_when_the_network_is_built(trt):
    for spoil in ("freed", "overwritten"):
        case = Case(trt)
        array = np.ones((1, 3, 1, 1), np.float32)
        added = case.elementwise(case.x, case.n.add_constant(array.shape, array).get_output(0), "SUM")
        case.n.mark_output(added.get_output(0))
        case.n.check()
        if spoil == "freed":
            del array
            gc.collect()
        else:
            array[:] = 2
        with pytest.raises(Refused, match="freed or overwritten"):
            case.n.check()


def test_network_without_output_or_with_an_input_as_output(trt):
    case = Case(trt)
    with pytest.raises(Refused, match="no output"):
        case.n.check()
    with pytest.raises(Refused, match="is an input"):
        case.n.mark_output(case.x)
    out = case.elementwise(case.x, case.y, "SUM").get_output(0)
    case.n.mark_output(out)
    with pytest.raises(Refused, match="output already"):
        case.n.mark_output(out)
    case.n.unmark_output(out)
    assert case.n.num_outputs == 0


def test_tensors_of_another_network(trt):
    case, other = Case(trt), Case(trt)
    with pytest.raises(Refused, match="another network"):
        case.elementwise(case.x, other.y, "SUM")


def test_a_layer_cannot_depend_on_itself(trt):
    case = Case(trt)
    first = case.elementwise(case.x, case.y, "SUM")
    second = case.elementwise(first.get_output(0), case.y, "SUM")
    first.set_input(1, second.get_output(0))
    with pytest.raises(Refused, match="own output"):
        assert tuple(second.get_output(0).shape)
