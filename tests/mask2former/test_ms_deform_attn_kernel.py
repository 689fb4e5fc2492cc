"""Multi-scale deformable attention by our kernel on a GPU.

Under NVIDIA's checker: tools/sanitize_kernels.py.
"""

from __future__ import annotations

import pytest
import torch

from mask2former import kernels
from mask2former.modeling.pixel_decoder import MSDeformAttn, ms_deform_attn_cuda
from mask2former.modeling.pixel_decoder.ms_deform_attn_reference import ms_deform_attn_reference
from tests.mask2former.ms_deform_attn_helpers import (
    BF16,
    F16,
    F32,
    PYRAMIDS,
    TOLERANCE,
    definition,
    error,
    offsets_and_logits,
    on_gpu,
    random_inputs,
)


def run_kernel(*inputs, shapes):
    return ms_deform_attn_cuda.ms_deform_attn(*inputs, shapes)


@on_gpu
@pytest.mark.parametrize("name", PYRAMIDS)
@pytest.mark.parametrize("dim", [1, 3, 4, 7, 8, 16, 20, 32, 33, 64, 128, 256])
def test_small_kernel_equals_the_definition(name, dim):
    shapes = PYRAMIDS[name]
    for dtype, sampling in ((F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)):
        inputs = random_inputs(shapes, dim=dim, dtype=dtype, sampling=sampling, device="cuda")
        actual = run_kernel(*inputs, shapes=shapes)
        assert actual.dtype == dtype
        assert error(actual, definition(*inputs, shapes)) < TOLERANCE[dtype], (dtype, sampling)


@on_gpu
@pytest.mark.parametrize("points", [1, 4, 5, 16])
@pytest.mark.parametrize("dim", [4, 32, 64, 5])
def test_small_kernel_with_any_number_of_points_and_heads(points, dim):
    shapes = PYRAMIDS["eight levels"]
    for heads in (1, 3, 8):
        inputs = random_inputs(shapes, heads=heads, dim=dim, points=points, device="cuda")
        assert error(run_kernel(*inputs, shapes=shapes), definition(*inputs, shapes)) < TOLERANCE[F32]


# Three levels, for the kernel of the model's own sizes: 8 heads of 32 channels, 4 points.
MODEL_PYRAMIDS = {
    "three levels": PYRAMIDS["three levels"],
    "first level empty": ((0, 4), (5, 6), (7, 2)),
    "only the first level": ((6, 5), (0, 0), (3, 0)),
    "one pixel each": ((1, 1), (1, 1), (1, 1)),
    "one row or column": ((20, 1), (1, 30), (2, 2)),
    "wide and high": ((37, 11), (5, 40), (9, 3)),
}
DTYPES = ((F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32))


@on_gpu
@pytest.mark.parametrize("name", MODEL_PYRAMIDS)
@pytest.mark.parametrize(("dtype", "sampling"), DTYPES)
def test_small_kernel_of_the_models_sizes_equals_the_definition(name, dtype, sampling):
    shapes = MODEL_PYRAMIDS[name]
    for batch in (1, 3):
        inputs = random_inputs(
            shapes, batch=batch, heads=8, dim=32, points=4, dtype=dtype, sampling=sampling, device="cuda"
        )
        actual = run_kernel(*inputs, shapes=shapes)
        assert error(actual, definition(*inputs, shapes)) < TOLERANCE[dtype]


@on_gpu
def test_small_kernels_agree_on_the_models_sizes():
    """Offsets at an odd address keep the general kernel at work."""
    shapes = MODEL_PYRAMIDS["wide and high"]
    for dtype, sampling in DTYPES:
        inputs = random_inputs(
            shapes, heads=8, dim=32, points=4, dtype=dtype, sampling=sampling, device="cuda"
        )
        actual = run_kernel(*inputs, shapes=shapes)
        value, offsets, logits = inputs
        odd = torch.cat((offsets.new_zeros(1), offsets.flatten()))[1:]
        assert odd.data_ptr() % (2 * odd.element_size())
        general = torch.empty_like(actual)
        kernels.load().ms_deform_attn(
            value.data_ptr(),
            odd.data_ptr(),
            logits.data_ptr(),
            general.data_ptr(),
            level_sizes=list(shapes),
            **arguments(value, offsets),
        )
        assert error(actual, general) < 2 * TOLERANCE[dtype]


