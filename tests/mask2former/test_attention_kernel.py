"""The kernels of csrc/attention against the definition of masked attention in float64.

Without a GPU they run over emulated instructions (tests/native), as the host's compiler sees them; tests marked `gpu` run
the compiled kernels.
"""

from __future__ import annotations

import pytest
import torch

from mask2former.modeling.transformer_decoder import attention_cuda
from tests.mask2former import attention_emulation
from tests.mask2former.native_library import compiler

F16, BF16 = torch.float16, torch.bfloat16
# Weights and results are rounded to 11 and 8 bits.
TOLERANCE = {F16: 1e-3, BF16: 8e-3}

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs g++ or clang++")


def definition(q, k, v, heads, mask_embed=None, mask_features=None, mask_logits=None):
    """softmax(q k^T / sqrt(D)) v in float64 over the keys whose mask logit is not negative, over all where there is none."""
    q, k, v = (x.double().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (B, heads, Q, K)
    if mask_embed is not None:
        mask_logits = mask_embed.double() @ mask_features.double().transpose(1, 2)
    if mask_logits is not None:
        blocked = mask_logits < 0
        blocked &= ~blocked.all(-1, keepdim=True)
        logits = logits.masked_fill(blocked[:, None], float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def inputs(batch, queries, keys, heads=2, dim=32, mask_dim=64, dtype=F16, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=rng)

    q, k, v = (random(batch, n, heads * dim).to(dtype) for n in (queries, keys, keys))
    made = {"q": q * 2, "k": k * 2, "v": v, "num_heads": heads}
    if mask_dim:
        made["mask_embed"] = random(batch, queries, mask_dim)
        made["mask_features"] = random(batch, keys, mask_dim).to(dtype)
    return made


def expected(given):
    heads = given["num_heads"]
    return definition(
        given["q"], given["k"], given["v"], heads, given.get("mask_embed"), given.get("mask_features")
    )


def error(actual, wanted) -> float:
    actual, wanted = actual.double().cpu(), wanted.double().cpu()
    return ((actual - wanted).norm() / wanted.norm()).item() if actual.isfinite().all() else float("inf")


def on_gpu(**given):
    moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    return attention_cuda.attention(**moved)


@pytest.fixture(
    params=[pytest.param("emulated", marks=needs_compiler), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def run(request):
    """The kernel: takes what `inputs` makes."""
    return attention_emulation.attention if request.param == "emulated" else on_gpu


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("mask_dim", [0, 32, 64, 96], ids=lambda n: f"mask{n}")
@pytest.mark.parametrize("dim", [8, 16, 32, 64], ids=lambda n: f"dim{n}")
def test_kernel_equals_the_definition(run, dim, mask_dim, dtype):
    given = inputs(2, 20, 70, dim=dim, mask_dim=mask_dim, dtype=dtype)
    assert error(run(**given), expected(given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [1, 3, 8, 9, 16])
def test_any_number_of_heads(run, heads):
    given = inputs(1, 5, 40, heads=heads, dim=8, mask_dim=32)
    assert error(run(**given), expected(given)) < TOLERANCE[F16]


@pytest.mark.parametrize("mask_dim", [0, 32], ids=lambda n: f"mask{n}")
@pytest.mark.parametrize("keys", [1, 2, 31, 32, 33, 64, 97, 130])
def test_any_number_of_keys(run, keys, mask_dim):
    given = inputs(3, 7, keys, mask_dim=mask_dim, dim=16)
    assert error(run(**given), expected(given)) < TOLERANCE[F16]


@pytest.mark.parametrize("mask_dim", [0, 32], ids=lambda n: f"mask{n}")
@pytest.mark.parametrize("queries", [1, 7, 16, 17, 100, 113, 200])
def test_any_number_of_queries(run, queries, mask_dim):
    given = inputs(1, queries, 67, mask_dim=mask_dim, dim=8)
    assert error(run(**given), expected(given)) < TOLERANCE[F16]


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("mask_dim", [0, 32], ids=lambda n: f"mask{n}")
@pytest.mark.parametrize("dim", [8, 32], ids=lambda n: f"dim{n}")
def test_positions_are_added(run, dim, mask_dim, dtype):
    given = inputs(2, 20, 70 if mask_dim else 20, dim=dim, mask_dim=mask_dim, dtype=dtype)
    rng = torch.Generator().manual_seed(5)
    summed = dict(given)
    for name in ("q", "k") if not mask_dim else ("q",):
        given[f"{name}_pos"] = torch.randn(given[name][:1].shape, generator=rng).to(dtype)
        summed[name] = given[name] + given[f"{name}_pos"]  # rounded, as the kernel does
    assert error(run(**given), expected(summed)) < TOLERANCE[dtype]


def set_mask(given, allowed):
    """Mask embedding and features whose product is exactly +1 where allowed (B, Q, K) and -1 elsewhere."""
    batch, queries, keys = allowed.shape
    assert queries <= 32
    embed = torch.zeros(batch, queries, 32)
    embed[:, range(queries), range(queries)] = 1
    features = torch.zeros(batch, keys, 32)
    features[:, :, :queries] = allowed.transpose(1, 2).float() * 2 - 1
    given["mask_embed"], given["mask_features"] = embed, features.to(given["q"].dtype)


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@needs_compiler
def test_blocked_rows_however_the_keys_are_split(multiprocessors, backwards):
    given = inputs(2, 20, 150, dim=8)
    allowed = torch.rand(2, 20, 150, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[:, 0] = False  # attends everywhere
    allowed[:, 1] = True
    for row, key in enumerate(
        (0, 31, 32, 100, 149), start=2
    ):  # one key: in the first tile, the last, between
        allowed[:, row] = False
        allowed[:, row, key] = True
    allowed[:, 7, :128] = False
    allowed[:, 8, 32:] = False
    allowed[1, 9:] = False
    set_mask(given, allowed)
    made = attention_emulation.attention(**given, multiprocessors=multiprocessors, backwards=backwards)
    assert error(made, expected(given)) < TOLERANCE[F16]
    # One allowed key gives that key's value itself.
    assert torch.equal(made[0, 2], given["v"][0, 0]) and torch.equal(made[0, 6], given["v"][0, 149])


def test_rows_blocked_everywhere_attend_everywhere(run):
    given = inputs(2, 20, 300, dim=32)
    set_mask(given, torch.zeros(2, 20, 300, dtype=torch.bool))
    unmasked = definition(given["q"], given["k"], given["v"], 2)
    assert error(run(**given), unmasked) < TOLERANCE[F16]


def test_one_image_does_not_change_another(run):
    given = inputs(3, 9, 80, dim=16)
    allowed = torch.rand(3, 9, 80, generator=torch.Generator().manual_seed(2)) < 0.5
    allowed[1] = False
    set_mask(given, allowed)
    together = run(**given)
    for image in range(3):
        alone = {n: x[image : image + 1] if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        assert error(run(**alone)[0], together[image].double()) < TOLERANCE[F16]


@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_large_logits(run, scale):
    given = inputs(1, 20, 100, dim=32)
    given["q"] = given["q"] * scale
    assert error(run(**given), expected(given)) < 4 * TOLERANCE[F16]


def test_large_logits_of_keys_that_are_blocked_do_not_count(run):
    given = inputs(1, 4, 100, dim=16)
    allowed = torch.ones(1, 4, 100, dtype=torch.bool)
    allowed[:, :, 40:] = False
    allowed[:, 0] = False
    allowed[:, 0, 90] = True  # all tiles before hold blocked keys
    set_mask(given, allowed)
    given["k"][:, :40] *= 1e-2
    given["k"][:, 40:90] *= 1e3
    assert error(run(**given), expected(given)) < TOLERANCE[F16]


def test_mask_logits_near_zero(run):
    """The sign is that of the product with the whole float32 embedding: zero is allowed, the smallest negative is not."""
    given = inputs(1, 4, 96, dim=16)
    embed, features = torch.zeros(1, 4, 32), torch.zeros(1, 96, 32, dtype=F16)
    step = 2.0**-16
    embed[0, :, 0] = 1 + torch.tensor([0, -step, step, -2 * step])  # more bits than float16 has
    embed[0, :, 1] = -1
    features[0, :, :2] = 1.0
    features[0, 1::2, :2] *= -1
    given["mask_embed"], given["mask_features"] = embed, features
    mask_logits = embed.double() @ features.double().transpose(1, 2)
    assert mask_logits.abs().max() < 1e-4 and (mask_logits == 0).any()
    assert error(run(**given), expected(given)) < TOLERANCE[F16]


@needs_compiler
def test_workspace_holds_whatever_is_smaller():
    sizes = [
        (b, q, k) for b in (1, 2, 3, 8, 40) for q in (1, 16, 100, 300) for k in (1, 33, 850, 3400, 13600)
    ]
    for multiprocessors in (1, 20, 132):
        for batch, queries, keys in sizes:
            needed, _ = attention_emulation.splits(batch, queries, keys, 8, multiprocessors)
            larger = [s for s in sizes if s[0] >= batch and s[1] >= queries and s[2] >= keys]
            assert all(needed <= attention_emulation.splits(*s, 8, multiprocessors)[1] for s in larger)


def test_operator_tells_its_shape_without_a_gpu():
    given = inputs(2, 5, 9, dtype=F16)
    with torch.device("meta"):
        moved = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    out = attention_cuda.attention(**moved)
    assert out.shape == given["q"].shape and out.dtype == F16


WRONG = {
    "float32": (lambda g: {"q": g["q"].float()}, "expected .* of float16 or bfloat16"),
    "keys and values": (lambda g: {"v": g["v"][:, :-1]}, r"v is \(1, 8, 64\)"),
    "another dtype": (lambda g: {"k": g["k"].bfloat16()}, "k is .*bfloat16; expected .*float16"),
    "features": (lambda g: {"mask_features": g["mask_features"][:, 1:]}, "mask_features is"),
    "positions": (lambda g: {"q_pos": g["q"][:, 1:]}, r"q_pos is \(1, 4, 64\)"),
    "positions of masked keys": (lambda g: {"k_pos": g["k"]}, "k_pos is given with a mask"),
    "heads": (lambda g: {"num_heads": 32}, "have no kernel; expected 1 to 256 heads"),
    "mask channels": (
        lambda g: {n: g[n][..., :40] for n in ("mask_embed", "mask_features")},
        "with a mask of 40 have no kernel",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    change, message = WRONG[name]
    given = inputs(1, 5, 9)
    with pytest.raises(ValueError, match=message):
        arguments = {"q_pos": None, "k_pos": None, **given, **change(given)}
        attention_cuda._check(**arguments)


def test_half_a_mask_is_refused():
    given = inputs(1, 5, 9)
    del given["mask_features"]
    with pytest.raises(ValueError, match="go together"):
        attention_cuda.attention(**given)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [
        (1, 100, 850),
        (1, 100, 3400),
        (1, 100, 13600),
        (3, 100, 13600),
        (1, 200, 3401),
        (2, 300, 1023),
        (8, 100, 850),
    ],
)
def test_full_size(batch, queries, keys, dtype):
    given = inputs(batch, queries, keys, heads=8, dim=32, mask_dim=256, dtype=dtype)
    given = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    assert error(attention_cuda.attention(**given), expected(given)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5])
def test_full_size_with_few_allowed_keys(share):
    given = inputs(2, 32, 3400, heads=8, dim=32)
    allowed = torch.rand(2, 32, 3400, generator=torch.Generator().manual_seed(3)) < share
    set_mask(given, allowed)
    assert error(on_gpu(**given), expected(given)) < TOLERANCE[F16]


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 7, 100, 200, 300])
def test_self_attention_at_full_size(queries):
    given = inputs(3, queries, queries, heads=8, dim=32, mask_dim=0)
    assert error(on_gpu(**given), expected(given)) < TOLERANCE[F16]


@pytest.mark.gpu
def test_parts_of_wider_rows_are_not_copied():
    rng = torch.Generator().manual_seed(4)
    packed = torch.randn(2, 100, 768, generator=rng).half().cuda()
    q, k, v = packed.split(256, 2)
    assert all(attention_cuda._rows(x) is x for x in (q, k, v))
    assert error(attention_cuda.attention(q, k, v, 8), definition(q, k, v, 8)) < TOLERANCE[F16]


@pytest.mark.gpu
def test_same_input_gives_the_same_bits():
    given = inputs(1, 100, 13600, heads=8, dim=32, mask_dim=256)
    given = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    first = attention_cuda.attention(**given)
    assert all(torch.equal(attention_cuda.attention(**given), first) for _ in range(20))


@pytest.mark.gpu
def test_kernel_can_be_captured_in_a_cuda_graph():
    given = inputs(1, 100, 3400, heads=8, dim=32, mask_dim=256)
    given = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    wanted = attention_cuda.attention(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = attention_cuda.attention(**given)
    made.fill_(float("nan"))
    graph.replay()
    assert torch.equal(made, wanted)


@pytest.mark.gpu
def test_wrong_addresses_are_refused_before_the_launch():
    from mask2former import kernels

    x = torch.zeros(1, 16, 64, dtype=F16, device="cuda")
    sizes = {"batch": 1, "queries": 16, "keys": 16, "heads": 2, "dim": 32}
    strides = {"q_stride": 64, "k_stride": 64, "v_stride": 64}
    at = x.data_ptr()

    def call(q=at, **changes):
        arguments = {"dtype": "float16", "stream": kernels.stream_of(x), **sizes, **strides, **changes}
        kernels.load().attention(q, at, at, at, **arguments)

    call()
    with pytest.raises(ValueError, match="q is not aligned to 16 bytes"):
        call(at + 2)
    with pytest.raises(ValueError, match="q is a null pointer"):
        call(0)
    with pytest.raises(ValueError, match="24 channels a head; expected 8, 16, 32 or 64"):
        call(dim=24)
    with pytest.raises(ValueError, match="300 heads; expected 1 to 256"):
        call(heads=300, dim=8)
    with pytest.raises(ValueError, match="rows of k are 68 elements apart"):
        call(k_stride=68)
    with pytest.raises(ValueError, match="mask_embed is a null pointer"):
        call(mask_dim=32)
    with pytest.raises(ValueError, match="mask_dim is 40"):
        call(mask_dim=40)
    with pytest.raises(ValueError, match="expected float16 or bfloat16"):
        call(dtype="float32")
