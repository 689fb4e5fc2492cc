"""Training mappers: what they make of images and annotations, and what they say about bad ones."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image
from pycocotools import mask as mask_util

from mask2former import get_mask2former_cfg
from mask2former.data import build_train_mapper
from mask2former.data.dataset_mappers import (
    MAPPERS,
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
)
from mask2former.data.dataset_mappers.instance import clip_polygon, transform_mask
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.evaluation.panoptic_quality import read_panoptic_png

PREFIX = "mappertest"
CONFIG = Path(__file__).resolve().parents[3] / "configs/shapes/maskformer2_mini_shapes.yaml"
NONE = T.TransformList([])
# Which form of the data set a mapper reads.
FORMS = {
    "mask_former_semantic": "sem_seg",
    "mask_former_panoptic": "panoptic",
    "mask_former_instance": "instance",
    "coco_instance_lsj": "instance",
    "coco_panoptic_lsj": "panoptic",
}


@pytest.fixture(scope="module", autouse=True)
def shapes(tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("mappers") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=24, val=1, seed=5, min_size=40, max_size=100))
    register_shapes(str(root), PREFIX)


def records(form: str) -> list[dict]:
    return DatasetCatalog.get(f"{PREFIX}_train_{form}")


def cfg_of(name: str, *opts):
    dataset = f"{PREFIX}_train_{FORMS[name]}"
    words = ["INPUT.DATASET_MAPPER_NAME", name, "DATASETS.TRAIN", (dataset,), *opts]
    return get_mask2former_cfg(CONFIG, words)


def plain(mapper: type, **options):
    """A mapper without augmentations."""
    return mapper(True, augmentations=[], image_format="RGB", **options)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)


@pytest.mark.parametrize("name", MAPPERS)
def test_every_mapper_gives_what_the_model_takes(name):
    mapper = build_train_mapper(cfg_of(name, "INPUT.IMAGE_SIZE", 64))
    for record in records(FORMS[name]):
        before = copy.deepcopy(record)
        result = mapper(record)
        assert record == before, "the record was changed"
        image, instances = result["image"], result["instances"]
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        assert instances.image_size == tuple(image.shape[1:])
        assert instances.gt_masks.dtype == torch.bool
        assert instances.gt_masks.shape == (len(instances.gt_classes), *image.shape[1:])
        assert instances.gt_classes.dtype == torch.int64
        assert not {"annotations", "segments_info", "pan_seg_file_name", "sem_seg_file_name"} & set(result)
        assert (result["height"], result["width"]) == (record["height"], record["width"])
        if name.endswith("lsj"):
            assert tuple(image.shape) == (3, 64, 64)


def test_unknown_mapper_lists_the_names():
    cfg = cfg_of("coco_panoptic_lsj")
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic"
    with pytest.raises(
        ValueError, match=r"'coco_panoptic'; allowed: 'mask_former_semantic'.*'coco_panoptic_lsj'"
    ):
        build_train_mapper(cfg)


def test_mappers_are_for_training():
    with pytest.raises(ValueError, match="is for training"):
        MAPPERS["coco_panoptic_lsj"](cfg_of("coco_panoptic_lsj"), False)


def test_panoptic_segments_are_those_of_the_map():
    crowds = 0
    for record in records("panoptic"):
        instances = plain(MaskFormerPanopticDatasetMapper)(record)["instances"]
        ids = read_panoptic_png(record["pan_seg_file_name"])
        segments = [s for s in record["segments_info"] if not s["iscrowd"]]
        crowds += len(record["segments_info"]) - len(segments)
        assert instances.gt_classes.tolist() == [s["category_id"] for s in segments]
        for mask, segment in zip(instances.gt_masks, segments):
            np.testing.assert_array_equal(mask.numpy(), ids == segment["id"])
    assert crowds > 0, "the data set has no crowd to leave out"


def test_semantic_segments_are_the_classes_without_the_ignored():
    ignored = 0
    for record in records("sem_seg"):
        instances = plain(MaskFormerSemanticDatasetMapper, ignore_label=255)(record)["instances"]
        labels = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert instances.gt_classes.tolist() == sorted(set(np.unique(labels).tolist()) - {255})
        ignored += int((labels == 255).any())
        for mask, label in zip(instances.gt_masks, instances.gt_classes):
            np.testing.assert_array_equal(mask.numpy(), labels == label.item())
    assert ignored > 0


def test_instances_are_the_things_without_crowds():
    for record in records("instance"):
        for mapper in (MaskFormerInstanceDatasetMapper, COCOInstanceNewBaselineDatasetMapper):
            instances = plain(mapper)(record)["instances"]
            wanted = [a for a in record["annotations"] if not a["iscrowd"]]
            assert instances.gt_classes.tolist() == [a["category_id"] for a in wanted]
            for mask, annotation in zip(instances.gt_masks, wanted):
                np.testing.assert_array_equal(mask.numpy(), mask_util.decode(annotation["segmentation"]) > 0)


@pytest.mark.parametrize("number", range(4))
def test_masks_move_with_the_image(number):
    """The panoptic map itself for an image: where a mask is, the image has the colour of its id."""
    record = records("panoptic")[number]
    height, width = record["height"], record["width"]
    record = {**record, "file_name": record["pan_seg_file_name"]}
    # Scales of one, so that no colours are mixed; crops smaller and larger than the image.
    for side in (min(height, width) - 9, max(height, width) + 8):
        augmentations = [
            T.RandomFlip(prob=0.5),
            T.FixedSizeCrop(crop_size=(side, side)),
        ]
        mapper = COCOPanopticNewBaselineDatasetMapper(True, augmentations=augmentations, image_format="RGB")
        for attempt in range(3):
            seed(attempt)
            result = mapper(record)
            rgb = result["image"].permute(1, 2, 0).long()
            ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
            wanted = [s["id"] for s in record["segments_info"] if not s["iscrowd"]]
            assert result["image"].shape[1:] == (side, side)
            for mask, segment in zip(result["instances"].gt_masks, wanted):
                assert torch.equal(mask, ids == segment)


def test_large_scale_jitter_covers_its_scales():
    cfg = cfg_of("coco_panoptic_lsj", "INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SCALE", 0.25, "INPUT.MAX_SCALE", 2.0)
    mapper = build_train_mapper(cfg)
    record = records("panoptic")[0]
    widths = []
    for number in range(30):
        seed(number)
        inside = (mapper(record)["image"] != 128).any(0)
        widths.append(int(inside.any(0).sum()))
    assert min(widths) < 32 and max(widths) == 64


@pytest.fixture
def lopsided(tmp_path) -> tuple[dict, np.ndarray, np.ndarray]:
    """A record for every mapper, its image (64, 64, 3), and the mask (64, 64) of its segment, neither of them symmetric."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[5:20, 3:40] = 1
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(np.where(mask, 2, 255).astype(np.uint8)).save(tmp_path / "labels.png")
    Image.fromarray(np.stack([7 * mask, 0 * mask, 0 * mask], 2)).save(tmp_path / "panoptic.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "pan_seg_file_name": str(tmp_path / "panoptic.png"),
        "segments_info": [{"id": 7, "category_id": 2}],
        "annotations": [{"category_id": 2, "segmentation": mask_util.encode(np.asfortranarray(mask))}],
    }
    return record, image, mask.astype(bool)


