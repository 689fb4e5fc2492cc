"""TensorRTPredictor beside detectron2's DefaultPredictor."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY
from PIL import Image
from torch import nn

import d2_trt
from d2_trt import TensorRTPredictor
from d2_trt import predictor as predictor_module
from d2_trt.errors import OptionsError
from mask2former import kernels
from tests.d2_trt.predictor_helpers import assert_equal, make, picture
from tests.golden import mini_cfg

SIZES = [(48, 60), (60, 48), (33, 150), (64, 64)]


@pytest.fixture(scope="module", params=["BGR", "RGB"])
def pair(request):
    """(TensorRTPredictor, DefaultPredictor) of one model."""
    mine = make(TensorRTPredictor, "INPUT.FORMAT", request.param)
    theirs = make(DefaultPredictor, "INPUT.FORMAT", request.param)
    theirs.model = mine.model
    return mine, theirs


@pytest.mark.parametrize("size", SIZES)
def test_results_are_the_default_predictors(pair, size):
    mine, theirs = pair
    image = picture(size)
    assert_equal(mine(image), theirs(image))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(np.float32) * 0.9,
        lambda x: x[:, ::-1],
        lambda x: np.asfortranarray(x),
        lambda x: x[::2, 1:],
    ],
    ids=["float", "mirrored view", "column-major", "strided view"],
)
def test_odd_arrays_give_the_default_predictors_results(pair, change):
    mine, theirs = pair
    image = change(picture((70, 80)))
    assert_equal(mine(image), theirs(image))


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros((8, 8, 4), np.uint8)]
)
def test_what_the_default_predictor_refuses_is_refused_alike(pair, image):
    mine, theirs = pair
    with pytest.raises(Exception) as expected:
        theirs(image)
    with pytest.raises(expected.type):
        mine(image)


@pytest.mark.parametrize("image, got", [(None, "None, which cv2.imread gives"), ("a.jpg", "got str")])
def test_what_is_no_array_is_told(pair, image, got):
    with pytest.raises(TypeError, match=rf"an image is a numpy array \(H, W, C\).*{got}"):
        pair[0](image)


def test_images_keep_their_size_where_the_config_says_so():
    mine, theirs = (make(kind, "INPUT.MIN_SIZE_TEST", 0) for kind in (TensorRTPredictor, DefaultPredictor))
    image = picture((40, 70))
    assert mine.load(image)["image"].shape == (3, 40, 70)
    assert_equal(mine(image), theirs(image))


def test_results_carry_no_gradients(pair):
    assert not pair[0](picture((48, 60)))["sem_seg"].requires_grad


def test_config_without_the_projects_keys_is_refused():
    with pytest.raises(OptionsError, match=r"MODEL\.TENSORRT is missing.*add_tensorrt_config"):
        TensorRTPredictor(get_cfg())


def test_model_of_another_kind_is_refused(monkeypatch):
    class Other(nn.Module):
        def __init__(self, cfg):
            super().__init__()

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Other", Other)
    with pytest.raises(OptionsError, match="'Other'; TensorRTPredictor runs 'MaskFormer'"):
        TensorRTPredictor(mini_cfg("resnet50-mini", ("MODEL.META_ARCHITECTURE", "Other")))


def test_package_exports_it_and_nothing_unknown():
    assert d2_trt.TensorRTPredictor is TensorRTPredictor
    with pytest.raises(AttributeError, match="no attribute 'Predictor'"):
        _ = d2_trt.Predictor


def test_description_says_what_runs_where(pair):
    mine, _ = pair
    told = mine.describe()
    assert told["backend"] == "torch"
    if mine.model.device.type == "cpu":
        assert told["resize"] == "cpu"


class Ring:
    """A double of the upload: images stay on the CPU."""

    def __init__(self):
        self.uploads = []

    def upload(self, image):
        self.uploads.append(image.shape)
        return torch.from_numpy(np.ascontiguousarray(image))


def resize_with_pillow(image, size, *, reverse_channels=False):
    image = image.numpy()[:, :, ::-1] if reverse_channels else image.numpy()
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size[::-1], Image.BILINEAR))
    return torch.from_numpy(resized.transpose(2, 0, 1).copy())


@pytest.fixture
def as_on_gpu(pair, monkeypatch):
    """The pair, with the first one's GPU path on doubles of the upload and the resize."""
    mine, theirs = pair
    monkeypatch.setattr(mine, "_resizes_on", "gpu")
    monkeypatch.setattr(mine, "_ring", Ring())
    calls = []

    def resize(*args, **options):
        calls.append(args)
        return resize_with_pillow(*args, **options)

    monkeypatch.setattr(predictor_module.gpu_resize, "resize_bilinear", resize)
    return mine, theirs, calls


