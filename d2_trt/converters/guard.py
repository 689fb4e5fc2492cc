"""What keeps anything without a converter out of an engine."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ConversionError
from .location import LocatedError, size_error, where
from .memory import tensors_of
from .registry import DISPATCHED, convert, resolve

# What reads no data and no size of a traced tensor, and so needs no layer.
_HARMLESS = {
    "dtype",
    "device",
    "is_cuda",
    "requires_grad",
    "ndim",
    "dim",
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
_COUNTS = {"numel", "nelement"}
_SIZES = {"shape", "size", "nbytes", "__len__"}


class Guard(TorchFunctionMode):
    """Fails the build on any function that takes a traced tensor and has no converter.

    Without it such a function's result would enter the engine as a constant: the value that it had for the image that
    was traced. Functions of PyTorch's Python interface come here by themselves. TorchScript's do not, and are refused where
    they are called; what compiled code and extensions call is seen as operators, by _Operators. An extension that reads a
    tensor's memory and hands the tensor to no operator is seen by nothing.

    Modes are of one thread. In others, traced tensors themselves refuse to be used, as TracedTensor; what these compute of
    anything else is their own business. The build fails also where nobody looks at the other thread's error.
    """

    def __init__(self, context, graph, table: Mapping[str, Mapping], dynamic: bool):
        """
        Args:
            context: torch2trt's, at work: wrappers that convert are in the functions' places.
            table: converter_table, made before.
        """
        super().__init__()
        self.context = context
        self.graph = graph
        self.dynamic = dynamic
        self.thread: int | None = None  # that of the model
        self._elsewhere: LocatedError | None = None  # what another thread was told
        graph.memory.outside = lambda: not context.lock
        graph.memory.guarded_by(self)
        self._around = contextlib.ExitStack()
        self._wrappers = {id(resolve(name)[2]) for name in table}
        # Called as they were where a module took one when it was made (self.activation = torch.relu).
        self._originals = {
            id(entry["method_impl"]): (name, entry["converter"]) for name, entry in table.items()
        }

    def __enter__(self):
        self._around.enter_context(_scripts_refused(self))
        self._around.enter_context(_Operators(self.graph))
        self.thread = threading.get_ident()
        return super().__enter__()

    def __exit__(self, kind, error, trace):
        self.thread = None
        super().__exit__(kind, error, trace)
        self._around.close()
        self.graph.memory.guarded_by(None)
        told, self._elsewhere = self._elsewhere, None
        if told not in (None, error) and (error is None or isinstance(error, Exception)):
            raise told from None  # what else failed, failed for want of it

    def check_thread(self, func) -> None:
        """Refuse a function of a traced tensor that another thread than the model's calls.

        Raises:
            LocatedError: it does, and the function reads more than a tensor's type.
        """
        if self._in_own_thread():
            return
        name = _name(func)
        if self._is_harmless(name):
            return
        place = where(self.graph, self.thread)
        self._elsewhere = LocatedError(
            f"{resolve_name(func) or name} takes a traced tensor {place}, in another thread than that of the model: an "
            "engine would keep what it gives for the image that was traced. Call it in the thread that calls the model"
        )
        raise self._elsewhere

    def takes_traced(self, *values) -> bool:
        """Whether what the model's own code calls now takes a tensor that was computed of the images."""
        memory = self.graph.memory
        own_work = memory.outside() or not self._in_own_thread()
        return own_work and any(map(memory.is_traced, tensors_of(*values)))

    def _in_own_thread(self) -> bool:
        return self.thread in (None, threading.get_ident())

    def __torch_function__(self, func, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.takes_traced(args, kwargs):
            return func(*args, **kwargs)
        for name, original in DISPATCHED.items():
            if func == original:
                converter = functools.partial(convert, self.graph, name)
                return self._run_and_convert(converter, func, args, kwargs)
        if id(func) in self._originals:
            return self._run_and_convert(self._originals[id(func)][1], func, args, kwargs)
        if id(func) not in self._wrappers:
            name = _name(func)
            if name in _COUNTS and self.dynamic:
                return _UnknownCount(self.graph)  # detectron2's Conv2d asks whether it is 0
            self._check(func, name)
        return func(*args, **kwargs)

    def _run_and_convert(self, converter, func, args, kwargs):
        context = self.context
        context.lock = True  # what a function or a converter does itself is not traced
        try:
            result = func(*args, **kwargs)
            # torch2trt reads them whenever a layer is added, to name it.
            context.method_args, context.method_kwargs, context.method_return = args, kwargs, result
            converter(context)
        finally:
            context.method_args = context.method_kwargs = context.method_return = None
            context.lock = False
        return result

    def _check(self, func, name: str) -> None:
        if self._is_harmless(name):
            return
        if name in _SIZES:
            raise size_error(self.graph, name)
        raise LocatedError(
            f"no converter for {resolve_name(func) or name} {where(self.graph)}. Add one under d2_trt/converters with "
            "@converts, or express the module with functions that have one"
        )

    def _is_harmless(self, name: str) -> bool:
        return name in _HARMLESS or (name in _SIZES | _COUNTS and not self.dynamic)


def _name(func) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property of Tensor
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


class _UnknownCount:
    """How many elements a traced tensor has, where an engine is for a range of sizes: not 0, and nothing else is known."""

    def __init__(self, graph):
        self._graph = graph

    def __bool__(self):
        return True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise size_error(self._graph, "numel")

    def _refuse(self, *unused):
        raise size_error(self._graph, "numel")

    def _compared(zero: bool):
        def compare(self, other):
            return zero if type(other) is int and other == 0 else self._refuse()

        return compare

    __eq__ = __lt__ = __le__ = _compared(False)
    __ne__ = __gt__ = __ge__ = _compared(True)
    __hash__ = _refuse


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow")
_CONVERSIONS = (
    "neg",
    "pos",
    "abs",
    "int",
    "float",
    "index",
    "complex",
    "round",
    "trunc",
    "floor",
    "ceil",
    "str",
    "repr",
)
for _operation in (*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), *_CONVERSIONS, "format"):
    setattr(_UnknownCount, f"__{_operation}__", _UnknownCount._refuse)


