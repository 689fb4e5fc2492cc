"""Images from NumPy to the GPU through pinned memory, so that the copy runs beside everything else."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor


class _Slot:
    """A pinned buffer, and the event after which it may be written again."""

    def __init__(self):
        self.buffer: Tensor | None = None
        self.read = torch.cuda.Event()

    def take(self, size: int) -> Tensor:
        self.read.synchronize()  # returns at once where nothing was recorded
        if self.buffer is None or self.buffer.numel() < size:
            self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self.buffer[:size]


class PinnedRing:
    """Pinned buffers, used in turn; each grows to the largest image that it has held. Safe to use from several threads."""

    def __init__(self, device: torch.device, slots: int):
        """
        Args:
            device: the GPU.
            slots: copies that may be under way before the next one waits for the oldest.
        """
        self._device = device
        with torch.cuda.device(device):
            self._slots = [_Slot() for _ in range(slots)]
        self._lock = threading.Lock()
        self._next = 0

    def upload(self, image: np.ndarray) -> Tensor:
        """Copy an image to the GPU on the current stream, without waiting for it.

        Args:
            image: uint8 of any shape and strides. It is read before this returns.

        Returns:
            a contiguous tensor of that shape on the GPU, to be read on the current stream.
        """
        if image.dtype != np.uint8:
            raise ValueError(f"got an image of {image.dtype}; expected uint8")
        with torch.cuda.device(self._device), self._lock:
            slot = self._slots[self._next]
            self._next = (self._next + 1) % len(self._slots)
            pinned = slot.take(image.size).view(image.shape)
            np.copyto(pinned.numpy(), image)
            out = torch.empty(image.shape, dtype=torch.uint8, device=self._device)
            out.copy_(pinned, non_blocking=True)
            slot.read.record()
        return out