@pytest.mark.parametrize("size", SIZES)
def test_gpu_path_gives_the_default_predictors_results(as_on_gpu, size):
    mine, theirs, calls = as_on_gpu
    image = picture(size)
    assert_equal(mine(image), theirs(image))
    assert len(calls) == 1 and mine._ring.uploads == [image.shape]


@pytest.mark.parametrize("kind", ["float", "tall to nothing", "another transform"])
def test_gpu_path_is_left_for_what_it_does_not_know(as_on_gpu, kind, monkeypatch):
    mine, theirs, calls = as_on_gpu
    image = picture((60, 80))
    if kind == "float":
        image = image.astype(np.float32)
    elif kind == "tall to nothing":
        with pytest.raises(ValueError, match="height and width"):
            theirs(np.zeros((1000, 1, 3), np.uint8))
        with pytest.raises(ValueError, match="height and width"):
            mine(np.zeros((1000, 1, 3), np.uint8))
        assert not calls
        return
    else:

        class Nearest(predictor_module.ResizeTransform):
            pass

        class Aug:
            def get_transform(self, image):
                return Nearest(*image.shape[:2], 64, 96, Image.NEAREST)

        monkeypatch.setattr(mine, "aug", Aug())
        monkeypatch.setattr(theirs, "aug", mine.aug)
    assert_equal(mine(image), theirs(image))
    assert not calls


def test_missing_kernels_are_said_once(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    monkeypatch.setattr(predictor_module.MaskFormer, "device", torch.device("cuda", 0))
    monkeypatch.setattr(predictor_module, "PinnedRing", lambda device, slots: Ring())
    monkeypatch.setattr(predictor_module.gpu_resize, "why_not", lambda: "no kernels")
    monkeypatch.setattr(predictor_module.DefaultPredictor, "__init__", fake_init)
    predictor = TensorRTPredictor(mini_cfg("resnet50-mini"))
    assert predictor._resizes_on == "cpu (no kernels)"
    assert len([r for r in caplog.records if "no kernels" in r.getMessage()]) == 1


def fake_init(self, cfg):
    self.model = predictor_module.MaskFormer.__new__(predictor_module.MaskFormer)


# On a GPU


def needs_kernels():
    if not kernels.available():
        pytest.skip(f"the CUDA kernels are not built: {kernels.BUILD_HINT}")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (480, 640), (1001, 353), (1, 1)])
def test_gpu_loads_the_default_predictors_pixels(pair, size):
    needs_kernels()
    mine, theirs = pair
    assert mine.describe()["resize"] == "gpu"
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    loaded = mine.load(image, mine._ring)["image"]
    flipped = image[:, :, ::-1] if theirs.input_format == "RGB" else image
    expected = theirs.aug.get_transform(flipped).apply_image(flipped)
    assert loaded.is_cuda and loaded.dtype == torch.uint8
    assert np.array_equal(loaded.cpu().numpy(), expected.transpose(2, 0, 1))


@pytest.mark.gpu
def test_gpu_uploads_do_not_overtake_each_other(pair):
    mine, _ = pair
    images = [np.full((700, 900, 3), n, np.uint8) for n in range(40)]
    uploaded = [mine._ring.upload(image) for image in images]
    assert [int(t.float().mean().item()) for t in uploaded] == list(range(40))


@pytest.mark.gpu
def test_gpu_threads_get_their_own_images_results(pair):
    needs_kernels()
    mine, theirs = pair
    images = [picture((48 + 8 * i, 60), seed=i) for i in range(4)]
    expected = [theirs(image)["sem_seg"].clone() for image in images]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(10):
                actual = mine(images[i])["sem_seg"]
                stream.synchronize()
                if not torch.allclose(actual, expected[i], rtol=1e-3, atol=1e-4):
                    wrong.append(f"thread {i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong
