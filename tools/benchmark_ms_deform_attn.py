#!/usr/bin/env python3
"""Microseconds per call of deformable attention by the kernel of csrc/ms_deform_attn, against PyTorch's operations, the
release's kernel and the GPU's bandwidth.

    python tools/benchmark_ms_deform_attn.py --size 800x1088 --batch 1

One encoder layer: the pixels of strides 32, 16 and 8 look at each other, 8 heads of 32 channels, 4 points a level; offsets
are random, of --spread pixels. `ours` has the softmax and the locations in it. `release` is the operator of the official
release, `+ softmax, locations` with what its module computes in PyTorch before it; both are timed where
MultiScaleDeformableAttention, which the release's make.sh builds, can be imported. `bytes` is the time of what must be
moved, value, offsets, logits and result, at the bandwidth that a large copy has on this GPU.

Forward calls are captured in one CUDA graph, so that launching costs what it costs in an engine's graph. --backward times
gradients, without a graph. The median of the rounds counts.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_attention import need_gpu, time_us
from benchmark_limits import copy_rate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.modeling.pixel_decoder.ms_deform_attn_cuda import ms_deform_attn
from mask2former.modeling.pixel_decoder.ms_deform_attn_reference import ms_deform_attn_reference

HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (32, 16, 8)


class Layer:
    """The inputs of a layer, and its computations by name."""

    def __init__(self, size: tuple[int, int], batch: int, dtype: torch.dtype, spread: float):
        """
        Args:
            size: (height, width) of the padded images.
            spread: standard deviation of the offsets, in pixels of the level sampled.
        """
        self.shapes = tuple((size[0] // stride, size[1] // stride) for stride in STRIDES)
        pixels = sum(h * w for h, w in self.shapes)
        rng = torch.Generator(device="cuda").manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=rng, device="cuda")

        self.value = random(batch, pixels, HEADS, CHANNELS).to(dtype)
        self.offsets = (random(batch, pixels, HEADS, len(STRIDES), POINTS, 2) * spread).to(dtype)
        self.logits = random(batch, pixels, HEADS, len(STRIDES) * POINTS).to(dtype)
        self.grad = random(batch, pixels, HEADS * CHANNELS).to(dtype)
        self.tensors = [self.value, self.offsets, self.logits]
        self._levels = torch.tensor(self.shapes, device="cuda")
        areas = self._levels.prod(1)
        self._starts = torch.cat((areas.new_zeros(1), areas.cumsum(0)[:-1]))
        self._centers = self._pixel_centers()
        self._locations = self._sampling_locations()
        self._weights = self._attention_weights()

    @property
    def bytes(self) -> int:
        """Value, offsets and logits in, the result out."""
        return sum(t.numel() * t.element_size() for t in (*self.tensors, self.value))

    def computations(self, release) -> dict[str, Callable[[], Tensor]]:
        """Name -> call.

        Args:
            release: the module MultiScaleDeformableAttention, or None.
        """
        found = {
            "ours": lambda: ms_deform_attn(*self.tensors, self.shapes),
            "PyTorch": lambda: ms_deform_attn_reference(*self.tensors, self.shapes),
        }
        if release is not None and self.value.dtype == torch.float32:  # it has no other
            found["release"] = lambda: self._release(release, self._locations, self._weights)
            found["+ softmax, locations"] = lambda: self._release(
                release, self._sampling_locations(), self._attention_weights()
            )
        return found

    def _release(self, release, locations: Tensor, weights: Tensor) -> Tensor:
        return release.ms_deform_attn_forward(
            self.value, self._levels, self._starts, locations, weights, len(self.value)
        )

    def _pixel_centers(self) -> Tensor:
        """(x, y) from 0 to 1 of the pixels of all levels: (1, S, 1, 1, 1, 2)."""
        made = []
        for height, width in self.shapes:
            y = (torch.arange(height, device="cuda") + 0.5) / height
            x = (torch.arange(width, device="cuda") + 0.5) / width
            made.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
        return torch.cat(made)[None, :, None, None, None]

    def _sampling_locations(self) -> Tensor:
        """(B, S, heads, levels, points, 2), (x, y) from 0 to 1 over a level."""
        sizes = self._levels.flip(1)[:, None].float()  # (width, height)
        return (self._centers + self.offsets.float() / sizes).contiguous()

    def _attention_weights(self) -> Tensor:
        """(B, S, heads, levels, points)."""
        return self.logits.float().softmax(-1).unflatten(-1, (len(STRIDES), POINTS)).contiguous()


def backward_us(function: Callable[[], Tensor], layer: Layer, rounds: int) -> float:
    """Median microseconds of the gradients of one call."""
    times = []
    for tensor in layer.tensors:
        tensor.requires_grad_()
    try:
        for _ in range(rounds + 2):
            out = function()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.autograd.grad(out, layer.tensors, layer.grad)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    finally:
        for tensor in layer.tensors:
            tensor.requires_grad_(False)
    return statistics.median(times[2:])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="800x1088", metavar="HxW", help="of the padded images (%(default)s)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="(1)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16", "bfloat16"], metavar="DTYPE")
    parser.add_argument("--spread", type=float, default=2.0, help="of the offsets, pixels (%(default)s)")
    parser.add_argument("--backward", action="store_true", help="time the gradients too")
    args = parser.parse_args()
    need_gpu(parser)
    return args


def main() -> None:
    args = parse_args()
    name = "MultiScaleDeformableAttention"
    release = importlib.import_module(name) if importlib.util.find_spec(name) else None
    rate = copy_rate("cuda")
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.size}, copies {rate / 1e9:.0f} GB/s"
    )
    if release is None:
        print(f"{name} is not installed: the release is not timed")
    print(f"{'dtype':>9} {'batch':>5} {'computed by':>22} {'us':>9} {'bytes':>8} {'gradients':>10}")
    size = tuple(int(side) for side in args.size.split("x"))
    for batch in args.batch:
        for kind in args.dtype:
            layer = Layer(size, batch, getattr(torch, kind), args.spread)
            least = layer.bytes / rate * 1e6
            for name, function in layer.computations(release).items():
                with torch.no_grad():
                    forward = time_us(function, 20, 15)
                ours = name in ("ours", "PyTorch")
                backward = f"{backward_us(function, layer, 15):10.1f}" if args.backward and ours else ""
                print(
                    f"{kind:>9} {batch:>5} {name:>22} {forward:9.1f} {least:8.1f} {backward:>10}", flush=True
                )


if __name__ == "__main__":
    main()
