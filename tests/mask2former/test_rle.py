"""Masks as COCO's run lengths, and the output formats that a config may ask for, on a CPU."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from mask2former import kernels
from mask2former.postprocess_options import PostprocessOptions
from mask2former.postprocessing import postprocess
from mask2former.rle import RLEMasks, encode_labels
from tests.golden import mini_cfg

TEST = "MODEL.MASK_FORMER.TEST."


def random_masks(count=7, size=(37, 53)) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 1, 5, 6, generator=rng)
    masks = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[:, 0] > 0
    masks[0], masks[1] = False, True
    return masks


def test_encoding_and_decoding_gives_the_same_masks():
    masks = random_masks()
    rles = RLEMasks.encode(masks)
    assert len(rles) == len(masks)
    assert rles[2]["size"] == [37, 53]
    assert (
        rles[2]["counts"] == mask_util.encode(np.asfortranarray(masks[2].numpy().astype(np.uint8)))["counts"]
    )
    assert torch.equal(rles.decode((37, 53)), masks)
    assert RLEMasks([]).decode((4, 5)).shape == (0, 4, 5)
    assert all(isinstance(rle["counts"], str) for rle in rles.to_json())


@pytest.mark.parametrize(
    "masks", [torch.zeros(3, 4), torch.zeros(4, 5, dtype=torch.bool), torch.zeros(1, 2, 3)]
)
def test_encoding_anything_but_bool_masks_is_refused(masks):
    with pytest.raises(ValueError, match=r"expected \(N, height, width\) torch.bool"):
        RLEMasks.encode(masks)


@pytest.mark.parametrize(
    "index",
    [
        slice(1, 5, 2),
        [4, 0, 0],
        torch.tensor([6, 2]),
        torch.tensor([True, False, True, False, False, True, True]),
        np.array([3]),
        torch.zeros(7, dtype=torch.bool),
        torch.tensor([], dtype=torch.int64),
    ],
)
def test_indexing_is_that_of_a_tensor_of_masks(index):
    masks = random_masks()
    assert RLEMasks.encode(masks)[index] == RLEMasks.encode(masks[index])


def test_instances_with_rle_can_be_indexed_moved_and_concatenated():
    masks = random_masks()
    instances = Instances(
        (37, 53),
        pred_masks_rle=RLEMasks.encode(masks),
        scores=torch.arange(7.0),
        pred_boxes=Boxes(torch.zeros(7, 4)),
    )
    best = instances.to("cpu")[instances.scores > 3]
    assert torch.equal(best.pred_masks_rle.decode((37, 53)), masks[4:])
    both = Instances.cat([best, instances])
    assert torch.equal(both.pred_masks_rle.decode((37, 53)), torch.cat([masks[4:], masks]))


@pytest.mark.skipif(not kernels.available(), reason=f"the kernels are not built: {kernels.BUILD_HINT}")
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (37, 53), (700, 900)])
def test_strings_of_the_compiled_coder_are_pycocotools(size):
    rng = np.random.default_rng(0)
    noise = rng.random(size) < 0.5
    blocks = np.kron(rng.random((3, 4)) < 0.5, np.ones((-(-size[0] // 3), -(-size[1] // 4)), bool))
    blocks = blocks[: size[0], : size[1]]
    for mask in (noise, blocks, ~blocks, np.zeros(size, bool), np.ones(size, bool)):
        flat = mask.reshape(-1, order="F").astype(np.int8)
        boundaries = np.flatnonzero(np.diff(flat, prepend=0)).astype(np.int32)
        encode = kernels.load().postprocess.encode_runs
        (counts,) = encode(boundaries.ctypes.data, len(boundaries), [0], [len(boundaries)], mask.size)
        assert counts == mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def run(**changes) -> dict:
    rng = torch.Generator().manual_seed(1)
    values = {"num_classes": 6, "semantic_on": True, "instance_on": True, "panoptic_on": True, "topk": 12}
    (result,) = postprocess(
        torch.randn(1, 9, 7, generator=rng) * 3,
        torch.randn(1, 9, 8, 12, generator=rng) * 4,
        padded_size=(32, 48),
        image_sizes=[(30, 45)],
        output_sizes=[(40, 50)],
        options=PostprocessOptions(**{**values, **changes}),
        thing_classes=frozenset({0, 1, 2}),
    )
    return result


def test_rle_instances_are_the_bitmask_instances():
    masks, rle = run()["instances"], run(instance_format="rle")["instances"]
    assert len(masks) > 3
    assert not rle.has("pred_masks")
    assert torch.equal(rle.pred_masks_rle.decode(rle.image_size), masks.pred_masks)
    assert torch.equal(rle.scores, masks.scores) and torch.equal(rle.pred_classes, masks.pred_classes)


@pytest.mark.parametrize("before", [True, False])
def test_labels_are_the_argmax_of_the_scores(before):
    changes = {} if before else {"instance_on": False, "panoptic_on": False, "resize_before_inference": False}
    scores, labels = run(**changes), run(semantic_format="labels", **changes)
    assert "sem_seg" not in labels
    assert torch.equal(labels["sem_seg_labels"], scores["sem_seg"].argmax(0))


def test_formats_of_a_config():
    assert PostprocessOptions.from_config(mini_cfg("resnet50-mini")).instance_format == "bitmask"
    assert PostprocessOptions.from_config(mini_cfg("resnet50-mini")).semantic_format == "scores"
    cfg = mini_cfg("resnet50-mini", (TEST + "INSTANCE_FORMAT", "rle", TEST + "SEMANTIC_FORMAT", "labels"))
    options = PostprocessOptions.from_config(cfg)
    assert (options.instance_format, options.semantic_format) == ("rle", "labels")


@pytest.mark.parametrize("key", ["INSTANCE_FORMAT", "SEMANTIC_FORMAT"])
def test_unknown_format_names_the_key_and_the_choices(key):
    with pytest.raises(ValueError, match=rf"TEST\.{key} is 'polygons'; expected one of auto, "):
        PostprocessOptions.from_config(mini_cfg("resnet50-mini", (TEST + key, "polygons")))


@pytest.mark.parametrize("kind", ["noise", "blocks", "one label"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_masks_of_labels_are_those_of_pycocotools(kind, dtype):
    rng = np.random.default_rng(3)
    for height, width in ((1, 1), (1, 9), (7, 1), (13, 29), (480, 640)):
        labels = rng.integers(0, 5, (height, width)) * 30
        if kind == "blocks":
            labels = np.kron(rng.integers(0, 5, (height, width)), np.ones((3, 5), dtype=int))
        elif kind == "one label":
            labels[:] = 7
        labels = labels.astype(dtype)
        encoded = encode_labels(labels)
        assert list(encoded) == np.unique(labels).tolist()
        for label, rle in encoded.items():
            assert rle == mask_util.encode(np.asfortranarray((labels == label).astype(np.uint8)))


def test_long_runs_of_labels():
    """Up to six characters a run, and differences below zero."""
    labels = np.zeros((60000, 600), dtype=np.uint8)
    labels[-1, -1] = labels[5, 5] = labels[40000, 0] = 1
    for label, rle in encode_labels(labels).items():
        assert rle == mask_util.encode(np.asfortranarray((labels == label).astype(np.uint8)))