def arguments(value, offsets) -> dict:
    batch, _, heads, dim = value.shape
    of_pixel = offsets[0, 0].numel()
    return {
        "value_dtype": kernels.dtype_name(value),
        "sampling_dtype": kernels.dtype_name(offsets),
        "batch": batch,
        "heads": heads,
        "dim": dim,
        "points": offsets.shape[4],
        "offsets_stride": of_pixel,
        "logits_stride": of_pixel // 2,
        "stream": kernels.stream_of(value),
    }


@on_gpu
@pytest.mark.parametrize(("heads", "dim", "points"), [(8, 32, 4), (2, 8, 4), (3, 20, 16), (2, 33, 8)])
@pytest.mark.parametrize("name", MODEL_PYRAMIDS)
def test_small_kernel_reads_offsets_and_logits_of_one_tensor(name, heads, dim, points):
    shapes = MODEL_PYRAMIDS[name]
    for dtype, sampling in DTYPES:
        value, offsets, logits = random_inputs(
            shapes, 3, heads, dim, points, dtype=dtype, sampling=sampling, device="cuda"
        )
        joined = torch.cat((offsets.flatten(2), logits.flatten(2)), 2)
        views = offsets_and_logits(joined, heads, len(shapes), points)
        assert all(ms_deform_attn_cuda._by_pixels(view)[0] is view for view in views)
        actual = run_kernel(value, *views, shapes=shapes)
        assert error(actual, definition(value, offsets, logits, shapes)) < TOLERANCE[dtype]
        assert torch.equal(actual, run_kernel(value, offsets, logits, shapes=shapes))


@on_gpu
@pytest.mark.parametrize(("heads", "dim", "points"), [(8, 32, 4), (2, 8, 3)])
@pytest.mark.parametrize("name", MODEL_PYRAMIDS)
def test_small_kernel_reads_level_sizes_on_the_device(name, heads, dim, points):
    shapes = MODEL_PYRAMIDS[name]
    value, offsets, logits = random_inputs(shapes, heads=heads, dim=dim, points=points, device="cuda")
    expected = run_kernel(value, offsets, logits, shapes=shapes)

    def run(sizes) -> torch.Tensor:
        out = torch.zeros_like(expected)
        sizes = torch.tensor(sizes, dtype=torch.int32, device="cuda")
        kernels.load().ms_deform_attn_device_levels(
            value.data_ptr(),
            offsets.data_ptr(),
            logits.data_ptr(),
            out.data_ptr(),
            level_sizes=sizes.data_ptr(),
            levels=len(shapes),
            pixels=value.shape[1],
            **arguments(value, offsets),
        )
        return out

    assert torch.equal(run(shapes), expected)
    last = shapes[-1]
    for wrong in ((last[0] + 1, last[1] + 1), (-last[0] - 1, -1), (1 << 30, 1 << 30)):
        assert run((*shapes[:-1], wrong)).isnan().all()


@on_gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_kernel_at_full_size(dtype):
    """800x1088: more tiles than fit at once, batch 2."""
    shapes = ((25, 34), (50, 68), (100, 136))
    inputs = random_inputs(shapes, heads=8, dim=32, points=4, dtype=dtype, spread=8.0, device="cuda")
    actual = run_kernel(*inputs, shapes=shapes)
    assert error(actual, definition(*inputs, shapes)) < 2 * TOLERANCE[dtype]
    value, offsets, logits = inputs
    joined = torch.cat((offsets.flatten(2), logits.flatten(2)), 2)
    assert torch.equal(run_kernel(value, *offsets_and_logits(joined, 8, 3, 4), shapes=shapes), actual)


