"""CUDA streams for one owner alone, which neither wait for the legacy stream nor make it wait."""

from __future__ import annotations

import ctypes
import functools

import torch

from .errors import BuildError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    """CUDA's driver library, which is there wherever a GPU works."""
    return ctypes.CDLL("libcuda.so.1")


class PrivateStreams:
    """Streams that exist as long as this object. PyTorch's come from a pool, so that two owners may have the same.

    TensorRT makes an engine's auxiliary streams itself unless it is given some, and its own are such as the legacy stream
    waits for. While a graph with them is recorded, nothing may ask about the legacy stream: a tensor that another thread
    frees then ends the process (cudaErrorStreamCaptureImplicit).
    """

    def __init__(self, device: torch.device, count: int):
        """
        Args:
            device: the GPU.
            count: streams, none of which is made where this is 0.

        Raises:
            BuildError: the driver makes none.
        """
        self.handles: list[int] = []
        if count == 0:
            return
        self._library = _driver()
        with torch.cuda.device(device):
            torch.cuda.mem_get_info()  # so that the driver has the device's context in this thread
            for _ in range(count):
                handle = ctypes.c_void_p()
                status = self._library.cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING)
                if status != 0:
                    raise BuildError(f"CUDA made no stream for the engine: error {status}")
                self.handles.append(handle.value)

    def __del__(self):
        for handle in getattr(self, "handles", ()):
            self._library.cuStreamDestroy_v2(ctypes.c_void_p(handle))  # work that is left is done first
