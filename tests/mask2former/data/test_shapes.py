"""The synthetic data set: the same everywhere, consistent in its three forms, and never half there."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from mask2former.data.datasets.shapes import draw_scene, register_all, register_shapes
from mask2former.data.datasets.shapes_files import (
    MANIFEST,
    ShapesOptions,
    check_shapes_dataset,
    make_shapes_dataset,
    semantic_map,
)
from mask2former.data.datasets.shapes_scene import CATEGORIES, STUFF, THINGS, SceneRandom
from mask2former.evaluation.panoptic_quality import read_panoptic_png

REPO_ROOT = Path(__file__).resolve().parents[3]
SMALL = ShapesOptions(train=2, val=12, seed=1, min_size=48, max_size=160)
PREFIX = "datatest"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    assert make_shapes_dataset(root, SMALL)
    register_shapes(str(root), PREFIX)
    return root


def digest(scene) -> str:
    content = hashlib.sha256(scene.image.tobytes())
    content.update(scene.panoptic.astype("<i4").tobytes())
    content.update(json.dumps(scene.segments).encode())
    return content.hexdigest()[:16]


# Not to be updated lightly: figures that were measured on the data set hold for these pixels.
@pytest.mark.parametrize(
    "seed, size, expected",
    [(0, (), "655ba74ce252e813"), (1, (), "2e959ffaecbe9b60"), (2, (97, 131), "9ecd1c7f8448af5b")],
)
def test_scene_is_the_one_it_always_was(seed, size, expected):
    assert digest(draw_scene(seed, *size)) == expected


def test_random_numbers_are_pcg64s():
    random = SceneRandom(7)
    raw = np.random.PCG64([7]).random_raw(3)
    assert random.uniform(0, 1) == (int(raw[0]) >> 11) / 2**53
    assert random.integer(3, 3) == 3
    np.testing.assert_array_equal(random.bytes(3), raw[2:].astype("<u8").view(np.uint8)[:3])
    draws = [SceneRandom(k).integer(2, 5) for k in range(200)]
    assert set(draws) == {2, 3, 4, 5}


def test_scenes_cover_what_an_evaluator_must_handle():
    scenes = [draw_scene(seed) for seed in range(80)]
    seen = {s["category_id"] for scene in scenes for s in scene.segments}
    assert seen == {c.dataset_id for c in CATEGORIES}
    assert any(s["iscrowd"] for scene in scenes for s in scene.segments)
    assert any(not any(s["isthing"] for s in scene.segments) for scene in scenes), "no image without things"
    assert any((scene.panoptic == 0).any() for scene in scenes), "no void"
    sizes = {scene.panoptic.shape for scene in scenes}
    assert len(sizes) > 60 and any(h > w for h, w in sizes) and any(h < w for h, w in sizes)
    assert any(h % 2 and w % 2 for h, w in sizes)
    assert all(96 <= side <= 512 for size in sizes for side in size)


@pytest.mark.parametrize("seed", range(6))
def test_segments_describe_the_map(seed):
    scene = draw_scene(seed, 120, 90)
    assert scene.image.shape == (120, 90, 3) and scene.image.dtype == np.uint8
    assert scene.panoptic.dtype == np.int32
    assert set(np.unique(scene.panoptic)) - {0} == {s["id"] for s in scene.segments}
    stuff = [s["category_id"] for s in scene.segments if not s["isthing"]]
    assert len(stuff) == len(set(stuff)), "a stuff class has two segments"
    for segment in scene.segments:
        mask = scene.panoptic == segment["id"]
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, w, h = segment["bbox"]
        assert (x, y, x + w - 1, y + h - 1) == (cols[0], rows[0], cols[-1], rows[-1])
        assert segment["area"] == mask.sum()
        assert segment["isthing"] or not segment["iscrowd"]


def test_figures_overlap():
    """Some figure hides a part of another one: its visible part is smaller than the same figure elsewhere."""
    touching = 0
    for seed in range(20):
        scene = draw_scene(seed)
        boxes = [s["bbox"] for s in scene.segments if s["isthing"] and not s["iscrowd"]]
        for i, (x, y, w, h) in enumerate(boxes):
            touching += any(
                x < x2 + w2 and x2 < x + w and y < y2 + h2 and y2 < y + h for x2, y2, w2, h2 in boxes[:i]
            )
    assert touching > 10


@pytest.mark.parametrize("size", [(None, 100), (100, None), (15, 100)])
def test_impossible_scene_sizes_are_refused(size):
    with pytest.raises(ValueError, match="height"):
        draw_scene(0, *size)


def test_scene_goes_on_with_a_given_generator():
    random = SceneRandom(5)
    first, second = draw_scene(random, 64, 64), draw_scene(random, 64, 64)
    assert digest(first) == digest(draw_scene(5, 64, 64)) != digest(second)


def test_dataset_ids_are_not_contiguous_ids():
    assert [c.contiguous_id for c in CATEGORIES] == list(range(13))
    assert [c.contiguous_id for c in THINGS] == list(range(8)) and len(STUFF) == 5
    assert all(c.dataset_id != c.contiguous_id for c in CATEGORIES)
    # detectron2's COCO loader numbers classes in the order of their ids.
    assert [c.dataset_id for c in THINGS] == sorted(c.dataset_id for c in THINGS)


def tree(root: Path) -> dict[str, str]:
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_files_are_the_same_whenever_and_however_they_are_drawn(root, tmp_path):
    assert make_shapes_dataset(tmp_path / "again", SMALL, workers=1)
    assert tree(tmp_path / "again") == tree(root)
    assert len(tree(root)) == 3 * (SMALL.train + SMALL.val) + 4 + 1


def test_longer_split_starts_with_the_shorter_one(root, tmp_path):
    make_shapes_dataset(tmp_path / "longer", ShapesOptions(3, 13, SMALL.seed, SMALL.min_size, SMALL.max_size))
    longer, shorter = tree(tmp_path / "longer"), tree(root)
    images = [name for name in shorter if name.endswith(".png")]
    assert images and all(longer[name] == shorter[name] for name in images)


def test_other_seed_draws_other_images(root, tmp_path):
    make_shapes_dataset(tmp_path / "other", ShapesOptions(2, 2, 2, SMALL.min_size, SMALL.max_size))
    assert not set(tree(tmp_path / "other").values()) & set(tree(root).values())


def test_three_forms_agree(root):
    coco = COCO(str(root / "annotations" / "instances_val.json"))
    records = DatasetCatalog.get(f"{PREFIX}_val_panoptic")
    assert len(records) == SMALL.val
    to_dataset_id = {c.contiguous_id: c.dataset_id for c in CATEGORIES}
    for record in records:
        ids = read_panoptic_png(record["pan_seg_file_name"])
        semantic = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert Image.open(record["file_name"]).size == (record["width"], record["height"])
        assert ids.shape == semantic.shape == (record["height"], record["width"])
        np.testing.assert_array_equal(semantic == 255, ids == 0)
        annotations = {a["area"]: a for a in coco.imgToAnns[record["image_id"]]}
        things = [s for s in record["segments_info"] if s["isthing"]]
        assert len(coco.imgToAnns[record["image_id"]]) == len(things)
        for segment in record["segments_info"]:
            mask = ids == segment["id"]
            assert set(np.unique(semantic[mask])) == {segment["category_id"]}
            if segment["isthing"]:
                annotation = annotations[segment["area"]]
                np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), mask)
                assert annotation["category_id"] == to_dataset_id[segment["category_id"]]
                assert annotation["iscrowd"] == segment["iscrowd"]


def test_crowds_are_uncompressed_rle_as_in_coco(tmp_path):
    options = ShapesOptions(train=1, val=30, min_size=40, max_size=64)
    make_shapes_dataset(tmp_path / "shapes", options)
    content = json.loads((tmp_path / "shapes/annotations/instances_val.json").read_text())
    crowds = [a for a in content["annotations"] if a["iscrowd"]]
    assert crowds and all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    for annotation in crowds:
        size = annotation["segmentation"]["size"]
        decoded = mask_util.decode(mask_util.frPyObjects(annotation["segmentation"], *size))
        assert decoded.sum() == annotation["area"]
    assert min(a["id"] for a in content["annotations"]) == 1


def test_semantic_map_of_a_scene():
    scene = draw_scene(3, 80, 80)
    semantic = semantic_map(scene)
    for segment in scene.segments:
        name = next(c for c in CATEGORIES if c.dataset_id == segment["category_id"])
        assert (semantic[scene.panoptic == segment["id"]] == name.contiguous_id).all()
    assert ((semantic == 255) == (scene.panoptic == 0)).all()


def test_registered_forms(root):
    panoptic = MetadataCatalog.get(f"{PREFIX}_val_panoptic")
    assert panoptic.evaluator_type == "coco_panoptic_seg"
    assert panoptic.ignore_label == 255 and panoptic.label_divisor == 1000
    assert len(panoptic.thing_classes) == len(panoptic.thing_colors) == 8
    assert len(panoptic.stuff_classes) == len(panoptic.stuff_colors) == 13
    assert panoptic.thing_dataset_id_to_contiguous_id[11] == 0
    assert panoptic.stuff_dataset_id_to_contiguous_id[110] == 12
    assert MetadataCatalog.get(f"{PREFIX}_val_instance").evaluator_type == "coco"
    assert MetadataCatalog.get(f"{PREFIX}_val_sem_seg").evaluator_type == "sem_seg"

    instances = DatasetCatalog.get(f"{PREFIX}_val_instance")
    annotations = [a for record in instances for a in record["annotations"]]
    assert {a["category_id"] for a in annotations} <= set(range(8))
    assert all(a["bbox_mode"] == BoxMode.XYWH_ABS for a in annotations)
    for record in DatasetCatalog.get(f"{PREFIX}_val_sem_seg"):
        assert "segments_info" not in record and Path(record["sem_seg_file_name"]).is_file()


def test_data_set_is_registered_on_import():
    import mask2former  # noqa: F401

    for split in ("train", "val"):
        for form in ("panoptic", "instance", "sem_seg"):
            assert f"shapes_{split}_{form}" in DatasetCatalog.list()


@pytest.mark.parametrize("form", ["panoptic", "instance", "sem_seg"])
def test_missing_files_say_how_to_draw_them(tmp_path, form):
    prefix = f"datatest_missing_{form}"
    register_shapes(str(tmp_path / "nowhere"), prefix)
    with pytest.raises(FileNotFoundError, match=r"python tools/make_shapes_dataset\.py --output .*nowhere"):
        DatasetCatalog.get(f"{prefix}_val_{form}")


def test_registering_twice_changes_nothing():
    before = MetadataCatalog.get("shapes_val_panoptic").image_root
    register_all("/elsewhere")
    assert MetadataCatalog.get("shapes_val_panoptic").image_root == before


@pytest.fixture
def own_root(tmp_path) -> Path:
    root = tmp_path / "shapes"
    make_shapes_dataset(root, ShapesOptions(1, 2, min_size=32, max_size=48))
    return root


TINY = ShapesOptions(1, 2, min_size=32, max_size=48)


def test_data_set_that_is_there_is_kept(own_root):
    before = {p: p.stat().st_mtime_ns for p in own_root.rglob("*")}
    assert not make_shapes_dataset(own_root, TINY)
    assert {p: p.stat().st_mtime_ns for p in own_root.rglob("*")} == before
    assert make_shapes_dataset(own_root, TINY, force=True)


@pytest.mark.parametrize("harm", ["truncate", "change", "remove", "manifest", "no manifest"])
def test_damaged_data_set_is_drawn_again(own_root, harm):
    good = tree(own_root)
    victim = next((own_root / "val" / "images").iterdir())
    if harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif harm == "change":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif harm == "remove":
        victim.unlink()
    elif harm == "manifest":
        (own_root / MANIFEST).write_text('{"files": ')
    else:
        (own_root / MANIFEST).unlink()
    assert check_shapes_dataset(own_root) is not None
    assert make_shapes_dataset(own_root, TINY)
    assert tree(own_root) == good
    assert check_shapes_dataset(own_root) is None


def test_other_options_draw_again(own_root):
    assert make_shapes_dataset(own_root, ShapesOptions(1, 3, min_size=32, max_size=48))
    assert len(list((own_root / "val" / "images").iterdir())) == 3


def test_foreign_files_are_not_deleted(own_root):
    (own_root / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        make_shapes_dataset(own_root, ShapesOptions(1, 1))
    assert (own_root / "notes.txt").read_text() == "mine"


def test_interrupted_drawing_leaves_nothing_behind(tmp_path):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shapes_dataset(tmp_path / "shapes", TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_redrawing_keeps_what_was_there(own_root):
    good = tree(own_root)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shapes_dataset(own_root, ShapesOptions(1, 5, seed=4), progress=interrupt)
    assert tree(own_root) == good
    assert [p.name for p in own_root.parent.iterdir()] == ["shapes"]


@pytest.mark.parametrize(
    "options", [{"train": 0}, {"val": 0}, {"seed": -1}, {"min_size": 8}, {"min_size": 100, "max_size": 50}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        ShapesOptions(**options)


def test_command_draws_and_then_keeps(tmp_path, capsys):
    command = [sys.executable, "tools/make_shapes_dataset.py", "--output", str(tmp_path / "shapes")]
    command += ["--train", "1", "--val", "2", "--max-size", "100"]
    first = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert "Drew 1 training and 2 validation images" in first.stdout

    spec = importlib.util.spec_from_file_location("make_shapes_dataset", REPO_ROOT / command[1])
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main(command[2:]) == 0
    assert "Already there: 1 training and 2 validation images" in capsys.readouterr().out
    (tmp_path / "shapes" / "foreign").touch()
    assert tool.main([*command[2:], "--force"]) == 2
    assert "foreign" in capsys.readouterr().err
    assert tool.main([*command[2:], "--val", "0"]) == 2
    assert "at least one image" in capsys.readouterr().err
