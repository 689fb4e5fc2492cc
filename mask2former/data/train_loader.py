"""Batches for training, the same whatever the number of worker processes, from any iteration on."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .dataset_mappers import build_train_mapper
from .dataset_mappers.base import UNDRAWN
from .datasets.catalog import require_paths, require_registered
from .errors import AnnotationError, naming
from .records import load_records
from .workers import worker_context

logger = logging.getLogger(__name__)

# Fields of metadata that name files or directories. json_file of a panoptic data set is not read in training.
_PATHS = ("image_root", "image_dir", "gt_dir", "json_file", "panoptic_root", "panoptic_json", "sem_seg_root")


def check_train_sets(cfg: CfgNode) -> None:
    """Fail early where a data set of DATASETS.TRAIN cannot be trained on, without reading it.

    Raises:
        ValueError: DATASETS.TRAIN is empty.
        KeyError: a data set is not registered.
        FileNotFoundError: files of it are missing; the message says which.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name at least one data set to train on")
    for name in cfg.DATASETS.TRAIN:
        require_registered(name, "DATASETS.TRAIN")
        metadata = MetadataCatalog.get(name)
        unread = {"json_file"} if metadata.get("panoptic_json") else set()
        needed = [path for key in _PATHS if key not in unread and (path := metadata.get(key))]
        require_paths(name, needed)


class TrainLoader:
    """An endless iterable of batches, lists of mapped records, of this process of a job.

    The random numbers of an image's augmentation follow from the seed and the image's place in the stream alone, so that
    batches depend neither on the number of workers nor on where the stream was entered: a resumed job sees what it would
    have seen. Nothing is read before the first batch is asked for; until then `seed` and `start_batch` can be set.
    A record that cannot be used ends the stream with an AnnotationError. Segments that a panoptic map does not show are left
    out, with a warning at the first image, the tenth, the hundredth and so on that has such.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict],
        make_sampler: Callable[[int], Iterable[int]],
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        shape_of: Callable[[dict], tuple[int, int]] | None = None,
    ):
        """
        Args:
            make_sampler: from the seed, an endless stream of places in `records` for this process.
            batch_size: images of a batch of this process.
            seed: the same on all processes.
            shape_of: (height, width) of a record's image; where given, a batch has upright images only, or others only.
        """
        self.records = DatasetFromList(list(records), copy=False)
        self.mapper = mapper
        self.make_sampler = make_sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.shape_of = shape_of
        self.start_batch = 0
        # By file names of the images, how many of their segments their map does not show.
        self._undrawn: dict[str, int] = {}

    def __iter__(self) -> Iterator[list[dict]]:
        places = self._grouped(iter(self.make_sampler(self.seed)))
        keys = itertools.islice(enumerate(places), self.start_batch * self.batch_size, None)
        loader = DataLoader(
            _SeededBatches(self.records, self.mapper, self.seed, comm.get_rank()),
            sampler=_Batches(keys, self.batch_size),
            batch_size=None,
            num_workers=self.num_workers,
            multiprocessing_context=worker_context(self.num_workers),
            collate_fn=batch_to_bytes if self.num_workers else _as_is,
            # Its own, or its start would draw from the model's random numbers.
            generator=torch.Generator().manual_seed(self.seed),
        )
        for batch in loader:
            if self.num_workers:
                batch = batch_from_bytes(batch)
            if isinstance(batch, AnnotationError):
                raise batch
            for one in batch:
                if (found := one.pop(UNDRAWN, None)) is not None:
                    self._tell_undrawn(one, found)
            yield batch

    def _tell_undrawn(self, image: dict, found: dict) -> None:
        """Here and not in the mapper: each worker would count its own images."""
        if image["file_name"] in self._undrawn:
            return
        self._undrawn[image["file_name"]] = len(found["ids"])
        images = len(self._undrawn)
        if images != 10 ** (len(str(images)) - 1):
            return
        segments = sum(self._undrawn.values())
        number = f" (image_id {image['image_id']!r})" if "image_id" in image else ""
        logger.warning(
            "%s%s: its panoptic map %s has no pixel of the segments %s that are listed for it. Such are left out: %d "
            "segment%s of %d image%s so far",
            *(image["file_name"], number, found["map"], found["ids"][:5]),
            *(segments, "s"[: segments != 1], images, "s"[: images != 1]),
        )

    def _grouped(self, places: Iterator[int]) -> Iterator[int]:
        """The stream in the order of its batches."""
        if self.shape_of is None:
            yield from places
            return
        upright: dict[int, bool] = {}
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for place in places:
            if place not in upright:
                record = self.records[place]
                with naming(record, "trained on"):
                    height, width = self.shape_of(record)
                upright[place] = height >= width
            group = waiting[upright[place]]
            group.append(place)
            if len(group) == self.batch_size:
                yield from group
                group.clear()


def build_train_loader(
    cfg: CfgNode, mapper: Callable[[dict], dict] | None = None, *, seed: int | None = None
) -> TrainLoader:
    """Batches of DATASETS.TRAIN for this process of a job.

    Args:
        cfg: SOLVER.IMS_PER_BATCH images make a batch of all processes. DATALOADER.SAMPLER_TRAIN, REPEAT_THRESHOLD,
            FILTER_EMPTY_ANNOTATIONS and NUM_WORKERS mean what they mean in detectron2, and so does ASPECT_RATIO_GROUPING
            where images come out in several sizes; where they all have one it is not needed.
        mapper: by default the one of INPUT.DATASET_MAPPER_NAME.
        seed: of order and augmentation, the same on all processes; by default SEED, or a random one where that is negative.

    Raises:
        ValueError: a key has a value that it cannot have.
        FileNotFoundError, AnnotationError: the data sets cannot be read, see `load_records`.
    """
    world = comm.get_world_size()
    images = cfg.SOLVER.IMS_PER_BATCH
    if images < 1 or images % world:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}, for all {world} processes together: must be a multiple of their number"
        )
    if mapper is None:
        mapper = build_train_mapper(cfg)
    records = load_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    if seed is None:
        seed = training_seed(cfg)
    group = cfg.DATALOADER.ASPECT_RATIO_GROUPING and not getattr(mapper, "fixed_size", False)
    return TrainLoader(
        records,
        mapper,
        _sampler_maker(cfg, records),
        batch_size=images // world,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
        shape_of=_image_shape if group else None,
    )


def training_seed(cfg: CfgNode) -> int:
    """SEED, or where that is negative a random number that all processes agree on."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def derived_seed(*numbers: int) -> int:
    """A seed of 32 bits for a place of a job; other places get other, unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _sampler_maker(cfg: CfgNode, records: list[dict]) -> Callable[[int], Iterable[int]]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; allowed: 'TrainingSampler', 'RepeatFactorTrainingSampler'"
    )


def _image_shape(record: dict) -> tuple[int, int]:
    """(height, width), from the image's header where the record does not say."""
    if "height" in record and "width" in record:
        return record["height"], record["width"]
    with PathManager.open(record["file_name"], "rb") as f, Image.open(f) as image:
        width, height = image.size
        # Orientations of EXIF that lie on their side; detectron2 turns them.
        turned = image.getexif().get(0x0112, 1) >= 5
    return (width, height) if turned else (height, width)


