"""A stand-in for torch2trt.torch2trt, for machines without it: its ConversionContext as far as d2_trt uses it.

Like the original it replaces the functions of a converter table while it is entered, runs a converter after each outermost
one, and names every layer after the module that is being run. Layers outside of all modules fail, as there, and sizes that
are read of traced tensors add layers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections import Counter

import torch

from d2_trt import compat


def has_torch2trt() -> bool:
    """Whether the original is installed."""
    return importlib.util.find_spec("torch2trt") is not None


def use_conversion(monkeypatch) -> None:
    """d2_trt converts with the original where it is installed, and with this stand-in where it is not."""
    if not has_torch2trt():
        monkeypatch.setattr(compat, "torch2trt", lambda: sys.modules[__name__])


class _NamingNetwork:
    """Hands every call to the network, and names the layers that come back."""

    def __init__(self, context, network):
        self._context = context
        self._network = network
        self._count = Counter()

    def __getattr__(self, name):
        attribute = getattr(self._network, name)
        if not name.startswith("add_") or name == "add_input":
            return attribute

        def call(*args, **kwargs):
            layer = attribute(*args, **kwargs)
            # As the original, which fails here where no conversion is under way.
            len(self._context.method_args), len(self._context.method_kwargs)
            scope = self._context.current_module_name()
            layer.name = f"{scope}:{self._count[scope]}:{layer.type.name}"
            self._count[scope] += 1
            return layer

        return call


class ConversionContext:
    def __init__(self, network, converters, torch2trt_kwargs=None, builder_config=None, logger=None):
        self.network = _NamingNetwork(self, network)
        self._bare_network = network
        self.lock = False
        self.method_args = self.method_kwargs = self.method_return = None
        self.torch2trt_kwargs = torch2trt_kwargs
        self.module_stack = []
        self._converters = converters
        self._module = torch2trt_kwargs["module"]
        self._names = {module: name for name, module in self._module.named_modules()}
        self._exit = contextlib.ExitStack()

    def get_module_name(self, module) -> str:
        return self._names[module]

    def current_module(self):
        return self.module_stack[-1]

    def current_module_name(self) -> str:
        return self.get_module_name(self.current_module())

    def _wrap(self, entry):
        original = entry["method_impl"]

        def wrapper(*args, **kwargs):
            outermost = not self.lock
            self.lock = True
            try:
                result = original(*args, **kwargs)
                if outermost:
                    self.method_args, self.method_kwargs, self.method_return = args, kwargs, result
                    entry["converter"](self)
            finally:
                if outermost:
                    self.method_args = self.method_kwargs = self.method_return = None
                    self.lock = False
            return result

        return wrapper

    def __enter__(self):
        for entry in self._converters.values():
            *path, last = entry["qual_name"].split(".")
            owner = entry["module"]
            for part in path:
                owner = getattr(owner, part)
            self._exit.callback(setattr, owner, last, entry["method_impl"])
            setattr(owner, last, self._wrap(entry))

        plain = torch.Tensor.size

        def size(tensor, dim=None):
            if hasattr(tensor, "_trt"):
                self._bare_network.add_shape(tensor._trt)
            return plain(tensor) if dim is None else plain(tensor, dim)

        self._exit.callback(setattr, torch.Tensor, "size", plain)
        torch.Tensor.size = size

        def enter(module, _):
            self.module_stack.append(module)

        def leave(module, *_):
            self.module_stack.pop()

        for module in self._module.modules():
            for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
                self._exit.callback(handle.remove)
        return self

    def __exit__(self, *error):
        self._exit.close()
