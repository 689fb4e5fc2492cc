"""PQ against cases worked out by hand, and against panopticapi where it is installed."""

from __future__ import annotations

import io
import json
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mask2former.evaluation.panoptic_quality import (
    count_overlaps,
    ids_to_rgb,
    match_segments,
    panoptic_png,
    pq_compute,
    read_panoptic_png,
    rgb_to_ids,
)

THING, OTHER_THING, STUFF = 5, 9, 70
CATEGORIES = {
    THING: {"id": THING, "isthing": 1},
    OTHER_THING: {"id": OTHER_THING, "isthing": 1},
    STUFF: {"id": STUFF, "isthing": 0},
}


def row(*runs: tuple[int, int]) -> np.ndarray:
    """A one-line map of (segment id, pixels)."""
    return np.concatenate([np.full(count, segment, dtype=np.int32) for segment, count in runs])[None]


def segments(categories: dict[int, int], crowds: tuple[int, ...] = ()) -> list[dict]:
    return [{"id": k, "category_id": v, "iscrowd": int(k in crowds)} for k, v in categories.items()]


def compare(gt, gt_categories, pred, pred_categories, crowds=()):
    return match_segments(gt, segments(gt_categories, crowds), pred, segments(pred_categories), CATEGORIES)


def test_equal_maps_under_other_ids_are_perfect():
    stat = compare(
        row((1, 6), (2, 4), (0, 2)), {1: THING, 2: STUFF}, row((8, 6), (9, 4), (0, 2)), {8: THING, 9: STUFF}
    )
    assert stat[THING] == (1.0, 1, 0, 0)
    assert stat[STUFF] == (1.0, 1, 0, 0)
    results = stat.results(CATEGORIES)
    assert results["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 2}
    # A category that occurs nowhere has no say in the mean.
    assert results["Things"]["n"] == 1
    assert results["per_class"][OTHER_THING] == {"pq": 0.0, "sq": 0.0, "rq": 0.0}


def test_one_match_one_false_positive_one_false_negative():
    # Thing: IoU 6 / 8. Stuff is missed, and another thing is made up in its place.
    stat = compare(
        row((1, 8), (2, 4)), {1: THING, 2: STUFF}, row((1, 6), (0, 2), (3, 4)), {1: THING, 3: OTHER_THING}
    )
    assert stat[THING] == (0.75, 1, 0, 0)
    assert stat[STUFF] == (0.0, 0, 0, 1)
    assert stat[OTHER_THING] == (0.0, 0, 1, 0)
    results = stat.results(CATEGORIES)
    assert results["All"] == {"pq": 0.25, "sq": 0.25, "rq": pytest.approx(1 / 3), "n": 3}
    assert results["Things"]["pq"] == 0.375
    assert results["Stuff"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 1}


def test_two_things_one_found_weighs_the_miss_by_half():
    stat = compare(row((1, 4), (2, 4)), {1: THING, 2: THING}, row((7, 4), (0, 4)), {7: THING})
    assert stat[THING] == (1.0, 1, 0, 1)
    assert stat.results(CATEGORIES)["All"]["pq"] == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("predicted, matches", [(5, False), (6, True)])
def test_iou_of_exactly_a_half_is_no_match(predicted, matches):
    stat = compare(row((1, 10)), {1: THING}, row((1, predicted), (0, 10 - predicted)), {1: THING})
    assert stat[THING] == ((0.6, 1, 0, 0) if matches else (0.0, 0, 1, 1))


def test_category_must_agree():
    stat = compare(row((1, 4)), {1: THING}, row((1, 4)), {1: OTHER_THING})
    assert stat[THING] == (0.0, 0, 0, 1)
    assert stat[OTHER_THING] == (0.0, 0, 1, 0)


def test_void_does_not_count_in_the_union():
    # 4 pixels right, 8 on void: without the rule IoU would be 4 / 12.
    stat = compare(row((1, 4), (0, 8)), {1: THING}, row((1, 12)), {1: THING})
    assert stat[THING] == (1.0, 1, 0, 0)


@pytest.mark.parametrize("on_void, false_positives", [(5, 1), (6, 0)])
def test_prediction_more_than_half_on_void_is_ignored(on_void, false_positives):
    gt = row((0, on_void), (2, 10 - on_void), (2, 20))
    stat = compare(gt, {2: STUFF}, row((1, 10), (2, 20)), {1: THING, 2: STUFF})
    assert stat[THING] == (0.0, 0, false_positives, 0)
    assert stat[STUFF][1] == 1


def test_ids_that_the_ground_truth_does_not_list_are_not_void():
    stat = compare(row((1, 4), (3, 8)), {1: THING}, row((1, 4), (2, 8)), {1: THING, 2: OTHER_THING})
    assert stat[OTHER_THING] == (0.0, 0, 1, 0)


def test_crowd_is_neither_matched_nor_missed():
    missed = compare(row((1, 10)), {1: THING}, row((0, 10)), {}, crowds=(1,))
    assert missed[THING] == (0.0, 0, 0, 0)
    covered = compare(row((1, 10)), {1: THING}, row((4, 10)), {4: THING}, crowds=(1,))
    assert covered[THING] == (0.0, 0, 0, 0)


def test_crowd_of_another_category_does_not_excuse_a_prediction():
    stat = compare(row((1, 10)), {1: THING}, row((4, 10)), {4: OTHER_THING}, crowds=(1,))
    assert stat[OTHER_THING] == (0.0, 0, 1, 0)


def test_void_and_crowd_excuse_a_prediction_together():
    # 3 of 10 pixels on void, 3 on the crowd: neither alone is more than half.
    gt = row((0, 3), (1, 3), (2, 4))
    stat = compare(gt, {1: THING, 2: STUFF}, row((4, 10)), {4: THING}, crowds=(1,))
    assert stat[THING] == (0.0, 0, 0, 0)
    assert stat[STUFF] == (0.0, 0, 0, 1)


def test_only_the_last_of_several_crowds_excuses():
    gt = row((1, 10), (2, 10))
    stat = compare(gt, {1: THING, 2: THING}, row((4, 10), (5, 10)), {4: THING, 5: THING}, crowds=(1, 2))
    assert stat[THING] == (0.0, 0, 1, 0)


def test_stuff_must_be_one_segment():
    gt = row((1, 6), (2, 4), (1, 3))
    categories = {1: STUFF, 2: THING}
    merged = compare(gt, categories, row((1, 6), (2, 4), (1, 3)), {1: STUFF, 2: THING})
    assert merged[STUFF] == (1.0, 1, 0, 0)
    split = compare(gt, categories, row((1, 6), (2, 4), (3, 3)), {1: STUFF, 3: STUFF, 2: THING})
    assert split[STUFF] == (6 / 9, 1, 1, 0)


def test_area_of_the_ground_truth_is_the_one_in_the_file():
    gt_segments = [{"id": 1, "category_id": THING, "iscrowd": 0, "area": 16}]
    stat = match_segments(row((1, 10)), gt_segments, row((1, 10)), segments({1: THING}), CATEGORIES)
    assert stat[THING] == (10 / 16, 1, 0, 0)


def test_images_without_segments():
    nothing = compare(row((0, 9)), {}, row((0, 9)), {})
    results = nothing.results(CATEGORIES)
    assert results["All"]["n"] == 0 and math.isnan(results["All"]["pq"])
    assert compare(row((1, 9)), {1: STUFF}, row((0, 9)), {})[STUFF] == (0.0, 0, 0, 1)
    assert compare(row((0, 9)), {}, row((1, 9)), {1: STUFF})[STUFF] == (0.0, 0, 0, 0)


def test_images_add_up():
    total = compare(row((1, 4)), {1: THING}, row((1, 3), (0, 1)), {1: THING})
    total += compare(row((1, 4)), {1: THING}, row((0, 4)), {})
    total += compare(row((2, 4)), {2: STUFF}, row((1, 4)), {1: THING})
    assert total[THING] == (0.75, 1, 1, 1)
    assert total[STUFF] == (0.0, 0, 0, 1)


@pytest.mark.parametrize(
    "pred, categories, message",
    [
        (row((1, 3), (4, 1)), {1: THING}, r"image None.*\[4\].*does not list"),
        (row((1, 4)), {1: THING, 6: THING}, r"lists ids \[6\]"),
        (row((1, 4)), {1: 33}, r"\[33\].*\[5, 9, 70\]"),
        (row((1, 5)), {1: THING}, r"prediction is 1x5.*ground truth 1x4"),
    ],
)
def test_malformed_predictions_are_refused(pred, categories, message):
    with pytest.raises(ValueError, match=message):
        compare(row((1, 4)), {1: THING}, pred, categories)


def test_two_segments_of_one_id_are_refused():
    twice = segments({1: THING}) + segments({1: STUFF})
    with pytest.raises(ValueError, match="share an id"):
        match_segments(row((1, 4)), segments({1: THING}), row((1, 4)), twice, CATEGORIES)


def test_overlaps_equal_counting_every_pixel():
    rng = np.random.default_rng(0)
    gt = np.kron(rng.integers(0, 4, (6, 5)), np.ones((7, 3), dtype=np.int64)) * 4_000_000
    pred = rng.integers(0, 3, gt.shape) * 8_000_000
    counted: dict[tuple[int, int], int] = {}
    for pair in zip(gt.ravel().tolist(), pred.ravel().tolist(), strict=True):
        counted[pair] = counted.get(pair, 0) + 1
    ours = zip(*(part.tolist() for part in count_overlaps(gt, pred)), strict=True)
    assert {(g, p): n for g, p, n in ours} == counted


def test_ids_survive_the_png_coding():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 70001, 2**24 - 1]], dtype=np.int32)
    np.testing.assert_array_equal(rgb_to_ids(ids_to_rgb(ids)), ids)
    for wrong in (-1, 2**24):
        with pytest.raises(ValueError, match="do not fit"):
            ids_to_rgb(np.array([[wrong]]))