@pytest.mark.parametrize(
    "name, flip",
    [
        *(
            (name, flip)
            for name in ("coco_panoptic_lsj", "coco_instance_lsj")
            for flip in ("horizontal", "vertical")
        ),
        *((name, "none") for name in ("coco_panoptic_lsj", "coco_instance_lsj")),
        *((name, "horizontal") for name in MAPPERS if not name.endswith("lsj")),
    ],
)
def test_half_of_the_images_are_flipped_with_their_masks(lopsided, name, flip):
    record, image, mask = lopsided
    mapper = build_train_mapper(
        cfg_of(
            *(name, "INPUT.RANDOM_FLIP", flip, "INPUT.CROP.ENABLED", False, "INPUT.COLOR_AUG_SSD", False),
            # One scale, so that each pixel stays what it is.
            *("INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0),
            *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 64, "INPUT.FORMAT", "RGB"),
        )
    )
    axis = 0 if flip == "vertical" else 1
    flipped = 0
    for number in range(40):
        seed(number)
        result = mapper(record)
        got, (got_mask,) = result["image"].permute(1, 2, 0).numpy(), result["instances"].gt_masks.numpy()
        turned = not np.array_equal(got, image)
        flipped += turned
        np.testing.assert_array_equal(got, np.flip(image, axis) if turned else image)
        np.testing.assert_array_equal(got_mask, np.flip(mask, axis) if turned else mask)
    # Forty coins: fewer than ten or more than thirty heads come once in a thousand times, and these seeds are fixed.
    assert flipped == 0 if flip == "none" else 10 <= flipped <= 30


