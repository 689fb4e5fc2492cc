"""The checkpoint that comes with the project: it is there, and what it segments is right."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.engine import DefaultPredictor

from mask2former import get_mask2former_cfg
from mask2former.data.datasets.shapes import draw_scene
from mask2former.data.datasets.shapes_scene import CATEGORIES, SceneRandom, scene_size
from mask2former.evaluation.panoptic_quality import PQStat, match_segments
from tests.tools.loading import REPO, load_tool

CONFIG = REPO / "configs/shapes/maskformer2_small_shapes.yaml"
WEIGHTS = CONFIG.with_suffix(".pth")


@pytest.fixture(scope="module")
def predictor():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(WEIGHTS), "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False]
    yield DefaultPredictor(get_mask2former_cfg(CONFIG, opts))
    torch.set_num_threads(before)


def test_file_is_small_and_holds_the_whole_model(predictor):
    assert WEIGHTS.stat().st_size < 12e6
    saved = torch.load(WEIGHTS, weights_only=True)["model"]
    model = predictor.model.state_dict()
    assert set(saved) == set(model)
    assert all(torch.equal(saved[name].float(), value.float()) for name, value in model.items())


@pytest.mark.slow
def test_scenes_of_the_validation_set_are_segmented_rightly(predictor):
    categories = {c.dataset_id: {"isthing": c.isthing} for c in CATEGORIES}
    dataset_ids = {c.contiguous_id: c.dataset_id for c in CATEGORIES}
    total = PQStat()
    for index in range(24):
        random = SceneRandom(0, 1, index)  # those of the split "val", in the order of its files
        scene = draw_scene(random, *scene_size(random, 96, 512))
        segments, found = predictor(scene.image[:, :, ::-1].copy())["panoptic_seg"]
        found = [{**s, "category_id": dataset_ids[s["category_id"]]} for s in found]
        total += match_segments(scene.panoptic, scene.segments, segments.numpy(), found, categories, index)
    quality = total.results(categories)
    assert quality["Stuff"]["pq"] > 0.9
    assert quality["Things"]["pq"] > 0.5 and quality["Things"]["sq"] > 0.85
    assert quality["All"]["n"] == 13


def test_demo_of_drawn_scenes_uses_it_without_being_asked(tmp_path, capsys):
    tool = load_tool("demo")
    report = tmp_path / "report.json"
    words = ["--draw", "1", "--device", "cpu", "--output", str(tmp_path / "scene.png"), "--json", str(report)]
    assert tool.main(words) == 0
    assert "the weights are random" not in capsys.readouterr().err
    content = json.loads(report.read_text())
    assert content["random_weights"] is False and content["weights"] == str(WEIGHTS)
    truth = {c.name for c in CATEGORIES for s in draw_scene(0).segments if s["category_id"] == c.dataset_id}
    names = {region["name"] for region in content["results"][0]["regions"]}
    assert names and names <= truth
    # Other weights, or none, where they are asked for.
    assert tool.parse_args(["--draw", "1", "--weights", "x.pth"]).weights == "x.pth"
    assert tool.parse_args(["--draw", "1", "--opts", "MODEL.WEIGHTS", ""]).weights is None
    assert tool.parse_args(["photo.jpg"]).weights is None
