"""trt.Weights that tell where their memory is, and what a layer remembers of them."""

from __future__ import annotations

import ctypes
import os
import weakref

import numpy as np
import torch

from .trt_api import Refused

_libc = ctypes.CDLL(None, use_errno=True)


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_memory(address: int, count: int) -> bytes | None:
    """Bytes at an address of this process; None where nothing is mapped, instead of a crash."""
    if count == 0:
        return b""
    buffer = ctypes.create_string_buffer(count)
    local = _Span(ctypes.addressof(buffer), count)
    remote = _Span(address, count)
    _libc.process_vm_readv.restype = ctypes.c_ssize_t
    done = _libc.process_vm_readv(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if done == count:
        return buffer.raw
    if ctypes.get_errno() in (
        1,
        38,
    ):  # forbidden or unknown in some containers: then a plain read, which may crash
        return ctypes.string_at(address, count)
    return None


def make_weights_class(real):
    """A subclass of the real Weights that remembers where its memory is; the real constructor checks the arguments."""

    class Weights(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            given = [*args, *kwargs.values()]
            array = next((value for value in given if isinstance(value, np.ndarray)), None)
            self._owner = weakref.ref(array) if array is not None and array.flags.owndata else None
            if array is not None:
                self._address = array.ctypes.data
            else:
                self._address = kwargs.get("ptr", args[1] if len(args) > 1 else 0)

    Weights.__module__ = real.__module__
    return Weights


class HeldWeights:
    """What TensorRT keeps of weights: a pointer. It copies nothing and keeps nothing alive until the build."""

    def __init__(self, weights, dtypes):
        """
        Args:
            weights: trt.Weights, of make_weights_class.
            dtypes: torch dtypes by trt.DataType.
        """
        self.dtype, self.size, self._bytes = weights.dtype, weights.size, weights.nbytes
        self._torch_dtype = dtypes[weights.dtype]
        self._address, self._owner = weights._address, weights._owner
        self._copy = self._read()

    def _read(self) -> bytes | None:
        return read_memory(self._address, self._bytes) if self._address and self.size else b""

    def tensor(self, where: str) -> torch.Tensor:
        """The values, 1-D."""
        if self._copy is None:
            raise Refused(f"{where}: the weights' pointer {self._address:#x} points to no memory")
        if not self.size:
            return torch.empty(0, dtype=self._torch_dtype)
        return torch.frombuffer(bytearray(self._copy), dtype=self._torch_dtype)

    def check_alive(self, where: str) -> None:
        gone = self._owner is not None and self._owner() is None
        if gone or self._read() != self._copy:
            raise Refused(
                f"{where}: the memory of its weights was freed or overwritten before the network was built; "
                "keep a reference to the array until then"
            )
