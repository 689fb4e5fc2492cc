"""Post-processing against the official release, and against a plain per-query version of its rules."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks

from mask2former import postprocessing
from mask2former.postprocess_options import PostprocessOptions
from mask2former.postprocessing import postprocess
from tests.golden import load_arrays, load_json, mini_cfg, unpack_masks

SPEC = load_json("postprocess")
CASES = range(len(SPEC["cases"]))


@pytest.fixture(scope="module")
def arrays():
    return load_arrays("postprocess")


def options(**changes) -> PostprocessOptions:
    values = {
        "num_classes": SPEC["num_classes"],
        "object_mask_threshold": SPEC["object_mask_threshold"],
        "overlap_threshold": SPEC["overlap_threshold"],
        "topk": SPEC["topk"],
        "semantic_on": False,
    }
    return PostprocessOptions(**{**values, **changes})


def run_case(arrays, case: int, opts: PostprocessOptions, things=None) -> dict:
    spec = SPEC["cases"][case]
    (result,) = postprocess(
        torch.from_numpy(arrays[f"case{case}/pred_logits"])[None],
        torch.from_numpy(arrays[f"case{case}/pred_masks"])[None],
        padded_size=tuple(spec["padded"]),
        image_sizes=[tuple(spec["image_size"])],
        output_sizes=[tuple(spec["output_size"])],
        options=opts,
        thing_classes=frozenset(SPEC["thing_contiguous_ids"] if things is None else things),
    )
    return result


def check_instances(instances, arrays, prefix: str) -> None:
    order = instances.scores.argsort(descending=True)
    scores = torch.from_numpy(arrays[f"{prefix}/scores"])
    torch.testing.assert_close(instances.scores[order], scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(instances.pred_classes[order].numpy(), arrays[f"{prefix}/classes"])
    masks = unpack_masks(arrays[f"{prefix}/masks_packed"], (len(scores), *instances.image_size))
    assert instances.pred_masks.dtype == torch.bool
    assert np.mean(instances.pred_masks[order].numpy() != masks) <= 1e-3


@pytest.fixture(params=["one chunk", "many chunks"])
def chunking(request, monkeypatch):
    """The results may not depend on how the work is cut."""
    if request.param == "many chunks":
        monkeypatch.setattr(postprocessing, "CPU_CHUNK_BYTES", 100_000)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("chunking")
def test_all_tasks_together_equal_the_release(arrays, case):
    result = run_case(arrays, case, options(semantic_on=True, instance_on=True, panoptic_on=True))
    segments, info = result["panoptic_seg"]
    assert info == SPEC["cases"][case]["segments_info"]
    assert np.mean(segments.numpy() != arrays[f"case{case}/panoptic_seg"]) <= 1e-3
    assert len(result["instances"]) == SPEC["cases"][case]["instances_things_only"]
    check_instances(result["instances"], arrays, f"case{case}/instances_things_only")
    expected = arrays[f"case{case}/sem_seg_fp16"].astype(np.float32)
    np.testing.assert_allclose(result["sem_seg"].numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("chunking")
def test_each_task_alone_equals_the_release(arrays, case):
    segments, info = run_case(arrays, case, options(panoptic_on=True))["panoptic_seg"]
    assert info == SPEC["cases"][case]["segments_info"]
    assert np.mean(segments.numpy() != arrays[f"case{case}/panoptic_seg"]) <= 1e-3
    result = run_case(arrays, case, options(instance_on=True), things=())
    assert set(result) == {"instances"}
    check_instances(result["instances"], arrays, f"case{case}/instances_all")


def panoptic_by_query(probs, masks, opts, things):
    """The release's rules, one query at a time."""
    scores, labels = probs.max(-1)
    keep = (labels != opts.num_classes) & (scores > opts.object_mask_threshold)
    segments = torch.zeros(masks.shape[-2:], dtype=torch.int32)
    info, stuff = [], {}
    if not keep.any():
        return segments, info
    scores, labels, masks = scores[keep], labels[keep].tolist(), masks[keep]
    winner = (scores[:, None, None] * masks).argmax(0)
    for k, label in enumerate(labels):
        inside = masks[k] >= 0.5
        mask = (winner == k) & inside
        if not mask.any() or (winner == k).sum().item() / inside.sum().item() < opts.overlap_threshold:
            continue
        if label not in things:
            if label in stuff:
                segments[mask] = stuff[label]
                continue
            stuff[label] = len(info) + 1
        segments[mask] = len(info) + 1
        info.append({"id": len(info) + 1, "isthing": label in things, "category_id": label})
    return segments, info


