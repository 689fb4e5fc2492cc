"""Our converter table, and what runs a converter."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from ..errors import ConversionError
from .location import LocatedError, where
from .memory import tensors_of

CONVERTERS: dict[str, Callable] = {}

# What a converter returns that leaves the conversion to what its function calls.
DECLINED = object()

# Converted where PyTorch dispatches it, not by putting a wrapper in its place: a class whose __getitem__ was set once passes
# for a sequence ever after, also when it is put back, and torch.as_tensor([tensor(0), tensor(1)]) fails then.
DISPATCHED = {"torch.Tensor.__getitem__": torch.Tensor.__getitem__}


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
    return [x for x in tensors_of(*values) if hasattr(x, "_trt")]


def resolve(name: str) -> tuple[object, str, Callable] | None:
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
    for name in CONVERTERS:
        found = resolve(name)
        if found is None or name in DISPATCHED:
            continue
        module, qualified, original = found
        table[name] = {
            "converter": functools.partial(convert, graph, name, original=original),
            "is_real": True,
            "module": module,
            "module_name": module.__name__,
            "qual_name": qualified,
            "method_str": name,
            "method_impl": original,
        }
    return table


def convert(graph, name: str, ctx, original: Callable | None = None) -> None:
    """Give the tensors that a function just returned their counterparts in the network.

    Args:
        name: of the function, in the table.
        ctx: torch2trt's context, which holds the function's arguments and result.
        original: the function.

    Raises:
        ConversionError: it names the function, the module and the line.
    """
    inputs, results = tensors_of(ctx.method_args, ctx.method_kwargs), tensors_of(ctx.method_return)
    problem = graph.memory.lost_write(inputs, results)
    graph.memory.forget_writes()
    if problem is None and graph.memory.lost(inputs):
        problem = (
            "it takes a tensor that was computed of the images by a function that PyTorch does not tell of"
        )
    if problem is None and graph.memory.foreign(inputs):
        problem = "it takes a tensor that was computed of the images of another build, which the model kept"
    if problem is not None:
        raise LocatedError(f"no converter for {name} {where(graph)}: {problem}")
    if not any(hasattr(x, "_trt") for x in inputs):
        return
    made = _counterparts(graph, name, ctx)
    if made is None:
        return
    if made is DECLINED:
        made = _convert_inside(graph, ctx, name, original)
    returned = ctx.method_return if isinstance(made, (list, tuple)) else [ctx.method_return]
    for tensor, counterpart in zip(
        returned, made if isinstance(made, (list, tuple)) else [made], strict=True
    ):
        _check_shape(graph, name, tensor, counterpart)
        if not any(
            tensor is x and not hasattr(x, "_trt") for x in inputs
        ):  # one that came through is the constant it was
            tensor._trt = counterpart
            graph.memory.add(tensor, inputs)


def _counterparts(graph, name: str, ctx):
    """What a converter makes."""
    graph.memory.converting = True
    try:
        return CONVERTERS[name](graph, ctx.method_return, *ctx.method_args, **ctx.method_kwargs)
    except LocatedError:
        raise
    except ConversionError as error:
        raise LocatedError(f"converting {name} {where(graph)} failed: {error}") from error
    except Exception as error:
        raise LocatedError(
            f"converting {name} {where(graph)} failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        graph.memory.converting = False


def _check_shape(graph, name: str, tensor: torch.Tensor, counterpart) -> None:
    shape, expected = tuple(counterpart.shape), tuple(tensor.shape)
    if len(shape) != len(expected) or any(0 <= a != b for a, b in zip(shape, expected)):
        raise LocatedError(
            f"the converter of {name} made a tensor of shape {shape} where PyTorch has {expected}, {where(graph)}"
        )


def _convert_inside(graph, ctx, name: str, original: Callable):
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
        raise LocatedError(
            f"the converter of {name} left it to the functions it calls, and these made no tensor, {where(graph)}"
        )
    return [r._trt for r in results] if isinstance(result, tuple) else result._trt
