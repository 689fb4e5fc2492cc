"""The double's layers of shapes, convolution and normalisation, against torch at several sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.doubles.checking import check, configured, constant, first, sizes
from tests.doubles.fixtures import trt_double  # noqa: F401


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
