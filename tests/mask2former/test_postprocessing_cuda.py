"""The CUDA kernels of post-processing against postprocessing.py in PyTorch, on the same GPU."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mask2former import kernels, postprocessing, postprocessing_cuda
from mask2former.postprocess_options import PostprocessOptions
from mask2former.postprocessing import postprocess
from mask2former.rle import RLEMasks

needs_kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason=f"the kernels are not built: {kernels.BUILD_HINT}"),
]


def on_gpu(test):
    for mark in needs_kernels:
        test = mark(test)
    return test


def options(classes: int, **changes) -> PostprocessOptions:
    values = {
        "num_classes": classes,
        "semantic_on": True,
        "instance_on": True,
        "panoptic_on": True,
        "object_mask_threshold": 0.3,
        "overlap_threshold": 0.4,
        "topk": 30,
    }
    return PostprocessOptions(**{**values, **changes})


def scene(batch=1, queries=40, classes=19, size=(25, 34), dtype=torch.float32, seed=0):
    """Class logits with some confident queries, mask logits with blobs."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, queries, classes + 1, generator=rng) * 3
    logits[..., -1] += 2
    coarse = torch.randn(batch, queries, 5, 7, generator=rng) * 8 - 3
    masks = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return logits.cuda(), masks.cuda().to(dtype)


def both(logits, masks, opts, padded, images, outputs, things=frozenset(range(10))):
    kwargs = {
        "padded_size": padded,
        "image_sizes": images,
        "output_sizes": outputs,
        "options": opts,
        "thing_classes": things,
    }
    return postprocess(logits, masks, fused=False, **kwargs), postprocess(logits, masks, fused=True, **kwargs)


def check(expected: list[dict], actual: list[dict], opts: PostprocessOptions) -> None:
    """Equal, but for sums, whose order is the kernels' own, and pixels on a threshold or a tie by rounding."""
    for e, a in zip(expected, actual, strict=True):
        assert list(a) == list(e)
        for name in a:
            if name == "sem_seg":
                torch.testing.assert_close(a[name], e[name], rtol=1e-5, atol=1e-6)
            elif name == "sem_seg_labels":
                assert a[name].dtype == e[name].dtype
                assert (a[name] != e[name]).float().mean() <= 1e-4
            elif name == "panoptic_seg":
                assert a[name][1] == e[name][1]
                assert a[name][0].dtype == torch.int32 and a[name][0].device == e[name][0].device
                assert (a[name][0] != e[name][0]).float().mean() <= 1e-4
            else:
                check_instances(e[name], a[name], opts)


def check_instances(expected, actual, opts) -> None:
    assert list(actual.get_fields()) == list(expected.get_fields())
    assert torch.equal(actual.pred_classes, expected.pred_classes)
    if opts.instance_format == "rle":
        e, a = (x.pred_masks_rle.decode(x.image_size) for x in (expected, actual))
        assert RLEMasks.encode(a) == actual.pred_masks_rle  # byte for byte pycocotools'
    else:
        e, a = expected.pred_masks, actual.pred_masks
        assert a.dtype == torch.bool and a.device == e.device
    assert a.shape == e.shape
    same = (e == a).flatten(1).all(1)
    assert (e != a).sum() <= 1e-4 * e.numel()
    same = same.to(actual.scores.device)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-6)
    boxes, boxes_expected = actual.pred_boxes.tensor, expected.pred_boxes.tensor
    assert boxes.device == boxes_expected.device
    same = same.to(boxes.device)
    assert torch.equal(boxes[same], boxes_expected[same])


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "padded", "image", "output"),
    [
        ((25, 34), (100, 136), (97, 121), (150, 201)),
        ((25, 34), (100, 136), (97, 121), (31, 45)),
        ((25, 34), (100, 136), (97, 121), (97, 121)),
        ((25, 34), (100, 136), (100, 136), (64, 32)),
        ((100, 136), (100, 136), (97, 121), (50, 60)),
        ((100, 136), (100, 136), (90, 130), (90, 130)),
        ((25, 34), (100, 136), (97, 121), (1, 1)),
    ],
    ids=["up", "down", "crop only", "aligned", "one step", "no step", "one pixel"],
)
def test_every_combination_of_steps_and_dtypes(dtype, size, padded, image, output):
    logits, masks = scene(size=size, dtype=dtype)
    opts = options(19, boxes_from_masks=True)
    expected, actual = both(logits, masks, opts, padded, [image], [output])
    if output != (1, 1):
        assert len(expected[0]["panoptic_seg"][1]) >= 3 and len(expected[0]["instances"]) >= 3
    check(expected, actual, opts)


