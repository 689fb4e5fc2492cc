"""What tests of multi-scale deformable attention share: inputs, the definition in float64, marks of tests of the kernel."""

from __future__ import annotations

import itertools

import pytest
import torch

from mask2former import kernels

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
