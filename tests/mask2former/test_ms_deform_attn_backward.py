"""The gradients of deformable attention by our kernel, against those of grid_sample in float64.

Without a GPU the kernel runs over emulated instructions (tests/native), as the host's compiler sees it; tests marked `gpu`
run the compiled one. Under NVIDIA's checker: tools/sanitize_kernels.py.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from mask2former import kernels
from mask2former.modeling.pixel_decoder import ms_deform_attn_cuda
from mask2former.modeling.pixel_decoder.ms_deform_attn_reference import (
    ms_deform_attn_reference,
    ms_deform_attn_reference_backward,
)
from tests.mask2former.ms_deform_attn_helpers import BF16, F16, F32, PYRAMIDS, error, on_gpu, random_inputs
from tests.mask2former.native_library import compiler, library


def emulated(grad, value, offsets, logits, shapes, backwards=False):
    batch, _, heads, dim = value.shape
    inputs = [t.contiguous() for t in (grad, value, offsets, logits)]
    outputs = [torch.zeros_like(value), *(torch.full_like(t, float("nan")) for t in (offsets, logits))]
    addresses = (ctypes.c_void_p * 7)(*(t.data_ptr() for t in (*inputs, *outputs)))
    sizes = (batch, heads, dim, len(shapes), offsets.shape[4], int(backwards))
    levels = [side for shape in shapes for side in shape]
    library("ms_deform_attn_backward").emulate_ms_deform_attn_backward(
        addresses, (ctypes.c_int32 * 6)(*sizes), (ctypes.c_int32 * len(levels))(*levels)
    )
    return outputs


def compiled(grad, value, offsets, logits, shapes):
    sizes = [side for shape in shapes for side in shape]
    tensors = [t.cuda() for t in (grad, value, offsets, logits)]
    return [t.cpu() for t in torch.ops.mask2former.ms_deform_attn_backward(*tensors, sizes)]


@pytest.fixture(
    params=[
        pytest.param(
            emulated,
            marks=pytest.mark.skipif(compiler() is None, reason="needs g++ or clang++"),
            id="emulated",
        ),
        pytest.param(
            compiled,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not kernels.available(), reason="the CUDA kernels are not built"),
            ],
            id="gpu",
        ),
    ]
)
def run(request):
    return request.param


def check(run, shapes, inputs, tolerance=2e-5, **options):
    """Gradients by the kernel against float64's."""
    value = inputs[0]
    grad = torch.randn(
        *value.shape[:2], value.shape[2] * value.shape[3], generator=torch.Generator().manual_seed(7)
    )
    wide = [t.double() for t in inputs]
    expected = ms_deform_attn_reference_backward(grad.double(), *wide, shapes)
    actual = run(grad, *inputs, shapes, **options)
    for name, a, e in zip(("value", "offsets", "logits"), actual, expected):
        assert a.shape == e.shape and error(a, e) < tolerance, name


@pytest.mark.parametrize("name", PYRAMIDS)
def test_every_pyramid(run, name):
    shapes = PYRAMIDS[name]
    check(run, shapes, random_inputs(shapes))


@pytest.mark.parametrize("dim", [1, 5, 12, 32, 36, 64])
def test_any_number_of_channels(run, dim):
    shapes = PYRAMIDS["two levels"]
    check(run, shapes, random_inputs(shapes, batch=1, heads=3, dim=dim, spread=2.0))


@pytest.mark.parametrize("points", [1, 4, 16])
def test_any_number_of_points(run, points):
    shapes = PYRAMIDS["three levels"]
    check(run, shapes, random_inputs(shapes, batch=1, points=points, spread=2.0))


def test_turns_of_the_threads_make_no_difference():
    if compiler() is None:
        pytest.skip("needs g++ or clang++")
    shapes = PYRAMIDS["thin levels"]
    check(emulated, shapes, random_inputs(shapes), backwards=True)


def test_locations_outside_and_at_the_edges(run):
    shapes = ((4, 5), (2, 3))
    value, offsets, logits = random_inputs(shapes)
    # On pixels, half a pixel beyond the last, just inside of what is still seen, far away.
    steps = torch.tensor([0.0, 0.5, -0.5, -0.999, 40.0, -1e6, 3e9])
    choice = torch.randint(len(steps), offsets.shape, generator=torch.Generator().manual_seed(3))
    inputs = value, steps[choice], logits
    grad = torch.randn(2, 26, 16, generator=torch.Generator().manual_seed(7))
    actual = run(grad, *inputs, shapes)
    expected = ms_deform_attn_reference_backward(grad, *inputs, shapes)
    # At a pixel's centre the slope is another to the left than to the right, and roundings decide between them.
    for a, e in zip((actual[0], actual[2]), (expected[0], expected[2])):
        assert error(a, e) < 2e-5
    assert torch.isfinite(actual[1]).all()
    far = (inputs[1].abs() >= 40).any(-1)
    assert far.any() and (actual[1][far] == 0).all() and (actual[1][~far] != 0).any()