@pytest.mark.parametrize("highest", [1, 200, 300, 2**16 + 5, 2**24 - 1])
def test_png_of_ids_is_a_png_to_all(highest):
    rng = np.random.default_rng(highest)
    small = np.append(rng.integers(0, highest + 1, 34), highest).reshape(5, 7)
    for ids in (small, np.kron(small, np.ones((9, 11), dtype=int)).astype(np.int32)):
        content = panoptic_png(ids)
        with Image.open(io.BytesIO(content)) as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), ids_to_rgb(ids))
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # checksums
        read = read_panoptic_png(io.BytesIO(content))
        assert read.dtype == np.int32
        np.testing.assert_array_equal(read, ids)
    for wrong in (-1, 2**24):
        with pytest.raises(ValueError, match="do not fit"):
            panoptic_png(np.array([[wrong]]))


def test_map_with_an_alpha_channel_is_read(tmp_path):
    ids = np.arange(12, dtype=np.int32).reshape(3, 4) * 70000
    rgba = np.dstack([ids_to_rgb(ids), np.full((3, 4), 9, dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "map.png")
    np.testing.assert_array_equal(read_panoptic_png(tmp_path / "map.png"), ids)
    Image.fromarray(rgba[..., 0]).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"expected a panoptic map of shape \(height, width, 3\)"):
        read_panoptic_png(tmp_path / "grey.png")


@pytest.mark.parametrize("zoom", [1, 6])
def test_overlaps_are_those_of_counting_pixels(zoom):
    rng = np.random.default_rng(zoom)
    zoomed = np.ones((zoom, zoom), dtype=np.int32)
    true = np.kron(rng.choice([0, 3, 70000, 2**24 - 1], (20, 30)), zoomed)
    predicted = np.kron(rng.integers(0, 4, (20, 30)), zoomed).astype(np.int32)
    found = [a.tolist() for a in count_overlaps(true, predicted)]
    pixels = Counter(zip(true.ravel().tolist(), predicted.ravel().tolist(), strict=True))
    assert list(zip(*found, strict=True)) == [(g, p, n) for (g, p), n in sorted(pixels.items())]


def write_case(folder, gt_maps, gt_annotations, pred_maps, pred_annotations, categories):
    paths = []
    for name, maps, infos in (("gt", gt_maps, gt_annotations), ("pred", pred_maps, pred_annotations)):
        (folder / name).mkdir()
        content = []
        for image_id, (ids, info) in enumerate(zip(maps, infos, strict=True)):
            Image.fromarray(ids_to_rgb(ids)).save(folder / name / f"{image_id}.png")
            content.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": info})
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"annotations": content, "categories": categories}))
        paths.append(str(path))
    return paths


