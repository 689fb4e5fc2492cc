#!/usr/bin/env python3
"""Microseconds per call of the kernel of csrc/mlp for the decoder's layers, against PyTorch's own operations.

    python tools/benchmark_mlp.py

Calls are captured in one CUDA graph, so that launching costs what it costs in an engine's graph; the median of the rounds
counts. `weights` is the time that the multiprocessors which work take at least to read the weights from the second-level
cache, 64 bytes a clock each at --mhz: what one block of a cluster of eight reads.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from benchmark_attention import need_gpu, time_us
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mask2former.modeling.transformer_decoder import mlp_cuda

LAYERS = {
    "mask embedding": ([256] * 4, False),
    "feed-forward": ([256, 2048, 256], True),
    "projection": ([256, 256], True),  # of attention's output, with a residual that is not its input
}


def pytorch(x, weights, biases, norm, after: bool, dtype: torch.dtype, residual=None):
    """The layers by PyTorch's operations, products in `dtype` (float32: TF32)."""
    channels = x.shape[-1:]
    out = x if after else F.layer_norm(x.float(), channels, *norm)
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        out = F.linear(out.to(dtype) if i == 0 else out.relu(), weight, bias)
    residual = x if residual is None else residual
    return F.layer_norm((residual + out).float(), channels, *norm).to(x.dtype) if after else out


def row(name: str, batch: int, dtype: torch.dtype, args) -> str:
    widths, after = LAYERS[name]
    rng = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=rng, device="cuda")

    x = random(batch, args.queries, widths[0]).half()
    residual = random(batch, args.queries, widths[-1]).half() if name == "projection" else None
    weights = [random(o, i) / i**0.5 for i, o in itertools.pairwise(widths)]
    biases, norm = [random(o) for o in widths[1:]], random(2, widths[0])
    packed = (mlp_cuda.pack_weights(weights, dtype), torch.cat(biases), norm, widths, 1e-5, after, dtype)
    out_dtype = torch.float16 if after else torch.float32
    ours = time_us(lambda: mlp_cuda.launch(x, *packed, out_dtype, residual=residual), 20, 15)
    given = ([w.to(dtype) for w in weights], [b.to(dtype) for b in biases], norm, after, dtype, residual)
    theirs = time_us(lambda: pytorch(x, *given), 20, 15)
    least = packed[0].numel() * 4 / 8 / 64 / args.mhz
    kind = str(dtype).removeprefix("torch.")
    return f"{name:>14} {kind:>8} {batch:>5} {ours:>8.2f} {theirs:>8.2f} {least:>8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--mhz", type=float, default=1755.0, help="the GPU's clock under load")
    args = parser.parse_args()
    need_gpu(parser)
    torch.backends.cuda.matmul.allow_tf32 = True
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.queries} queries")
    print(f"{'layers':>14} {'products':>8} {'batch':>5} {'us':>8} {'PyTorch':>8} {'weights':>8}")
    with torch.no_grad():
        for batch in args.batch:
            for name, dtype in (
                ("mask embedding", torch.float32),
                ("mask embedding", torch.float16),
                ("feed-forward", torch.float16),
                ("projection", torch.float16),
            ):
                print(row(name, batch, dtype, args), flush=True)


if __name__ == "__main__":
    main()