SIZES = pytest.mark.parametrize(
    ("shapes", "sizes"),
    [(((4, 5), (2, 3)), {}), (((4, 5), (2, 3), (3, 1)), {"heads": 8, "dim": 32, "points": 4})],
    ids=["general", "the model's"],
)


@on_gpu
@SIZES
def test_small_kernel_far_outside_and_at_the_edges(shapes, sizes):
    value, offsets, logits = random_inputs(shapes, device="cuda", **sizes)
    for number in (1e4, -1e4, 3e38, -3e38, float("inf"), float("-inf"), float("nan")):
        assert not run_kernel(value, torch.full_like(offsets, number), logits, shapes=shapes).any()
    for step in (0.0, 0.5, -0.5, 1.0, -1.0):
        offsets = torch.full_like(offsets, step)
        expected = definition(value, offsets, logits, shapes)
        assert error(run_kernel(value, offsets, logits, shapes=shapes), expected) < TOLERANCE[F32]


@on_gpu
@SIZES
def test_small_kernel_with_extreme_logits(shapes, sizes):
    value, offsets, logits = random_inputs(shapes, device="cuda", **sizes)
    for scale in (1e4, -1e4, 1e30):
        actual = run_kernel(value, offsets, logits * scale, shapes=shapes)
        assert error(actual, definition(value, offsets, logits * scale, shapes)) < TOLERANCE[F32]
    logits[0, 3] = float("nan")
    assert run_kernel(value, offsets, logits, shapes=shapes).isnan().nonzero()[:, :2].unique(
        dim=0
    ).tolist() == [[0, 3]]


@on_gpu
def test_small_kernel_of_views_in_any_order():
    shapes = ((6, 4),)
    inputs = random_inputs(shapes, dim=8, device="cuda")
    expected = run_kernel(*inputs, shapes=shapes)
    # In another order, and at addresses that are no multiples of 16.
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    assert torch.equal(run_kernel(*turned, shapes=shapes), expected)
    shifted = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view_as(t) for t in inputs]
    assert shifted[0].data_ptr() % 16
    assert torch.equal(run_kernel(*shifted, shapes=shapes), expected)
    assert run_kernel(*(t[:0] for t in inputs), shapes=shapes).shape == (0, 24, 16)
    nothing = [t[:, :0] for t in inputs]
    assert run_kernel(*nothing, shapes=((0, 4),)).shape == (2, 0, 16)


