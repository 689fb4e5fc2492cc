"""Training batches: the same for any number of workers, from any iteration on."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from PIL import Image

from mask2former import get_mask2former_cfg
from mask2former.data import build_train_loader, check_train_sets
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.data.train_loader import AnnotationError, derived_seed

PREFIX = "loadertest"
CONFIG = Path(__file__).resolve().parents[3] / "configs/shapes/maskformer2_mini_shapes.yaml"


@pytest.fixture(scope="module", autouse=True)
def shapes(tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("loader") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=12, val=1, seed=2, min_size=40, max_size=90))
    register_shapes(str(root), PREFIX)


def make_cfg(*opts):
    return get_mask2former_cfg(
        CONFIG,
        [
            *("DATASETS.TRAIN", (f"{PREFIX}_train_panoptic",)),
            *("SOLVER.IMS_PER_BATCH", 3, "DATALOADER.NUM_WORKERS", 0),
            *("INPUT.IMAGE_SIZE", 32, "SEED", 7, *opts),
        ],
    )


def batches(loader, count: int) -> list[list[dict]]:
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def same(a: list[list[dict]], b: list[list[dict]]) -> bool:
    return [[x["image_id"] for x in batch] for batch in a] == [
        [x["image_id"] for x in batch] for batch in b
    ] and all(
        torch.equal(x["image"], y["image"]) and torch.equal(x["instances"].gt_masks, y["instances"].gt_masks)
        for one, other in zip(a, b)
        for x, y in zip(one, other)
    )


def test_batches_do_not_depend_on_the_workers():
    none = batches(build_train_loader(make_cfg()), 6)
    assert [len(batch) for batch in none] == [3] * 6
    assert same(none, batches(build_train_loader(make_cfg("DATALOADER.NUM_WORKERS", 2)), 6))


def test_stream_can_be_entered_anywhere():
    loader = build_train_loader(make_cfg())
    whole = batches(loader, 9)
    loader.start_batch = 5
    assert same(whole[5:], batches(loader, 4))


def test_every_image_comes_once_an_epoch_and_never_twice_the_same():
    found = [x for batch in batches(build_train_loader(make_cfg()), 8) for x in batch]
    first, second = found[:12], found[12:]
    assert {x["image_id"] for x in first} == {x["image_id"] for x in second} and len(
        {x["image_id"] for x in first}
    ) == 12
    by_id = {x["image_id"]: x["image"] for x in second}
    assert sum(torch.equal(x["image"], by_id[x["image_id"]]) for x in first) == 0


def test_seed_decides():
    first = batches(build_train_loader(make_cfg()), 4)
    assert same(first, batches(build_train_loader(make_cfg()), 4))
    assert not same(first, batches(build_train_loader(make_cfg("SEED", 8)), 4))
    assert not same(
        batches(build_train_loader(make_cfg("SEED", -1)), 4),
        batches(build_train_loader(make_cfg("SEED", -1)), 4),
    )


def test_processes_share_the_images_and_the_batch(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append([x for batch in batches(build_train_loader(make_cfg()), 4) for x in batch])
    assert [len(part) for part in parts] == [4, 4, 4]
    assert len({x["image_id"] for part in parts for x in part}) == 12


def test_random_numbers_outside_go_on_as_if_nothing_had_been_drawn():
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    def reset() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    iterator = iter(build_train_loader(make_cfg()))
    reset()
    expected = draw()
    for _ in range(2):  # the start of the loader, and a later batch
        reset()
        next(iterator)
        assert draw() == expected


def test_upright_and_other_images_are_not_mixed_where_sizes_differ():
    cfg = make_cfg("INPUT.DATASET_MAPPER_NAME", "mask_former_panoptic", "INPUT.MIN_SIZE_TRAIN", (40,))
    upright = [
        {x["image"].shape[1] >= x["image"].shape[2] for x in batch}
        for batch in batches(build_train_loader(cfg), 8)
    ]
    assert all(len(kinds) == 1 for kinds in upright) and {True} in upright and {False} in upright
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    mixed = batches(build_train_loader(cfg), 8)
    assert any(len({x["image"].shape[1] >= x["image"].shape[2] for x in batch}) == 2 for batch in mixed)


def test_sizes_that_no_record_has_are_read_from_the_images():
    name = f"{PREFIX}_unsized"
    if name not in DatasetCatalog.list():
        source = f"{PREFIX}_train_panoptic"
        DatasetCatalog.register(
            name,
            lambda: [
                {k: v for k, v in r.items() if k not in ("height", "width")}
                for r in DatasetCatalog.get(source)
            ],
        )
    opts = ("INPUT.DATASET_MAPPER_NAME", "mask_former_panoptic", "INPUT.MIN_SIZE_TRAIN", (40,))
    sized = batches(build_train_loader(make_cfg(*opts)), 4)
    assert same(sized, batches(build_train_loader(make_cfg(*opts, "DATASETS.TRAIN", (name,))), 4))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_record_is_named(workers, tmp_path):
    name = f"{PREFIX}_damaged_{workers}"
    (record,) = DatasetCatalog.get(f"{PREFIX}_train_panoptic")[:1]
    Image.new("RGB", (3, 3)).save(tmp_path / "tiny.png")
    DatasetCatalog.register(name, lambda: [{**record, "pan_seg_file_name": str(tmp_path / "tiny.png")}])
    cfg = make_cfg("DATASETS.TRAIN", (name,), "DATALOADER.NUM_WORKERS", workers)
    with pytest.raises(AnnotationError) as error:
        batches(build_train_loader(cfg), 1)
    message = str(error.value)
    assert (
        record["file_name"] in message and "cannot be trained on" in message and "tiny.png is 3x3" in message
    )


def test_truncated_image_is_named(tmp_path):
    name = f"{PREFIX}_truncated"
    (record,) = DatasetCatalog.get(f"{PREFIX}_train_panoptic")[:1]
    content = Path(record["file_name"]).read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    DatasetCatalog.register(name, lambda: [{**record, "file_name": str(tmp_path / "half.png")}])
    with pytest.raises(AnnotationError, match=r"half.png cannot be trained on"):
        batches(build_train_loader(make_cfg("DATASETS.TRAIN", (name,))), 1)


def test_wrong_keys_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"SAMPLER_TRAIN is 'Sampler'; allowed: 'TrainingSampler'"):
        build_train_loader(make_cfg("DATALOADER.SAMPLER_TRAIN", "Sampler"))
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH is 0"):
        build_train_loader(make_cfg("SOLVER.IMS_PER_BATCH", 0))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH is 3, for all 2 processes"):
        build_train_loader(make_cfg())


def test_rare_categories_come_more_often():
    cfg = make_cfg(
        *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 1.0),
        *("DATASETS.TRAIN", (f"{PREFIX}_train_instance",), "INPUT.DATASET_MAPPER_NAME", "coco_instance_lsj"),
    )
    found = [x["image_id"] for batch in batches(build_train_loader(cfg), 12) for x in batch]
    counts = [found.count(i) for i in set(found)]
    assert max(counts) > min(counts)


def test_seeds_of_neighbouring_places_are_unrelated():
    seeds = {derived_seed(7, rank, position) for rank in range(8) for position in range(2000)}
    assert len(seeds) == 16000
    assert derived_seed(7, 0, 1) != derived_seed(7, 1, 0)


def test_train_sets_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN is empty"):
        check_train_sets(make_cfg("DATASETS.TRAIN", ()))
    with pytest.raises(KeyError, match="'nope', which is not registered"):
        check_train_sets(make_cfg("DATASETS.TRAIN", ("nope",)))
    check_train_sets(make_cfg())
    register_shapes(str(tmp_path / "absent"), "shapes_loadertest")
    with pytest.raises(FileNotFoundError, match=r"(?s)absent.*make_shapes_dataset.py"):
        check_train_sets(make_cfg("DATASETS.TRAIN", ("shapes_loadertest_train_panoptic",)))


def test_instances_of_a_panoptic_set_are_not_needed(tmp_path):
    name = f"{PREFIX}_no_instances"
    source = MetadataCatalog.get(f"{PREFIX}_train_panoptic").as_dict()
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(
        **{k: v for k, v in source.items() if k not in ("name", "json_file")},
        json_file=str(tmp_path / "absent.json"),
    )
    check_train_sets(make_cfg("DATASETS.TRAIN", (name,)))
