"""The kernel of csrc/mlp against its definition in float64.

Without a GPU it runs over emulated instructions (tests/native), as the host's compiler sees it, with clusters and without;
tests marked `gpu` run the compiled kernel.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from mask2former import kernels
from mask2former.modeling.transformer_decoder import mlp_cuda
from tests.mask2former import mlp_emulation
from tests.mask2former.native_library import compiler

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Weights, and what is between layers, are rounded to 16, 11 and 8 bits.
TOLERANCE = {F32: 1e-5, F16: 1e-3, BF16: 8e-3}
# Without LayerNorm after the layers: of the mask embedding, TF32's 11 bits would be 3e-4.
EMBEDDING, FEED_FORWARD = [256, 256, 256, 256], [256, 2048, 256]
PROJECTION = [256, 256]  # of attention's output


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), eps)


def definition(x, weights, biases, norm_weight, norm_bias, eps, after, residual=None):
    """What `mlp` gives, in float64: the result, and norm(x)."""
    normed = layer_norm(x, norm_weight, norm_bias, eps)
    out = x.double() if after else normed
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        out = F.linear(out if i == 0 else out.relu(), weight.double(), bias.double())
    residual = x if residual is None else residual
    return (layer_norm(residual + out, norm_weight, norm_bias, eps) if after else out), normed


def inputs(rows, widths, after, x_dtype=F16, eps=1e-5, residual=None):
    """rows: a number, or the sizes of all dimensions but the last. residual: the type of one that is not x."""
    rows = rows if isinstance(rows, tuple) else (rows,)
    rng = torch.Generator().manual_seed(sum(rows) + sum(widths))

    def randn(*shape, std=1.0, mean=0.0):
        return torch.randn(*shape, generator=rng) * std + mean

    given = {
        "x": randn(*rows, widths[0], std=2.0, mean=0.5).to(x_dtype),
        "weights": [randn(o, i, std=i**-0.5) for i, o in itertools.pairwise(widths)],
        "biases": [randn(o) for o in widths[1:]],
        "norm_weight": randn(widths[0]),
        "norm_bias": randn(widths[0]),
        "eps": eps,
        "after": after,
    }
    if residual is not None:
        given["residual"] = randn(*rows, widths[-1], std=3.0, mean=-1.0).to(residual)
    return given


def error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


def on_gpu(**given):
    for name in ("parts", "multiprocessors", "backwards", "blocks"):
        given.pop(name, None)

    def moved(value):
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    outputs = mlp_cuda.mlp(**{name: moved(value) for name, value in given.items()})
    return tuple(None if out is None else out.cpu() for out in outputs)


built = pytest.mark.skipif(
    not kernels.available(), reason="the CUDA kernels are not built: setup.py build_ext"
)
emulates = pytest.mark.skipif(compiler() is None, reason="needs g++ or clang++")


@pytest.fixture(
    params=[
        pytest.param(mlp_emulation.mlp, marks=emulates, id="emulated"),
        pytest.param(on_gpu, marks=[pytest.mark.gpu, built], id="gpu"),
    ]
)
def run(request):
    return request.param


def check(run, rows, widths, after, dtype, x_dtype=F16, out_dtype=F32, residual=None, **options):
    given = inputs(rows, widths, after, x_dtype, residual=residual)
    expected, _ = definition(**given)
    out, normed = run(**given, dtype=dtype, out_dtype=out_dtype, **options)
    assert normed is None and out.dtype == out_dtype
    assert error(out, expected) < max(TOLERANCE[dtype], TOLERANCE[out_dtype])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize(
    ("widths", "after"),
    [
        ([64, 64], False),
        ([64, 64], True),
        ([96, 96], True),  # four parts of 24 columns
        ([224, 224], True),  # rows of odd multiples of 64 bytes; splits of unequal length
        ([64, 64, 64, 64], False),
        ([32, 96, 160], False),  # rows of odd multiples of 64 bytes; parts that do not divide the layers
        ([96, 32, 32, 32, 288], False),  # columns of more than one turn
        ([64, 128, 64], True),
        ([128, 512, 512, 128], True),
        ([32, 32, 32], True),
    ],
)
def test_kernel_equals_the_definition(run, widths, after, rows, dtype):
    check(run, rows, widths, after, dtype)


@emulates
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("widths", "after"), [([64, 256, 64], True), ([64, 128, 64], False), ([64, 64], True), ([256, 256], True)]
)
def test_any_number_of_blocks_in_a_cluster(parts, widths, after):
    for dtype in (F32, F16):
        check(mlp_emulation.mlp, 20, widths, after, dtype, parts=parts)
        check(mlp_emulation.mlp, 20, widths, after, dtype, parts=parts, backwards=True)
    check(mlp_emulation.mlp, 20, widths, after, BF16, parts=parts, x_dtype=BF16)


@emulates
@pytest.mark.parametrize(("multiprocessors", "blocks"), [(40, 1), (24, 2), (16, 4), (1, 4)])
@pytest.mark.parametrize(
    ("widths", "after"), [([64, 256, 64], True), ([64, 64, 64], False), ([64, 64], True)]
)
def test_tiles_of_more_rows_where_there_are_many(multiprocessors, blocks, widths, after):
    options = {"multiprocessors": multiprocessors, "blocks": blocks, "parts": 8}
    for x_dtype in (F16, F32):
        check(mlp_emulation.mlp, 65, widths, after, F16, x_dtype, **options)


@emulates
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(("tiles", "blocks"), [(5, 1), (3, 2), (2, 4)])
def test_lanes_of_a_projections_rows(parts, tiles, blocks):
    """A row of 256, 128, 64 or 32 columns is the work of 32, 32, 16 or 8 lanes."""
    options = {"parts": parts, "multiprocessors": tiles * parts, "blocks": blocks}
    check(mlp_emulation.mlp, 65, PROJECTION, True, F16, residual=F32, **options)


@emulates
def test_tiles_are_no_larger_than_the_shared_memory():
    check(
        mlp_emulation.mlp,
        40,
        FEED_FORWARD,
        True,
        F16,
        parts=1,
        multiprocessors=1,
        shared_bytes=99 << 10,
        blocks=1,
    )


@pytest.mark.parametrize(
    ("widths", "after", "dtype"),
    # Feed-forward layers in float32 are more than a block's shared memory holds without clusters.
    [
        (EMBEDDING, False, F32),
        (EMBEDDING, False, F16),
        (FEED_FORWARD, True, F16),
        (FEED_FORWARD, True, BF16),
        (PROJECTION, True, F16),
        (PROJECTION, True, BF16),
    ],
    ids=str,
)
def test_layers_of_the_model(run, widths, after, dtype):
    check(run, (1, 20), widths, after, dtype)


@pytest.mark.parametrize("normed_dtype", [F32, F16], ids=str)
def test_normed_rows(run, normed_dtype):
    given = inputs((2, 9), [64, 64, 32], False)
    expected, wanted = definition(**given)
    out, normed = run(**given, dtype=F32, out_dtype=F32, normed_dtype=normed_dtype)
    assert normed.dtype == normed_dtype and error(normed, wanted) < TOLERANCE[normed_dtype]
    assert error(out, expected) < TOLERANCE[F32]


@pytest.mark.parametrize("x_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("out_dtype", [F32, F16, BF16], ids=str)
def test_types_of_inputs_and_outputs(run, x_dtype, out_dtype):
    check(run, 5, [64, 64, 64], True, F16, x_dtype, out_dtype)
    for dtype in (F16, BF16, F32):
        check(run, 5, [64, 64], True, dtype, x_dtype, out_dtype)


@pytest.mark.parametrize("residual", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("x_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("widths", [[64, 64], [64, 128, 64], [256, 256]], ids=str)
def test_residual_that_is_not_the_input(run, widths, x_dtype, residual):
    for dtype in (F16, BF16) if max(widths) > 64 else (F16, BF16, F32):
        check(run, (2, 9), widths, True, dtype, x_dtype, residual=residual)


@pytest.mark.parametrize("rows", [16, 17, 64, 129])
def test_rows_of_whole_tiles_and_of_one_more(run, rows):
    check(run, rows, [64, 64], True, F16, residual=F16)
    check(run, rows, [64, 64], True, F16, F32, residual=F32)


@pytest.mark.parametrize("widths", [[64, 64], [256, 256], [64, 64, 64]], ids=str)
def test_variance_of_rows_far_from_zero(run, widths):
    """A mean of hundreds of deviations, which the difference of two sums of squares would lose."""
    given = inputs(18, widths, True, F32, residual=F32)
    given["residual"] += 1000.0
    expected, _ = definition(**given)
    assert error(run(**given, dtype=F32, out_dtype=F32)[0], expected) < 2e-4


def test_float32_keeps_what_half_precision_loses(run):
    """Sizes far from one, and sums that nearly cancel."""
    given = inputs(6, [64, 64, 64], False, F32)
    given["x"] = given["x"] * 1e6
    given["weights"] = [given["weights"][0] * 1e-7, given["weights"][1] * 1e8]
    given["biases"] = [given["biases"][0] * 1e-7, -given["biases"][1]]
    expected, _ = definition(**given)
    assert error(run(**given, dtype=F32, out_dtype=F32)[0], expected) < TOLERANCE[F32]


@emulates
def test_threads_may_take_turns_in_any_order():
    given = inputs(18, [64, 256, 64], True)
    outs = [
        mlp_emulation.mlp(**given, dtype=F16, out_dtype=F32, backwards=backwards)[0]
        for backwards in (False, True)
    ]
    assert torch.equal(*outs)


CHAINS = [
    (widths, after)
    for after in (False, True)
    for widths in (
        EMBEDDING,
        FEED_FORWARD,
        [256, 4096, 256],
        [256, 1024, 256],
        [64, 64],
        PROJECTION,
        [288, 288],
        [512, 512, 512],
        [544, 64, 544],
        [64, 2048, 64],
        [40, 64, 40],
        [64, 96, 128],
        [32, 8192, 32],
        [256, 8224, 256],
        [64] * 5,
        [64] * 6,
    )
]


def test_what_there_is_a_kernel_for():
    assert mlp_cuda.supported(EMBEDDING, False, F32) and mlp_cuda.supported(EMBEDDING, False, F16)
    assert mlp_cuda.supported(FEED_FORWARD, True, F16) and mlp_cuda.supported(FEED_FORWARD, True, BF16)
    assert all(mlp_cuda.supported(PROJECTION, True, dtype) for dtype in (F32, F16, BF16))
    assert not mlp_cuda.supported([64, 96, 128], True, F16)  # no residual
    assert not mlp_cuda.supported([40, 64, 40], False, F16)
    assert not mlp_cuda.supported([64] * 6, False, F16)


@built
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_the_compiled_kernel_takes_the_same(dtype):
    module = kernels.load()
    for widths, after in CHAINS:
        if len(widths) > mlp_cuda.MAX_LAYERS + 1 or max(widths) > mlp_cuda.MAX_WIDTH:
            continue
        takes = module.mlp_takes(widths, after=after, dtype=str(dtype).removeprefix("torch."))
        assert takes == mlp_cuda.supported(widths, after, dtype), (widths, after)


def test_where_it_pays():
    for widths, dtype in ((EMBEDDING, F32), (FEED_FORWARD, F16)):
        assert mlp_cuda.pays(widths, dtype) and mlp_cuda.pays(widths, dtype, (9, 0))
    # One multiprocessor reads all weights for sixteen rows.
    assert mlp_cuda.pays(EMBEDDING, F32, (8, 0)) and not mlp_cuda.pays(FEED_FORWARD, F16, (8, 0))
    assert mlp_cuda.pays(PROJECTION, F16, (9, 0)) and not mlp_cuda.pays(PROJECTION, F16, (8, 9))


@pytest.mark.gpu
@built
@pytest.mark.parametrize("rows", [1, 7, 100, 200, 800, 3200])
@pytest.mark.parametrize(
    ("widths", "after", "dtype"),
    [
        (EMBEDDING, False, F32),
        (EMBEDDING, False, F16),
        (FEED_FORWARD, True, F16),
        (FEED_FORWARD, True, BF16),
        (FEED_FORWARD, True, F32),
        (PROJECTION, True, F16),
        (PROJECTION, True, BF16),
        (PROJECTION, True, F32),
        ([256, 2048, 2048, 256], False, F16),
        ([512, 512, 512, 2048], False, F16),
    ],
)
def test_full_size(widths, after, dtype, rows):
    if mlp_cuda.supported(widths, after, dtype):
        check(on_gpu, rows, widths, after, dtype, residual=F16 if after else None)
    else:
        with pytest.raises(ValueError, match="have no kernel"):
            on_gpu(**inputs(rows, widths, after), dtype=dtype)


@pytest.mark.gpu
@built
def test_mask_embedding_is_more_exact_than_tf32():
    given = inputs(100, EMBEDDING, False)
    expected, _ = definition(**given)
    rounded = {**given, "weights": [(w.double() * (1 + 2.0**-11)).float() for w in given["weights"]]}
    ours = error(on_gpu(**given, dtype=F32, out_dtype=F32)[0], expected)
    assert ours < error(definition(**rounded)[0], expected) / 10


@pytest.mark.gpu
@built
def test_calls_are_captured_in_a_cuda_graph():
    given = inputs(100, [256, 256, 256], False)
    cuda = {n: [t.cuda() for t in v] if isinstance(v, list) else v for n, v in given.items()}
    cuda.update({n: v.cuda() for n, v in given.items() if isinstance(v, torch.Tensor)})
    mlp_cuda.mlp(**cuda, dtype=F16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = mlp_cuda.mlp(**cuda, dtype=F16)
    for seed in range(2):
        x = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(seed)).half()
        cuda["x"].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert error(out.cpu(), definition(**{**given, "x": x})[0]) < TOLERANCE[F16]


@pytest.mark.gpu
@built
def test_what_the_kernel_refuses():
    given = inputs(3, [64, 64, 64], True)
    with pytest.raises(ValueError, match=r"x is torch\.float64 \(3, 64\)"):
        on_gpu(**{**given, "x": given["x"].double()}, dtype=F16)
    with pytest.raises(ValueError, match=r"layer 1 has weights \(64, 32\)"):
        on_gpu(**{**given, "weights": [given["weights"][0], given["weights"][1][:, :32]]}, dtype=F16)
    with pytest.raises(ValueError, match="2 weights and 1 biases"):
        on_gpu(**{**given, "biases": given["biases"][:1]}, dtype=F16)
    with pytest.raises(ValueError, match=r"norm_bias is torch\.float16"):
        on_gpu(**{**given, "norm_bias": given["norm_bias"].half()}, dtype=F16)
    with pytest.raises(ValueError, match="LayerNorm comes after"):
        on_gpu(**given, dtype=F16, normed_dtype=F32)
    with pytest.raises(ValueError, match=r"the residual is torch\.float16 \(3, 32\)"):
        on_gpu(**given, dtype=F16, residual=given["x"][:, :32])
    with pytest.raises(ValueError, match=r"the residual is torch\.float64"):
        on_gpu(**given, dtype=F16, residual=given["x"].double())
    with pytest.raises(ValueError, match="LayerNorm comes before"):
        on_gpu(**{**given, "after": False}, dtype=F16, residual=given["x"])
    with pytest.raises(ValueError, match=r"layers of \[40, 64, 40\] channels"):
        on_gpu(**inputs(3, [40, 64, 40], True), dtype=F16)


@pytest.mark.gpu
@built
@pytest.mark.parametrize("name", ["x", "residual"])
def test_addresses_that_are_no_multiples_of_16_are_refused(name):
    tensors = {n: t.cuda() for n, t in inputs(3, [64, 64], True, residual=F16).items() if torch.is_tensor(t)}
    weights, biases = (
        [t.cuda() for t in inputs(3, [64, 64], True, residual=F16)[n]] for n in ("weights", "biases")
    )
    shifted = torch.zeros(tensors[name].numel() + 4, device="cuda", dtype=F16)[4:].view(3, 64)
    with pytest.raises(ValueError, match=f"{name} is not aligned to 16 bytes"):
        mlp_cuda.mlp(**{**tensors, name: shifted}, weights=weights, biases=biases, after=True, dtype=F16)
