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


@pytest.mark.gpu
def test_wrong_sizes_are_refused():
    embed, features = random(1, 5, 64).cuda(), random(1, 9, 64).half().cuda()
    with pytest.raises(ValueError, match="40 channels; expected a multiple of 32 up to 512"):
        attention_cuda.mask_product(embed[..., :40], features[..., :40])
    with pytest.raises(ValueError, match="features are float32"):
        attention_cuda.mask_product(embed, features.float())
    with pytest.raises(ValueError, match="results are 0x1"):
        attention_cuda.resize_mask_features(features.view(1, 3, 3, 64), (0, 1))
    with pytest.raises(ValueError, match="12 channels; expected a multiple of 8"):
        attention_cuda.resize_mask_features(features.view(1, 3, 3, 64)[..., :12], (1, 1))
