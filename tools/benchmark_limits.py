"""What a network asks of the hardware, and how fast this hardware is at it: tools/benchmark.py's limits.

Work is counted by running the network once in PyTorch: matrix products and convolutions by the formulas of
torch.utils.flop_counter, deformable attention by its own. What is not counted (norms, softmax, activations, resizing) costs
arithmetic that no GPU lacks, and no memory traffic where it is fused with its neighbours. Two floors follow:

    limit_ms    all the arithmetic at the measured peak, or what must cross the memory's bus at the measured bandwidth
                (weights and images once in, results once out), whichever takes longer; nothing can be faster
    layers_ms   the same for each matrix product, convolution and deformable attention by itself, its operands read and its
                result written, summed: what a perfect kernel a layer reaches without fusing two of them

A padded image's arithmetic grows with the batch, the weights' traffic does not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
# Bilinear sampling and weighting of a channel: four products and sums.
_SAMPLE_FLOPS = 8


@dataclass(frozen=True)
class Work:
    """A layer's: floating-point operations (a multiply-add is two) and elements, for one image.

    Attributes:
        sampled: it samples rather than multiplies matrices, which no matrix unit does.
    """

    name: str
    flops: int
    activations: int  # elements read and written
    weights: int  # elements read
    sampled: bool = False


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
        return cls(_copy_rate(1 << 30 if cuda else 1 << 26, device), flops)


def _copy_rate(count: int, device: str) -> float:
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


@dataclass(frozen=True)
class Workload:
    """A network at one padded size, for one image.

    Attributes:
        layers: in the order in which they run.
        weights: elements of all weights that it reads.
        images, results: bytes of the input, uint8 or float32 as it comes, and of the outputs in float32.
    """

    layers: tuple[Work, ...]
    weights: int
    images: int
    results: int

    @classmethod
    def count(cls, core: Callable, model: torch.nn.Module, images: torch.Tensor) -> Workload:
        """Run the network once.

        Args:
            core: images -> (pred_logits, pred_masks).
            model: whose weights it reads.
            images: (1, 3, H, W).
        """
        counter = _Counter(model)
        with counter, counter.watching_deformable_attention():
            outputs = core(images)
        return cls(
            tuple(counter.layers),
            sum(p.numel() for p in model.parameters()),
            images.numel() * images.element_size(),
            sum(o.numel() * 4 for o in outputs),
        )

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    def moved(self, precision: str, batch: int) -> int:
        """Bytes that must cross the memory's bus: weights and images in, results out."""
        return self.weights * ELEMENT_BYTES[precision] + batch * (self.images + self.results)

    def columns(self, ceilings: Ceilings, precision: str, batch: int) -> dict[str, float]:
        """gflop, moved_mb, limit_ms and layers_ms of a batch."""
        size = ELEMENT_BYTES[precision]

        def arithmetic(layer: Work) -> float:
            return batch * layer.flops / ceilings.flops["fp32" if layer.sampled else precision]

        moved = self.moved(precision, batch)
        whole = max(sum(map(arithmetic, self.layers)), moved / ceilings.bandwidth)
        layers = sum(
            max(
                arithmetic(layer),
                (batch * layer.activations + layer.weights) * size / ceilings.bandwidth,
            )
            for layer in self.layers
        )
        return {
            "gflop": round(batch * self.flops / 1e9, 3),
            "moved_mb": round(moved / 1e6, 3),
            "limit_ms": float(f"{1e3 * whole:.4g}"),
            "layers_ms": float(f"{1e3 * layers:.4g}"),
        }


class _Counter(TorchDispatchMode):
    """Records the matrix products and convolutions that run under it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.layers: list[Work] = []
        self._model = model
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not self._paused:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            held = [t.untyped_storage().data_ptr() in self._weights for t in tensors]
            weights = sum(t.numel() for t, is_weight in zip(tensors, held) if is_weight)
            read = sum(t.numel() for t, is_weight in zip(tensors, held) if not is_weight)
            written = sum(o.numel() for o in (out if isinstance(out, tuple) else (out,)) if o is not None)
            flops = formula(*args, **kwargs, out_val=out)
            self.layers.append(Work(func._overloadpacket.__name__, flops, read + written, weights))
        return out

    @contextlib.contextmanager
    def watching_deformable_attention(self):
        """Count deformable attention as a whole, whatever it is computed by."""
        from mask2former.modeling.pixel_decoder.ms_deform_attn import MSDeformAttnCore

        def before(module, arguments):
            self._paused = True

        def after(module, arguments, out):
            self._paused = False
            value, offsets, logits = arguments[:3]
            samples = logits.numel()  # queries * heads * levels * points
            elements = value.numel() + offsets.numel() + logits.numel() + out.numel()
            self.layers.append(
                Work("ms_deform_attn", samples * value.shape[-1] * _SAMPLE_FLOPS, elements, 0, sampled=True)
            )

        hooks = []
        for module in self._model.modules():
            if isinstance(module, MSDeformAttnCore):
                hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