@contextlib.contextmanager
def _scripts_refused(guard: Guard) -> Iterator[None]:
    """Functions and methods of TorchScript take no traced tensor: their operators may be fused into kernels of its own, and
    sizes that they read are seen by nobody.
    """
    kinds = (torch._C.ScriptFunction, torch._C.ScriptMethod)
    originals = [kind.__call__ for kind in kinds]

    def refusing(original):
        def call(script, *args, **kwargs):
            if guard.takes_traced(args, kwargs):
                name = getattr(script, "qualified_name", script.name).removeprefix("__torch__.")
                place = where(guard.graph, guard.thread)
                raise LocatedError(
                    f"no converter for TorchScript's {name} {place}. Call the Python function that it was made of, or add a "
                    "converter of the function that calls it under d2_trt/converters with @converts"
                )
            return original(script, *args, **kwargs)

        return call

    try:
        for kind, original in zip(kinds, originals):
            kind.__call__ = refusing(original)
        yield
    finally:
        for kind, original in zip(kinds, originals):
            kind.__call__ = original


class _Operators(TorchDispatchMode):
    """Sees the operators that PyTorch runs, whatever calls them.

    Refused are those on traced tensors outside of converted functions, and in converters, which would bake in what they
    read. Writes are noted, see TracedMemory.
    """

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        memory = self.graph.memory
        outside = memory.outside()
        if (outside or memory.converting) and any(map(memory.is_traced, tensors_of(args, kwargs))):
            if memory.converting:
                raise ConversionError(f"it needs the values of a traced tensor, as a constant ({func})")
            raise LocatedError(
                f"no converter for {func} {where(self.graph)}, which takes a traced tensor past the functions that have "
                "converters"
            )
        for tensor in _written(func, args, kwargs):
            if outside and memory.shown(tensor):
                raise LocatedError(
                    f"{func} changes a constant in place {where(self.graph)}, of which a traced tensor shows a part; "
                    "compute a new one instead"
                )
            if not outside and not memory.converting:
                memory.note_write(tensor)
        return func(*args, **kwargs)


def _written(func, args, kwargs) -> list[torch.Tensor]:
    """Tensors that an operator writes to, as its schema says."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    if (
        given.get("training") is False or given.get("train") is False
    ):  # statistics of normalisation, that are only read
        return []
    return [
        tensor
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_of(given.get(argument.name))
    ]
