"""TensorRT's own timing caches, as builds of two networks leave and find them. Three small engines are built."""

from __future__ import annotations

import logging

import pytest
from detectron2.engine import DefaultPredictor

import d2_trt  # noqa: F401
from d2_trt import builder, compat
from d2_trt.cache_timing import timing_caches
from tests.golden import mini_cfg

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def said():
    handler = Said()
    logger = logging.getLogger("d2_trt.tensorrt")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


def build(folder, width: int) -> None:
    """An engine of a network with random weights, other ones every time."""
    trt = ("PRECISION", "fp16", "OPT_LEVEL", 0, "SHAPES", ["64x64", "64x96", "96x96"], "MAX_BATCH_SIZE", 1)
    trt += ("VERIFY.ENABLED", False, "CACHE.DIR", str(folder))
    keys = [f"MODEL.TENSORRT.{word}" if i % 2 == 0 else word for i, word in enumerate(trt)]
    sizes = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", width)
    predictor = DefaultPredictor(mini_cfg("resnet50-mini", (*sizes, *keys, "MODEL.BACKEND", "tensorrt")))
    predictor.model.prepare()


def test_a_build_starts_from_its_own_networks_timings(tmp_path, monkeypatch, said):
    given, reports = [], []
    build_engine = builder.build_engine

    def watched(model, spec, images, timing_cache=None):
        given.append(timing_cache)
        built = build_engine(model, spec, images, timing_cache)
        reports.append(built[1])
        return built

    monkeypatch.setattr(builder, "build_engine", watched)
    build(tmp_path, 128)
    (first,) = timing_caches(tmp_path)
    first_timings = first.read_bytes()
    build(tmp_path, 256)
    said.clear()
    build(tmp_path, 128)
    assert len(given) == 3 and given[0] == b"" and reports[2].timing_cache_used
    assert not [message for message in said if "timing cache will not be used" in message.lower()]
    if compat.timing_caches_combine():
        assert timing_caches(tmp_path) == [first]
    else:
        assert first_timings.endswith(given[2]) and len(timing_caches(tmp_path)) == 2
