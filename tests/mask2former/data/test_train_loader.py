"""Training batches: the same for any number of workers, from any iteration on."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image

from mask2former import get_mask2former_cfg
from mask2former.data import build_train_loader, check_train_sets
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.data.errors import AnnotationError
from mask2former.data.train_loader import batch_from_bytes, batch_to_bytes, derived_seed

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


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_workers_of_a_job_are_forked_though_its_processes_are_spawned(monkeypatch):
    """Spawned ones would be sent the mapper, and import PyTorch one after the other."""
    one = batches(build_train_loader(make_cfg("SOLVER.IMS_PER_BATCH", 2)), 2)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda x: [x])
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        loader = build_train_loader(make_cfg("DATALOADER.NUM_WORKERS", 2, "SOLVER.IMS_PER_BATCH", 4))
        mapper = loader.mapper
        loader.mapper = lambda record: mapper(record)  # not to be pickled
        assert [len(batch) for batch in batches(loader, 2)] == [len(batch) for batch in one]
    finally:
        multiprocessing.set_start_method(before, force=True)


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


def _without_file(record, folder):
    return {
        "file_name": str(folder / "gone.png")
    }, r"gone.png \(image_id {id}\) cannot be trained on: .*No such file"


def _half_a_file(record, folder):
    content = Path(record["file_name"]).read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    return {"file_name": str(folder / "half.png")}, r"half.png \(image_id {id}\) cannot .*truncated"


def _no_image(record, folder):
    (folder / "text.png").write_text("<html>404</html>")
    return {
        "file_name": str(folder / "text.png")
    }, r"text.png \(image_id {id}\) cannot .*cannot identify image file"


def _no_bytes(record, folder):
    (folder / "empty.png").touch()
    return {
        "file_name": str(folder / "empty.png")
    }, r"empty.png \(image_id {id}\) cannot .*cannot identify image file"


def _other_size(record, folder):
    return {"height": record["height"] + 1}, r"png \(image_id {id}\) cannot .*Mismatched image shape"


def _small_panoptic_map(record, folder):
    Image.new("RGB", (3, 3)).save(folder / "tiny.png")
    return {"pan_seg_file_name": str(folder / "tiny.png")}, r"\(image_id {id}\) cannot .*tiny.png is 3x3"


def _no_panoptic_map(record, folder):
    return {
        "pan_seg_file_name": str(folder / "gone.png")
    }, r"\(image_id {id}\) cannot .*No such file.*gone.png"


@pytest.mark.parametrize(
    "damage",
    [_without_file, _half_a_file, _no_image, _no_bytes, _other_size, _small_panoptic_map, _no_panoptic_map],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_record_is_named(workers, damage, tmp_path):
    name = f"{PREFIX}{damage.__name__}_{workers}"
    good, record = DatasetCatalog.get(f"{PREFIX}_train_panoptic")[:2]
    change, message = damage(record, tmp_path)
    DatasetCatalog.register(name, lambda: [good, {**record, **change}])
    cfg = make_cfg("DATASETS.TRAIN", (name,), "DATALOADER.NUM_WORKERS", workers)
    with pytest.raises(AnnotationError, match=message.format(id=record["image_id"])) as error:
        batches(build_train_loader(cfg), 3)
    # From a worker process too, without its traceback.
    assert "Traceback" not in str(error.value)


def test_unknown_category_and_half_a_file_of_annotations_are_named(tmp_path):
    make_shapes_dataset(tmp_path / "shapes", ShapesOptions(train=1, val=1, min_size=48, max_size=64))
    register_shapes(str(tmp_path / "shapes"), "badjson")
    for kind, segments in (("panoptic", "segments_info"), ("instances", None)):
        path = tmp_path / "shapes" / "annotations" / f"{kind}_train.json"
        name = f"badjson_train_{kind.removesuffix('s')}"
        text = path.read_text()
        content = json.loads(text)
        first = content["annotations"][0]
        (first[segments][0] if segments else first)["category_id"] = 77
        path.write_text(json.dumps(content))
        with pytest.raises(
            AnnotationError, match=rf"category_id 77 of .*0000001.png in .*{kind}_train.json is unknown"
        ):
            DatasetCatalog.get(name)
        if kind == "panoptic":
            path.write_text(text[: len(text) // 2])
            with pytest.raises(AnnotationError, match=r"panoptic_train.json is no valid JSON"):
                DatasetCatalog.get(name)


def test_image_without_segments_and_image_that_is_all_void_come_through(tmp_path):
    record = DatasetCatalog.get(f"{PREFIX}_train_panoptic")[0]
    Image.new("RGB", (record["width"], record["height"])).save(tmp_path / "void.png")
    empty = {**record, "segments_info": []}
    void = {**record, "pan_seg_file_name": str(tmp_path / "void.png")}
    DatasetCatalog.register(f"{PREFIX}_empty", lambda: [empty, void])
    (batch,) = batches(
        build_train_loader(make_cfg("DATASETS.TRAIN", (f"{PREFIX}_empty",), "SOLVER.IMS_PER_BATCH", 2)), 1
    )
    assert record["segments_info"] and len(batch) == 2
    for found in (x["instances"] for x in batch):
        assert len(found) == 0 and found.gt_masks.shape == (0, *found.image_size)
        assert found.gt_masks.dtype == torch.bool


def test_images_without_instances_are_left_out_as_in_detectron2():
    records = DatasetCatalog.get(f"{PREFIX}_train_instance")
    DatasetCatalog.register(f"{PREFIX}_some", lambda: [records[0], {**records[1], "annotations": []}])
    for keep, expected in ((True, 1), (False, 2)):
        cfg = make_cfg(
            *("DATASETS.TRAIN", (f"{PREFIX}_some",), "INPUT.DATASET_MAPPER_NAME", "coco_instance_lsj"),
            *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", keep),
        )
        assert len(build_train_loader(cfg).records) == expected


def test_batches_survive_the_way_out_of_a_worker():
    masks = torch.rand(5, 7, 9) > 0.5
    batch = [
        {
            "image": torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8),
            "instances": Instances((7, 9), gt_classes=torch.arange(5), gt_masks=masks),
            "half": torch.rand(3).bfloat16(),
            "none": torch.zeros(0, 7, 9, dtype=torch.bool),
            "image_id": "a",
        }
    ]
    data = batch_to_bytes(batch)
    (got,) = batch_from_bytes(data)
    assert list(got) == list(batch[0]) and got["image_id"] == "a"
    for key in ("image", "half", "none"):
        assert got[key].dtype == batch[0][key].dtype and torch.equal(got[key], batch[0][key])
    assert torch.equal(got["instances"].gt_masks, masks) and got["instances"].image_size == (7, 9)
    got["instances"].gt_masks[:] = False  # memory of its own
    # Masks as bits: eight times smaller than they are.
    big = batch_to_bytes([{"masks": torch.zeros(64, 64, 64, dtype=torch.bool)}])
    assert len(big) < 64**3 / 7


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


@pytest.mark.parametrize("content", [None, b"no image"])
def test_image_whose_size_cannot_be_read_is_named(tmp_path, content):
    """Where records do not tell sizes, batches of upright images are made of the files' headers."""
    record = dict(DatasetCatalog.get(f"{PREFIX}_train_panoptic")[0])
    del record["height"], record["width"]
    record["file_name"] = str(tmp_path / "image.png")
    if content is not None:
        (tmp_path / "image.png").write_bytes(content)
    name = f"{PREFIX}_header_{content is None}"
    DatasetCatalog.register(name, lambda: [record])
    words = ["DATASETS.TRAIN", (name,), "INPUT.DATASET_MAPPER_NAME", "mask_former_panoptic"]
    with pytest.raises(AnnotationError, match=r"image.png \(image_id 1\) cannot be trained on: "):
        batches(build_train_loader(make_cfg(*words)), 1)


def test_more_than_8_bits_are_refused(tmp_path):
    """Pillow makes 255 of all that is above: an image of 16 bits would be white."""
    record = dict(DatasetCatalog.get(f"{PREFIX}_train_panoptic")[0])
    record["file_name"] = str(tmp_path / "deep.png")
    Image.fromarray(np.full((record["height"], record["width"]), 700, np.uint16)).save(tmp_path / "deep.png")
    DatasetCatalog.register(f"{PREFIX}_deep", lambda: [record])
    with pytest.raises(AnnotationError, match=r"deep.png \(image_id 1\) .* up to 700; allowed: 8 bits"):
        batches(build_train_loader(make_cfg("DATASETS.TRAIN", (f"{PREFIX}_deep",))), 1)
