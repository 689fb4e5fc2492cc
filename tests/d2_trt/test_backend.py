"""The "tensorrt" backend: when it builds, loads, falls back and refuses, and what it tells of it."""

from __future__ import annotations

import gc
import json
import logging
import sys
import threading
import weakref

import pytest
import torch

from d2_trt import backend as backend_module
from d2_trt import compat, plugin
from d2_trt.backend import TensorRTBackend
from d2_trt.errors import BuildError, EngineShapeError, MissingDependencyError, OptionsError, ParityError
from d2_trt.options import TensorRTOptions
from d2_trt.sample_images import SampleImages, verified_batches
from d2_trt.shape_range import ShapeRange
from tests.d2_trt.backend_helpers import TinyModel, images, make_backend, make_cfg
from tests.d2_trt.backend_helpers import workshop as workshop


def equal(actual, expected) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def entries(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "d2_trt").glob("*.engine"))


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
    backend(images())
    assert model.core_calls == 0 and len(workshop.built) == 1


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
    assert told["backend"] == "tensorrt" and told["images"] == {"tensorrt": 2, "torch": 5}
    assert len(told["reasons"]) == 1 and "padded to 160x96" in told["reasons"][0]


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


# What fails


def test_engine_that_disagrees_is_not_kept_and_says_where(workshop, tmp_path):
    workshop.disturb = lambda logits, masks: (logits, masks + 0.5 * (masks.shape[-1] == 32))
    backend = make_backend()
    for _ in range(2):  # the second call does not build for minutes to fail again
        with pytest.raises(ParityError, match=r"at 1x3x128x128: pred_masks: mask error.*MAX_MASK_ERROR"):
            backend(images())
    assert len(workshop.built) == 1 and entries(tmp_path) == []
    assert not list((tmp_path / "d2_trt").glob("*.json"))


def test_unchecked_engine_is_used_as_it_is(workshop):
    workshop.disturb = lambda logits, masks: (logits, -masks)
    backend = make_backend(VERIFY__ENABLED=False)
    assert equal(backend(images())[1:], [-TinyModel().core(images())[1]])
    assert backend.describe()["engines"][0]["parity"] == {}


def test_failure_falls_back_with_one_warning_and_says_so(workshop, caplog):
    workshop.fail = BuildError("TensorRT built nothing\n  details")
    model = TinyModel()
    backend = make_backend(model, ON_ERROR="torch")
    backend.prepare()
    for _ in range(3):
        assert equal(backend(images()), model.core(images()))
    assert len(workshop.built) == 1 and caplog.text.count("TensorRT built nothing") == 1
    told = backend.describe()
    assert told["backend"] == "torch (fallback: TensorRT built nothing)"
    assert told["images"] == {"tensorrt": 0, "torch": 3}
    assert "MODEL.TENSORRT.ON_ERROR" in told["reasons"][0]
    json.dumps(told)


def test_other_weights_get_another_try(workshop):
    workshop.fail = BuildError("no")
    model = TinyModel(0)
    backend = make_backend(model, ON_ERROR="torch")
    backend(images())
    workshop.fail = None
    model.load_state_dict(TinyModel(1).state_dict())
    backend(images())
    told = backend.describe()
    assert told["backend"] == "tensorrt" and told["images"] == {"tensorrt": 1, "torch": 1}


def test_static_size_that_fails_leaves_the_others_alone(workshop):
    backend = make_backend(STATIC=True, ON_ERROR="torch")
    workshop.fail = BuildError("no")
    backend(images(1, 64, 64))
    workshop.fail = None
    backend(images(1, 64, 96))
    backend(images(1, 64, 64))
    assert backend.describe()["images"] == {"tensorrt": 1, "torch": 2}
    assert len(workshop.built) == 2


def test_out_of_memory_says_what_to_lower(workshop):
    workshop.fail = torch.cuda.OutOfMemoryError("Tried to allocate 3 GiB")
    with pytest.raises(BuildError, match=r"3 GiB.*MAX_BATCH_SIZE.*MODEL\.TENSORRT\.SHAPES"):
        make_backend().prepare()


def test_plugin_that_is_not_built(workshop, monkeypatch, tmp_path):
    monkeypatch.setattr(plugin, "library", lambda: tmp_path / "libd2_trt_plugins_trt10.so")
    with pytest.raises(
        MissingDependencyError, match=r"MSDA 'plugin' needs libd2_trt_plugins_trt10\.so.*setup\.py build_ext"
    ):
        make_backend(MSDA="plugin").prepare()


def test_plugin_is_taken_where_it_is_built(workshop, monkeypatch):
    make_backend().prepare()
    monkeypatch.setattr(plugin, "is_built", lambda: True)
    monkeypatch.setattr(plugin, "load", lambda option: None)
    backend = make_backend()
    entry = backend.entry(backend.options.shapes)  # not the stock plugin's
    made_by = entry.sidecar["ingredients"]["plugins"]
    assert made_by["MSDA"] == "D2TRTMSDeformAttn 2"
    # Every plugin's version counts.
    assert all(str(kind) in made_by[kind.option] for kind in plugin.PLUGINS)
    make_backend(MSDA="stock").prepare()
    monkeypatch.setattr(compat, "plugin_creator", lambda name, *rest: None)
    monkeypatch.setattr(plugin, "is_built", lambda: False)
    make_backend().prepare()
    assert [spec.msda for spec in workshop.built] == ["stock", "plugin", "stock", "native"]


