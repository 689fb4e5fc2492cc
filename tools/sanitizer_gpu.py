"""Arrays on a GPU without PyTorch, each an allocation of its own: what tools/sanitize_kernels.py runs kernels on."""

from __future__ import annotations

import ctypes

import numpy as np

UNWRITTEN = 0xFF  # bytes of an output before its kernel runs: NaN, or a number that no output holds

DTYPES = ("float32", "float16", "bfloat16")


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array's bits in a dtype by its name in C++; NumPy has no bfloat16, so that its bits are int16."""
    if dtype == "bfloat16":
        return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(dtype)


class Missing(Exception):
    """What is needed to run the kernels is not there."""


class Gpu:
    """Memory of the first GPU, by the driver's API, in the context that the kernels' CUDA runtime uses."""

    def __init__(self):
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Missing(f"no NVIDIA driver: {error}") from None
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if self._driver.cuInit(0) or self._driver.cuDeviceGet(ctypes.byref(device), 0):
            raise Missing("no GPU")
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._outputs: list[tuple[str, int, int]] = []
        self._allocated: list[int] = []

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'error').decode()}")

    def _allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._allocated.append(address.value)
        return address.value

    def put(self, array: np.ndarray) -> int:
        """The address of a copy of the array."""
        array = np.ascontiguousarray(array)
        address = self._allocate(array.nbytes)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), array.ctypes, ctypes.c_size_t(array.nbytes))
        return address

    def out(self, name: str, size: int) -> int:
        """The address of `size` bytes that a kernel is to write, at least some of them."""
        address = self.scratch(size)
        self._outputs.append((name, address, size))
        return address

    def scratch(self, size: int) -> int:
        """The address of `size` bytes that kernels may write."""
        return self.put(np.full(size, UNWRITTEN, np.uint8))

    def get(self, address: int, size: int, dtype: str) -> np.ndarray:
        array = np.empty(size // np.dtype(dtype).itemsize, dtype)
        self._call("cuMemcpyDtoH_v2", array.ctypes, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))
        return array

    def synchronize(self) -> None:
        """Wait for the kernels.

        Raises:
            RuntimeError: one failed.
        """
        self._call("cuCtxSynchronize")

    def finish(self) -> None:
        """Wait for the kernels, look at their outputs, free everything.

        Raises:
            RuntimeError: a kernel failed, or wrote nothing.
        """
        self.synchronize()
        outputs, self._outputs = self._outputs, []
        unwritten = [n for n, address, size in outputs if (self.get(address, size, "u1") == UNWRITTEN).all()]
        allocated, self._allocated = self._allocated, []
        for address in allocated:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        if unwritten:
            raise RuntimeError(f"nothing was written to {', '.join(unwritten)}")