@pytest.mark.parametrize("seed", range(20))
def test_panoptic_with_ties_equals_the_rules_applied_query_by_query(seed):
    rng = torch.Generator().manual_seed(seed)
    queries, classes, things = 12, 5, {0, 1}
    # Coarse values, so that equal probabilities, equal scores and masks of exactly 0.5 are common.
    logits = torch.randint(-2, 5, (1, queries, classes + 1), generator=rng).float()
    masks = torch.randint(-2, 3, (1, queries, 9, 11), generator=rng).float()
    masks[0, 3] = masks[0, 2]
    logits[0, 3] = logits[0, 2]
    opts = PostprocessOptions(
        num_classes=classes,
        panoptic_on=True,
        semantic_on=False,
        object_mask_threshold=0.3,
        overlap_threshold=0.4,
    )
    (result,) = postprocess(
        logits,
        masks,
        padded_size=(9, 11),
        image_sizes=[(9, 11)],
        output_sizes=[(9, 11)],
        options=opts,
        thing_classes=frozenset(things),
    )
    segments, info = panoptic_by_query(logits[0].softmax(-1), masks[0].sigmoid(), opts, things)
    assert result["panoptic_seg"][1] == info
    assert torch.equal(result["panoptic_seg"][0], segments)


def test_image_without_any_kept_query_gives_empty_results():
    logits = torch.zeros(1, 6, 4)
    logits[..., -1] = 10.0  # "no object"
    opts = PostprocessOptions(
        num_classes=3,
        semantic_on=False,
        instance_on=True,
        panoptic_on=True,
        object_mask_threshold=0.8,
        topk=4,
    )
    (result,) = postprocess(
        logits,
        torch.randn(1, 6, 8, 8),
        padded_size=(32, 32),
        image_sizes=[(30, 31)],
        output_sizes=[(15, 20)],
        options=opts,
        thing_classes=frozenset(),
    )
    segments, info = result["panoptic_seg"]
    assert info == [] and segments.shape == (15, 20) and not segments.any()
    assert len(result["instances"]) == 0 and result["instances"].pred_masks.shape == (0, 15, 20)
    assert result["instances"].pred_boxes.tensor.shape == (0, 4)


def test_batch_of_different_sizes_equals_its_images_alone(arrays):
    opts = options(semantic_on=True, instance_on=True, panoptic_on=True)
    logits = torch.from_numpy(np.stack([arrays["case0/pred_logits"], arrays["case1/pred_logits"]]))
    masks = torch.randn(2, logits.shape[1], 24, 32, generator=torch.Generator().manual_seed(0)) * 4
    image_sizes, output_sizes = [(90, 121), (96, 100)], [(120, 161), (50, 47)]
    together = postprocess(
        logits,
        masks,
        padded_size=(96, 128),
        image_sizes=image_sizes,
        output_sizes=output_sizes,
        options=opts,
        thing_classes=frozenset(range(8)),
    )
    for i in range(2):
        (alone,) = postprocess(
            logits[i : i + 1],
            masks[i : i + 1],
            padded_size=(96, 128),
            image_sizes=image_sizes[i : i + 1],
            output_sizes=output_sizes[i : i + 1],
            options=opts,
            thing_classes=frozenset(range(8)),
        )
        assert together[i]["sem_seg"].shape[1:] == output_sizes[i]
        assert torch.equal(together[i]["sem_seg"], alone["sem_seg"])
        assert torch.equal(together[i]["panoptic_seg"][0], alone["panoptic_seg"][0])
        assert together[i]["panoptic_seg"][1] == alone["panoptic_seg"][1]
        assert torch.equal(together[i]["instances"].pred_masks, alone["instances"].pred_masks)
        assert torch.equal(together[i]["instances"].scores, alone["instances"].scores)


