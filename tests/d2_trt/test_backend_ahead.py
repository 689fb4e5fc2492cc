"""What the "tensorrt" backend traces and compares with, and what an evaluation has it build before the first image."""

from __future__ import annotations

import logging
import types
from collections import Counter

import pytest
import torch
from detectron2.modeling import build_model

from d2_trt import backend as backend_module
from d2_trt import requirements
from d2_trt.errors import GPUMemoryError, ParityError
from mask2former import get_mask2former_cfg
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.evaluation import evaluate_model, inference, test_loader
from tests.d2_trt import backend_helpers
from tests.d2_trt.backend_helpers import TinyModel, images, make_backend
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.golden import REPO


class Ahead:
    """In the place of ImagesAhead."""

    def __init__(self, sizes=None, count: int = 4):
        self._sizes, self._count = sizes, count
        self.reads = 0
        self.images = [images(1, 40 + 8 * i, 72)[0].to(torch.uint8) for i in range(count)]

    def examples(self, count):
        self.reads += 1
        return self.images[:count]

    def sizes(self, multiple):
        assert multiple == 32
        return self._sizes


class Watched(TinyModel):
    """A model that keeps what PyTorch was asked for."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def core(self, images):
        self.seen.append(images)
        return super().core(images)


def stretched(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(image[None].float(), size=(height, width), mode="bilinear")


def among(wanted: torch.Tensor, batches: list[torch.Tensor]) -> bool:
    return any(torch.equal(wanted[0], image) for batch in batches for image in batch)


# What is traced and compared


@pytest.mark.parametrize("static", [False, True])
def test_callers_image_is_traced_and_compared(workshop, static):
    backend = make_backend(model := Watched(), STATIC=static, MAX_BATCH_SIZE=1)
    backend(given := images(1, 64, 96))
    assert among(given, workshop.traced)
    compared = [batch for batch in model.seen if batch.shape[2:] == (64, 96)]
    assert among(given, compared) and len(compared) == 2  # with one that the network was not traced with
    if not static:  # at the other sizes too
        assert among(stretched(given[0], 128, 128), model.seen) and among(
            stretched(given[0], 64, 64), model.seen
        )
    parity = backend.describe()["engines"][0]["parity"]
    assert (parity["given_images"], parity["drawn_scenes"]) == (1, 1)


@pytest.mark.parametrize("static", [False, True])
def test_engine_that_is_right_for_the_traced_image_alone_is_refused(workshop, static):
    backend = make_backend(STATIC=static, SHAPES=["64x96"], MAX_BATCH_SIZE=1)
    given = images(1, 64, 96)
    logits, masks = TinyModel().core(given)
    workshop.disturb = lambda *_: (logits.detach(), masks.detach())
    with pytest.raises(ParityError):
        backend(given)


def test_images_ahead_are_traced_and_compared_each_in_its_turn(workshop, caplog):
    caplog.set_level(logging.INFO, logger="d2_trt")
    backend = make_backend(model := Watched(), MAX_BATCH_SIZE=1)
    backend.prepare(ahead := Ahead())
    first, *others = ahead.images
    assert torch.equal(workshop.traced[0], stretched(first, 64, 96))
    sizes = [(64, 96), (128, 128), (64, 64)]
    for image, size, batch in zip(others, sizes, model.seen, strict=True):
        assert torch.equal(batch, stretched(image, *size))
    parity = backend.describe()["engines"][0]["parity"]
    assert (parity["given_images"], parity["drawn_scenes"]) == (3, 0)
    assert "Compared with PyTorch on 3 given images\n" in caplog.text + "\n"


def test_drawn_scenes_are_told_where_nothing_else_is_at_hand(workshop, caplog):
    caplog.set_level(logging.INFO, logger="d2_trt")
    backend = make_backend()
    backend.prepare()
    assert "on 5 drawn scenes alone: no real image was at hand" in caplog.text
    parity = backend.describe()["engines"][0]["parity"]
    assert (parity["given_images"], parity["drawn_scenes"]) == (0, 5)


def test_cached_engine_reads_no_images_where_real_ones_were_compared(workshop):
    make_backend().prepare(Ahead())
    make_backend().prepare(ahead := Ahead())
    assert ahead.reads == 0 and len(workshop.built) == 1


# Engines that were built without real images


@pytest.fixture(params=["built here", "cached"])
def unmet(workshop, request):
    """A backend, and its model, that has an engine which was compared on drawn scenes alone."""

    def make(**options):
        if request.param == "cached":
            make_backend(Watched(), **options).prepare()
        backend = make_backend(model := Watched(), **options)
        backend.prepare()
        model.seen.clear()
        return backend, model

    return make


def test_first_real_image_is_compared_once(workshop, unmet, caplog):
    caplog.set_level(logging.INFO, logger="d2_trt")
    backend, model = unmet()
    first, second = images(2, 64, 64), images(1, 96, 96)
    for batch in (first, second, first):
        backend(batch)
    assert [x.shape for x in model.seen] == [(1, 3, 64, 64)]  # as many as VERIFY.IMAGES says
    assert torch.equal(model.seen[0], first[:1])
    parity = backend.describe()["engines"][0]["parity"]
    assert (parity["given_images"], parity["drawn_scenes"]) == (1, 5)
    assert [row["images"] for row in parity["sizes"]][3:] == ["1x3x64x64"]
    assert caplog.text.count("Compared with PyTorch on the first 1 given image\n") == 1
    assert len(workshop.built) == 1


def test_images_ahead_are_compared_before_the_first_one(workshop, unmet):
    backend, model = unmet()
    backend.prepare(ahead := Ahead(count=1))
    assert ahead.reads == 1 and torch.equal(model.seen[0][:1], stretched(ahead.images[0], 64, 96))
    backend(images(1, 64, 64))
    assert len(model.seen) == 1 and len(workshop.built) == 1


def test_unreadable_images_ahead_leave_it_to_the_first_image(workshop, unmet):
    backend, model = unmet()
    backend.prepare(Ahead(count=0))
    assert not model.seen
    backend(images(1, 64, 64))
    assert len(model.seen) == 1


@pytest.mark.parametrize("on_error", ["raise", "torch"])
def test_engine_that_is_wrong_on_the_first_real_image_is_not_used(workshop, unmet, caplog, on_error):
    backend, model = unmet(ON_ERROR=on_error)
    workshop.disturb = lambda logits, masks: (logits, -masks)
    real = images(1, 64, 64)
    for _ in range(2):
        if on_error == "torch":
            assert all(map(torch.equal, backend(real), TinyModel().core(real)))
        else:
            with pytest.raises(ParityError, match="at 1x3x64x64: pred_masks: mask error is 2"):
                backend(real)
    told = backend.describe()
    assert told["engines"] == [] and told["images"]["tensorrt"] == 0
    assert caplog.text.count("disagrees with PyTorch") == (on_error == "torch")
    assert len(model.seen) == (3 if on_error == "torch" else 1) and len(workshop.built) == 1


def test_whole_batch_of_a_static_engine_is_compared(workshop, unmet):
    backend, model = unmet(STATIC=True, SHAPES=["64x96"], MAX_BATCH_SIZE=1)
    backend(images(1, 64, 96))
    assert [x.shape for x in model.seen] == [(1, 3, 64, 96)]


def test_nothing_is_compared_where_verify_is_off(workshop, unmet):
    backend, model = unmet(VERIFY__ENABLED=False)
    backend(images(1, 64, 64))
    assert not model.seen


def test_memory_that_does_not_suffice_for_the_comparison_is_told_and_asked_for_again(
    workshop, unmet, monkeypatch
):
    backend, model = unmet()

    def fail(model, images):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "core", fail)
        with pytest.raises(GPUMemoryError, match="does not suffice to run the engine"):
            backend(images(1, 64, 64))
    backend(images(1, 64, 64))
    assert backend.describe()["images"] == {"tensorrt": 1, "torch": 0} and len(workshop.built) == 1


# Engines of the sizes to come

SIZES = Counter({(1, 64, 96): 5, (2, 64, 64): 9, (1, 96, 96): 1})


def test_static_engines_of_the_sizes_to_come_are_built_before_the_first_image(workshop, caplog):
    backend = make_backend(STATIC=True)
    backend.prepare(
        ahead := Ahead(SIZES + Counter({(1, 256, 256): 9, (3, 64, 64): 9}))
    )  # two are out of range
    assert [spec.opt_shape for spec in workshop.built] == [(2, 64, 64), (1, 64, 96), (1, 96, 96)]
    assert ahead.reads == 1 and "images' timing" not in caplog.text
    for shape in SIZES:
        backend(images(*shape))
    assert len(workshop.built) == 3


def test_static_engines_beyond_the_bound_are_told_in_one_line(workshop, monkeypatch, caplog):
    monkeypatch.setattr(backend_module, "MAX_LOADED", 2)
    make_backend(STATIC=True).prepare(Ahead(SIZES))
    assert [spec.opt_shape for spec in workshop.built] == [(2, 64, 64), (1, 64, 96)]
    assert caplog.text.count("within the images' timing") == 1
    assert "in 3 batches and padded sizes. Engines of the 2 most frequent" in caplog.text


def test_static_sizes_that_records_do_not_tell_are_told_in_one_line(workshop, caplog):
    make_backend(STATIC=True).prepare(Ahead())
    assert not workshop.built and caplog.text.count("within the images' timing") == 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("ahead") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=1, val=6, min_size=48, max_size=96))
    register_shapes(str(root), "aheaddrawn")
    return "aheaddrawn_val_panoptic"


@pytest.mark.parametrize("records", ["with sizes", "without"])
def test_evaluation_builds_before_its_timing_starts(workshop, drawn, monkeypatch, tmp_path, caplog, records):
    config = REPO / "configs/shapes/maskformer2_mini_shapes.yaml"
    words = ["MODEL.DEVICE", "cpu", "MODEL.BACKEND", "tensorrt", "MODEL.TENSORRT.STATIC", True]
    words += ["DATASETS.TEST", (drawn,), "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path)]
    words += ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, "MODEL.TENSORRT.PRECISION", "fp32"]
    words += ["MODEL.TENSORRT.SHAPES", ["32x32", "64x64", "96x96"]]
    cfg = get_mask2former_cfg(config, words)
    monkeypatch.setattr(requirements, "require", lambda *_, **__: None)
    # The double keeps the model as it is, with the backend that is building for it.
    monkeypatch.setattr(backend_helpers, "copy", types.SimpleNamespace(deepcopy=lambda model: model))
    if records == "without":
        read = test_loader.load_records
        monkeypatch.setattr(
            test_loader,
            "load_records",
            lambda *words, **options: [
                {k: v for k, v in record.items() if k not in ("height", "width")}
                for record in read(*words, **options)
            ],
        )
    before = []
    run = inference.inference_on_dataset
    monkeypatch.setattr(
        inference, "inference_on_dataset", lambda *words: (before.append(len(workshop.built)), run(*words))[1]
    )
    model = build_model(cfg).eval()
    evaluate_model(cfg, model)
    told = model.backend.describe()
    assert told["images"] == {"tensorrt": 6, "torch": 0}
    if records == "without":
        assert before == [0] and caplog.text.count("within the images' timing") == 1
    else:
        assert before == [len(workshop.built)] and len(workshop.built) > 1
        assert all(one["parity"]["given_images"] for one in told["engines"])