@on_gpu
@pytest.mark.parametrize("classes", [1, 3, 19, 32, 33, 65, 133, 150, 171, 400])
@pytest.mark.parametrize("queries", [1, 33, 100, 200])
@pytest.mark.parametrize("semantic_format", ["scores", "labels"])
def test_semantic_results_for_any_number_of_classes_and_queries(classes, queries, semantic_format):
    logits, masks = scene(queries=queries, classes=classes)
    opts = options(classes, instance_on=False, panoptic_on=False, semantic_format=semantic_format)
    check(*both(logits, masks, opts, (100, 136), [(97, 121)], [(75, 91)]), opts)


@on_gpu
@pytest.mark.parametrize("semantic_format", ["scores", "labels"])
@pytest.mark.parametrize("output", [(97, 121), (75, 91)])
def test_semantic_scores_resized_after_inference(semantic_format, output):
    logits, masks = scene()
    opts = options(
        19,
        instance_on=False,
        panoptic_on=False,
        resize_before_inference=False,
        semantic_format=semantic_format,
    )
    check(*both(logits, masks, opts, (100, 136), [(97, 121)], [output]), opts)


@on_gpu
@pytest.mark.parametrize("tasks", range(1, 8))
@pytest.mark.parametrize("instance_format", ["bitmask", "rle"])
def test_every_mix_of_tasks_in_a_batch_of_different_sizes(tasks, instance_format):
    logits, masks = scene(batch=3)
    opts = options(
        19,
        semantic_on=bool(tasks & 1),
        instance_on=bool(tasks & 2),
        panoptic_on=bool(tasks & 4),
        instance_format=instance_format,
    )
    images, outputs = [(97, 121), (100, 110), (60, 136)], [(150, 201), (33, 32), (64, 70)]
    check(*both(logits, masks, opts, (100, 136), images, outputs), opts)