@pytest.mark.usefixtures("chunking")
def test_semantic_scores_resized_after_inference_equal_the_direct_computation(arrays):
    spec = SPEC["cases"][0]
    result = run_case(arrays, 0, options(semantic_on=True, resize_before_inference=False))
    probs = torch.from_numpy(arrays["case0/pred_logits"]).softmax(-1)[:, :-1]
    masks = torch.from_numpy(arrays["case0/pred_masks"])[None]
    up = torch.nn.functional.interpolate(masks, size=spec["padded"], mode="bilinear")[0].sigmoid()
    scores = torch.einsum("qc,qhw->chw", probs, up)[:, : spec["image_size"][0], : spec["image_size"][1]]
    expected = torch.nn.functional.interpolate(scores[None], size=spec["output_size"], mode="bilinear")[0]
    torch.testing.assert_close(result["sem_seg"], expected, rtol=1e-5, atol=1e-6)


def test_boxes_are_the_masks_boxes_where_the_config_asks(arrays):
    instances = run_case(arrays, 0, options(instance_on=True, boxes_from_masks=True))["instances"]
    assert not instances.pred_masks.flatten(1).any(1).all() or len(instances) == SPEC["topk"]
    expected = BitMasks(instances.pred_masks).get_bounding_boxes().tensor
    assert torch.equal(instances.pred_boxes.tensor, expected)
    zeros = run_case(arrays, 0, options(instance_on=True))["instances"].pred_boxes.tensor
    assert zeros.shape == expected.shape and not zeros.any() and expected.any()


def test_box_of_an_empty_mask_is_zero():
    masks = torch.zeros(2, 5, 6, dtype=torch.bool)
    masks[1, 2:4, 3:5] = True
    boxes = postprocessing._boxes(masks, torch.tensor([1, 0])).tensor
    assert boxes.tolist() == [[3.0, 2.0, 5.0, 4.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("topk", [0, 20 * 13 + 1])
def test_number_of_detections_outside_the_pairs_names_the_key(topk):
    with pytest.raises(ValueError, match=r"TEST\.DETECTIONS_PER_IMAGE is"):
        PostprocessOptions.from_config(mini_cfg("resnet50-mini", ("TEST.DETECTIONS_PER_IMAGE", topk)))


def test_only_a_purely_semantic_config_resizes_scores_instead_of_masks():
    key = "MODEL.MASK_FORMER.TEST."
    all_tasks = PostprocessOptions.from_config(mini_cfg("resnet50-mini"))
    assert all_tasks.resize_before_inference and all_tasks.panoptic_on and all_tasks.instance_on
    semantic = mini_cfg("resnet50-mini", (key + "PANOPTIC_ON", False, key + "INSTANCE_ON", False))
    assert not PostprocessOptions.from_config(semantic).resize_before_inference
    semantic.merge_from_list([key + "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", True])
    assert PostprocessOptions.from_config(semantic).resize_before_inference


def test_large_image_makes_few_large_tensors():
    """1344x1344 with 100 queries and 133 classes; tests/mask2former/test_gpu.py bounds the peak on a GPU."""
    sizes = _sizes_of_tensors_made()
    # The class scores, 133 x 1344 x 1344 floats, are the largest; mask logits at that size, and few others, come near.
    assert max(sizes) <= 4 * 133 * 1344 * 1344
    assert sum(s > 64 << 20 for s in sizes) <= 4


def _run_large() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 100, 134, generator=rng) * 4
    masks = torch.randn(1, 100, 336, 336, generator=rng) * 4
    postprocess(
        logits,
        masks,
        padded_size=(1344, 1344),
        image_sizes=[(1344, 1344)],
        output_sizes=[(1344, 1344)],
        options=PostprocessOptions(num_classes=133, semantic_on=True, panoptic_on=True, instance_on=True),
        thing_classes=frozenset(range(80)),
    )


def _sizes_of_tensors_made() -> list[int]:
    """Bytes of every tensor that post-processing makes."""
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [out] if isinstance(out, torch.Tensor) else []
            inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            sizes.extend(
                t.numel() * t.element_size() for t in made if t.untyped_storage().data_ptr() not in inputs
            )
            return out

    with Recorder():
        _run_large()
    return sizes
