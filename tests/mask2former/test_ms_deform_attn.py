"""Multi-scale deformable attention: the path through grid_sample and its gradient on any machine, our kernel on a GPU.

Under NVIDIA's checker: tools/sanitize_kernels.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mask2former import kernels
from mask2former.modeling.pixel_decoder import MSDeformAttn, MSDeformAttnCore, ms_deform_attn_cuda
from mask2former.modeling.pixel_decoder.ms_deform_attn_reference import (
    ms_deform_attn_reference,
    ms_deform_attn_reference_backward,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PYRAMIDS = {
    "one level": ((5, 7),),
    "two levels": ((4, 6), (9, 13)),
    "three levels": ((3, 5), (6, 9), (12, 18)),
    "empty levels": ((0, 4), (5, 6), (3, 0), (7, 2)),
    "thin levels": ((1, 1), (1, 9), (8, 1), (2, 3), (11, 5)),
    "last level empty": ((6, 5), (0, 0)),
    "eight levels": ((2, 2), (1, 3), (4, 4), (5, 1), (3, 3), (2, 7), (1, 1), (6, 6)),
}
# Largest error against float64 of the same inputs, over the largest output. float32: locations of some tens of pixels
# are rounded at 2e-6 of a pixel; the others: half of the last place of the output, with room for it.
TOLERANCE = {F32: 2e-5, F16: 1e-3, BF16: 8e-3}


def needs_kernels():
    """Marks of a test that runs the kernel."""
    reason = f"the CUDA kernels are not built: {kernels.BUILD_HINT}"
    return [pytest.mark.gpu, pytest.mark.skipif(not kernels.available(), reason=reason)]


def on_gpu(test):
    for mark in needs_kernels():
        test = mark(test)
    return test


def random_inputs(
    shapes, batch=2, heads=2, dim=8, points=3, dtype=F32, sampling=None, spread=4.0, device="cpu"
):
    """Value, offsets and logits; many samples fall outside of small levels."""
    rng = torch.Generator().manual_seed(batch + 10 * heads + 100 * dim + len(shapes))
    pixels, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(batch, pixels, heads, dim, generator=rng)
    offsets = torch.randn(batch, pixels, heads, levels, points, 2, generator=rng) * spread
    logits = torch.randn(batch, pixels, heads, levels * points, generator=rng) * 3
    sampling = sampling or dtype
    return value.to(device, dtype), offsets.to(device, sampling), logits.to(device, sampling)


def offsets_and_logits(sampling, heads, levels, points) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of one tensor (B, S, heads * levels * points * 3) that has both, as our TensorRT plugin takes it."""
    samples = heads * levels * points
    offsets = sampling[..., : 2 * samples].unflatten(2, (heads, levels, points, 2))
    return offsets, sampling[..., 2 * samples :].unflatten(2, (heads, levels * points))


def definition(value, offsets, logits, shapes) -> torch.Tensor:
    """Deformable DETR's equation 3 in float64, by indexing: (B, S, heads * D)."""
    value, offsets, logits = (t.detach().double() for t in (value, offsets, logits))
    batch, pixels, heads, dim = value.shape
    levels, points = offsets.shape[3:5]
    weights = logits.softmax(-1).view(batch, pixels, heads, levels, points)
    places = [((x + 0.5) / w, (y + 0.5) / h) for h, w in shapes for y in range(h) for x in range(w)]
    center = torch.tensor(places, dtype=torch.float64, device=value.device).view(1, pixels, 1, 1, 2)
    b = torch.arange(batch, device=value.device).view(-1, 1, 1, 1)
    m = torch.arange(heads, device=value.device).view(1, 1, -1, 1)
    out = value.new_zeros(batch, pixels, heads, dim)
    start = 0
    for level, (height, width) in enumerate(shapes):
        if height * width == 0:
            continue
        level_value = value[:, start : start + height * width].view(batch, height, width, heads, dim)
        start += height * width
        size = torch.tensor([width, height], dtype=torch.float64, device=value.device)
        x, y = (center * size + offsets[:, :, :, level] - 0.5).unbind(-1)  # (B, S, heads, points)
        for dx, dy in itertools.product((0, 1), (0, 1)):
            xi, yi = x.floor() + dx, y.floor() + dy
            share = (1 - (x - xi).abs()) * (1 - (y - yi).abs()) * weights[:, :, :, level]
            share = share * ((xi >= 0) & (xi < width) & (yi >= 0) & (yi < height))
            xi, yi = xi.clamp(0, width - 1).long(), yi.clamp(0, height - 1).long()
            out += (level_value[b, yi, xi, m] * share[..., None]).sum(3)
    return out.flatten(2)


def error(actual, expected) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# On any machine


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


# On a GPU


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
