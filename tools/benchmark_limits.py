#!/usr/bin/env python3
"""How fast this machine is at what bounds a network, and what a network asks of it.

    python tools/benchmark_limits.py --config-file FILE --size 800x1088 --precision fp16

prints for each part of the network its arithmetic and its floors by the speeds measured just before;
tools/benchmark_work.py says what is counted. tools/benchmark.py sets its rows against the same floors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark_timing import check_device
from benchmark_work import ELEMENT_BYTES, PARTS, Workload


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in the tool's own measurements: bytes a second, and operations a second by precision."""

    bandwidth: float
    flops: dict[str, float]

    @classmethod
    def measure(cls, device: str, precisions: list[str]) -> Ceilings:
        """A large copy, read and written, and large square matrix products; the fastest of several."""
        cuda = device.startswith("cuda")
        flops = {}
        for precision in dict.fromkeys((*precisions, "fp32")):  # sampling is float32's in any case
            flops[precision] = _matmul_rate(precision, 8192 if cuda else 768, device)
        return cls(copy_rate(device), flops)


def copy_rate(device: str) -> float:
    """Bytes a second of a large copy, read and written."""
    count = 1 << 30 if device.startswith("cuda") else 1 << 26
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _fastest(lambda: target.copy_(source), device.startswith("cuda"))


def _matmul_rate(precision: str, side: int, device: str) -> float:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        return 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), device.startswith("cuda"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _fastest(call: Callable[[], object], cuda: bool, samples: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    for _ in range(3):
        call()
    best = float("inf")
    for _ in range(samples):
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return best


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", default="configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
    )
    parser.add_argument("--size", default="800x1088", metavar="HxW", help="padded size (%(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=sorted(ELEMENT_BYTES), default=["fp16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--speeds",
        nargs=3,
        type=float,
        metavar=("GB/S", "TFLOP/S", "FP32-TFLOP/S"),
        help="of another machine, instead of measuring this one: memory, matrix products, sampling",
    )
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config, after --")
    args = parser.parse_args(argv)
    try:
        height, width = (int(side) for side in args.size.lower().split("x"))
    except ValueError:
        parser.error(f"--size {args.size}: expected HEIGHTxWIDTH, such as 800x1088")
    if min(height, width) < 32 or height % 32 or width % 32 or args.batch < 1:
        parser.error(
            f"--size {args.size}, --batch {args.batch}: expected multiples of 32, and at least one image"
        )
    args.size = (height, width)
    try:
        check_device(args.device, "--device")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from detectron2.modeling import build_model

    import d2_trt  # noqa: F401 - its keys, which a config may have
    from mask2former import get_mask2former_cfg

    try:
        cfg = get_mask2former_cfg(args.config_file, [*args.opts, "MODEL.DEVICE", args.device])
    except (FileNotFoundError, KeyError, ValueError) as error:
        print(f"benchmark_limits.py: error: {error.args[0]}", file=sys.stderr)
        return 2
    cfg.MODEL.BACKEND = "torch"
    model = build_model(cfg).eval()
    with torch.no_grad():
        work = Workload.count(model.core, model, torch.zeros(1, 3, *args.size, device=args.device))
    if args.speeds:
        memory, products, sampling = args.speeds
        ceilings = Ceilings(
            1e9 * memory, {**dict.fromkeys(args.precision, 1e12 * products), "fp32": 1e12 * sampling}
        )
    else:
        ceilings = Ceilings.measure(args.device, args.precision)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.config_file} at {args.size[0]}x{args.size[1]}, batch {args.batch}: {parameters / 1e6:.1f} million weights"
    )
    for precision in args.precision:
        print(
            f"{precision}: {ceilings.bandwidth / 1e9:.0f} GB/s, {ceilings.flops[precision] / 1e12:.1f} TFLOP/s, "
            f"sampling {ceilings.flops['fp32'] / 1e12:.1f} TFLOP/s"
        )
        print(f"{'':22}{'operations':>11}{'GFLOP':>9}{'layers_ms':>11}")
        for part in PARTS:
            layers = [layer for layer in work.layers if layer.part == part]
            flops = args.batch * sum(layer.flops for layer in layers) / 1e9
            floor = 1e3 * sum(layer.floor(ceilings, precision, args.batch) for layer in layers)
            print(f"{part:22}{len(layers):11}{flops:9.1f}{floor:11.3f}")
        told = work.columns(ceilings, precision, args.batch)
        print(f"{'all':22}{len(work.layers):11}{told['gflop']:9.1f}{told['layers_ms']:11.3f}")
        print(f"limit_ms {told['limit_ms']}: {told['moved_mb']} MB cross the memory's bus at least")
    return 0


if __name__ == "__main__":
    sys.exit(main())
