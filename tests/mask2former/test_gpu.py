"""What only a GPU can show: agreement with the CPU, streams, threads, host waits and memory."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.modeling import build_model

from mask2former import get_mask2former_cfg, postprocessing
from mask2former.postprocess_options import PostprocessOptions
from mask2former.postprocessing import postprocess
from tests.golden import MINI_MODELS, config_path, mini_model, relative_error

pytestmark = pytest.mark.gpu


def scene(device, queries=100, classes=133, size=(200, 272), confident=30):
    """Logits like a trained model's: some confident queries with blob masks, the others "no object"."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(1, queries, classes + 1, generator=rng)
    logits[..., -1] += 6
    labels = torch.randint(0, classes, (confident,), generator=rng)
    logits[0, torch.arange(confident), labels] += 14
    coarse = torch.randn(1, queries, 6, 8, generator=rng) * 8 - 10
    masks = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return logits.to(device), masks.to(device)


ALL_TASKS = PostprocessOptions(
    num_classes=133,
    semantic_on=True,
    instance_on=True,
    panoptic_on=True,
    object_mask_threshold=0.8,
    overlap_threshold=0.2,
)


def run(logits, masks, batch=1, fused=None):
    return postprocess(
        logits.expand(batch, -1, -1),
        masks.expand(batch, -1, -1, -1),
        padded_size=(800, 1088),
        image_sizes=[(800, 1067)] * batch,
        output_sizes=[(480, 640)] * batch,
        options=ALL_TASKS,
        thing_classes=frozenset(range(80)),
        fused=fused,
    )


@pytest.mark.parametrize(
    "name",
    [
        "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
        "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml",
    ],
)
def test_full_size_model_equals_the_cpu(name):
    torch.manual_seed(0)
    model = build_model(get_mask2former_cfg(config_path(name), ["MODEL.DEVICE", "cpu"])).eval()
    images = torch.rand(2, 3, 224, 288, generator=torch.Generator().manual_seed(1)) * 255
    with torch.inference_mode():
        expected = model.core(images)
        actual = model.cuda().core(images.cuda())
    assert relative_error(actual[0], expected[0]) < 1e-3
    assert relative_error(actual[1], expected[1]) < 1e-3


def test_postprocessing_equals_the_cpu():
    (expected,), (actual,) = run(*scene("cpu")), run(*scene("cuda"))
    assert len(expected["panoptic_seg"][1]) >= 5
    assert actual["panoptic_seg"][1] == expected["panoptic_seg"][1]
    wrong = actual["panoptic_seg"][0].cpu() != expected["panoptic_seg"][0]
    assert wrong.float().mean() <= 1e-3
    torch.testing.assert_close(actual["sem_seg"].cpu(), expected["sem_seg"], rtol=1e-3, atol=1e-4)
    a, e = (r["instances"].to("cpu") for r in (actual, expected))
    a, e = a[a.scores.argsort(descending=True)], e[e.scores.argsort(descending=True)]
    torch.testing.assert_close(a.scores, e.scores, rtol=1e-3, atol=1e-5)
    assert (a.pred_masks != e.pred_masks).float().mean() <= 1e-3


@pytest.mark.parametrize("batch", [1, 4])
def test_host_waits_twice_without_the_kernels_for_a_batch_whatever_the_queries(batch):
    logits, masks = scene("cuda")
    run(logits, masks, batch, fused=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(logits, masks, batch, fused=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert 1 <= len(waits) <= 2, [str(w.message) for w in waits]


def test_large_image_keeps_temporaries_small():
    """1344x1344, 100 queries, 133 classes: beside the outputs only mask logits at their size, and bounded pieces."""
    logits, masks = scene("cuda", size=(336, 336))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    size = (1344, 1344)
    (result,) = postprocess(
        logits,
        masks,
        padded_size=size,
        image_sizes=[size],
        output_sizes=[size],
        options=ALL_TASKS,
        thing_classes=frozenset(range(80)),
    )
    pixels = size[0] * size[1]
    instances = len(result["instances"])
    outputs = pixels * (4 * 133 + 4 + instances)
    logits_and_masks = pixels * (4 * 100 + 100)
    bound = outputs + logits_and_masks + 3 * postprocessing.CUDA_CHUNK_BYTES
    assert torch.cuda.max_memory_allocated() - before <= bound


@pytest.mark.parametrize("name", MINI_MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_stays_near_float32(name, dtype):
    model = mini_model(name)
    images = (
        torch.randint(0, 256, (1, 3, 128, 160), generator=torch.Generator().manual_seed(0)).float().cuda()
    )
    with torch.inference_mode():
        expected = model.backend(images)
        with torch.autocast("cuda", dtype=dtype):
            actual = model.backend(images)
    for a, e in zip(actual, expected):
        assert torch.isfinite(a).all()
        assert relative_error(a, e) < 0.15


def test_streams_and_threads_do_not_disturb_each_other():
    model = mini_model("resnet50-mini")
    rng = torch.Generator().manual_seed(0)
    inputs = [
        [{"image": torch.randint(0, 256, (3, 64 + 8 * i, 96), generator=rng, dtype=torch.uint8)}]
        for i in range(4)
    ]
    with torch.inference_mode():
        expected = [model(x)[0]["sem_seg"].clone() for x in inputs]
    errors = []

    def work(i):
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(10):
                result = model(inputs[i])[0]["sem_seg"]
                stream.synchronize()
                if not torch.allclose(result, expected[i], rtol=1e-4, atol=1e-5):
                    errors.append(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not errors
