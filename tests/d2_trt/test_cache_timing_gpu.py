"""TensorRT's own timing caches, as a build leaves and another finds them. Two small engines are built."""

from __future__ import annotations

import pytest
from detectron2.engine import DefaultPredictor

import d2_trt  # noqa: F401
from d2_trt import builder
from d2_trt.cache_timing import timing_caches
from tests.golden import mini_cfg

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt, pytest.mark.slow]


def build(folder) -> None:
    """An engine of a network with random weights, other ones every time."""
    trt = ("PRECISION", "fp16", "OPT_LEVEL", 1, "SHAPES", ["64x64", "64x96", "96x96"], "MAX_BATCH_SIZE", 1)
    trt += ("VERIFY.ENABLED", False, "CACHE.DIR", str(folder))
    keys = [f"MODEL.TENSORRT.{word}" if i % 2 == 0 else word for i, word in enumerate(trt)]
    sizes = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96)
    predictor = DefaultPredictor(mini_cfg("resnet50-mini", (*sizes, *keys, "MODEL.BACKEND", "tensorrt")))
    predictor.model.prepare()


def test_a_network_that_was_timed_before_is_timed_less(tmp_path, monkeypatch):
    reports = []
    build_engine = builder.build_engine

    def watched(*args):
        built = build_engine(*args)
        reports.append(built[1])
        return built

    monkeypatch.setattr(builder, "build_engine", watched)
    build(tmp_path)
    assert len(timing_caches(tmp_path)) == 1
    build(tmp_path)
    first, second = reports
    assert not first.timing_cache_used and second.timing_cache_used
    assert 0 < second.kernels_timed < first.kernels_timed
