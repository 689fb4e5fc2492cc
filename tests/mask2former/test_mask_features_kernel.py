"""The kernels of csrc/attention/mask_features.h: the product with mask embeddings, and resizing to the levels.

As in test_attention_kernel.py, they run over emulated instructions without a GPU, and as compiled kernels with one.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mask2former.modeling.transformer_decoder import attention_cuda
from tests.mask2former import attention_emulation
from tests.mask2former.test_attention_kernel import BF16, F16, error, needs_compiler

EMULATED_AND_GPU = [
    pytest.param("emulated", marks=needs_compiler),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=EMULATED_AND_GPU)
def product(request):
    if request.param == "emulated":
        return attention_emulation.mask_product
    return lambda embed, features: attention_cuda.mask_product(embed.cuda(), features.cuda()).cpu()


@pytest.fixture(params=EMULATED_AND_GPU)
def resize(request):
    if request.param == "emulated":
        return attention_emulation.resize_mask_features
    return lambda features, size: attention_cuda.resize_mask_features(features.cuda(), size).cpu()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F16, 1e-6), (BF16, 2e-5)])
@pytest.mark.parametrize(
    ("batch", "queries", "pixels", "channels"),
    [(2, 20, 130, 64), (1, 100, 257, 32), (3, 1, 1, 96), (1, 65, 900, 32)],
)
def test_product_is_as_exact_as_the_features(product, batch, queries, pixels, channels, dtype, tolerance):
    embed, features = random(batch, queries, channels), random(batch, pixels, channels, seed=1).to(dtype)
    expected = embed.double() @ features.double().transpose(1, 2)
    assert error(product(embed, features), expected) < tolerance


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("size", [(24, 40), (17, 9)], ids=str)
def test_resizing_equals_pytorch(resize, size, dtype):
    features = random(2, *size, 40).to(dtype)
    for factor in (8, 4, 2, 1):
        level = tuple(-(-side // factor) for side in size)
        out = resize(features, level)
        expected = F.interpolate(
            features.float().permute(0, 3, 1, 2), level, mode="bilinear", align_corners=False
        )
        assert out.dtype == dtype
        assert error(out, expected.permute(0, 2, 3, 1).flatten(1, 2)) < (3e-4 if dtype == F16 else 3e-3)


@pytest.mark.gpu
def test_full_size():
    embed, features = random(2, 100, 256).cuda(), random(2, 200, 272, 256).half().cuda()
    expected = embed.double() @ features.flatten(1, 2).double().transpose(1, 2)
    assert error(attention_cuda.mask_product(embed, features.flatten(1, 2)), expected) < 1e-6
    for size in [(25, 34), (50, 68), (100, 136)]:
        out = attention_cuda.resize_mask_features(features, size)
        wanted = F.interpolate(
            features.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", align_corners=False
        )
        assert error(out, wanted.permute(0, 2, 3, 1).flatten(1, 2)) < 3e-4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embed": random(5, 64)}, r"mask_embed is \(5, 64\) torch.float32; expected \(B, Q, mask_dim\)"),
        ({"embed": random(1, 5, 64).half()}, r"mask_embed is \(1, 5, 64\) torch.float16; .* torch.float32"),
        ({"features": random(9, 64).half()}, r"features are \(9, 64\); expected \(B, pixels, mask_dim\)"),
        ({"features": random(2, 9, 64).half()}, r"features are \(2, 9, 64\); .* B 1 and mask_dim 64"),
        ({"features": random(1, 9, 32).half()}, r"features are \(1, 9, 32\); .* B 1 and mask_dim 64"),
        ({"features": random(1, 9, 64)}, "features are torch.float32; expected float16 or bfloat16"),
        (
            {"embed": random(1, 5, 40), "features": random(1, 9, 40).half()},
            "40 channels; expected a multiple of 32 up to 512",
        ),
        ({}, "expected one GPU; got mask_embed on cpu, features on cpu"),
    ],
)
def test_wrong_products_are_refused_before_any_kernel(change, message):
    given = {"embed": random(1, 5, 64), "features": random(1, 9, 64).half(), **change}
    with pytest.raises(ValueError, match=message):
        attention_cuda.mask_product(*given.values())


@pytest.mark.parametrize(
    "features, size, message",
    [
        (
            random(9, 3, 64).half(),
            (1, 1),
            r"features are \(9, 3, 64\) torch.float16; expected \(B, H, W, C\)",
        ),
        (random(1, 3, 3, 64), (1, 1), "torch.float32; .* of float16 or bfloat16"),
        (random(1, 3, 3, 12).half(), (1, 1), "12 channels; expected a multiple of 8"),
        (random(1, 0, 3, 64).half(), (1, 1), r"features are \(1, 0, 3, 64\); expected no side of 0"),
        (random(1, 3, 3, 64).half(), (0, 1), r"the size of the result is \(0, 1\)"),
        (random(1, 3, 3, 64).half(), (1,), r"the size of the result is \(1,\)"),
        (random(1, 3, 3, 64).half(), (1, 1), "expected one GPU; got features on cpu"),
    ],
)
def test_wrong_resizes_are_refused_before_any_kernel(features, size, message):
    with pytest.raises(ValueError, match=message):
        attention_cuda.resize_mask_features(features, size)


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused():
    embed, features = random(1, 5, 64), random(1, 9, 64).half()
    with pytest.raises(ValueError, match="got mask_embed on cuda:0, features on cpu"):
        attention_cuda.mask_product(embed.cuda(), features)
