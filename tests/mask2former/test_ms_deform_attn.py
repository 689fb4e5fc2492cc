"""Multi-scale deformable attention on any machine: the path through grid_sample, its gradient, and when our kernel runs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mask2former import kernels
from mask2former.modeling.pixel_decoder import MSDeformAttnCore, ms_deform_attn_cuda
from mask2former.modeling.pixel_decoder.ms_deform_attn_reference import (
    ms_deform_attn_reference,
    ms_deform_attn_reference_backward,
)
from tests.mask2former.ms_deform_attn_helpers import (
    BF16,
    F16,
    F32,
    PYRAMIDS,
    definition,
    error,
    offsets_and_logits,
    random_inputs,
)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_reference_equals_the_definition(name):
    shapes = PYRAMIDS[name]
    inputs = random_inputs(shapes)
    actual = ms_deform_attn_reference(*inputs, shapes)
    assert error(actual, definition(*inputs, shapes)) < 2e-5


def test_pyramid_without_pixels_gives_nothing():
    shapes = ((0, 3), (2, 0))
    assert MSDeformAttnCore()(*random_inputs(shapes), shapes).shape == (2, 0, 16)


@pytest.mark.parametrize("name", ["three levels", "empty levels"])
def test_reference_gradient_equals_autograd(name):
    shapes = PYRAMIDS[name]
    inputs = [t.requires_grad_() for t in random_inputs(shapes, dtype=torch.float64)]
    out = ms_deform_attn_reference(*inputs, shapes)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(out, inputs, grad)
    actual = ms_deform_attn_reference_backward(grad, *(t.detach() for t in inputs), shapes)
    for a, e in zip(actual, expected):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_gradient_of_half_precision_is_computed_in_float32():
    shapes = PYRAMIDS["two levels"]
    inputs = random_inputs(shapes, dtype=F16)
    grad = torch.randn(2, sum(h * w for h, w in shapes), 16).half()
    with torch.autocast("cpu", dtype=BF16):
        actual = ms_deform_attn_reference_backward(grad, *inputs, shapes)
    expected = ms_deform_attn_reference_backward(grad.float(), *(t.float() for t in inputs), shapes)
    for a, e in zip(actual, expected):
        assert a.dtype == F16
        torch.testing.assert_close(a, e.half(), rtol=0, atol=0)


def test_operator_tells_its_shape_without_a_gpu():
    with FakeTensorMode():
        value, offsets, logits = (
            torch.empty(shape, device="cuda", dtype=F16)
            for shape in ((2, 35, 3, 8), (2, 35, 3, 1, 4, 2), (2, 35, 3, 4))
        )
        out = ms_deform_attn_cuda.ms_deform_attn(value, offsets, logits, ((5, 7),))
    assert out.shape == (2, 35, 24) and out.dtype == F16 and out.device.type == "cuda"


def test_tensors_that_the_kernel_has_no_code_for_go_through_grid_sample(monkeypatch):
    def usable(shapes=((3, 4),), dtype=F32, device="cuda", points=3):
        inputs = random_inputs(shapes, points=points)
        with FakeTensorMode():
            inputs = [torch.empty(t.shape, dtype=dtype, device=device) for t in inputs]
            return ms_deform_attn_cuda.usable(*inputs)

    monkeypatch.setattr(kernels, "available", lambda: True)
    assert usable() and usable(dtype=F16) and usable(((1, 1),) * ms_deform_attn_cuda.MAX_LEVELS)
    assert not usable(device="cpu")
    assert not usable(dtype=torch.float64)
    assert not usable(((1, 1),) * (ms_deform_attn_cuda.MAX_LEVELS + 1))
    assert not usable(points=ms_deform_attn_cuda.MAX_POINTS + 1)
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert not usable()


def test_columns_of_one_tensor_are_read_where_they_are():
    sampling = torch.randn(2, 6, 2 * 3 * 4 * 3, dtype=F16)
    offsets, logits = offsets_and_logits(sampling, 2, 3, 4)
    assert logits.data_ptr() % 16 == offsets.data_ptr() % 16 == 0
    for tensor in (offsets, logits, offsets[:1]):
        same, stride = ms_deform_attn_cuda._by_pixels(tensor)
        assert same is tensor and stride == 72
    for tensor, row in ((offsets.contiguous(), 48), (logits.contiguous(), 24)):
        same, stride = ms_deform_attn_cuda._by_pixels(tensor)
        assert same is tensor and stride == row


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:, ::2],  # images are no multiple of two pixels apart
        lambda t: t.transpose(0, 1),
        lambda t: t[:1].expand(2, -1, -1, -1),
        lambda t: t[:, :1].expand(-1, 6, -1, -1),
        lambda t: t.transpose(2, 3),
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),  # not aligned
    ],
)
def test_other_views_are_copied_for_the_kernel(change):
    tensor = change(torch.arange(2.0 * 7 * 2 * 12).view(2, 7, 2, 12))
    copy, stride = ms_deform_attn_cuda._by_pixels(tensor)
    assert copy is not tensor and copy.data_ptr() % 16 == 0
    rows = copy.as_strided(
        (copy.shape[0] * copy.shape[1], copy[0, 0].numel()), (stride, 1), copy.storage_offset()
    )
    assert torch.equal(rows, tensor.flatten(0, 1).flatten(1))


WRONG = {
    "value of three dimensions": (lambda v, o, w: (v[0], o, w), r"\(B, S, heads, D\)"),
    "value of float64": (lambda v, o, w: (v.double(), o, w), "torch.float64; expected"),
    "offsets of five dimensions": (lambda v, o, w: (v, o[0], w), r"\(B, S, heads, levels, points, 2\)"),
    "too few pixels": (lambda v, o, w: (v[:, 1:], o[:, 1:], w[:, 1:]), "do not hold the 11 pixels"),
    "offsets of another batch": (lambda v, o, w: (v, o[:1], w), r"sampling_offsets is \(1, 12"),
    "offsets of three coordinates": (lambda v, o, w: (v, o[..., :1], w), "sampling_offsets is"),
    "logits of fewer points": (lambda v, o, w: (v, o, w[..., 1:]), "attention_logits is"),
    "half offsets to float32 values": (lambda v, o, w: (v, o.half(), w.half()), "sampling_offsets is torch.float16"),
    "offsets and logits of two dtypes": (lambda v, o, w: (v.half(), o, w.half()), "expected one dtype"),
    "offsets on another device": (lambda v, o, w: (v, o.to("meta"), w), "sampling_offsets is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        ms_deform_attn_cuda._check(*change(*random_inputs(((3, 4),))), [3, 4])
