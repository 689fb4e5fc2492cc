"""What an evaluation is going to run, told to the backend before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from detectron2.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader

from .image_sizes import padded, resizing
from .test_loader import build_test_loader


class ImagesAhead:
    """The images of data sets that this process is going to run, by the loaders that give them."""

    def __init__(self, cfg: CfgNode, names: Sequence[str]):
        """
        Args:
            names: of data sets. They are read when something is asked of them.
        """
        self._cfg = cfg
        self._names = list(names)
        self._loaders: dict[str, DataLoader] = {}

    def number_of_images(self, name: str) -> int:
        """Those of this process."""
        return len(self._loader(name).batch_sampler.sampler)

    def take_loader(self, name: str, skip: int = 0) -> DataLoader:
        """The loader of a data set, which is not kept; without the first images of this process where `skip` says so."""
        loader = self._loader(name)
        if skip:
            loader.batch_sampler.sampler = list(loader.batch_sampler.sampler)[skip:]
        return self._loaders.pop(name)

    def records(self, name: str) -> Sequence[dict]:
        """All records of a data set, those of other processes too."""
        return self._loader(name).records

    def examples(self, count: int) -> list[Tensor]:
        """Up to so many images, from all over the data sets: (C, height, width), resized, not padded.

        What cannot be read is left out: the evaluation will name it.
        """
        places = [
            (self._loader(name), i) for name in self._names for i in self._loader(name).batch_sampler.sampler
        ]
        count = min(count, len(places))
        chosen = [places[i * len(places) // count] for i in range(count)]
        inputs = [loader.dataset[i] for loader, i in chosen]
        return [one["image"] for one in inputs if isinstance(one, dict)]

    def sizes(self, multiple: int) -> Counter[tuple[int, int, int]] | None:
        """How often each (batch, height, width) comes, padded to a multiple; None where the records do not tell."""
        resized = resizing(self._cfg)
        if resized is None:
            return None
        counts: Counter[tuple[int, int, int]] = Counter()
        for name in self._names:
            loader = self._loader(name)
            for batch in loader.batch_sampler:
                sizes = [loader.record_sizes[i] for i in batch]
                if None in sizes:
                    return None
                counts[(len(batch), *padded(map(resized, sizes), multiple))] += 1
        return counts

    def _loader(self, name: str) -> DataLoader:
        if name not in self._loaders:
            self._loaders[name] = build_test_loader(self._cfg, name)
        return self._loaders[name]