@pytest.mark.parametrize("flip, message", [("diagonal", "INPUT.RANDOM_FLIP is 'diagonal'"), ("none", "")])
def test_flip_is_checked(flip, message):
    cfg = cfg_of("coco_panoptic_lsj", "INPUT.RANDOM_FLIP", flip)
    if message:
        with pytest.raises(ValueError, match=message):
            build_train_mapper(cfg)
    else:
        assert not any(isinstance(a, T.RandomFlip) for a in build_train_mapper(cfg).augmentations.augs)


def test_segments_that_the_crop_removed():
    """As in the release, panoptic and mask_former_instance keep them with an empty mask; coco_instance_lsj does not."""
    crop = [T.FixedSizeCrop(crop_size=(4, 4))]
    record = next(r for r in records("instance") if sum(not a["iscrowd"] for a in r["annotations"]) > 1)
    wanted = [a for a in record["annotations"] if not a["iscrowd"]]
    seed(0)
    kept = MaskFormerInstanceDatasetMapper(True, augmentations=crop, image_format="RGB")(record)["instances"]
    seed(0)
    left = COCOInstanceNewBaselineDatasetMapper(True, augmentations=crop, image_format="RGB")(record)[
        "instances"
    ]
    assert len(kept) == len(wanted) and not kept.gt_masks.flatten(1).any(1).all()
    assert len(left) == int(kept.gt_masks.flatten(1).any(1).sum())
    panoptic = next(r for r in records("panoptic") if len(r["segments_info"]) > 3)
    got = COCOPanopticNewBaselineDatasetMapper(True, augmentations=crop, image_format="RGB")(panoptic)[
        "instances"
    ]
    assert len(got) == sum(not s["iscrowd"] for s in panoptic["segments_info"])


@pytest.mark.parametrize("name", ["mask_former_semantic", "mask_former_panoptic", "mask_former_instance"])
def test_images_are_padded_to_a_square(name):
    side = 120
    mapper = build_train_mapper(
        cfg_of(
            name, "INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MAX_SIZE_TRAIN", side, "INPUT.SIZE_DIVISIBILITY", side
        )
    )
    assert mapper.fixed_size
    for record in records(FORMS[name])[:3]:
        result = mapper(record)
        assert tuple(result["image"].shape) == (3, side, side)
        assert (result["image"][:, 40:, 40:] == 128).any()
        padding = (result["image"] == 128).all(0)
        last_row = padding.all(1)
        assert not result["instances"].gt_masks[:, last_row].any()
    small = build_train_mapper(cfg_of(name, "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.SIZE_DIVISIBILITY", 48))
    with pytest.raises(ValueError, match=r"INPUT.SIZE_DIVISIBILITY 48"):
        small(records(FORMS[name])[0])


