"""What a network asks of the hardware: tools/benchmark.py's count of arithmetic and of bytes.

The network runs once in PyTorch. Matrix products and convolutions are counted by the formulas of
torch.utils.flop_counter, attention and deformable attention as one operation each by their own, whatever computes them. What
is not counted (norms, softmax, activations, resizing) costs arithmetic that no GPU lacks, and no memory traffic where it is
fused with its neighbours. Two floors follow for a machine of known speed:

    limit_ms    all the arithmetic at the peak, or what must cross the memory's bus at its bandwidth (weights and images
                once in, results once out), whichever takes longer; nothing can be faster
    layers_ms   the same for each matrix product, convolution and attention by itself, its operands read and its result
                written, summed: what a perfect kernel a layer reaches where no two are fused and no cache helps

An image's arithmetic grows with the batch, the weights' traffic does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
# Bilinear sampling and weighting of a channel: four products and sums.
_SAMPLE_FLOPS = 8
PARTS = ("backbone", "pixel decoder", "transformer decoder")


@dataclass(frozen=True)
class Work:
    """A layer's: floating-point operations (a multiply-add is two) and elements, for one image.

    Attributes:
        sampled: it samples rather than multiplies matrices, which no matrix unit does.
        part: of the network, one of PARTS.
    """

    name: str
    flops: int
    activations: int  # elements read and written
    weights: int  # elements read
    sampled: bool = False
    part: str = ""

    def arithmetic(self, ceilings, precision: str, batch: int) -> float:
        """Seconds of its operations at the measured peak."""
        return batch * self.flops / ceilings.flops["fp32" if self.sampled else precision]

    def floor(self, ceilings, precision: str, batch: int) -> float:
        """Seconds that it takes at least, by itself: of arithmetic or of memory traffic."""
        moved = (batch * self.activations + self.weights) * ELEMENT_BYTES[precision]
        return max(self.arithmetic(ceilings, precision, batch), moved / ceilings.bandwidth)


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
        with counter, counter.watching():
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

    def columns(self, ceilings, precision: str, batch: int) -> dict[str, float]:
        """gflop, moved_mb, limit_ms and layers_ms of a batch.

        Args:
            ceilings: benchmark_limits.Ceilings.
        """
        moved = self.moved(precision, batch)
        arithmetic = sum(layer.arithmetic(ceilings, precision, batch) for layer in self.layers)
        whole = max(arithmetic, moved / ceilings.bandwidth)
        layers = sum(layer.floor(ceilings, precision, batch) for layer in self.layers)
        return {
            "gflop": round(batch * self.flops / 1e9, 3),
            "moved_mb": round(moved / 1e6, 3),
            "limit_ms": float(f"{1e3 * whole:.4g}"),
            "layers_ms": float(f"{1e3 * layers:.4g}"),
        }


class _Counter(TorchDispatchMode):
    """Records the matrix products, convolutions and attentions that run under it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.layers: list[Work] = []
        self._model = model
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._paused = False
        self._part = PARTS[1]  # what neither of the others is

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
            self._add(
                func._overloadpacket.__name__, formula(*args, **kwargs, out_val=out), read + written, weights
            )
        return out

    def _add(self, name: str, flops: int, activations: int, weights: int = 0, sampled: bool = False) -> None:
        self.layers.append(Work(name, flops, activations, weights, sampled, self._part))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Know where in the network an operation is, and count what is one operation to an engine as one."""
        from mask2former.modeling.pixel_decoder.ms_deform_attn import MSDeformAttnCore
        from mask2former.modeling.transformer_decoder import attention_core

        plain = attention_core.reference

        def attention(q, k, v, num_heads, mask_embed=None, mask_features=None):
            self._paused = True
            try:
                out = plain(q, k, v, num_heads, mask_embed, mask_features)
            finally:
                self._paused = False
            pairs = q.shape[0] * q.shape[1] * k.shape[1]
            operands = [t for t in (q, k, v, out, mask_embed, mask_features) if t is not None]
            channels = q.shape[2] + v.shape[2] + (0 if mask_embed is None else mask_embed.shape[2])
            self._add("attention", 2 * pairs * channels, sum(t.numel() for t in operands))
            return out

        hooks = []
        for name, module in self._model.named_modules():
            if isinstance(module, MSDeformAttnCore):
                hooks += [module.register_forward_pre_hook(self._pause)]
                hooks += [module.register_forward_hook(self._add_deformable)]
            for suffix, part in (("backbone", PARTS[0]), ("sem_seg_head.predictor", PARTS[2])):
                if name == suffix:
                    hooks += [module.register_forward_pre_hook(lambda *_, part=part: self._enter(part))]
                    hooks += [module.register_forward_hook(lambda *_: self._enter(PARTS[1]))]
        attention_core.reference = attention
        try:
            yield
        finally:
            attention_core.reference = plain
            for hook in hooks:
                hook.remove()

    def _enter(self, part: str) -> None:
        self._part = part

    def _pause(self, module, arguments) -> None:
        self._paused = True

    def _add_deformable(self, module, arguments, out) -> None:
        self._paused = False
        value, offsets, logits = arguments[:3]
        samples = logits.numel()  # queries * heads * levels * points
        elements = value.numel() + offsets.numel() + logits.numel() + out.numel()
        self._add("ms_deform_attn", samples * value.shape[-1] * _SAMPLE_FLOPS, elements, sampled=True)
