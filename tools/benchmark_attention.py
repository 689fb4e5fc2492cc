#!/usr/bin/env python3
"""Microseconds per call of the attention kernels of csrc/attention, against PyTorch's own operations and the GPU's limit.

    python tools/benchmark_attention.py --dtype float16

Calls are captured in one CUDA graph, so that launching costs what it costs in an engine's graph; the median of the rounds
counts. Behind it are the kernels by themselves, by the profiler. `limit` is the time that the arithmetic alone takes at the
dense 16-bit rate of --tflops (989: H100, H200).
Masks are made so that a query may attend to about `--share` of the keys: tiles that no query needs are skipped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from benchmark_timing import check_device
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.modeling.transformer_decoder import attention_core, attention_cuda

HEADS, CHANNELS, MASK_DIM = 8, 256, 256


def time_us(function, calls: int, rounds: int) -> float:
    """Median microseconds of one call, of `rounds` replays of a graph of `calls`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[2:])


def kernel_times(function, calls: int = 20) -> str:
    """Microseconds on the GPU of each kernel of one call, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    found = {}
    for event in profile.key_averages():
        name = next((n for n in ("mask", "attention", "combine") if f"{n}_kernel" in event.key), None)
        if name is not None:
            found[name] = event.device_time_total / event.count
    return ", ".join(f"{name} {time:.1f}" for name, time in found.items())


def masked_inputs(batch: int, queries: int, keys: int, dtype: torch.dtype, share: float) -> dict:
    rng = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=rng, device="cuda")

    # Along one direction each query's mask is a run of neighbouring keys, as masks of objects are; the rest is noise.
    # (share / 2) ** 2 - (position - center) ** 2 is a product of (1, position, position ** 2) and coefficients; positions
    # are sums of two numbers of the dtype, so that they are exact enough.
    embed, features = random(batch, queries, MASK_DIM) * 1e-3, random(batch, keys, MASK_DIM) * 1e-3
    position = torch.linspace(0, 1, keys, device="cuda")
    centers = torch.linspace(0, 1, queries, device="cuda")
    columns = [(torch.ones_like(position), (share / 2) ** 2 - centers**2)]
    for values, coefficients in ((position, 2 * centers), (position**2, -torch.ones_like(centers))):
        high = values.to(dtype).float()
        columns += [(high, coefficients), (values - high, coefficients)]
    for i, (values, coefficients) in enumerate(columns):
        features[:, :, i], embed[:, :, i] = values, coefficients
    return {
        "q": random(batch, queries, CHANNELS).to(dtype),
        "k": random(batch, keys, 3 * CHANNELS).to(dtype)[..., :CHANNELS],
        "v": random(batch, keys, 3 * CHANNELS).to(dtype)[..., :CHANNELS],
        "num_heads": HEADS,
        "mask_embed": embed,
        "mask_features": features.to(dtype),
    }


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """End the tool with status 2 where there is no GPU."""
    try:
        check_device("cuda", "")
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--tflops", type=float, default=989.0, help="the GPU's dense 16-bit rate")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.05])
    args = parser.parse_args()
    need_gpu(parser)
    dtype = getattr(torch, args.dtype)
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.dtype}, {args.queries} queries"
    )
    print(
        f"{'what':>8} {'batch':>5} {'keys':>6} {'share':>6} {'us':>8} {'PyTorch':>8} {'limit':>6} {'of it':>6}"
    )
    with torch.no_grad():
        for batch in (1, 8):
            for keys in (850, 3400, 13600):
                for share in args.shares:
                    given = masked_inputs(batch, args.queries, keys, dtype, share)
                    # Logits and values, and the mask's product with both halves of its embedding.
                    work = 2 * batch * args.queries * keys * (2 * CHANNELS + 2 * MASK_DIM)
                    _row("masked", batch, keys, share, given, work, args)
            _mask_features(batch, dtype, args)
            x = torch.randn(batch, args.queries, 3 * CHANNELS, device="cuda").to(dtype)
            q, k, v = x.split(CHANNELS, 2)
            work = 4 * batch * args.queries**2 * CHANNELS
            _row("self", batch, args.queries, 1.0, {"q": q, "k": k, "v": v, "num_heads": HEADS}, work, args)


def _mask_features(batch: int, dtype: torch.dtype, args) -> None:
    """The last layer's masks, and the mask features of three levels, for an image of 800x1088."""
    height, width = 200, 272
    embed = torch.randn(batch, args.queries, MASK_DIM, device="cuda")
    features = torch.randn(batch, height, width, MASK_DIM, device="cuda").to(dtype)
    sizes = [(height // n, width // n) for n in (8, 4, 2)]
    nchw = features.permute(0, 3, 1, 2).contiguous()
    product = time_us(lambda: attention_cuda.mask_product(embed, features.flatten(1, 2)), 20, 15)
    theirs = time_us(lambda: embed.to(dtype) @ nchw.flatten(2), 5, 10)
    resize = time_us(lambda: [attention_cuda.resize_mask_features(features, s) for s in sizes], 20, 15)
    theirs_resized = time_us(
        lambda: [F.interpolate(nchw, s, mode="bilinear", align_corners=False) for s in sizes], 5, 10
    )
    print(f"   masks {batch:>5} {height * width:>6} {'':>6} {product:>8.2f} {theirs:>8.2f}")
    print(f"  resize {batch:>5} {'':>6} {'':>6} {resize:>8.2f} {theirs_resized:>8.2f}", flush=True)


def _row(what: str, batch: int, keys: int, share: float, given: dict, work: float, args) -> None:
    ours = time_us(lambda: attention_cuda.attention(**given), 20, 15)
    half = {n: x.to(given["q"].dtype) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    theirs = time_us(lambda: attention_core.reference(**half), 5, 10)
    limit = work / args.tflops / 1e6
    print(
        f"{what:>8} {batch:>5} {keys:>6} {share:>6} {ours:>8.2f} {theirs:>8.2f} {limit:>6.2f} {limit / ours:>6.1%}"
        f"  {kernel_times(lambda: attention_cuda.attention(**given))}",
        flush=True,
    )


if __name__ == "__main__":
    main()
