"""Instance masks as COCO's run-length encoding: what evaluators store, a thousandth of the size of bool masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from pycocotools import mask as mask_util
from torch import Tensor

# Of a run length in COCO's text: 5 bits each, for 32 bits and a sign.
_MOST_CHARACTERS = 7


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


def encode_labels(labels: np.ndarray) -> dict[int, dict]:
    """The mask of each label of a map, as pycocotools.mask.encode gives it, in one pass over all of them.

    Args:
        labels: (height, width) integers.

    Returns:
        {"size": [height, width], "counts": bytes} by label, in ascending order.
    """
    pixels = np.ascontiguousarray(labels.T).ravel()  # COCO counts down the columns
    starts = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])
    ends = np.append(starts[1:], pixels.size)
    values = pixels[starts]
    order = np.argsort(values, kind="stable")
    values, starts, ends = values[order], starts[order], ends[order]  # (runs,), those of a label together
    first = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    last = np.append(first[1:], values.size) - 1

    before = np.concatenate([[0], ends[:-1]])
    before[first] = 0
    counts = np.stack([starts - before, ends - starts], axis=1).ravel()  # outside, inside, outside, ...
    rest = pixels.size - ends[last]
    counts = np.insert(counts, 2 * last + 2, rest)
    begins = 2 * first + np.arange(first.size)
    # A mask that reaches the last pixel has no run of zeros after it.
    kept = np.ones(counts.size, dtype=bool)
    kept[begins[1:] - 1], kept[-1] = rest[:-1] > 0, rest[-1] > 0
    begins = begins - np.concatenate([[0], np.cumsum(rest == 0)[:-1]])
    counts = counts[kept]

    text, sizes = _compressed(counts, begins)
    ends_of_text = np.cumsum(sizes)[np.append(begins[1:], counts.size) - 1].tolist()
    size = [int(n) for n in labels.shape]
    return {
        label: {"size": list(size), "counts": text[start:end]}
        for label, start, end in zip(values[first].tolist(), [0, *ends_of_text], ends_of_text)
    }


def _compressed(counts: np.ndarray, begins: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Run lengths as COCO's text (rleToString of cocoapi), and how many characters each takes.

    Args:
        counts: (n,) run lengths of masks one after the other.
        begins: where in them each mask begins.
    """
    numbers = counts.copy()
    numbers[2:] -= counts[:-2]
    # The first three of a mask are not differences.
    for place in range(3):
        at = begins + place
        at = at[at < np.append(begins[1:], counts.size)]
        numbers[at] = counts[at]
    characters = np.zeros((numbers.size, _MOST_CHARACTERS), dtype=np.uint8)  # 0: none
    sizes = np.zeros(numbers.size, dtype=np.int64)
    going = np.arange(numbers.size)
    for column in characters.T:
        low = numbers & 31
        numbers = numbers >> 5
        more = numbers != np.where(low & 16, -1, 0)
        column[going] = low + 32 * more + 48
        sizes[going] += 1
        going, numbers = going[more], numbers[more]
    return characters[characters != 0].tobytes(), sizes
