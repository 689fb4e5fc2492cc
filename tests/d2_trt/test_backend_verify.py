"""A cached engine is compared again where it was not compared as is asked for now."""

from __future__ import annotations

import json

import pytest

from d2_trt import parity
from d2_trt.cache import EngineCache
from d2_trt.errors import ParityError
from d2_trt.options import VerifyOptions
from tests.d2_trt.backend_helpers import TinyModel, entries, equal, images, make_backend
from tests.d2_trt.backend_helpers import workshop as workshop


def wrong_signs(logits, masks):
    return logits, -masks


def a_hundredth_off(logits, masks):
    return logits, masks * 1.01


def compared(tmp_path):
    (sidecar,) = (tmp_path / "d2_trt").glob("*.json")
    return [row["images"] for row in json.loads(sidecar.read_text())["parity"].get("sizes", [])]


@pytest.mark.parametrize(
    ("disturb", "lax"),
    [(wrong_signs, {"VERIFY__ENABLED": False}), (a_hundredth_off, {"VERIFY__MAX_MASK_ERROR": 0.5})],
)
def test_engine_that_passed_a_laxer_gate_is_refused_by_a_stricter_one(workshop, tmp_path, disturb, lax):
    workshop.disturb = disturb
    make_backend(**lax).prepare()
    for mode in ("readwrite", "require"):
        backend = make_backend(CACHE__MODE=mode)
        for _ in range(2):
            with pytest.raises(ParityError, match="MAX_MASK_ERROR"):
                backend(images())
        with pytest.raises(ParityError):
            backend.entry(backend.options.shapes)
    fallen = make_backend(model := TinyModel(), ON_ERROR="torch")
    assert equal(fallen(images()), model.core(images()))
    assert fallen.describe()["backend"].startswith("torch (fallback: the engine disagrees with PyTorch")
    make_backend(**lax).prepare()  # its own user keeps it
    assert len(workshop.built) == 1 and len(entries(tmp_path)) == 1


@pytest.mark.parametrize("ask", ["an image", "entry"])
def test_engine_that_was_not_compared_is_compared_once_without_a_build(workshop, tmp_path, ask):
    make_backend(VERIFY__ENABLED=False).prepare()
    assert compared(tmp_path) == []
    backend = make_backend(model := TinyModel())
    if ask == "entry":
        entry = backend.entry(backend.options.shapes, images())
    else:
        backend(images())
        (told,) = backend.describe()["engines"]
        assert told["parity"]["given_images"] == 1 and not told["built"]
    assert model.core_calls and compared(tmp_path)[0] == "2x3x64x96"
    (info,) = EngineCache(tmp_path / "d2_trt").verify()
    assert not info.problem and info.sidecar["parity"]["sizes"]
    if ask == "entry":
        assert entry.sidecar == info.sidecar
    make_backend(model := TinyModel()).prepare()
    assert model.core_calls == 0 and len(workshop.built) == 1


@pytest.mark.parametrize("more", [{"VERIFY__SIZES": 4}, {"VERIFY__IMAGES": 3}], ids=str)
def test_more_sizes_and_images_are_compared_where_they_are_asked_for(workshop, tmp_path, more):
    make_backend().prepare()
    before = compared(tmp_path)
    make_backend(**more).prepare()
    assert len(compared(tmp_path)) > len(before)
    make_backend(model := TinyModel()).prepare()  # less is asked for
    assert model.core_calls == 0 and len(workshop.built) == 1


def test_comparison_is_not_written_where_the_cache_is_only_read(workshop, tmp_path):
    make_backend(VERIFY__ENABLED=False).prepare()
    (sidecar,) = (tmp_path / "d2_trt").glob("*.json")
    before = sidecar.read_bytes()
    for _ in range(2):
        make_backend(model := TinyModel(), CACHE__MODE="read").prepare()
        assert model.core_calls
    assert sidecar.read_bytes() == before and len(workshop.built) == 1


def test_engine_to_compare_that_does_not_load_is_built_again(workshop, tmp_path):
    make_backend(VERIFY__ENABLED=False).prepare()
    workshop.refused.add((tmp_path / "d2_trt" / entries(tmp_path)[0]).read_bytes())
    backend = make_backend()
    assert backend.entry(backend.options.shapes).parity["sizes"]
    assert len(workshop.built) == 2


ROW = {"logit_error": 1e-4, "mask_error": 1e-4, "sign_agreement": 1.0, "class_agreement": 1.0}
LIMITS = VerifyOptions(
    max_logit_error=2e-3, max_mask_error=2e-3, min_sign_agreement=0.999, min_class_agreement=0.99
)


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"mask_error": 3e-3}, False),
        ({"class_agreement": 0.9}, False),
        ({"mask_error": "nan"}, False),  # as a sidecar has it
        ({"mask_error": None}, False),
        ({"images": "1x3x64x64"}, False),
    ],
)
def test_sidecars_numbers_are_held_against_the_limits(change, good):
    rows = [{"images": "1x3x64x96", **ROW}, {"images": "1x3x96x96", **ROW, **change}]
    assert parity.passed({"sizes": rows}, [(1, 64, 96), (1, 96, 96)], LIMITS) == good
    assert not parity.passed({}, [(1, 64, 96)], LIMITS)


def test_limit_that_is_not_checked_passes_any_number():
    row = {"images": "1x3x64x96", **ROW, "mask_error": 9.0}
    assert parity.passed({"sizes": [row]}, [(1, 64, 96)], VerifyOptions())
