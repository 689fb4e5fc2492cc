"""Our converter table, and the guard that keeps anything without a converter out of an engine."""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree

from ..errors import ConversionError

CONVERTERS: dict[str, Callable] = {}

# What a converter returns that leaves the conversion to what its function calls.
DECLINED = object()

# What reads no data and no size of a traced tensor, and so needs no layer.
_HARMLESS = {
    "dtype",
    "device",
    "is_cuda",
    "requires_grad",
    "ndim",
    "dim",
    "numel",
    "is_floating_point",
    "layout",
    "is_sparse",
    "is_quantized",
    "is_complex",
    "grad_fn",
    "is_nested",
    "is_mps",
    "is_cpu",
}
_SIZES = {"shape", "size"}
# Converted where PyTorch dispatches it, not by putting a wrapper in its place: a class whose __getitem__ was set once passes
# for a sequence ever after, also when it is put back, and torch.as_tensor([tensor(0), tensor(1)]) fails then.
_DISPATCHED = {"torch.Tensor.__getitem__": torch.Tensor.__getitem__}


def converts(*names: str):
    """Register a converter of functions, methods or module forwards, by their importable names.

    It is called as `converter(graph, result, *args, **kwargs)` with the arguments and the result of the original, and
    returns the network's tensor of the result, or as many as the result has tensors, or None where the result is no
    tensor. A converter of a function of the model may return DECLINED: the functions that it calls are then converted. It
    is not called where no argument was traced: what depends on constants alone is a constant.
    """

    def register(function):
        for name in names:
            CONVERTERS[name] = function
        return function

    return register


def traced_tensors(*values) -> list[torch.Tensor]:
    """Tensors among (nested) values that have a counterpart in the network."""
    leaves = _pytree.tree_leaves(values)
    return [x for x in leaves if isinstance(x, torch.Tensor) and hasattr(x, "_trt")]


def _resolve(name: str) -> tuple[object, str, Callable] | None:
    """Module, qualified name in it and object of an importable name; None where this torch has no such function."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        target = module
        for part in parts[i:]:
            target = getattr(target, part, None)
        return None if target is None else (module, ".".join(parts[i:]), target)
    return None


def converter_table(graph) -> dict[str, dict]:
    """The table in the form that torch2trt's ConversionContext takes."""
    table = {}
    for name, function in CONVERTERS.items():
        found = _resolve(name)
        if found is None or name in _DISPATCHED:
            continue
        module, qualified, original = found
        table[name] = {
            "converter": functools.partial(_convert, graph, name, function, original=original),
            "is_real": True,
            "module": module,
            "module_name": module.__name__,
            "qual_name": qualified,
            "method_str": name,
            "method_impl": original,
        }
    return table


def _convert(graph, name: str, function: Callable, ctx, original: Callable | None = None) -> None:
    if not traced_tensors(ctx.method_args, ctx.method_kwargs):
        return
    try:
        made = function(graph, ctx.method_return, *ctx.method_args, **ctx.method_kwargs)
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(
            f"converting {name} in module '{graph.current_module()}' ({_caller()}) failed: {type(error).__name__}: {error}"
        ) from error
    if made is None:
        return
    if made is DECLINED:
        made = _convert_inside(ctx, name, original)
    results = ctx.method_return if isinstance(made, (list, tuple)) else [ctx.method_return]
    for tensor, counterpart in zip(results, made if isinstance(made, (list, tuple)) else [made], strict=True):
        if len(counterpart.shape) != tensor.dim():
            raise ConversionError(
                f"the converter of {name} made a tensor of {len(counterpart.shape)} dimensions where PyTorch has "
                f"{tensor.dim()}, in module '{graph.current_module()}' ({_caller()})"
            )
        tensor._trt = counterpart


def _convert_inside(ctx, name: str, original: Callable):
    """Runs a function of the model again, with what it calls converted; the network's tensor, or tensors, of its result."""
    kept = {key: getattr(ctx, key) for key in ("lock", "method_args", "method_kwargs", "method_return")}
    ctx.lock = False
    try:
        result = original(*kept["method_args"], **kept["method_kwargs"])
    finally:
        for key, value in kept.items():
            setattr(ctx, key, value)
    results = result if isinstance(result, tuple) else (result,)
    if not all(hasattr(r, "_trt") for r in results):
        raise ConversionError(
            f"the converter of {name} left it to the functions it calls, and these made no tensor"
        )
    return [r._trt for r in results] if isinstance(result, tuple) else result._trt


def _caller() -> str:
    """File and line of the model's code that is being traced."""
    ours, torchs = Path(__file__).resolve().parent.parent, Path(torch.__file__).resolve().parent
    for frame in reversed(traceback.extract_stack(sys._getframe())):
        path = Path(frame.filename).resolve()
        # The wrapper that the context puts around converted functions stands between the model and its converter.
        if ours not in path.parents and torchs not in path.parents and frame.name != "wrapper":
            return f"{path.name}:{frame.lineno}: {frame.line}"
    return "unknown line"


class Guard(TorchFunctionMode):
    """Fails the build on any function that takes a traced tensor and has no converter.

    Without it such a function's result would enter the engine as a constant: the value that it had for the image that
    was traced.
    """

    def __init__(self, context, graph, dynamic: bool):
        super().__init__()
        self.context = context
        self.graph = graph
        self.dynamic = dynamic

        # A module that took a function when it was made (Conv2d(activation=F.relu)) reaches the converter through here.
        self.converted = {id(_resolve(name)[2]) for name in CONVERTERS if _resolve(name) is not None}

    def __torch_function__(self, func, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.context.lock or not traced_tensors(args, kwargs):
            return func(*args, **kwargs)
        for name, original in _DISPATCHED.items():
            if func == original:
                return self._run_and_convert(name, func, args, kwargs)
        if id(func) not in self.converted:
            self._check(func)
        return func(*args, **kwargs)

    def _run_and_convert(self, name: str, func, args, kwargs):
        result = func(*args, **kwargs)
        context = self.context
        context.lock = True  # what a converter does itself is not traced
        # torch2trt reads them whenever a layer is added, to name it.
        context.method_args, context.method_kwargs, context.method_return = args, kwargs, result
        try:
            _convert(self.graph, name, CONVERTERS[name], context)
        finally:
            context.method_args = context.method_kwargs = context.method_return = None
            context.lock = False
        return result

    def _check(self, func) -> None:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # a property of Tensor
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name in _HARMLESS or (name in _SIZES and not self.dynamic):
            return
        where = f"in module '{self.graph.current_module()}' ({_caller()})"
        if name in _SIZES:
            raise ConversionError(
                f"the size of a traced tensor is read {where}: an engine for a range of sizes would keep the size of the "
                "image that was traced. Use a function of mask2former.modeling.shape_ops, or build with "
                "MODEL.TENSORRT.STATIC True"
            )
        raise ConversionError(
            f"no converter for {resolve_name(func) or name} {where}. Add one under d2_trt/converters with "
            "@converts, or express the module with functions that have one"
        )