@on_gpu
def test_kernel_runs_on_the_callers_stream():
    shapes = ((40, 40), (20, 20))
    inputs = random_inputs(shapes, heads=8, dim=32, points=4, device="cuda")
    expected = run_kernel(*inputs, shapes=shapes)
    late = [torch.zeros_like(t) for t in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the inputs come late: only what waits for this stream sees them
        for tensor, source in zip(late, inputs):
            tensor.copy_(source)
        actual = run_kernel(*late, shapes=shapes)
    stream.synchronize()
    assert torch.equal(actual, expected)


@on_gpu
def test_kernel_can_be_captured_in_a_cuda_graph():
    shapes = ((8, 8), (4, 4))
    inputs = random_inputs(shapes, device="cuda")
    run_kernel(*inputs, shapes=shapes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_kernel(*inputs, shapes=shapes)
    inputs[0].mul_(2)
    graph.replay()
    assert torch.equal(out, run_kernel(*inputs, shapes=shapes))


@on_gpu
def test_module_takes_the_kernel_and_can_be_kept_from_it(monkeypatch):
    shapes = ((10, 12), (5, 6))
    torch.manual_seed(0)
    module = MSDeformAttn(64, 2, 4, 4).cuda().eval()
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    pixels = torch.randn(2, 150, 64, device="cuda")
    calls = []
    original = ms_deform_attn_cuda.ms_deform_attn
    monkeypatch.setattr(ms_deform_attn_cuda, "ms_deform_attn", lambda *a: (calls.append(1), original(*a))[1])
    with torch.no_grad():
        actual = module(pixels, pixels, shapes)
        assert len(calls) == 1
        for dtype in (F16, BF16):
            with torch.autocast("cuda", dtype=dtype):
                assert error(module(pixels, pixels, shapes), actual) < 0.05
        assert len(calls) == 3
        module.core.use_kernel = False
        expected = module(pixels, pixels, shapes)
    assert len(calls) == 3
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("dtype", [F32, F16])
def test_gradient_equals_that_of_grid_sample(dtype):
    shapes = PYRAMIDS["three levels"]
    inputs = [
        t.requires_grad_()
        for t in random_inputs(shapes, dim=16, dtype=dtype, sampling=F32, spread=2.0, device="cuda")
    ]
    out = run_kernel(*inputs, shapes=shapes)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, inputs, grad)
    plain = [t.detach().float().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(ms_deform_attn_reference(*plain, shapes), plain, grad.float())
    for a, e in zip(actual, expected):
        assert error(a, e) < (1e-4 if dtype == F32 else 2e-3)


@on_gpu
def test_operator_follows_pytorchs_rules():
    shapes = PYRAMIDS["two levels"]
    inputs = [t.requires_grad_() for t in random_inputs(shapes, device="cuda")]
    sizes = [side for shape in shapes for side in shape]
    torch.library.opcheck(torch.ops.mask2former.ms_deform_attn.default, (*inputs, sizes))


@on_gpu
def test_limits_are_those_of_the_kernel():
    module = kernels.load()
    assert module.MS_DEFORM_ATTN_MAX_LEVELS == ms_deform_attn_cuda.MAX_LEVELS
    assert module.MS_DEFORM_ATTN_MAX_POINTS == ms_deform_attn_cuda.MAX_POINTS
    shapes = ((2, 3),)
    with pytest.raises(ValueError, match=r"17 points; expected 1 to 16"):
        run_kernel(*random_inputs(shapes, points=17, device="cuda"), shapes=shapes)
    shapes = ((1, 2),) * 9
    with pytest.raises(ValueError, match=r"9 levels; expected 1 to 8"):
        run_kernel(*random_inputs(shapes, device="cuda"), shapes=shapes)


@on_gpu
def test_wrong_addresses_are_refused_before_the_launch():
    types = {"value_dtype": "float32", "sampling_dtype": "float32"}
    strides = {"offsets_stride": 2, "logits_stride": 1}
    wrong = {**types, **strides, "batch": 1, "heads": 1, "dim": 4, "points": 1, "stream": 0}
    sizes = [(1, 1)]
    launch = kernels.load().ms_deform_attn
    memory = torch.zeros(64, device="cuda")
    at = memory.data_ptr()
    with pytest.raises(ValueError, match="value is a null pointer"):
        launch(0, at, at, at, level_sizes=sizes, **wrong)
    with pytest.raises(ValueError, match="out is not aligned to 16 bytes"):
        launch(at, at, at, at + 8, level_sizes=sizes, **wrong)
    with pytest.raises(ValueError, match="float64; expected float32, float16 or bfloat16"):
        launch(at, at, at, at, level_sizes=sizes, **{**wrong, "value_dtype": "float64"})
    with pytest.raises(ValueError, match="must be float32 or of the value's type"):
        launch(at, at, at, at, level_sizes=sizes, **{**wrong, "sampling_dtype": "float16"})
    with pytest.raises(ValueError, match=r"level 0 is -1x1"):
        launch(at, at, at, at, level_sizes=[(-1, 1)], **wrong)
    for name, stride in (("offsets_stride", 1), ("logits_stride", 0), ("logits_stride", 1 << 31)):
        with pytest.raises(
            ValueError, match="elements between the offsets and logits of pixels, which have 2 and 1"
        ):
            launch(at, at, at, at, level_sizes=sizes, **{**wrong, name: stride})