def test_location_that_is_no_number_is_outside(run):
    shapes = ((4, 5),)
    value, offsets, logits = random_inputs(shapes)
    offsets[0, 3, 1, 0, 2] = float("nan")
    away = offsets.clone()
    away[0, 3, 1, 0, 2] = 1e6
    grad = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(7))
    for a, b in zip(run(grad, value, offsets, logits, shapes), run(grad, value, away, logits, shapes)):
        assert torch.isfinite(a).all() and error(a, b) < 1e-6


def test_extreme_logits(run):
    shapes = PYRAMIDS["two levels"]
    value, offsets, logits = random_inputs(shapes)
    check(run, shapes, (value, offsets, logits * 30), tolerance=1e-4)


@on_gpu
@pytest.mark.parametrize(
    ("dtype", "sampling"), [(F32, F32), (F16, F32), (F16, F16), (BF16, F32), (BF16, BF16)], ids=str
)
def test_gradients_of_the_operator_have_its_inputs_dtypes(dtype, sampling):
    shapes = PYRAMIDS["three levels"]
    given = random_inputs(shapes, dim=32, points=4, dtype=dtype, sampling=sampling, device="cuda")
    inputs = [t.requires_grad_() for t in given]
    out = ms_deform_attn_cuda.ms_deform_attn(*inputs, shapes)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, inputs, grad)
    wide = [t.detach().double() for t in inputs]
    expected = ms_deform_attn_reference_backward(grad.double(), *wide, shapes)
    for name, a, e, t in zip(("value", "offsets", "logits"), actual, expected, inputs):
        assert a.dtype == t.dtype and a.shape == t.shape
        # Offsets of few digits lead to the centres of pixels, where the slope is another on each side.
        if name != "offsets" or sampling == F32:
            assert error(a, e) < {F32: 2e-5, F16: 1e-3, BF16: 8e-3}[dtype], name


@on_gpu
def test_views_are_taken_as_they_come():
    shapes = PYRAMIDS["two levels"]
    inputs = [t.requires_grad_() for t in random_inputs(shapes, device="cuda")]
    views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    out = ms_deform_attn_cuda.ms_deform_attn(*views, shapes)
    grad = torch.randn(out.shape[::-1], device="cuda").permute(2, 1, 0)
    actual = torch.autograd.grad(out, inputs, grad)
    plain = [t.detach().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(ms_deform_attn_reference(*plain, shapes), plain, grad)
    assert all(error(a, e) < 1e-4 for a, e in zip(actual, expected))


@on_gpu
def test_operator_follows_pytorchs_rules():
    shapes = PYRAMIDS["two levels"]
    inputs = random_inputs(shapes, device="cuda")
    grad = torch.randn(2, inputs[0].shape[1], 16, device="cuda")
    sizes = [side for shape in shapes for side in shape]
    # What queries add to a pixel comes in any order: two calls may differ in the last place.
    torch.library.opcheck(
        torch.ops.mask2former.ms_deform_attn_backward.default, (grad, *inputs, sizes), rtol=1e-4, atol=1e-4
    )


@on_gpu
def test_wrong_arguments_are_refused_before_the_launch():
    inputs = random_inputs(PYRAMIDS["two levels"], device="cuda")
    sizes = [side for shape in PYRAMIDS["two levels"] for side in shape]
    operator = torch.ops.mask2former.ms_deform_attn_backward
    with pytest.raises(ValueError, match=r"grad is \(2, 141, 3\)"):
        operator(torch.zeros(2, 141, 3, device="cuda"), *inputs, sizes)
    with pytest.raises(ValueError, match="sampling_offsets is"):
        operator(torch.zeros(2, 141, 16, device="cuda"), *inputs, [*sizes, 0, 0])


@on_gpu
def test_who_asks_for_determinism_is_told():
    shapes = PYRAMIDS["two levels"]
    inputs = [t.requires_grad_() for t in random_inputs(shapes, device="cuda")]
    out = ms_deform_attn_cuda.ms_deform_attn(*inputs, shapes)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.autograd.grad(out, inputs, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
