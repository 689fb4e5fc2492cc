"""The "tensorrt" backend: when it builds, loads and runs in PyTorch, and what it tells of it."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging
import pickle
import threading
import time
import weakref

import pytest
import torch
from detectron2.modeling import build_model

from d2_trt import backend as backend_module
from d2_trt import builder, compat, requirements
from d2_trt.backend import TensorRTBackend
from d2_trt.cache_timing import timing_caches
from d2_trt.errors import BuildError, EngineShapeError
from d2_trt.options import TensorRTOptions
from d2_trt.shape_range import ShapeRange
from tests.d2_trt.backend_helpers import SHAPES, TinyModel, entries, equal, images, make_backend, make_cfg
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.golden import mini_cfg

# Building and loading


def test_first_call_builds_and_the_next_process_loads(workshop, tmp_path):
    model = TinyModel()
    backend = make_backend(model)
    with torch.no_grad():
        expected = model.core(images())
        assert equal(backend(images()), expected)
        assert equal(backend(images(2, 128, 64)), model.core(images(2, 128, 64)))
    assert len(workshop.built) == 1 and len(entries(tmp_path)) == 1

    second = make_backend(TinyModel())
    assert equal(second(images()), expected)
    assert len(workshop.built) == 1
    assert [e["built"] for e in (*backend.describe()["engines"], *second.describe()["engines"])] == [
        True,
        False,
    ]


def test_built_engine_is_deserialized_once(workshop):
    backend = make_backend()
    backend.prepare()
    backend(images())
    assert workshop.deserialized == 1


def test_prepare_builds_before_the_first_image_and_checks_it(workshop):
    model = TinyModel()
    backend = make_backend(model)
    backend.prepare()
    assert len(workshop.built) == 1 and workshop.built[0].opt_shape == (2, 64, 96)
    checked = [row["images"] for row in backend.describe()["engines"][0]["parity"]["sizes"]]
    assert checked == ["2x3x64x96", "1x3x128x128", "2x3x64x64"]
    model.core_calls = 0
    for _ in range(3):
        backend(images())
    # The first image alone is compared, since no real one was at hand before.
    assert model.core_calls == 1 and len(workshop.built) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"OPT_LEVEL": 1},
        {"PRECISION": "tf32"},
        {"MAX_BATCH_SIZE": 1},
        {"SHAPES": ["64x64", "64x96", "128x160"]},
        {"MSDA": "native"},
    ],
    ids=str,
)
def test_other_options_are_another_engine(workshop, tmp_path, change):
    make_backend().prepare()
    make_backend(**change).prepare()
    assert len(workshop.built) == 2 and len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    "change", [{"CUDA_GRAPHS": False}, {"ON_ERROR": "torch"}, {"VERIFY__SIZES": 1}], ids=str
)
def test_options_that_do_not_change_the_engine_share_it(workshop, change):
    make_backend().prepare()
    make_backend(**change).prepare()
    assert len(workshop.built) == 1


def test_other_weights_and_other_configs_are_another_engine(workshop, tmp_path):
    make_backend(TinyModel(seed=0)).prepare()
    make_backend(TinyModel(seed=1)).prepare()
    cfg = make_cfg()
    cfg.MODEL.MASK_FORMER.NHEADS = 4
    TensorRTBackend(TinyModel(seed=0), cfg).prepare()
    assert len(workshop.built) == 3 and len(entries(tmp_path)) == 3


def test_both_meta_architectures_share_the_engine(workshop):
    make_backend().prepare()
    cfg = make_cfg()
    cfg.MODEL.META_ARCHITECTURE = "TensorRTMaskFormer"
    TensorRTBackend(TinyModel(), cfg).prepare()
    assert len(workshop.built) == 1


def test_another_tensorrt_or_gpu_is_another_engine(workshop, monkeypatch):
    make_backend().prepare()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Other GPU")
    make_backend().prepare()
    monkeypatch.setattr(compat, "tensorrt", lambda: type("trt", (), {"__version__": "10.0.2"}))
    make_backend().prepare()
    assert len(workshop.built) == 3


def test_timings_go_from_build_to_build(workshop):
    make_backend(TinyModel(0)).prepare()
    make_backend(TinyModel(1)).prepare()
    make_backend(TinyModel(2), TIMING_CACHE=False).prepare()
    assert workshop.timings == [b"", b"timings", b""]


def test_level_that_times_nothing_neither_takes_timings_nor_leaves_any(workshop, tmp_path):
    make_backend(TinyModel(0), OPT_LEVEL=0).prepare()
    assert workshop.timings == [b""] and not timing_caches(tmp_path / "d2_trt")
    make_backend(TinyModel(1)).prepare()
    make_backend(TinyModel(2), OPT_LEVEL=0).prepare()
    assert workshop.timings == [b"", b"", b""] and len(timing_caches(tmp_path / "d2_trt")) == 1


def test_builds_that_overlap_lose_no_timings_where_those_do_not_combine(workshop, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda: (8, 6))
    build, names = builder.build_engine, []

    def build_engine(model, spec, images, timing_cache=None):
        """As TensorRT: adds to what it is given."""
        names.append(name := model.name)
        if len(names) == 1:
            start(2048)  # begins later, and ends earlier
        plan, report, _ = build(model, spec, images, timing_cache)
        return plan, report, b" ".join([*timing_cache.split(), name.encode()])

    def start(width: int, batch: int = 1, seed: int = 0) -> None:
        model = TinyModel(seed)
        model.name = f"{width}x{batch}"
        cfg = make_cfg(MAX_BATCH_SIZE=batch)
        cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = width
        TensorRTBackend(model, cfg).prepare()

    monkeypatch.setattr(builder, "build_engine", build_engine)
    start(1024)
    start(2048, seed=1)
    start(1024, seed=1)
    start(2048, batch=2)
    assert workshop.timings == [b"", b"", b"2048x1", b"1024x1", b"2048x1 2048x1"]


def test_sidecar_holds_report_and_parity(workshop, tmp_path):
    make_backend().prepare()
    (sidecar,) = (json.loads(p.read_text()) for p in (tmp_path / "d2_trt").glob("*.json"))
    assert sidecar["report"]["layers"] == {"CONVOLUTION": 1}
    assert sidecar["parity"]["sizes"][0]["sign_agreement"] == 1.0


def test_entry_gives_path_bytes_and_sidecar_and_builds_where_missing(workshop):
    backend = make_backend()
    shapes = ShapeRange((1, 64, 64), (1, 64, 64), (1, 96, 96))
    first, again = backend.entry(shapes), backend.entry(shapes, images())
    assert first.built and not again.built and len(workshop.built) == 1
    assert again.path.read_bytes() == bytes(first.data) == bytes(again.data)
    assert again.parity["sizes"] and again.sidecar["ingredients"]["shapes"] == shapes.to_json()


def test_cached_engine_that_does_not_load_is_built_again(workshop, tmp_path, caplog):
    make_backend().prepare()
    workshop.refused.add((tmp_path / "d2_trt" / entries(tmp_path)[0]).read_bytes())
    backend = make_backend()
    assert equal(backend(images()), TinyModel().core(images()))
    assert len(workshop.built) == 2 and len(entries(tmp_path)) == 1
    assert caplog.text.count("is built again: the engine does not load") == 1
    make_backend().prepare()  # what replaced it loads
    assert len(workshop.built) == 2


def test_engine_that_does_not_load_where_nothing_may_be_built_is_an_error(workshop, tmp_path):
    make_backend().prepare()
    workshop.refused.add((tmp_path / "d2_trt" / entries(tmp_path)[0]).read_bytes())
    with pytest.raises(BuildError, match="of another driver"):
        make_backend(CACHE__MODE="require").prepare()
    make_backend(CACHE__MODE="read").prepare()
    assert len(workshop.built) == 2 and workshop.refused == {
        (tmp_path / "d2_trt" / entries(tmp_path)[0]).read_bytes()
    }


# Weights


def test_loading_other_weights_is_noticed(workshop):
    model = TinyModel(0)
    backend = make_backend(model)
    backend.prepare()
    model.load_state_dict(TinyModel(1).state_dict())
    assert equal(backend(images()), TinyModel(1).core(images()))
    assert len(workshop.built) == 2
    model.backbone.load_state_dict(TinyModel(2).backbone.state_dict())
    assert equal(backend(images()), model.core(images()))
    assert len(workshop.built) == 3
    model.load_state_dict(TinyModel(0).state_dict())  # cached from before
    assert equal(backend(images()), TinyModel(0).core(images()))
    assert len(workshop.built) == 3


def test_loading_the_same_weights_keeps_the_engine(workshop):
    model = TinyModel()
    backend = make_backend(model)
    backend.prepare()
    model.load_state_dict(TinyModel().state_dict())
    backend(images())
    assert (len(workshop.built), workshop.deserialized) == (1, 1)


def test_weights_edited_in_place_count_once_they_are_announced(workshop):
    model = TinyModel()
    backend = make_backend(model)
    before = backend(images())
    with torch.no_grad():
        model.head.bias.add_(1)
    assert equal(backend(images()), before)
    backend.weights_changed()
    assert equal(backend(images()), model.core(images()))


def test_model_does_not_keep_a_backend_alive(workshop):
    model = TinyModel()
    reference = weakref.ref(make_backend(model))
    gc.collect()
    assert reference() is None
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
def test_copy_of_a_model_has_engines_of_its_own(workshop, monkeypatch, how):
    monkeypatch.setattr(requirements, "require", lambda *args, **kwargs: None)
    options = [
        (f"MODEL.TENSORRT.{key}", value) for key, value in (SHAPES | {"VERIFY.ENABLED": False}).items()
    ]
    cfg = mini_cfg("resnet50-mini", ("MODEL.BACKEND", "tensorrt", *itertools.chain(*options)))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.backend(images())
    other = how(model)
    torch.nn.init.zeros_(other.sem_seg_head.predictor.class_embed.weight)
    with torch.no_grad():
        assert equal(other.backend(images()), other.core(images()))
    assert other.backend is not model.backend and len(workshop.built) == 2
    other.load_state_dict(model.state_dict())
    assert equal(other.backend(images()), model.backend(images())) and len(workshop.built) == 2


# Sizes


def test_image_outside_the_range_runs_in_pytorch_with_one_warning(workshop, caplog):
    model = TinyModel()
    backend = make_backend(model)
    backend.prepare()
    for shape in ((1, 160, 96), (1, 96, 160), (3, 64, 64)):
        assert equal(backend(images(*shape)), model.core(images(*shape)))
    backend(images(2))
    assert caplog.text.count("is outside this engine's range") == 1
    assert "MODEL.TENSORRT.ON_OUT_OF_RANGE" in caplog.text
    told = backend.describe()
    assert told["backend"] == "tensorrt (2 images) and torch (5 images)"
    assert told["images"] == {"tensorrt": 2, "torch": 5}
    assert len(told["reasons"]) == 1 and "padded to 160x96" in told["reasons"][0]


def test_images_that_are_all_outside_the_range_are_told_as_pytorchs(workshop):
    backend = make_backend()
    backend.prepare()
    assert backend.describe()["backend"] == "tensorrt"  # what would run the first
    backend(images(1, 160, 96))
    told = backend.describe()["backend"]
    assert told.startswith(
        "torch (fallback: image padded to 160x96 is outside this engine's range 64..128 (H)"
    )


def test_image_outside_the_range_is_refused_on_demand(workshop):
    backend = make_backend(ON_OUT_OF_RANGE="raise")
    with pytest.raises(EngineShapeError, match=r"padded to 160x96.*MODEL\.TENSORRT\.SHAPES"):
        backend(images(1, 160, 96))
    with pytest.raises(EngineShapeError, match=r"TEST\.BATCH_SIZE.*MODEL\.TENSORRT\.MAX_BATCH_SIZE"):
        backend(images(3))
    assert not workshop.built


def test_static_builds_an_engine_for_each_size(workshop, tmp_path):
    backend = make_backend(STATIC=True)
    backend.prepare()
    assert not workshop.built
    for shape in ((1, 64, 96), (2, 64, 96), (1, 96, 64), (1, 64, 96)):
        backend(images(*shape))
    assert [spec.min_shape for spec in workshop.built] == [(1, 64, 96), (2, 64, 96), (1, 96, 64)]
    assert all(spec.min_shape == spec.opt_shape == spec.max_shape for spec in workshop.built)
    assert len(entries(tmp_path)) == 3
    # Traced and checked with what was to be segmented.
    assert torch.equal(workshop.traced[0], images(1, 64, 96))


def test_static_with_one_size_is_prepared(workshop):
    make_backend(STATIC=True, SHAPES=["64x96"], MAX_BATCH_SIZE=1).prepare()
    assert len(workshop.built) == 1


def test_static_engines_in_memory_are_bounded(workshop, monkeypatch):
    monkeypatch.setattr(backend_module, "MAX_LOADED", 2)
    backend = make_backend(STATIC=True)
    a, b, c = images(1, 64, 64), images(1, 64, 96), images(1, 96, 64)
    for x in (a, b, a, c):  # b is the least recently used when c comes
        backend(x)
    assert len(backend.describe()["engines"]) == 2
    backend(a)
    assert (len(workshop.built), workshop.deserialized) == (3, 3)
    backend(b)  # from the disk
    assert (len(workshop.built), workshop.deserialized) == (3, 4)


def test_engine_is_let_go_of_once_the_gpu_has_done_with_it(workshop, monkeypatch):
    """Of the least recently used and of other weights' engines."""
    monkeypatch.setattr(backend_module, "MAX_LOADED", 1)
    model, kept = TinyModel(0), []
    backend = make_backend(model, STATIC=True)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device=None: kept.append((device, len(backend._loaded)))
    )
    backend(images(1, 64, 64))
    assert kept == []
    backend(images(1, 64, 96))
    assert kept == [(model.device, 1)]
    model.load_state_dict(TinyModel(1).state_dict())
    backend(images(1, 64, 96))
    assert kept == [(model.device, 1)] * 2


