"""The kernels of csrc/normalization against float64, and the checks in front of them."""

import pytest
import torch
from torch.nn import functional as F

from mask2former import kernels
from mask2former.modeling.norms_cuda import group_norm, layer_norm, normalize_images

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
# Rounding of the output, and of float32 sums.
TOLERANCE = {F32: 2e-6, F16: 6e-4, BF16: 5e-3}


def gpu(test):
    why = "the CUDA kernels are not built: python setup.py build_ext --inplace"
    return pytest.mark.gpu(pytest.mark.skipif(not kernels.available(), reason=why)(test))


def random(*shape, dtype=F32, seed=0, mean=0.0, std=1.0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=rng) * std + mean).to(dtype).cuda()


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous, one element past an aligned address."""
    base = x.new_empty(x.numel() + 1)
    base[1:] = x.flatten()
    return base[1:].view(x.shape)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the largest value."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def expected_layer_norm(x, weight, bias, eps=1e-5, residual=None):
    x = x.double() if residual is None else x.double() + residual.double()
    return F.layer_norm(x, x.shape[-1:], weight.double(), bias.double(), eps)


def expected_group_norm(x, groups, weight, bias, eps=1e-5, relu=False):
    out = F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)
    return out.relu() if relu else out


ROWS = [
    (1, 256),
    (3, 8),
    (5, 12),
    (7, 1),
    (33, 96),
    (9, 100),
    (17, 192),
    (6, 384),
    (4, 768),
    (3, 1000),
    (2, 1024),
]
LONG_ROWS = [(3, 1025), (2, 1536), (5, 3072), (1, 5000), (4, 6144)]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS + LONG_ROWS, ids=str)
def test_layer_norm_equals_float64(shape, dtype):
    x, update = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight, bias = random(shape[1], seed=2), random(shape[1], seed=3)
    for residual in (None, update):
        out = layer_norm(x, weight, bias, residual=residual)
        assert out.dtype == dtype
        if shape[1] == 1:  # no variance: the bias alone
            assert torch.equal(out, bias.to(dtype).expand(shape))
            continue
        assert error(out, expected_layer_norm(x, weight, bias, residual=residual)) < TOLERANCE[dtype]


@gpu
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [256, 1536, 30])
def test_layer_norm_of_mixed_types(x_dtype, residual_dtype, out_dtype, channels):
    x, update = random(4, 5, channels, dtype=x_dtype), random(4, 5, channels, dtype=residual_dtype, seed=1)
    weight, bias = random(channels, seed=2), random(channels, seed=3)
    out = layer_norm(x, weight, bias, 1e-6, update, out_dtype)
    assert out.dtype == out_dtype
    assert error(out, expected_layer_norm(x, weight, bias, 1e-6, update)) < TOLERANCE[out_dtype]


POSITIONED = [(2, 7, 256), (3, 5, 96), (1, 9, 33), (2, 3, 4, 384), (5, 1024), (2, 6, 1536), (3, 2, 1025)]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", POSITIONED, ids=str)
def test_layer_norm_adds_positions_to_a_second_output(shape, dtype):
    x, update = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight, bias = random(shape[-1], seed=2), random(shape[-1], seed=3)
    position = random(1, *shape[1:], dtype=dtype, seed=4)
    for residual in (None, update):
        out, total = layer_norm(x, weight, bias, residual=residual, position=position)
        assert torch.equal(out, layer_norm(x, weight, bias, residual=residual))
        assert out.dtype == total.dtype == dtype
        # Of the sum before it is rounded: half the last place, not one.
        expected = expected_layer_norm(x, weight, bias, residual=residual) + position.double()
        assert error(total, expected) < TOLERANCE[dtype]


@gpu
@pytest.mark.parametrize("position_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [256, 1536, 30])
def test_positions_of_another_type(position_dtype, out_dtype, channels):
    x, position = random(4, 5, channels, dtype=F16), random(1, 5, channels, dtype=position_dtype, seed=1)
    weight, bias = random(channels, seed=2), random(channels, seed=3)
    out, total = layer_norm(x, weight, bias, out_dtype=out_dtype, position=position)
    expected = expected_layer_norm(x, weight, bias)
    assert out.dtype == total.dtype == out_dtype
    assert error(out, expected) < TOLERANCE[out_dtype]
    assert error(total, expected + position.double()) < TOLERANCE[out_dtype]


@gpu
def test_positions_of_the_encoder_and_of_unaligned_tensors():
    x, update = random(2, 17850, 256, dtype=F16), random(2, 17850, 256, dtype=F16, seed=1)
    weight, bias = random(256, seed=2), random(256, seed=3)
    position = random(1, 17850, 256, dtype=F16, seed=4)
    out, total = layer_norm(x, weight, bias, residual=update, position=position)
    expected = expected_layer_norm(x, weight, bias, residual=update)
    assert error(out, expected) < TOLERANCE[F16]
    assert error(total, expected + position.double()) < TOLERANCE[F16]
    again = layer_norm(x, weight, bias, residual=update, position=unaligned(position))
    for one, other in zip(again, (out, total)):
        torch.testing.assert_close(one, other)
    assert [t.shape for t in layer_norm(x[:, :0], weight, bias, position=position[:, :0])] == [
        (2, 0, 256)
    ] * 2


@gpu
@pytest.mark.parametrize("channels", [96, 256, 768, 1000, 2048])
def test_layer_norm_keeps_its_digits_beside_a_large_mean(channels):
    x = random(50, channels, mean=1000.0)
    update = random(50, channels, seed=1, std=1e-3)
    weight, bias = torch.ones(channels).cuda(), torch.zeros(channels).cuda()
    assert error(layer_norm(x, weight, bias), expected_layer_norm(x, weight, bias)) < 2e-6
    # The sum of the two is rounded to float32, which has 6e-5 between neighbours at 1000.
    out = layer_norm(x, weight, bias, residual=update)
    assert error(out, expected_layer_norm(x, weight, bias, residual=update)) < 3e-5


@gpu
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_layer_norm_of_unaligned_tensors(dtype):
    x, update = random(10, 256, dtype=dtype), random(10, 256, dtype=dtype, seed=1)
    weight, bias = random(256, seed=2), random(256, seed=3)
    aligned = layer_norm(x, weight, bias, residual=update)
    for tensors in (
        (unaligned(x), weight, bias, update),
        (x, unaligned(weight), bias, update),
        (x, weight, bias, unaligned(update)),
    ):
        x_, weight_, bias_, update_ = tensors
        torch.testing.assert_close(layer_norm(x_, weight_, bias_, residual=update_), aligned)


@gpu
def test_layer_norm_of_many_rows_and_of_none():
    x = random(17850, 256, dtype=F16)
    weight, bias = random(256, seed=2), random(256, seed=3)
    assert error(layer_norm(x, weight, bias), expected_layer_norm(x, weight, bias)) < TOLERANCE[F16]
    assert layer_norm(x[:0], weight, bias).shape == (0, 256)


@gpu
def test_layer_norm_lets_nan_through_in_its_row_only():
    x = random(6, 256)
    x[2, 7] = float("nan")
    x[4, 0] = float("inf")
    out = layer_norm(x, torch.ones(256).cuda(), torch.zeros(256).cuda())
    assert out.isnan().any(1).tolist() == [False, False, True, False, True, False]


MAPS = [
    (1, 256, 25, 34),
    (2, 256, 50, 68),
    (1, 32, 1, 1),
    (3, 64, 7, 5),
    (2, 256, 1, 3),
    (1, 512, 9, 16),
    (1, 2048, 3, 4),
    (1, 256, 100, 136),  # too large for a block to keep a group
    (2, 64, 71, 73),  # groups start at multiples of 16 bytes, planes do not
    (1, 64, 64, 64),  # the largest that a block keeps
    (1, 64, 64, 65),
]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_equals_float64(shape, dtype, channels_last):
    groups = max(1, shape[1] // 8) if shape[1] < 256 else 32
    x = random(*shape, dtype=dtype, mean=0.5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = random(shape[1], seed=2), random(shape[1], seed=3)
    for relu in (False, True):
        out = group_norm(x, groups, weight, bias, relu=relu)
        assert out.dtype == dtype and out.stride() == x.stride()
        expected = expected_group_norm(x, groups, weight, bias, relu=relu)
        assert error(out, expected) < TOLERANCE[dtype]


@gpu
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 15, 8, 8), (2, 6, 1, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_of_groups_that_fill_no_16_bytes(shape, dtype):
    x = random(*shape, dtype=dtype)
    weight, bias = random(shape[1], seed=2), random(shape[1], seed=3)
    assert error(group_norm(x, 3, weight, bias), expected_group_norm(x, 3, weight, bias)) < TOLERANCE[dtype]
    if shape[2] > 1:
        x = x.contiguous(memory_format=torch.channels_last)
        with pytest.raises(
            ValueError, match="with channels last, expected groups of a multiple of 8 channels"
        ):
            group_norm(x, 3, weight, bias)


@gpu
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_of_mixed_types(x_dtype, out_dtype, channels_last):
    x = random(2, 64, 12, 10, dtype=x_dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = random(64, seed=2), random(64, seed=3)
    out = group_norm(x, 4, weight, bias, 1e-3, out_dtype=out_dtype)
    assert error(out, expected_group_norm(x, 4, weight, bias, 1e-3)) < TOLERANCE[out_dtype]


@gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_keeps_its_digits_beside_a_large_mean(channels_last):
    x = random(2, 64, 96, 88, mean=1000.0)
    x[:, :, 0, 0] = 0.0  # nor is the first value like the others
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(64).cuda(), torch.zeros(64).cuda()
    expected, actual = expected_group_norm(x, 8, weight, bias), group_norm(x, 8, weight, bias)
    assert error(actual, expected) < 2e-6
    # The mean is a float32, which has 6e-5 between neighbours at 1000; the standard deviation is about 11.
    assert float((actual.double() - expected)[:, :, 1:].abs().max()) < 3e-5


@gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_of_a_large_map_is_exact_and_repeats(channels_last):
    x = random(1, 256, 200, 272, dtype=F16, mean=-2.0, std=3.0)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = random(256, seed=2), random(256, seed=3)
    out = group_norm(x, 32, weight, bias, relu=True)
    assert error(out, expected_group_norm(x, 32, weight, bias, relu=True)) < TOLERANCE[F16]
    assert all(torch.equal(out, group_norm(x, 32, weight, bias, relu=True)) for _ in range(3))


@gpu
def test_group_norm_of_unaligned_maps():
    x = random(2, 32, 8, 16, dtype=F16)
    weight, bias = random(32, seed=2), random(32, seed=3)
    torch.testing.assert_close(group_norm(unaligned(x), 4, weight, bias), group_norm(x, 4, weight, bias))


@gpu
def test_group_norm_of_no_images():
    x = random(2, 32, 8, 16)[:0]
    assert group_norm(x, 4, torch.ones(32).cuda(), torch.zeros(32).cuda()).shape == (0, 32, 8, 16)


def random_images(*shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(255).round().cuda()
    mean = torch.linspace(103.53, 123.675, shape[1]).cuda()
    std = torch.linspace(57.375, 58.395, shape[1]).cuda()
    return images, mean, std


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((1, 3, 800, 1088), (0, 3, 4, 8)),
        ((3, 3, 33, 47), (0, 3, 4, 8)),
        ((2, 1, 1, 1), (0, 1, 4, 8)),
        ((2, 4, 7, 1025), (0, 4, 8)),
        ((2, 6, 5, 8), (0, 6, 8)),
        ((2, 8, 5, 3), (0, 8)),
        ((1, 9, 5, 3), (0,)),
    ],
    ids=str,
)
def test_images_are_normalised_to_pytorchs_bits(shape, strides, dtype):
    images, mean, std = random_images(*shape)
    expected = ((images - mean[:, None, None]) / std[:, None, None]).to(dtype)
    for stride in strides:
        out = normalize_images(images, mean, std, dtype, stride)
        assert out.dtype == dtype
        if stride:
            assert out.shape == (shape[0], *shape[2:], stride) and not out[..., shape[1] :].any()
            out = out[..., : shape[1]].permute(0, 3, 1, 2)
        assert torch.equal(out, expected), stride


@gpu
def test_pixels_that_are_their_mean_become_zeros():
    images, mean, std = random_images(2, 3, 40, 48)
    images[:, :, 30:, :] = mean[:, None, None]
    for stride in (0, 3, 4, 8):
        for dtype in DTYPES:
            out = normalize_images(images, mean, std, dtype, stride)
            assert not (out[:, 30:] if stride else out[:, :, 30:]).any()


@gpu
def test_unaligned_images_and_none():
    images, mean, std = random_images(2, 3, 16, 24)
    for stride in (0, 4, 8):
        out = normalize_images(unaligned(images), unaligned(mean), std, F16, stride)
        assert torch.equal(out, normalize_images(images, mean, std, F16, stride))
    assert normalize_images(images[:0], mean, std).shape == (0, 3, 16, 24)


@gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": torch.ones(2)}, r"std is \(2,\); expected \(3,\), images's channels"),
        ({"mean": torch.ones(3, dtype=F16)}, "mean is torch.float16; expected torch.float32"),
        ({"images": torch.ones(1, 3, 4, 4, dtype=F16)}, "images are torch.float16; expected torch.float32"),
        ({"images": torch.ones(3, 4, 4)}, r"3 dimensions; expected \(B, C, H, W\)"),
        ({"pixel_stride": 2}, "2 elements from pixel to pixel for 3 channels; expected 0, 4 or 8"),
        ({"pixel_stride": 16}, "16 elements from pixel to pixel for 3 channels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_normalize_images_refuses(change, message):
    given = {"images": torch.ones(1, 3, 4, 4), "mean": torch.ones(3), "std": torch.ones(3), **change}
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        normalize_images(**given)


@gpu
def test_workspace_for_the_largest_map_suffices_for_all():
    workspace = kernels.load().group_norm_workspace
    for last in (False, True):
        sizes = [
            workspace(batch=b, channels=256, pixels=p, groups=32, channels_last=last)
            for b in (1, 2)
            for p in (1, 850, 3400, 54400, 10**6, 10**8)
        ]
        assert sizes[:6] == sorted(sizes[:6]) and all(a < b for a, b in zip(sizes[:6], sizes[6:]))


@gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight is \(7,\); expected \(8,\)"),
        ({"bias": torch.ones(8, dtype=F16)}, "bias is torch.float16; expected torch.float32"),
        ({"residual": torch.ones(3, 8)}, r"residual is \(3, 8\); expected \(2, 8\)"),
        ({"position": torch.ones(2, 8)}, r"position is \(2, 8\); expected \(1, 8\)"),
        ({"x": torch.ones(2, 8, dtype=torch.float64)}, "x is torch.float64; expected torch.float32"),
        ({"eps": -1.0}, "epsilon is -1; expected at least 0"),
        ({"out_dtype": torch.int32}, "out_dtype is torch.int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_layer_norm_refuses(change, message):
    given = {"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": torch.ones(8), **change}
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        layer_norm(**given)


@gpu
def test_what_group_norm_refuses():
    x, ones = torch.ones(2, 8, 3, 3).cuda(), torch.ones(8).cuda()
    with pytest.raises(ValueError, match="8 channels in 3 groups; expected a multiple of the groups"):
        group_norm(x, 3, ones, ones)
    with pytest.raises(ValueError, match=r"3 dimensions; expected \(B, C, H, W\)"):
        group_norm(x[0], 2, ones, ones)


def test_tensors_on_the_cpu_are_refused():
    x, ones = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="x is on cpu; expected a GPU"):
        layer_norm(x, ones, ones)
    with pytest.raises(ValueError, match="x is on cpu; expected a GPU"):
        group_norm(x[..., None, None], 2, ones, ones)
    with pytest.raises(ValueError, match="images is on cpu; expected a GPU"):
        normalize_images(x[..., None, None], ones, ones)
