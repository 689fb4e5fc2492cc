"""Batches of test images, for every supported detectron2: its builder takes no batch size before 2022."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, MapDataset
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import BatchSampler, DataLoader

from ..data.depth import check_depth
from ..data.errors import AnnotationError, naming
from ..data.records import load_records
from ..data.workers import worker_context
from .image_sizes import grouped_by_size, recorded_size


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Callable[[dict], dict] | None = None
) -> DataLoader:
    """Loader of a data set's images, each exactly once over all ranks.

    Args:
        cfg: TEST.BATCH_SIZE images make a batch of one rank (the last one may be smaller);
            DATALOADER.NUM_WORKERS processes load them. With TEST.GROUP_BY_SIZE a rank has its images in the order of
            grouped_by_size, unless a mapper is given; else in the data set's.
        mapper: turns a dict of the data set into a model input; by default detectron2's DatasetMapper.

    Returns:
        A loader that yields lists of dicts. It raises AnnotationError where a record cannot be read. `record_sizes` has for
        each record (height, width) of its image before the mapper, or None where it does not tell; `records` are those.

    Raises:
        ValueError: TEST.BATCH_SIZE is not a positive integer.
    """
    batch_size = cfg.TEST.BATCH_SIZE
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"TEST.BATCH_SIZE must be a positive integer, got {batch_size!r}")
    records = load_records([dataset_name], filter_empty=False)
    sizes = [recorded_size(record) for record in records]
    sampler = InferenceSampler(len(records))
    if mapper is None:
        if cfg.TEST.GROUP_BY_SIZE:
            sampler = grouped_by_size(sampler, sizes, cfg)
        mapper = _Mapper(cfg, False)
        # It would read and resize the semantic maps, which the evaluators read themselves.
        records = [{k: v for k, v in record.items() if k != "sem_seg_file_name"} for record in records]
    kept = DatasetFromList(records, copy=False)
    dataset = MapDataset(kept, _NamingMapper(mapper))
    loader = _TestLoader(
        dataset,
        batch_sampler=BatchSampler(sampler, batch_size, drop_last=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        multiprocessing_context=worker_context(cfg.DATALOADER.NUM_WORKERS),
        collate_fn=_as_list,
    )
    loader.records = kept
    loader.record_sizes = sizes
    return loader


class _Mapper(DatasetMapper):
    """detectron2's, which refuses images that it would spoil."""

    def __call__(self, record: dict) -> dict:
        check_depth(record["file_name"])
        return super().__call__(record)


class _NamingMapper:
    """A mapper whose results are AnnotationErrors where it fails: raised in a worker, they would come out with the worker's
    traceback for a message.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        self._mapper = mapper

    def __call__(self, record: dict) -> dict | AnnotationError:
        try:
            with naming(record, "read"):
                return self._mapper(record)
        except AnnotationError as error:
            return error


class _TestLoader(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            for one in batch:
                if isinstance(one, AnnotationError):
                    raise one
            yield batch


def _as_list(batch: list[dict]) -> list[dict]:
    return batch