# Threads, and the caller's state


def test_threads_that_ask_at_once_build_once(workshop):
    workshop.gate = threading.Event()
    backend, results = make_backend(), []
    threads = [threading.Thread(target=lambda: results.append(backend(images()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    workshop.gate.set()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(equal(r, TinyModel().core(images())) for r in results)
    assert (len(workshop.built), workshop.deserialized) == (1, 1)
    assert backend.describe()["images"]["tensorrt"] == 4


def test_images_with_an_engine_do_not_wait_for_another_ones_build(workshop):
    backend = make_backend(STATIC=True)
    backend(images(1, 64, 64))
    workshop.gate = threading.Event()
    building = threading.Thread(target=lambda: backend(images(1, 96, 96)))
    building.start()
    try:
        assert equal(backend(images(1, 64, 64)), TinyModel().core(images(1, 64, 64)))
        assert len(backend._loaded) == 1  # while the other was still building
    finally:
        workshop.gate.set()
        building.join()


def test_description_does_not_wait_for_a_build(workshop):
    workshop.gate = threading.Event()
    backend, told = make_backend(), []
    building = threading.Thread(target=backend.prepare)
    building.start()
    while not workshop.built:
        time.sleep(0.01)
    asking = threading.Thread(target=lambda: told.append(backend.describe()))
    asking.start()
    asking.join(5)
    try:
        assert told and told[0]["engines"] == []
    finally:
        workshop.gate.set()
        building.join()


def test_build_does_not_see_the_callers_autocast_and_mode(workshop):
    model = TinyModel().train()
    backend = make_backend(model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        backend(images() + 0)
        assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()
    assert b'"autocast": false, "inference": false' in backend.entry(backend.options.shapes).data
    assert model.training and not workshop.models[1].training


def test_parts_of_a_model_keep_the_mode_that_they_are_in(workshop):
    model = TinyModel().train()
    model.backbone.eval()  # frozen
    make_backend(model).prepare()
    assert model.training and model.head.training and not model.backbone.training


def test_progress_is_logged_once_for_build_and_load(workshop, caplog):
    caplog.set_level(logging.INFO, logger="d2_trt")
    make_backend().prepare()
    make_backend().prepare()
    assert caplog.text.count("Building the TensorRT engine for batch 1..2") == 1
    assert caplog.text.count("TensorRT engine ready in") == 2


def test_default_options_are_valid():
    assert TensorRTOptions.from_cfg(make_cfg()).verify.sizes == 3
