"""What decides an engine's key."""

import json
import math

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from d2_trt.cache_key import canonical, digest, graph_config, key_ingredients, source_digest, weights_digest
from d2_trt.config import add_tensorrt_config
from d2_trt.errors import CacheError
from d2_trt.shape_range import ShapeRange
from mask2former.config import add_maskformer2_config
from tests.d2_trt.cache_helpers import ingredients


def network(dtype=torch.float32) -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module.register_buffer("pixel_mean", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.linspace(-1, 1 + i, parameter.numel()).view_as(parameter))
    return module.to(dtype)


def test_digest_is_of_the_content():
    assert weights_digest(network()) == weights_digest(network())
    assert len(weights_digest(network())) == 64


def test_digest_does_not_depend_on_memory_layout_or_order():
    module = network()
    other = network().to(memory_format=torch.channels_last)
    assert not other[0].weight.is_contiguous()
    assert weights_digest(other) == weights_digest(module)
    reordered = network()
    weight = reordered[0].weight
    del reordered[0].weight
    reordered[0].register_parameter("weight", weight)
    assert next(iter(dict(reordered.named_parameters()))) == "0.bias"
    assert weights_digest(reordered) == weights_digest(module)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.data.view(-1).__setitem__(5, 0.123),
        lambda m: m[1].running_mean.__setitem__(0, 1.0),
        lambda m: m[1].num_batches_tracked.add_(1),
        lambda m: m.pixel_mean.__setitem__(2, 9.0),
        lambda m: m[2].weight.data.mul_(-1),
        lambda m: m.half(),
        lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.detach().reshape(4, 2))),
        lambda m: m.register_buffer("extra", torch.zeros(0)),
        lambda m: m.register_module("3", m._modules.pop("2")),
    ],
    ids=[
        "one weight",
        "buffer",
        "0-d buffer",
        "non-persistent buffer",
        "sign",
        "dtype",
        "shape",
        "empty buffer",
        "name",
    ],
)
def test_digest_notices(change):
    module, before = network(), weights_digest(network())
    change(module)
    assert weights_digest(module) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_digest_of_every_float_type(dtype):
    changed = network(dtype)
    changed[2].bias.data[0] += 1
    assert weights_digest(network(dtype)) == weights_digest(network(dtype)) != weights_digest(changed)


def test_digest_of_many_tensors_holds_few_at_a_time(monkeypatch):
    monkeypatch.setattr("d2_trt.cache_key._PENDING_BYTES", 100)
    bounded = weights_digest(network())
    monkeypatch.undo()
    assert bounded == weights_digest(network())


def test_weights_without_data_are_refused():
    with pytest.raises(CacheError, match=r"0\.weight is a tensor on meta"):
        weights_digest(network().to("meta"))
    sparse = nn.Module()
    sparse.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(CacheError, match=r"table is a tensor on cpu with layout torch\.sparse_coo"):
        weights_digest(sparse)


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    add_tensorrt_config(cfg)
    return cfg


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.WEIGHTS", "other.pkl"),
        ("MODEL.DEVICE", "cpu"),
        ("MODEL.BACKEND", "tensorrt"),
        ("MODEL.TENSORRT.ON_ERROR", "torch"),
        ("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True),
        ("MODEL.MASK_FORMER.DICE_WEIGHT", 5.0),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 3),
        ("SOLVER.BASE_LR", 1.0),
        ("INPUT.MIN_SIZE_TEST", 640),
        ("TEST.BATCH_SIZE", 4),
    ],
)
def test_keys_that_do_not_change_the_network_do_not_change_its_config(cfg, key, value):
    before = digest(graph_config(cfg))
    cfg.merge_from_list([key, value])
    assert digest(graph_config(cfg)) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.DEPTH", 101),
        ("MODEL.BACKBONE.NAME", "D2SwinTransformer"),
        ("MODEL.SWIN.WINDOW_SIZE", 12),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 200),
        ("MODEL.MASK_FORMER.NHEADS", 4),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 19),
        ("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]),
        ("MODEL.META_ARCHITECTURE", "MaskFormer"),
    ],
)
def test_keys_that_change_the_network_change_its_config(cfg, key, value):
    before = digest(graph_config(cfg))
    cfg.merge_from_list([key, value])
    assert digest(graph_config(cfg)) != before


def test_keys_of_unknown_backbones_count(cfg):
    before = digest(graph_config(cfg))
    cfg.MODEL.MY_BACKBONE = type(cfg)({"HEADS": 3})
    assert digest(graph_config(cfg)) != before


def test_ingredients_are_readable_json():
    value = ingredients(3)
    assert json.loads(canonical(value)) == value
    assert value["compute_capability"] == "9.0"
    assert value["shapes"] == {"min": [1, 256, 256], "opt": [1, 800, 1088], "max": [1, 1344, 1344]}


def test_every_ingredient_must_be_given():
    with pytest.raises(TypeError, match="gpu"):
        key_ingredients(
            weights="",
            modules="",
            config={},
            options={},
            shapes=ShapeRange.fixed(1, 32, 32),
            versions={},
            plugins={},
            tensorrt="",
            compute_capability=(9, 0),
        )


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": ShapeRange((1, 256, 256), (1, 800, 1088), (2, 1344, 1344))},
        {"options": {"precision": "bf16"}},
        {"versions": {"d2_trt": "0.1.0", "detectron2": "0.6"}},
        {"compute_capability": (8, 0)},
    ],
)
def test_key_changes_with_its_ingredients(change):
    assert digest(ingredients(**change)) != digest(ingredients())


def test_key_does_not_depend_on_the_order_of_ingredients():
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, {1}, object(), b"bytes"])
def test_value_that_is_not_json_is_refused(value):
    with pytest.raises(CacheError, match="Allowed: None, bools, finite numbers"):
        canonical({"key": [value]})


def test_source_digest_notices_an_edited_file(tmp_path):
    (tmp_path / "converters").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "converters" / "b.py").write_text("y = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "a.pyc").write_bytes(b"compiled")
    assert source_digest(tmp_path) == before
    (tmp_path / "converters" / "b.py").write_text("y = 2\n")
    edited = source_digest(tmp_path)
    (tmp_path / "converters" / "b.py").rename(tmp_path / "b.py")
    assert len({before, edited, source_digest(tmp_path)}) == 3


def test_source_digest_of_nothing_is_refused(tmp_path):
    with pytest.raises(CacheError, match="no Python files"):
        source_digest(tmp_path)