class _Batches:
    """A sampler of what is left of an iterator, in lists of a batch each."""

    def __init__(self, keys: Iterator[tuple[int, int]], batch_size: int):
        self._keys = keys
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        while batch := list(itertools.islice(self._keys, self._batch_size)):
            yield batch


class _SeededBatches(Dataset):
    """Batches of mapped records by lists of (place in the stream, place in the data set)."""

    def __init__(self, records: Dataset, mapper: Callable[[dict], dict], seed: int, rank: int):
        self._records = records
        self._mapper = mapper
        self._seed = seed
        self._rank = rank

    def __getitem__(self, keys: list[tuple[int, int]]) -> list[dict] | AnnotationError:
        try:
            return [self._mapped(*key) for key in keys]
        except AnnotationError as error:
            # Raised in a worker it would come out with the worker's traceback for a message.
            return error

    def _mapped(self, position: int, place: int) -> dict:
        record = self._records[place]
        with _random_state(derived_seed(self._seed, self._rank, position)), naming(record, "trained on"):
            return self._mapper(record)


@contextlib.contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Other random numbers inside; outside they go on as if nothing had been drawn."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _as_is(record: dict) -> dict:
    return record


class _BatchPickler(pickle.Pickler):
    def reducer_override(self, value):
        if (
            not isinstance(value, Tensor)
            or value.device.type != "cpu"
            or value.layout != torch.strided
            or value.requires_grad
            or value.dtype == torch.bfloat16  # numpy has none
        ):
            return NotImplemented
        array = value.numpy()
        if array.dtype != bool:
            return torch.from_numpy, (array,)
        return _unpack_bits, (np.packbits(array), array.shape)


def batch_to_bytes(batch: list[dict] | AnnotationError) -> bytes:
    """A batch, or why there is none, in one piece, masks as bits.

    PyTorch's own way from a worker to the main process is a piece of shared memory for each tensor, which costs the main
    process 0.5 ms apiece and needs a large /dev/shm.
    """
    buffer = io.BytesIO()
    _BatchPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(batch)
    return buffer.getvalue()


def batch_from_bytes(data: bytes) -> list[dict] | AnnotationError:
    """What `batch_to_bytes` was given."""
    return pickle.loads(data)


def _unpack_bits(bits: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).view(bool).reshape(shape))
