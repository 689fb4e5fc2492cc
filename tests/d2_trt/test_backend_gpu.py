"""The "tensorrt" backend on a GPU: mini models through real engines, beside PyTorch. Two engines are built."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor

import d2_trt  # noqa: F401
from d2_trt import builder, parity
from mask2former.data.datasets.shapes_scene import draw_scene
from tests.golden import mini_cfg, relative_error, state_dict

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

# Shorter side 96, longer at most 160, padded to 32: all within the engine's range.
SIZES = [(60, 80), (80, 60), (96, 96), (70, 110)]
OPTS = ("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160)
OPTS += ("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True)
OPTS += ("MODEL.MASK_FORMER.TEST.INSTANCE_ON", True)


def make_predictor(backend: str, cache, *more) -> DefaultPredictor:
    trt = ("PRECISION", "fp32", "OPT_LEVEL", 0, "SHAPES", ["64x64", "96x128", "160x160"], "MAX_BATCH_SIZE", 2)
    keys = [f"MODEL.TENSORRT.{word}" if i % 2 == 0 else word for i, word in enumerate(trt)]
    opts = (*OPTS, *keys, "MODEL.TENSORRT.CACHE.DIR", str(cache), "MODEL.BACKEND", backend, *more)
    predictor = DefaultPredictor(mini_cfg("resnet50-mini", opts))
    weights = state_dict("resnet50-mini")
    weights.setdefault("criterion.empty_weight", predictor.model.criterion.empty_weight)
    predictor.model.load_state_dict(weights)
    return predictor


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def torch_predictor(cache):
    return make_predictor("torch", cache)


@pytest.fixture(scope="module")
def trt_predictor(cache):
    predictor = make_predictor("tensorrt", cache)
    predictor.model.prepare()
    return predictor


@pytest.fixture
def no_build(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing was to be built")

    monkeypatch.setattr(builder, "build_engine", refuse)


def picture(size, seed=0) -> np.ndarray:
    return np.ascontiguousarray(draw_scene(seed, *size).image[:, :, ::-1])


def batch(batch_size: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(batch_size, 3, height, width, generator=rng) * 255).cuda()


def assert_close(actual, expected, most=2e-3):
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < most


@pytest.mark.parametrize("size", SIZES)
def test_predictor_gives_pytorchs_results(trt_predictor, torch_predictor, size):
    actual, expected = trt_predictor(picture(size)), torch_predictor(picture(size))
    assert set(actual) == set(expected) == {"sem_seg", "panoptic_seg", "instances"}
    assert actual["sem_seg"].shape == expected["sem_seg"].shape
    assert relative_error(actual["sem_seg"], expected["sem_seg"]) < 2e-3
    assert (actual["sem_seg"].argmax(0) == expected["sem_seg"].argmax(0)).double().mean() > 0.99
    assert actual["panoptic_seg"][1] == expected["panoptic_seg"][1]
    assert (actual["panoptic_seg"][0] == expected["panoptic_seg"][0]).double().mean() > 0.99
    mine, theirs = actual["instances"], expected["instances"]
    assert len(mine) == len(theirs) and mine.get_fields().keys() == theirs.get_fields().keys()
    scores = [x.scores.sort(descending=True).values for x in (mine, theirs)]
    torch.testing.assert_close(*scores, rtol=5e-3, atol=1e-4)
    assert trt_predictor.model.backend.describe()["images"]["torch"] == 0


def test_batches_give_pytorchs_results(trt_predictor):
    model = trt_predictor.model
    with torch.inference_mode():
        for shape in ((1, 64, 64), (2, 96, 128), (2, 160, 160)):
            images = batch(*shape)
            assert_close(model.backend(images), model.core(images))


def test_parity_numbers_are_kept(trt_predictor, cache):
    (engine,) = trt_predictor.model.backend.describe()["engines"]
    rows = engine["parity"]["sizes"]
    assert len(rows) == 3 and all(row["mask_error"] < 2e-3 for row in rows)
    assert all(row["sign_agreement"] >= 0.999 for row in rows)


def test_second_start_loads_the_cached_engine(trt_predictor, torch_predictor, cache, no_build):
    again = make_predictor("tensorrt", cache)
    again.model.prepare()
    (engine,) = again.model.backend.describe()["engines"]
    assert engine["built"] is False and engine["ready_seconds"] < 3
    images = batch(1, 96, 128)
    with torch.inference_mode():
        assert_close(again.model.backend(images), torch_predictor.model.core(images))


def test_cached_engine_is_compared_at_more_sizes_without_a_build(trt_predictor, cache, no_build, monkeypatch):
    verify, calls = parity.verify, []
    monkeypatch.setattr(parity, "verify", lambda *words: calls.append(1) or verify(*words))
    for _ in range(2):  # the second start finds the first one's numbers
        again = make_predictor("tensorrt", cache, "MODEL.TENSORRT.VERIFY.SIZES", 4)
        again.model.prepare()
        (engine,) = again.model.backend.describe()["engines"]
        assert engine["built"] is False and len(engine["parity"]["sizes"]) == 4
        assert all(row["mask_error"] < 2e-3 for row in engine["parity"]["sizes"])
    assert len(calls) == 1


def test_meta_architecture_that_says_it_shares_the_engine(trt_predictor, cache, no_build):
    predictor = make_predictor("torch", cache, "MODEL.META_ARCHITECTURE", "TensorRTMaskFormer")
    predictor(picture(SIZES[0]))
    assert predictor.model.backend.describe()["images"] == {"tensorrt": 1, "torch": 0}


def test_callers_autocast_does_not_reach_the_engine(trt_predictor):
    images = batch(1, 96, 128)
    backend = trt_predictor.model.backend
    with torch.inference_mode():
        expected = [t.clone() for t in backend(images)]
        with torch.autocast("cuda", dtype=torch.float16):
            actual = backend(images)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_image_outside_the_range_runs_in_pytorch(trt_predictor):
    model = trt_predictor.model
    before = model.backend.describe()["images"]["torch"]
    images = batch(1, 192, 96)
    with torch.inference_mode():
        assert_close(model.backend(images), model.core(images))
    assert model.backend.describe()["images"]["torch"] == before + 1


def test_threads_on_their_own_streams_get_equal_results(trt_predictor):
    backend = trt_predictor.model.backend
    inputs = [batch(1 + i % 2, 64 + 32 * (i % 3), 96 + 32 * (i % 2), seed=i) for i in range(4)]
    with torch.inference_mode():
        expected = [[t.clone() for t in backend(x)] for x in inputs]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(i):
        stream = torch.cuda.Stream()
        try:
            with torch.inference_mode(), torch.cuda.stream(stream):
                for _ in range(20):
                    actual = backend(inputs[i].clone())
                    stream.synchronize()
                    if not all(relative_error(a, e) < 1e-5 for a, e in zip(actual, expected[i])):
                        wrong.append(f"thread {i}")
        except Exception as error:  # a thread's own would be lost
            wrong.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Last, since it changes the model that the tests share.
def test_other_weights_get_an_engine_of_their_own(trt_predictor):
    model = trt_predictor.model
    images = batch(1, 96, 128)
    weights = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    with torch.inference_mode():
        before = [t.clone() for t in model.backend(images)]
    changed = {k: v * 1.05 if k.endswith("conv1.weight") else v for k, v in weights.items()}
    model.backbone.load_state_dict(changed)
    with torch.inference_mode():
        after = model.backend(images)
        assert_close(after, model.core(images))
    assert relative_error(after[1], before[1]) > 1e-3
    model.backbone.load_state_dict(weights)
    with torch.inference_mode():
        assert_close(model.backend(images), before, most=1e-5)