def random_case(folder, seed, images=20):
    """Overlapping boxes with void, crowds, unlisted ids and predictions of every quality."""
    rng = np.random.default_rng(seed)
    categories = [{"id": 7 * i + 3, "isthing": i % 2} for i in range(6)]
    known = [c["id"] for c in categories]
    gt_maps, gt_info, pred_maps, pred_info = [], [], [], []
    for _ in range(images):
        height, width = rng.integers(5, 60, 2)
        count = int(rng.integers(1, 9))

        def boxes(height=height, width=width, count=count):
            ids = np.zeros((height, width), dtype=np.int64)
            for k in range(1, count + 1):
                y, x = rng.integers(0, height), rng.integers(0, width)
                ids[y : rng.integers(y, height) + 1, x : rng.integers(x, width) + 1] = k
            return ids

        gt = boxes()
        pred = gt.copy() if rng.random() < 0.7 else boxes()
        if rng.random() < 0.7:
            noisy = rng.random(pred.shape) < 0.7 * rng.random()
            pred[noisy] = np.roll(pred, 3, axis=0)[noisy]
        if rng.random() < 0.3:
            pred[gt == rng.integers(0, count + 1)] = count + 1
        gt_category = rng.choice(known, count + 2)
        pred_category = np.where(rng.random(count + 2) < 0.8, gt_category, rng.choice(known, count + 2))
        gt_ids = np.concatenate([[0], rng.choice(2**24 - 1, count + 1, replace=False) + 1])
        pred_ids = np.concatenate([[0], rng.choice(2**24 - 1, count + 1, replace=False) + 1])
        gt_maps.append(gt_ids[gt])
        pred_maps.append(pred_ids[pred])
        gt_info.append(
            [
                {
                    "id": int(gt_ids[k]),
                    "category_id": int(gt_category[k]),
                    "iscrowd": int(rng.random() < 0.25),
                    "area": int((gt == k).sum()),
                }
                for k in np.unique(gt)
                if k > 0 and rng.random() < 0.95
            ]
        )
        pred_info.append(
            [{"id": int(pred_ids[k]), "category_id": int(pred_category[k])} for k in np.unique(pred) if k > 0]
        )
    return write_case(folder, gt_maps, gt_info, pred_maps, pred_info, categories)