@on_gpu
@pytest.mark.parametrize("seed", range(20))
def test_random_sizes_queries_and_thresholds(seed):
    rng = random.Random(seed)
    queries, classes = rng.randint(1, 120), rng.randint(1, 140)
    logits, masks = scene(2, queries, classes, (rng.randint(8, 60), rng.randint(8, 60)), seed=seed)
    padded = (4 * masks.shape[-2], 4 * masks.shape[-1])
    images = [(rng.randint(4, padded[0]), rng.randint(4, padded[1])) for _ in range(2)]
    outputs = [(rng.randint(1, 300), rng.randint(1, 300)) for _ in range(2)]
    opts = options(
        classes,
        object_mask_threshold=rng.choice([0.0, 0.5, 0.8]),
        overlap_threshold=rng.choice([0.0, 0.5, 0.8]),
        topk=rng.randint(1, min(100, queries * classes)),
        instance_format=rng.choice(["bitmask", "rle"]),
        semantic_format=rng.choice(["scores", "labels"]),
    )
    things = frozenset(rng.sample(range(classes), classes // 2))
    check(*both(logits, masks, opts, padded, images, outputs, things), opts)


@on_gpu
@pytest.mark.parametrize("seed", range(20))
def test_ties_go_to_the_first_as_without_the_kernels(seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 5, (1, 12, 6), generator=rng).float()
    # No step changes the size: equal values stay equal, and 0 is common.
    masks = torch.randint(-2, 3, (1, 12, 9, 11), generator=rng).float()
    if seed % 2:
        logits, masks = (logits > 2).float() * 4, (masks > 0).float() * 2
    masks[0, 3], logits[0, 3] = masks[0, 2], logits[0, 2]
    opts = options(5, topk=20, object_mask_threshold=0.1, semantic_format="labels")
    size = (9, 11)
    (e,), (a,) = both(logits.cuda(), masks.cuda(), opts, size, [size], [size], frozenset({0, 1}))
    assert a["panoptic_seg"][1] == e["panoptic_seg"][1]
    assert torch.equal(a["panoptic_seg"][0], e["panoptic_seg"][0])
    assert torch.equal(a["instances"].pred_masks, e["instances"].pred_masks)


@on_gpu
@pytest.mark.parametrize("levels", [3, 100, None], ids=["many ties", "some ties", "no ties"])
@pytest.mark.parametrize(("queries", "classes"), [(1, 1), (3, 7), (100, 133), (200, 90)])
def test_best_pairs_are_those_of_topk_in_its_order(queries, classes, levels):
    rng = torch.Generator().manual_seed(queries + classes)
    probs = torch.rand(3, queries, classes + 1, generator=rng) ** 4
    if levels:
        probs = (probs * levels).round() / levels
    probs = probs.cuda()
    for topk in {1, min(100, queries * classes), queries * classes}:
        scores = torch.empty(3, topk, device="cuda")
        pairs = torch.empty(3, topk, dtype=torch.int64, device="cuda")
        kernels.load().postprocess.top_pairs(
            probs.data_ptr(),
            3,
            queries,
            classes,
            topk,
            scores.data_ptr(),
            pairs.data_ptr(),
            kernels.stream_of(probs),
        )
        flat = probs[..., :-1].flatten(1)
        expected = flat.topk(topk, sorted=False)
        assert torch.equal(scores, flat.gather(1, pairs))
        assert torch.equal(scores.sort().values, expected.values.sort().values)
        if queries * classes < 20000:  # else PyTorch sorts in several blocks
            assert torch.equal(pairs, expected.indices)


@on_gpu
@pytest.mark.parametrize("instance_format", ["bitmask", "rle"])
def test_nothing_kept(instance_format):
    logits, masks = scene()
    logits[..., -1] += 100
    opts = options(19, instance_format=instance_format, boxes_from_masks=True)
    # No class is a thing, so there is no instance either.
    (e,), (a,) = both(logits, masks, opts, (100, 136), [(97, 121)], [(40, 50)], frozenset())
    assert a["panoptic_seg"][1] == [] and not a["panoptic_seg"][0].any() and len(a["instances"]) == 0
    check([e], [a], opts)


@on_gpu
def test_masks_of_any_strides(monkeypatch):
    logits, masks = scene(batch=2)
    opts = options(19)
    sizes = ((100, 136), [(97, 121)] * 2, [(40, 50)] * 2)
    expected = both(logits, masks, opts, *sizes)[1]
    wide = torch.zeros(2, 40, 25, 40, device="cuda")
    wide[..., :34] = masks
    apart = torch.zeros(2, 80, 25, 34, device="cuda")
    apart[:, ::2] = masks
    for view in (wide[..., :34], apart[:, ::2], masks.to(memory_format=torch.channels_last)):
        actual = both(logits, view, opts, *sizes)[1]
        assert torch.equal(actual[1]["sem_seg"], expected[1]["sem_seg"])
        assert torch.equal(actual[1]["panoptic_seg"][0], expected[1]["panoptic_seg"][0])
        assert torch.equal(actual[1]["instances"].pred_masks, expected[1]["instances"].pred_masks)
    shared = both(logits[:1].expand(2, -1, -1), masks[:1].expand(2, -1, -1, -1), opts, *sizes)[1]
    assert torch.equal(shared[0]["sem_seg"], shared[1]["sem_seg"])
    assert torch.equal(shared[0]["sem_seg"], expected[0]["sem_seg"])


@on_gpu
def test_results_are_the_same_every_time():
    logits, masks = scene(queries=100, classes=133, size=(100, 136))
    opts = options(133)
    runs = [both(logits, masks, opts, (400, 544), [(400, 533)], [(240, 320)])[1][0] for _ in range(3)]
    for other in runs[1:]:
        assert torch.equal(other["sem_seg"], runs[0]["sem_seg"])
        assert torch.equal(other["panoptic_seg"][0], runs[0]["panoptic_seg"][0])
        assert torch.equal(other["instances"].scores, runs[0]["instances"].scores)


@on_gpu
@pytest.mark.parametrize("batch", [1, 4])
def test_host_waits_once_for_a_batch(monkeypatch, batch):
    logits, masks = scene(batch=batch)
    opts = options(19, instance_format="rle", boxes_from_masks=True)
    waits = []
    synchronize = torch.cuda.Event.synchronize
    monkeypatch.setattr(
        torch.cuda.Event, "synchronize", lambda event: (waits.append(event), synchronize(event))
    )
    args = (logits, masks, opts, (100, 136), [(97, 121)] * batch, [(40, 50)] * batch)
    both(*args)
    waits.clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # any other wait raises
    try:
        postprocess(
            logits,
            masks,
            padded_size=(100, 136),
            image_sizes=[(97, 121)] * batch,
            output_sizes=[(40, 50)] * batch,
            options=opts,
            thing_classes=frozenset(range(10)),
            fused=True,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


@on_gpu
def test_more_runs_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(postprocessing_cuda._RunRoom, "per_image", 5)
    logits, _ = scene(batch=2)
    masks = torch.randn(2, 40, 25, 34, generator=torch.Generator().manual_seed(0)).cuda()
    opts = options(19, instance_format="rle")
    check(*both(logits, masks, opts, (100, 136), [(97, 121)] * 2, [(97, 121), (40, 50)]), opts)
    assert postprocessing_cuda._RunRoom.per_image > 1000


@on_gpu
def test_wide_masks_take_several_strips_of_columns():
    logits, masks = scene(queries=5, classes=3, size=(6, 700))
    opts = options(3, topk=5, instance_format="rle", semantic_on=False)
    things = frozenset(range(3))
    check(*both(logits, masks, opts, (24, 2800), [(24, 2777)], [(24, 2777)], things), opts)


@on_gpu
def test_streams_do_not_disturb_each_other():
    cases = [scene(seed=i) for i in range(4)]
    opts = options(19)
    sizes = ((100, 136), [(97, 121)], [(75, 91)])
    expected = [both(*case, opts, *sizes)[1][0] for case in cases]
    torch.cuda.synchronize()
    errors = []

    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                result = both(*cases[i], opts, *sizes)[1][0]
                stream.synchronize()
                if not (
                    torch.equal(result["panoptic_seg"][0], expected[i]["panoptic_seg"][0])
                    and torch.equal(result["instances"].pred_masks, expected[i]["instances"].pred_masks)
                    and torch.equal(result["sem_seg"], expected[i]["sem_seg"])
                ):
                    errors.append(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not errors


@on_gpu
def test_no_tensor_of_queries_by_pixels():
    logits, masks = scene(queries=100, classes=133, size=(336, 336))
    size = (1344, 1344)
    opts = options(133, topk=100)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (result,) = postprocess(
        logits,
        masks,
        padded_size=size,
        image_sizes=[size],
        output_sizes=[size],
        options=opts,
        thing_classes=frozenset(range(80)),
        fused=True,
    )
    pixels = size[0] * size[1]
    outputs = pixels * (4 * 133 + 4 + len(result["instances"]))
    bits = 100 * pixels // 8
    assert torch.cuda.max_memory_allocated() - before <= outputs + bits + (32 << 20)


@on_gpu
def test_out_of_memory_goes_on_without_the_kernels(monkeypatch, caplog):
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        raise torch.cuda.OutOfMemoryError("no room")

    logits, masks = scene()
    opts = options(19)
    args = (logits, masks, opts, (100, 136), [(97, 121)], [(40, 50)])
    expected = both(*args)[0]
    monkeypatch.setattr(postprocessing, "postprocess_cuda", full)
    with caplog.at_level("WARNING", logger=postprocessing.logger.name):
        actual = both(*args)[1]
    assert len(calls) == 2 and "no room" in caplog.text
    check(expected, actual, opts)


def test_kernels_asked_for_where_they_cannot_run_say_why():
    with pytest.raises(ValueError, match=r"fused=True\): the masks are on cpu, not on a GPU"):
        postprocess(
            torch.zeros(1, 3, 4),
            torch.zeros(1, 3, 8, 8),
            padded_size=(32, 32),
            image_sizes=[(32, 32)],
            output_sizes=[(8, 8)],
            options=options(3),
            fused=True,
        )


@on_gpu
def test_sizes_and_dtypes_that_the_kernels_do_not_take_are_named():
    logits, masks = scene()
    sizes = ((100, 136), [(97, 121)], [(40, 50)])
    with pytest.raises(ValueError, match=r"torch\.float64; the kernels take float32, float16 and bfloat16"):
        both(logits, masks.double(), options(19), *sizes)
    many = torch.zeros(1, 1025, 20, device="cuda"), torch.zeros(1, 1025, 8, 8, device="cuda")
    with pytest.raises(ValueError, match=r"1025 queries .* at most 1024"):
        both(*many, options(19), (32, 32), [(32, 32)], [(8, 8)])
    with pytest.raises(ValueError, match=r"do not fit 7 classes"):
        postprocess(
            logits,
            masks,
            padded_size=(100, 136),
            image_sizes=[(97, 121)],
            output_sizes=[(40, 50)],
            options=options(7),
            fused=True,
        )
