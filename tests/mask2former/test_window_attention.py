"""The kernel of csrc/window_attention against Swin's own steps in float64.

Without a GPU it runs over emulated instructions (tests/native), as the host's compiler sees it; tests marked `gpu` run the
compiled kernel.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from mask2former import kernels
from mask2former.modeling import shape_ops
from mask2former.modeling.backbone import window_attention_cuda
from tests.mask2former.native_library import compiler, library

F16, BF16 = torch.float16, torch.bfloat16
# Weights and results are rounded to 11 and 8 bits.
TOLERANCE = {F16: 1e-3, BF16: 8e-3}


def definition(qkv, qkv_bias, bias, window_size, shift, scale):
    """Padding, cyclic shift, window partition, attention with bias and mask, and all the way back, as Swin says it."""
    x, heads = qkv.double(), bias.shape[0]
    batch, height, width, channels = x.shape
    high, wide = (-(-n // window_size) * window_size for n in (height, width))
    padded = qkv_bias.to(qkv.dtype).double().expand(batch, high, wide, channels).clone()
    padded[:, :height, :width] = x
    shifted = torch.roll(padded, (-shift, -shift), (1, 2))
    windows = shape_ops.window_partition(shifted, window_size)  # (B, windows, N, 3C)
    q, k, v = windows.unflatten(3, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (B, windows, heads, N, D)
    y, x = (p.flatten() for p in torch.meshgrid(*[torch.arange(window_size)] * 2, indexing="ij"))
    relative = bias.double()[:, y[:, None] - y + window_size - 1, x[:, None] - x + window_size - 1]
    logits = q @ k.transpose(3, 4) * scale + relative
    if shift:
        logits = logits + shape_ops.shifted_window_mask(shifted, window_size, shift)[:, None].double()
    out = (logits.softmax(-1) @ v).transpose(2, 3).flatten(3)
    out = torch.roll(shape_ops.window_reverse(out, window_size, shifted), (shift, shift), (1, 2))
    return out[:, :height, :width]


def inputs(height, width, window_size, shift, batch=1, heads=2, dim=32, dtype=F16, std=1.0):
    rng = torch.Generator().manual_seed(height * 100 + width)
    channels, span = 3 * heads * dim, 2 * window_size - 1
    return {
        "qkv": (torch.randn(batch, height, width, channels, generator=rng) * std).to(dtype),
        "qkv_bias": torch.randn(channels, generator=rng),
        "bias": torch.randn(heads, span, span, generator=rng) * 2,
        "window_size": window_size,
        "shift": shift,
        "scale": dim**-0.5,
    }


def error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at a multiple of 16 bytes, between values that are not numbers."""
    whole = tensor.new_full((tensor.numel() + 128,), float("nan"))
    start = next(i for i in range(64, 72) if (whole.data_ptr() + i * whole.element_size()) % 16 == 0)
    inner = whole[start : start + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def emulated(qkv, qkv_bias, bias, window_size, shift, scale, backwards=False):
    heads, (batch, height, width, channels) = bias.shape[0], qkv.shape
    qkv, qkv_bias, bias = map(guarded, (qkv, qkv_bias, bias))
    out = guarded(qkv.new_full((batch, height, width, channels // 3), float("nan")))
    sizes = (batch, height, width, heads, channels // 3 // heads, window_size, shift, int(backwards))
    library("window_attention").emulate_window_attention(
        *(ctypes.c_void_p(t.data_ptr()) for t in (qkv, qkv_bias, bias, out)),
        (ctypes.c_int32 * 8)(*sizes),
        ctypes.c_float(scale),
        int(qkv.dtype == BF16),
    )
    around = out._base
    assert around.isnan().sum() == around.numel() - out.numel(), "outside of the map, or not all of it"
    return out


def on_gpu(**given):
    moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    return window_attention_cuda.window_attention(**moved).cpu()


built = pytest.mark.skipif(
    not kernels.available(), reason="the CUDA kernels are not built: setup.py build_ext"
)


@pytest.fixture(
    params=[
        pytest.param(
            emulated,
            marks=pytest.mark.skipif(compiler() is None, reason="needs g++ or clang++"),
            id="emulated",
        ),
        pytest.param(on_gpu, marks=[pytest.mark.gpu, built], id="gpu"),
    ]
)
def run(request):
    return request.param


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("dim", [16, 32])
@pytest.mark.parametrize(
    ("height", "width", "window_size", "shift"),
    [
        (14, 14, 7, 0),
        (14, 14, 7, 3),
        (9, 16, 7, 3),  # padding below and to the right
        (7, 7, 7, 3),  # one window
        (3, 5, 7, 3),  # smaller than a window
        (1, 1, 7, 0),
        (8, 12, 4, 2),
        (5, 6, 2, 1),
        (9, 8, 8, 4),
        (13, 12, 12, 6),
        (4, 3, 1, 0),
    ],
)
def test_kernel_equals_the_definition(run, height, width, window_size, shift, dim, dtype):
    given = inputs(height, width, window_size, shift, dim=dim, dtype=dtype)
    assert error(run(**given), definition(**given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_batches_and_heads(run, heads):
    given = inputs(10, 8, 4, 2, batch=3, heads=heads, dim=16)
    assert error(run(**given), definition(**given)) < TOLERANCE[F16]


def test_large_logits(run):
    given = inputs(14, 9, 7, 3, std=6.0)
    assert error(run(**given), definition(**given)) < 2e-3


@pytest.mark.skipif(compiler() is None, reason="needs g++ or clang++")
def test_threads_may_take_turns_in_any_order():
    given = inputs(9, 10, 7, 3)
    assert torch.equal(emulated(**given), emulated(**given, backwards=True))


@pytest.mark.gpu
@built
@pytest.mark.parametrize(
    ("height", "width", "heads", "window_size"),
    [(200, 272, 3, 7), (50, 68, 12, 7), (200, 272, 6, 12), (25, 34, 48, 12)],
)
def test_full_size(height, width, heads, window_size):
    for shift in (0, window_size // 2):
        given = inputs(height, width, window_size, shift, batch=2, heads=heads)
        assert error(on_gpu(**given), definition(**given)) < TOLERANCE[F16]


@pytest.mark.gpu
@built
def test_what_the_kernel_refuses():
    given = inputs(8, 8, 4, 2)
    with pytest.raises(ValueError, match="shift is 4; expected 0 to 3"):
        on_gpu(**{**given, "shift": 4})
    with pytest.raises(
        ValueError, match="windows of 13 and heads of 32 channels; expected 1 to 12 and 16 or 32"
    ):
        on_gpu(**inputs(8, 8, 13, 2))
    with pytest.raises(ValueError, match=r"qkv is torch\.float32"):
        on_gpu(**{**given, "qkv": given["qkv"].float()})
    with pytest.raises(ValueError, match=r"bias is \(2, 7, 7\); expected \(2, 9, 9\) for windows of 5"):
        on_gpu(**{**given, "window_size": 5})