def test_attention_is_tensorrts_own_on_a_gpu_without_the_plugins_instructions(workshop, monkeypatch):
    monkeypatch.setattr(plugin, "is_built", lambda: True)
    monkeypatch.setattr(plugin, "load", lambda option: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    make_backend().prepare()
    (spec,) = workshop.built
    assert (spec.attention, spec.normalization, spec.msda) == ("native", "plugin", "plugin")
    with pytest.raises(
        MissingDependencyError, match=r"ATTENTION 'plugin' needs .* 8\.0 .* 7\.5: set MODEL\.TENSORRT"
    ):
        make_backend(ATTENTION="plugin").prepare()


def test_bf16_needs_tensorrt_10(workshop, monkeypatch):
    monkeypatch.setattr(compat, "strongly_typed", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"'bf16', which needs TensorRT 10.*Set it to fp16"):
        make_backend(PRECISION="bf16").prepare()
    monkeypatch.setattr(compat, "strongly_typed", lambda: True)
    make_backend(PRECISION="bf16").prepare()
    assert workshop.built[0].dtype == torch.bfloat16


def test_model_on_the_cpu_is_refused_with_what_to_change(tmp_path):
    with pytest.raises(MissingDependencyError, match=r"on cpu.*MODEL\.DEVICE cuda, or MODEL\.BACKEND torch"):
        make_backend()
    backend = make_backend(model := TinyModel(), ON_ERROR="torch")
    backend.prepare()
    assert equal(backend(images()), model.core(images()))
    assert backend.describe()["backend"].startswith("torch (fallback: MODEL.BACKEND 'tensorrt' runs on an")
    with pytest.raises(MissingDependencyError):
        backend.entry(backend.options.shapes)


def test_missing_tensorrt_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(TensorRTBackend, "_require", lambda self: compat.tensorrt())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    compat.tensorrt.cache_clear()
    with pytest.raises(MissingDependencyError, match="pip install tensorrt"):
        make_backend()


def test_wrong_key_is_an_error_even_with_a_fallback(workshop):
    cfg = make_cfg(ON_ERROR="torch")
    cfg.MODEL.TENSORRT.PRECISION = "fp8"
    with pytest.raises(OptionsError, match=r"MODEL\.TENSORRT\.PRECISION is 'fp8'"):
        TensorRTBackend(TinyModel(), cfg)


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


def test_build_does_not_see_the_callers_autocast_and_mode(workshop):
    model = TinyModel().train()
    backend = make_backend(model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        backend(images() + 0)
        assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()
    assert b'"autocast": false, "inference": false' in backend.entry(backend.options.shapes).data
    assert model.training and not workshop.models[1].training


def test_progress_is_logged_once_for_build_and_load(workshop, caplog):
    caplog.set_level(logging.INFO, logger="d2_trt")
    make_backend().prepare()
    make_backend().prepare()
    assert caplog.text.count("Building the TensorRT engine for batch 1..2") == 1
    assert caplog.text.count("TensorRT engine ready in") == 2


# What engines are compared on


def test_compared_sizes_hold_the_fastest_the_largest_and_the_smallest():
    shapes = ShapeRange((1, 256, 256), (2, 800, 1088), (4, 1344, 1344))
    assert verified_batches(shapes, 32, 1, 1) == [(2, 800, 1088)]
    assert verified_batches(shapes, 32, 3, 1) == [(2, 800, 1088), (1, 1344, 1344), (4, 256, 256)]
    six = verified_batches(shapes, 32, 6, 1)
    assert len({size[1:] for size in six}) == 6
    assert any(h > w for _, h, w in six) and any(h < w for _, h, w in six)
    assert all(shapes.contains(*size) and size[1] % 32 == size[2] % 32 == 0 for size in six)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_size_gets_the_wanted_number_of_images(count):
    shapes = ShapeRange((1, 64, 64), (1, 64, 96), (2, 256, 256))
    per_size = {}
    for batch, *size in verified_batches(shapes, 32, 5, count):
        assert batch <= 2
        per_size[tuple(size)] = per_size.get(tuple(size), 0) + batch
    assert len(per_size) == 5 and min(per_size.values()) >= count


def test_range_of_one_size_is_compared_once():
    assert verified_batches(ShapeRange.fixed(2, 64, 96), 32, 5, 1) == [(2, 64, 96)]


def test_samples_are_what_was_given_and_then_scenes_none_twice():
    given = images(2, 64, 96)
    samples = SampleImages(torch.device("cpu"), given)
    first, second = samples.take((3, 64, 96)), samples.take((2, 32, 64))
    assert torch.equal(first[:2], given)
    assert first.dtype == torch.float32 and second.shape == (2, 3, 32, 64)
    assert first[2].max() > 1 and not torch.equal(second[0], second[1])


def test_default_options_are_valid():
    assert TensorRTOptions.from_cfg(make_cfg()).verify.sizes == 3
