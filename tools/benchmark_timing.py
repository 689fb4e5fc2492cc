"""How tools/benchmark.py times calls, and in what arithmetic PyTorch runs them."""

from __future__ import annotations

import contextlib
import statistics
import time

import torch


class Timer:
    """Times calls one by one; on CUDA with events, or wall-clock time around a synchronised call."""

    def __init__(self, device: str, warmup: int, iterations: int):
        self.device = device
        self.cuda = device.startswith("cuda")
        self.warmup = warmup
        self.iterations = iterations

    def measure(self, call, wall_clock: bool = False) -> dict:
        for _ in range(self.warmup):
            call()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.iterations):
            if self.cuda and not wall_clock:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
                continue
            begin = time.perf_counter()
            call()
            if self.cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
        times.sort()
        return {
            "median_ms": round(statistics.median(times), 3),
            "p10_ms": round(times[int(0.1 * (len(times) - 1))], 3),
            "p90_ms": round(times[int(0.9 * (len(times) - 1))], 3),
            "iterations": len(times),
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if self.cuda else "",
        }


def set_precision(precision: str, device: str):
    """Sets PyTorch's TF32 switches; returns the context that a call runs in."""
    tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if precision in ("fp16", "bf16"):
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(device.split(":")[0], dtype=dtype)
    return contextlib.nullcontext()