@pytest.mark.parametrize("seed", range(3))
def test_equals_panopticapi(tmp_path, seed):
    reference = pytest.importorskip(
        "panopticapi.evaluation",
        reason="needs panopticapi, which is not on PyPI: pip install git+https://github.com/cocodataset/panopticapi",
    )
    gt_json, pred_json = random_case(tmp_path, seed)
    ours, theirs = pq_compute(gt_json, pred_json), reference.pq_compute(gt_json, pred_json)
    assert ours["All"]["n"] == theirs["All"]["n"] == 6
    for group in ("All", "Things", "Stuff"):
        assert ours[group] == pytest.approx(theirs[group], abs=1e-12)
    for category, scores in theirs["per_class"].items():
        assert ours["per_class"][category] == pytest.approx(scores, abs=1e-12)


def test_number_of_workers_changes_nothing(tmp_path):
    gt_json, pred_json = random_case(tmp_path, seed=5)
    one, many = pq_compute(gt_json, pred_json, num_workers=1), pq_compute(gt_json, pred_json, num_workers=4)
    assert one == many
    assert 0 < one["All"]["pq"] < 1


def test_missing_prediction_is_an_error(tmp_path):
    gt_json, pred_json = random_case(tmp_path, seed=1, images=3)
    with open(pred_json) as f:
        content = json.load(f)
    del content["annotations"][1]
    with open(pred_json, "w") as f:
        json.dump(content, f)
    with pytest.raises(ValueError, match=r"no prediction for 1 images.*\[1\]"):
        pq_compute(gt_json, pred_json)
