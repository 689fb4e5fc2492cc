"""What a backend is told of the images that an evaluation is going to run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from mask2former.evaluation.ahead import ImagesAhead

SIZES = [(40, 60), (60, 40), (50, 50), (40, 60), (30, 200), (64, 64), (41, 63)]


@pytest.fixture
def pictures(tmp_path):
    """Registers a data set of images of these sizes, and gives its name."""
    names = []

    def register(name: str, told: bool = True, damaged: int | None = None) -> str:
        records = []
        for i, (height, width) in enumerate(SIZES):
            path = tmp_path / f"{name}_{i}.png"
            Image.fromarray(np.full((height, width, 3), 20 * i, np.uint8)).save(path)
            if i == damaged:
                path.write_bytes(path.read_bytes()[:40])
            size = {"height": height, "width": width} if told else {}
            records.append({"file_name": str(path), "image_id": i, **size})
        names.append(name)
        DatasetCatalog.register(name, lambda: records)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)


@pytest.fixture
def cfg(cfg):
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128, "TEST.BATCH_SIZE", 2])
    return cfg


def test_padded_sizes_of_the_batches_are_told_as_the_loader_gives_them(cfg, pictures):
    ahead = ImagesAhead(cfg, [pictures("ahead_sizes"), pictures("ahead_more")])
    told = ahead.sizes(32)
    seen = Counter()
    for name in ("ahead_sizes", "ahead_more"):
        for batch in ahead.take_loader(name):
            height, width = (max(one["image"].shape[i] for one in batch) for i in (1, 2))
            seen[(len(batch), -(-height // 32) * 32, -(-width // 32) * 32)] += 1
    assert told == seen and sum(told.values()) == 8 and len(told) > 2


def test_sizes_are_not_told_where_records_or_the_config_do_not(cfg, pictures):
    assert ImagesAhead(cfg, [pictures("ahead_silent", told=False)]).sizes(32) is None
    name = pictures("ahead_random")
    cfg.INPUT.MIN_SIZE_TEST = (64, 96)
    assert ImagesAhead(cfg, [name]).sizes(32) is None


def test_examples_come_from_all_over_the_data_set_as_the_loader_gives_them(cfg, pictures):
    cfg.TEST.GROUP_BY_SIZE = False
    ahead = ImagesAhead(cfg, [pictures("ahead_examples")])
    examples = ahead.examples(3)
    assert [int(image.max()) // 20 for image in examples] == [0, 2, 4]
    assert [tuple(image.shape) for image in examples] == [(3, 64, 96), (3, 64, 64), (3, 19, 128)]
    assert len(ahead.examples(100)) == len(SIZES)


def test_example_that_cannot_be_read_is_left_out(cfg, pictures):
    assert len(ImagesAhead(cfg, [pictures("ahead_damaged", damaged=2)]).examples(7)) == 6
