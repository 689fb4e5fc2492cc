"""Half precision emulated in PyTorch: what an engine with given FP32_MODULES computes, as nearly as rounding shows it.

As in the engine, an operation has the precision of the module that runs it. A half one has its inputs and its output rounded
to half, and is computed in float32 between: half tensors, float32 sums. What our plugins compute is one operation. What
TensorRT does beside that is not in it: kernels with half sums, operations that it fuses and so rounds less often, constants
that it folds before it rounds them. An engine has to confirm.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mask2former.modeling import fused_ops
from mask2former.modeling.pixel_decoder.ms_deform_attn import MSDeformAttnCore
from mask2former.modeling.transformer_decoder import attention_core
from mask2former.modeling.transformer_decoder.position_encoding import PositionEmbeddingSine

# Float32 in an engine whatever FP32_MODULES says: their converters compute so.
ALWAYS_FLOAT32 = (MSDeformAttnCore, PositionEmbeddingSine)
# Functions that compute nothing: they ask, or move elements, which keep their type; a conversion is the policy's business.
_MOVES = {
    *("__get__", "__getitem__", "__setitem__", "__len__", "size", "dim", "numel", "stride", "data_ptr"),
    *("is_floating_point", "is_contiguous", "detach", "clone", "contiguous", "dropout"),
    *("to", "float", "half", "type", "type_as"),
    *(
        "flatten",
        "unflatten",
        "view",
        "reshape",
        "permute",
        "transpose",
        "movedim",
        "t",
        "unsqueeze",
        "squeeze",
    ),
    *("expand", "expand_as", "broadcast_to", "repeat", "roll", "pad", "cat", "concat", "stack"),
    *("chunk", "split", "split_with_sizes", "unbind", "select", "narrow"),
}


def computes(func: Callable) -> bool:
    """Whether a function that PyTorch dispatches computes numbers, and so has a precision in an engine."""
    return getattr(func, "__name__", "") not in _MOVES


class ModuleStack(contextlib.ExitStack):
    """While entered, knows which module of a model runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._running = [""]
        self._always_float32 = 0

    @property
    def name(self) -> str:
        """Path of the innermost module that runs, "" for the model itself."""
        return self._running[-1]

    def path(self, module: nn.Module) -> str:
        """Path of a module."""
        return self._names[module]

    @property
    def always_float32(self) -> bool:
        """Whether that is in one of ALWAYS_FLOAT32."""
        return self._always_float32 > 0

    def __enter__(self) -> ModuleStack:
        for module in self._names:
            self.callback(module.register_forward_pre_hook(self._begin).remove)
            self.callback(module.register_forward_hook(self._end, always_call=True).remove)
        return super().__enter__()

    def _begin(self, module: nn.Module, inputs) -> None:
        self._running.append(self._names[module])
        self._always_float32 += isinstance(module, ALWAYS_FLOAT32)

    def _end(self, module: nn.Module, inputs, output) -> None:
        self._running.pop()
        self._always_float32 -= isinstance(module, ALWAYS_FLOAT32)


@contextlib.contextmanager
def emulated(
    model: nn.Module, is_low: Callable[[str], bool], dtype: torch.dtype, plugins: Collection[str] = ()
) -> Iterator[None]:
    """While entered, a model's float32 modules that `is_low` names compute as in half precision.

    Args:
        model: MaskFormer, in evaluation mode.
        is_low: path of a module, as in named_modules() -> whether its own operations are in half precision.
        dtype: float16 or bfloat16.
        plugins: what our plugins compute. "attention" and "normalization" are emulated as they do it; the sampling of
            deformable attention ("msda") is in float32 with any of its means.
            Linear layers with residual and LayerNorm that the MLP plugin has in one kernel (feed_forward,
            linear_residual_layer_norm, mlp_of_norm and norm_and_mlp of fused_ops) are emulated operation by operation:
            judged a little worse than an engine has them.
    """
    with (
        ModuleStack(model) as stack,
        _Rounding(stack, is_low, dtype) as rounding,
        contextlib.ExitStack() as patches,
    ):
        wrapped = []
        if "attention" in plugins:
            wrapped += [
                (attention_core, name, rounding.attention) for name in ("masked_attention", "self_attention")
            ]
        if "normalization" in plugins:
            wrapped += [
                (fused_ops, name, rounding.norm)
                for name in ("residual_layer_norm", "residual_layer_norm_and_position", "group_norm_relu")
            ]
            wrapped.append((fused_ops, "normalize_images", rounding.images))
        for module, name, wrapper in wrapped:
            original = getattr(module, name)
            patches.callback(setattr, module, name, original)
            setattr(module, name, functools.partial(wrapper, original))
        yield


