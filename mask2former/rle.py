"""Instance masks as COCO's run-length encoding: what evaluators store, a thousandth of the size of bool masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from pycocotools import mask as mask_util
from torch import Tensor


class RLEMasks(Sequence):
    """The masks of N instances as pycocotools.mask.encode gives them: {"size": [height, width], "counts": bytes}.

    A field of `Instances`: it is indexed as a tensor of masks would be, and concatenated by `Instances.cat`. It lives on
    the CPU whatever device the other fields are on.
    """

    def __init__(self, rles: Iterable[dict]):
        self._rles = list(rles)

    @classmethod
    def encode(cls, masks: Tensor) -> RLEMasks:
        """
        Args:
            masks: (N, height, width) bool, on any device.
        """
        if masks.dim() != 3 or masks.dtype != torch.bool:
            raise ValueError(
                f"masks are {tuple(masks.shape)} {masks.dtype}; expected (N, height, width) torch.bool"
            )
        # One at a time: all of them in column-major order would be a second copy of the lot.
        arrays = (np.asfortranarray(mask.cpu().numpy().view(np.uint8)) for mask in masks)
        return cls(mask_util.encode(array) for array in arrays)

    def decode(self, size: tuple[int, int]) -> Tensor:
        """
        Args:
            size: (height, width) of the masks, needed where there is none to tell it.

        Returns:
            (N, height, width) bool, on the CPU.
        """
        if not self._rles:
            return torch.zeros(0, *size, dtype=torch.bool)
        return torch.from_numpy(np.stack([mask_util.decode(rle).view(bool) for rle in self._rles]))

    def to_json(self) -> list[dict]:
        """The masks as COCO's result files hold them: counts as str."""
        return [
            {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}
            for rle in self._rles
        ]

    def __len__(self) -> int:
        return len(self._rles)

    def __iter__(self) -> Iterator[dict]:
        return iter(self._rles)

    def __getitem__(self, index: int | slice | Sequence | Tensor | np.ndarray) -> dict | RLEMasks:
        if isinstance(index, (int, np.integer)):
            return self._rles[index]
        if isinstance(index, slice):
            return RLEMasks(self._rles[index])
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        # numpy knows what lists of indices and of booleans mean, and which lengths fit.
        return RLEMasks(self._rles[i] for i in np.arange(len(self._rles))[np.asarray(index)])

    def to(self, *args, **kwargs) -> RLEMasks:
        """Itself: runs are on the host wherever the other fields go."""
        return self

    @classmethod
    def cat(cls, parts: list[RLEMasks]) -> RLEMasks:
        return cls(rle for part in parts for rle in part)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RLEMasks) and self._rles == other._rles

    __hash__ = None

    def __repr__(self) -> str:
        return f"RLEMasks({len(self)} masks)"
