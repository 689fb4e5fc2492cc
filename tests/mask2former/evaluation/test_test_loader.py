"""Batches at test time: every image once, in one of two orders, for any batch size and number of processes."""

from __future__ import annotations

from itertools import chain, groupby

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, samplers
from PIL import Image

from mask2former.data.errors import AnnotationError
from mask2former.evaluation import build_test_loader


def ids_of(loader) -> list[list[int]]:
    return [[image["image_id"] for image in batch] for batch in loader]


@pytest.fixture
def cfg(cfg):
    cfg.TEST.GROUP_BY_SIZE = False
    return cfg


@pytest.fixture
def all_ids(shapes) -> list[int]:
    return [record["image_id"] for record in DatasetCatalog.get(f"{shapes}_val_panoptic")]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 13, 50])
def test_every_image_once_and_in_order(cfg, shapes, all_ids, batch_size):
    cfg.TEST.BATCH_SIZE = batch_size
    loader = build_test_loader(cfg, f"{shapes}_val_panoptic")
    batches = ids_of(loader)
    assert list(chain.from_iterable(batches)) == all_ids
    assert len(loader) == len(batches)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_images(cfg, shapes, all_ids, monkeypatch, world_size):
    cfg.TEST.BATCH_SIZE = 4
    comm = samplers.distributed_sampler.comm
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        own = list(chain.from_iterable(ids_of(build_test_loader(cfg, f"{shapes}_val_panoptic"))))
        assert 0 < len(own) < len(all_ids)
        seen += own
    assert seen == all_ids


def test_worker_processes_keep_the_order(cfg, shapes, all_ids):
    cfg.TEST.BATCH_SIZE = 2
    cfg.DATALOADER.NUM_WORKERS = 2
    assert list(chain.from_iterable(ids_of(build_test_loader(cfg, f"{shapes}_val_panoptic")))) == all_ids


def test_images_come_as_the_model_wants_them(cfg, shapes):
    image = next(iter(build_test_loader(cfg, f"{shapes}_val_panoptic")))[0]
    record = DatasetCatalog.get(f"{shapes}_val_panoptic")[0]
    assert (image["height"], image["width"]) == (record["height"], record["width"])
    assert image["image"].shape[0] == 3
    assert min(image["image"].shape[1:]) <= cfg.INPUT.MIN_SIZE_TEST
    assert max(image["image"].shape[1:]) <= cfg.INPUT.MAX_SIZE_TEST


def test_own_mapper_is_used(cfg, shapes, all_ids):
    loader = build_test_loader(cfg, f"{shapes}_val_panoptic", mapper=lambda record: record["image_id"])
    assert list(chain.from_iterable(loader)) == all_ids


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_batch_size_must_be_a_positive_integer(cfg, shapes, batch_size):
    cfg.TEST.BATCH_SIZE = batch_size
    with pytest.raises(ValueError, match=r"TEST\.BATCH_SIZE must be a positive integer"):
        build_test_loader(cfg, f"{shapes}_val_panoptic")


def padded_sizes(loader) -> list[list[tuple[int, ...]]]:
    return [
        [tuple(-(-n // 32) * 32 for n in image["image"].shape[1:]) for image in batch] for batch in loader
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_images_of_one_padded_size_follow_each_other(cfg, shapes, all_ids, batch_size):
    cfg.merge_from_list(["TEST.GROUP_BY_SIZE", True, "TEST.BATCH_SIZE", batch_size])
    loader = build_test_loader(cfg, f"{shapes}_val_panoptic")
    assert sorted(chain.from_iterable(ids_of(loader))) == sorted(all_ids)
    sizes = list(chain.from_iterable(padded_sizes(loader)))
    assert len({size for size, _ in groupby(sizes)}) == len(list(groupby(sizes))) == len(set(sizes)) > 2
    areas = [height * width for height, width in sizes]
    assert areas == sorted(areas, reverse=True)
    ids = dict(zip(chain.from_iterable(ids_of(loader)), sizes))
    for size in set(sizes):  # in the data set's order among themselves
        own = [i for i in ids if ids[i] == size]
        assert own == [i for i in all_ids if i in own]


def test_grouped_batches_are_padded_less(cfg, shapes):
    cfg.TEST.BATCH_SIZE = 4
    pixels = []
    for grouped in (False, True):
        cfg.TEST.GROUP_BY_SIZE = grouped
        batches = padded_sizes(build_test_loader(cfg, f"{shapes}_val_panoptic"))
        pixels.append(
            sum(len(batch) * max(h for h, _ in batch) * max(w for _, w in batch) for batch in batches)
        )
    assert pixels[1] < pixels[0]


def test_ranks_have_the_same_images_grouped_or_not(cfg, shapes, monkeypatch):
    comm = samplers.distributed_sampler.comm
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        own = []
        for grouped in (False, True):
            cfg.TEST.GROUP_BY_SIZE = grouped
            own.append(list(chain.from_iterable(ids_of(build_test_loader(cfg, f"{shapes}_val_panoptic")))))
        assert own[0] != own[1] and sorted(own[0]) == sorted(own[1])


def test_sizes_that_are_left_to_chance_leave_the_data_sets_order(cfg, shapes, all_ids):
    cfg.TEST.GROUP_BY_SIZE, cfg.INPUT.MIN_SIZE_TEST = True, (64, 96)
    assert list(chain.from_iterable(ids_of(build_test_loader(cfg, f"{shapes}_val_panoptic")))) == all_ids
    cfg.INPUT.MIN_SIZE_TEST = 64
    mapper = lambda record: record  # noqa: E731
    loader = build_test_loader(cfg, f"{shapes}_val_panoptic", mapper=mapper)
    assert list(chain.from_iterable(ids_of(loader))) == all_ids


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("highest", [255, 256])
def test_more_than_8_bits_are_refused_where_they_would_be_cut(cfg, shapes, tmp_path, mode, highest):
    """Pillow makes 255 of all that is above: an image of 16 bits would be white."""
    record = dict(DatasetCatalog.get(f"{shapes}_val_panoptic")[0])
    values = np.full((record["height"], record["width"]), 100)
    values[3, 4] = highest
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    record["file_name"] = str(tmp_path / "deep.tif")
    Image.fromarray(values.astype(dtype)).save(record["file_name"])
    name = f"deep_{mode[-1]}_{highest}"
    DatasetCatalog.register(name, lambda: [record])
    if highest == 255:
        ((image,),) = build_test_loader(cfg, name)
        assert image["image"].float().mean() == pytest.approx(100, abs=1)
        return
    with pytest.raises(
        AnnotationError, match=r"deep.tif \(image_id \d+\) cannot be read: .* up to 256; allowed: 8 bits"
    ):
        next(iter(build_test_loader(cfg, name)))