def test_crop_and_colour_augmentation_of_the_config():
    cfg = cfg_of(
        "mask_former_panoptic",
        *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", (32, 32)),
        *("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.75, "INPUT.COLOR_AUG_SSD", True),
    )
    mapper = build_train_mapper(cfg)
    kinds = [type(a).__name__ for a in mapper.augmentations.augs]
    assert kinds[0] == "ResizeShortestEdge" and kinds[-1] == "RandomFlip" and len(kinds) == 4
    record = records("panoptic")[0]
    seed(0)
    first = mapper(record)
    seed(0)
    again = mapper(record)
    assert torch.equal(first["image"], again["image"]) and first["image"].shape[1:] == (32, 32)
    without = {k: v for k, v in record.items() if k != "sem_seg_file_name"}
    with pytest.raises(ValueError, match="no sem_seg_file_name"):
        mapper(without)


# Polygons.


def star(centre: tuple[float, float], radius: float) -> list[float]:
    angle = np.arange(10) * np.pi / 5
    reach = radius * np.where(np.arange(10) % 2, 0.4, 1.0)
    return (
        np.stack([centre[0] + reach * np.cos(angle), centre[1] + reach * np.sin(angle)], 1).ravel().tolist()
    )


# What FixedSizeCrop pads segmentations with: detectron2 0.5 and 0.6, and later ones.
@pytest.mark.parametrize("value", [0, 255])
def test_padding_belongs_to_no_instance(value):
    pad = T.TransformList([T.PadTransform(0, 0, 6, 3, 10, 12, seg_pad_value=value)])
    mask = np.zeros((12, 10), np.uint8, order="F")
    mask[3:5, 2:9] = 1
    for segmentation in (mask_util.encode(mask), np.ascontiguousarray(mask)):
        moved = transform_mask(segmentation, (12, 10), pad, (15, 16))
        assert np.array_equal(moved, np.pad(mask, ((0, 3), (0, 6))).astype(bool))


@pytest.mark.parametrize("value", [0, 255])
def test_padding_belongs_to_no_segment(tmp_path, value):
    """Though a segment may have the id that its colour is."""
    record = dict(records("panoptic")[0])
    height, width = record["height"], record["width"]
    color = 255 * (1 + 256 + 65536) if value else 0
    segment = {"id": color, "category_id": 1, "isthing": True, "iscrowd": 0}
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[:5] = 7
    Image.fromarray(pixels).save(tmp_path / "map.png")
    record.update(pan_seg_file_name=str(tmp_path / "map.png"), segments_info=[segment])
    pad = T.PadTransform(0, 0, 9, 4, width, height, seg_pad_value=value)
    mapper = COCOPanopticNewBaselineDatasetMapper(True, augmentations=[pad], image_format="RGB")
    (mask,) = mapper(record)["instances"].gt_masks.numpy()
    assert np.array_equal(mask, np.pad(pixels[..., 0] == value, ((0, 4), (0, 9))))


def test_polygons_and_run_length_codes_agree():
    size = (60, 80)
    polygons = [star((30, 30), 20), star((60, 20), 11)]
    mask = transform_mask(polygons, size, NONE, size)
    code = mask_util.merge(mask_util.frPyObjects(polygons, *size))
    uncompressed = {"size": list(size), "counts": _runs(mask)}
    for other in (code, uncompressed, mask):
        np.testing.assert_array_equal(transform_mask(other, size, NONE, size), mask)
    assert 0 < mask.mean() < 0.5


def _runs(mask: np.ndarray) -> list[int]:
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return ([0] if flat[0] else []) + runs


def test_polygons_move_as_masks_do():
    size = (60, 80)
    polygons = [star((40, 30), 25)]
    mask = transform_mask(polygons, size, NONE, size)
    for transforms, new_size in (
        (T.TransformList([T.HFlipTransform(80)]), size),
        (T.TransformList([T.CropTransform(20, 10, 40, 30)]), (30, 40)),
        (T.TransformList([T.PadTransform(0, 0, 10, 20, 80, 60)]), (80, 90)),
    ):
        moved = transform_mask(polygons, size, transforms, new_size)
        expected = transforms.apply_segmentation(mask.astype(np.uint8)) > 0
        assert moved.shape == expected.shape == new_size
        assert (moved != expected).sum() <= 12 < expected.sum() / 10, "other than single pixels of the edge"
    assert polygons == [star((40, 30), 25)], "the annotation was changed"


@pytest.mark.parametrize(
    "counts",
    [
        [1, 2],  # the rest would be what the memory held
        [1, 100 * 90],
        [-1, 100 * 90 + 1],
        [10.5, 100 * 90 - 10.5],
        ["10", 100 * 90 - 10],
        None,
        b"zzzzzzzzzz",
        "1",
        "\u00e4",
        "",
    ],
)
def test_run_lengths_that_do_not_cover_the_image_are_refused(counts):
    size = (100, 90)
    with pytest.raises(
        ValueError, match=r"counts .*allowed: whole numbers from 0 that sum to the 100 x 90 = 9000"
    ):
        transform_mask({"size": list(size), "counts": counts}, size, NONE, size)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_run_lengths_are_read_as_pycocotools_writes_them(share):
    for number, size in enumerate([(1, 1), (60, 80), (700, 900)]):
        mask = np.random.default_rng(number).random(size) < share
        code = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = code["counts"].decode("ascii")
        for counts in (code["counts"], text, _runs(mask)):
            got = transform_mask({"size": list(size), "counts": counts}, size, NONE, size)
            np.testing.assert_array_equal(got, mask)
        # One character less is another number, or half of one.
        with pytest.raises(ValueError, match="allowed: whole numbers"):
            transform_mask({"size": list(size), "counts": text[:-1]}, size, NONE, size)


@pytest.mark.parametrize(
    "points, expected",
    [
        ([[2, 2], [8, 2], [8, 6]], [[2, 2], [8, 2], [8, 6]]),  # inside
        ([[-4, 2], [4, 2], [4, 6], [-4, 6]], [[0, 2], [4, 2], [4, 6], [0, 6]]),
        ([[-50, -50], [50, -50], [50, 50], [-50, 50]], [[0, 0], [10, 0], [10, 8], [0, 8]]),
        ([[20, 20], [30, 20], [30, 30]], []),
    ],
)
def test_polygons_are_clipped(points, expected):
    got = clip_polygon(np.array(points, dtype=np.float64), (8, 10)).tolist()
    assert sorted(map(tuple, got)) == sorted(map(tuple, expected))


def test_polygon_that_left_the_image_is_empty():
    crop = T.TransformList([T.CropTransform(0, 0, 5, 5)])
    mask = transform_mask([star((60, 40), 10)], (60, 80), crop, (5, 5))
    assert mask.shape == (5, 5) and not mask.any()


# Bad annotations.


def test_image_of_another_size_is_refused():
    record = {**records("panoptic")[0], "height": 7}
    with pytest.raises(SizeMismatchError, match=r"\.png"):
        plain(MaskFormerPanopticDatasetMapper)(record)


def test_maps_of_another_size_are_refused(tmp_path):
    record = records("panoptic")[0]
    Image.new("RGB", (5, 4)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png is 4x5"):
        plain(MaskFormerPanopticDatasetMapper)({**record, "pan_seg_file_name": str(tmp_path / "small.png")})
    Image.new("L", (5, 4)).save(tmp_path / "labels.png")
    mapper = plain(MaskFormerSemanticDatasetMapper, ignore_label=255)
    with pytest.raises(ValueError, match=r"labels.png has shape \(4, 5\)"):
        mapper({**record, "sem_seg_file_name": str(tmp_path / "labels.png")})
    Image.new("RGB", (record["width"], record["height"])).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb.png has shape .*one label for each pixel"):
        mapper({**record, "sem_seg_file_name": str(tmp_path / "rgb.png")})


@pytest.mark.parametrize(
    "name, message",
    [
        ("mask_former_semantic", "no sem_seg_file_name"),
        ("mask_former_panoptic", "no pan_seg_file_name"),
        ("coco_panoptic_lsj", "no pan_seg_file_name"),
        ("mask_former_instance", "no annotations"),
        ("coco_instance_lsj", "no annotations"),
    ],
)
def test_records_of_another_form_name_what_to_change(name, message):
    record = records("panoptic")[0]
    bare = {k: record[k] for k in ("file_name", "height", "width")}
    with pytest.raises(ValueError, match=f"{message}.*DATASETS.TRAIN"):
        build_train_mapper(cfg_of(name))(bare)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1.0, 2.0, 3.0, 4.0]], "at least three points"),
        ([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], "at least three points"),
        ([[1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]], "finite"),
        ([], "no polygon"),
        ({"size": [3, 3], "counts": [9]}, r"size \(3, 3\), the image"),
        (np.zeros((3, 3)), r"ndarray of shape \(3, 3\)"),
        ("101", "is a str"),
    ],
)
def test_segmentations_that_cannot_be_read(segmentation, message):
    record = records("instance")[0]
    annotation = {"category_id": 0, "bbox": [0, 0, 1, 1], "segmentation": segmentation}
    with pytest.raises(ValueError, match=message):
        plain(MaskFormerInstanceDatasetMapper)({**record, "annotations": [annotation]})


def test_boxes_without_masks_are_refused():
    record = {**records("instance")[0], "annotations": [{"category_id": 3, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(ValueError, match="category 3 has no segmentation"):
        plain(COCOInstanceNewBaselineDatasetMapper)(record)


def test_image_without_annotations_has_no_segments():
    record = records("panoptic")[0]
    instances = plain(MaskFormerPanopticDatasetMapper)({**record, "segments_info": []})["instances"]
    assert instances.gt_masks.shape == (0, record["height"], record["width"])
    record = {**records("instance")[0], "annotations": []}
    for mapper in (MaskFormerInstanceDatasetMapper, COCOInstanceNewBaselineDatasetMapper):
        assert plain(mapper)(record)["instances"].gt_masks.shape[0] == 0


def test_semantic_data_set_without_ignore_label_names_it():
    name = "mappertest_no_ignore_label"
    MetadataCatalog.get(name).stuff_classes = ["a"]
    cfg = cfg_of("mask_former_semantic")
    cfg.DATASETS.TRAIN = (name,)
    with pytest.raises(ValueError, match=f"{name} has no ignore_label"):
        build_train_mapper(cfg)