class _Rounding(TorchFunctionMode):
    def __init__(self, stack: ModuleStack, is_low: Callable[[str], bool], dtype: torch.dtype):
        super().__init__()
        self._stack = stack
        self._is_low = is_low
        self._known: dict[str, bool] = {}
        self._dtype = dtype
        self._in_plugin = False

    def __torch_function__(self, func, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        exact = self._in_plugin or self._stack.always_float32 or not computes(func)
        if exact or not self._low(self._stack.name):
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in (F.batch_norm, torch.batch_norm):
            # An engine has one factor and one offset of a channel, made from the statistics in float32.
            return self._round(func(self._round(args[0]), *args[1:], **kwargs))
        rounded = [tree_map(self._round, values) for values in (args, kwargs)]
        out = tree_map(self._round, func(*rounded[0], **rounded[1]))
        if _in_place(func):
            return args[0].copy_(out)
        return out

    def attention(self, original: Callable, *args) -> Tensor:
        """attention_core's functions by our plugin: all is taken in half but the mask embedding, and summed in float32."""
        if not self._low(self._stack.name):
            return original(*args)
        embedding = 5 if original.__name__ == "masked_attention" else None
        return self._round(
            self._plugin(original, *(x if i == embedding else self._round(x) for i, x in enumerate(args)))
        )

    def norm(self, original: Callable, *args) -> Tensor | tuple[Tensor, ...]:
        """fused_ops' functions by our plugin: what comes is taken as it is, and the norm's precision is the outputs'."""
        out = self._plugin(original, *args)
        norm = next(arg for arg in args if isinstance(arg, nn.Module))
        return tree_map(self._round, out) if self._low(self._stack.path(norm)) else out

    def images(self, original: Callable, *args) -> Tensor:
        """The images' normalisation by our plugin: in float32, whatever the output is."""
        out = self._plugin(original, *args)
        return self._round(out) if self._low(self._stack.name) else out

    def _plugin(self, original: Callable, *args) -> Tensor | tuple[Tensor, ...]:
        self._in_plugin = True
        try:
            return original(*args)
        finally:
            self._in_plugin = False

    def _low(self, name: str) -> bool:
        if name not in self._known:
            self._known[name] = self._is_low(name)
        return self._known[name]

    def _round(self, value):
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.to(self._dtype).float()
        return value

    def _attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """In the steps of the converter, each of which rounds: the logits above all."""
        if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
            raise NotImplementedError(
                "attention with dropout, grouping or a boolean mask is not emulated; see d2_trt/converters/layers.py"
            )
        query, key, value, attn_mask = map(self._round, (query, key, value, attn_mask))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = self._round(self._round(query * scale) @ key.transpose(-2, -1))
        if attn_mask is not None:
            logits = self._round(logits + attn_mask)
        return self._round(self._round(logits.softmax(-1)) @ value)


def _in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return name.endswith("_")


@dataclass
class OperationTimes:
    """Computing operations of a module, without those of the modules in it, and their milliseconds in both precisions."""

    count: int = 0
    float32_ms: float = 0.0
    half_ms: float = 0.0


def operation_times(
    model: nn.Module, images: Tensor, dtype: torch.dtype, repeats: int = 10
) -> dict[str, OperationTimes]:
    """Run a model once and time each of its operations by itself, in float32 and in half precision.

    The sums are no times of an engine, which fuses operations; but they tell which modules half precision can speed up. What
    PyTorch does not compute in half precision on the device has float32's time twice.

    Args:
        images: (B, 3, H, W) float32 on the model's device.

    Returns:
        by the path of the module that runs them, in the order in which they first run. Modules of ALWAYS_FLOAT32 and what
        runs without floating tensors are left out.
    """
    times: dict[str, OperationTimes] = {}
    with ModuleStack(model) as stack, _Meter(stack, times, dtype, repeats):
        model.core(images)
    return times


class _Meter(TorchFunctionMode):
    def __init__(
        self, stack: ModuleStack, times: dict[str, OperationTimes], dtype: torch.dtype, repeats: int
    ):
        super().__init__()
        self._stack = stack
        self._times = times
        self._dtype = dtype
        self._repeats = repeats

    def __torch_function__(self, func, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        floats = [x for x in tree_leaves((args, kwargs)) if _is_float32(x)]
        if floats and computes(func) and not self._stack.always_float32:
            entry = self._times.setdefault(self._stack.name, OperationTimes())
            float32_ms = self._time(func, args, kwargs, torch.float32)
            entry.count += 1
            entry.float32_ms += float32_ms
            try:
                entry.half_ms += self._time(func, args, kwargs, self._dtype)
            except (RuntimeError, ValueError, TypeError):
                entry.half_ms += float32_ms
        return func(*args, **kwargs)

    def _time(self, func, args, kwargs, dtype: torch.dtype) -> float:
        # Copies, since some functions write to their arguments.
        args, kwargs = tree_map(lambda x: x.clone().to(dtype) if _is_float32(x) else x, (args, kwargs))
        func(*args, **kwargs)
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves((args, kwargs)))
        if on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
        began = time.perf_counter()
        for _ in range(self._repeats):
            func(*args, **kwargs)
        if not on_gpu:
            return (time.perf_counter() - began) * 1e3 / self._repeats
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self._repeats


def _is_float32(value) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32
