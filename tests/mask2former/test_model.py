"""The model as its users meet it: inputs, batches, checkpoints, backends."""

import copy
import pickle
import threading
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from mask2former import BACKEND_REGISTRY, get_mask2former_cfg
from mask2former.backend import TorchBackend
from tests.golden import config_path, mini_cfg, mini_model, state_dict


@pytest.fixture(scope="module")
def model():
    return mini_model("resnet50-mini")


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8)


def run(model, inputs):
    with torch.no_grad():
        return model(inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "at least one"),
        ([{"file_name": "a.jpg"}], "key 'image'"),
        ([random_image(32, 32)], "key 'image'"),
        ([{"image": np.zeros((3, 32, 32))}], "expected a torch.Tensor"),
        ([{"image": torch.zeros(32, 32)}], r"expected \(3, height, width\)"),
        ([{"image": torch.zeros(32, 32, 3)}], r"expected \(3, height, width\)"),
        ([{"image": torch.zeros(4, 32, 32)}], r"expected \(3, height, width\)"),
        ([{"image": torch.zeros(3, 0, 32)}], "is empty"),
        ([{"image": torch.zeros(3, 32, 32, dtype=torch.bool)}], "dtype torch.bool"),
        ([{"image": torch.zeros(3, 32, 32, dtype=torch.complex64)}], "dtype torch.complex64"),
        ([{"image": torch.full((3, 32, 32), float("nan"))}], "NaN or infinite"),
        ([{"image": torch.full((3, 32, 32), float("inf"))}], "NaN or infinite"),
        ([{"image": random_image(32, 32), "height": 0, "width": 5}], "output of 0x5"),
    ],
)
def test_wrong_input_is_named(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(model, inputs)


def test_error_names_the_image_of_the_batch(model):
    good = {"image": random_image(32, 32)}
    with pytest.raises(ValueError, match="image 2 of the batch"):
        run(model, [good, good, {"image": torch.zeros(1, 32, 32)}])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.float16, torch.float32, torch.float64]
)
def test_dtype_of_the_image_does_not_change_the_result(model, dtype):
    image = random_image(64, 96)
    (expected,) = run(model, [{"image": image}])
    (result,) = run(model, [{"image": image.to(dtype)}])
    assert torch.equal(result["sem_seg"], expected["sem_seg"])


def test_images_of_different_sizes_share_a_batch(model):
    """Each image's results have its own output size and equal those at the same padded size alone."""
    sizes = [(64, 96), (70, 50), (33, 90)]
    inputs = [{"image": random_image(h, w, seed=h), "height": 2 * h, "width": w + 3} for h, w in sizes]
    results = run(model, inputs)
    images, image_sizes, _ = model.preprocess(inputs)
    assert images.shape == (3, 3, 96, 96) and image_sizes == sizes
    for i, (h, w) in enumerate(sizes):
        # The padding is the mean: zeros once normalised, as in the release.
        padding = images[i, :, h:] if h < 96 else images[i, :, :, w:]
        assert torch.equal(padding, model.pixel_mean.expand_as(padding))
        with torch.no_grad():
            logits, _ = model.core(images[i : i + 1])
            together, _ = model.core(images)
        torch.testing.assert_close(together[i], logits[0], rtol=1e-4, atol=1e-4)
        assert results[i]["sem_seg"].shape[1:] == (2 * h, w + 3)
        assert results[i]["panoptic_seg"][0].shape == (2 * h, w + 3)
        assert results[i]["instances"].image_size == (2 * h, w + 3)


def test_output_size_defaults_to_the_images_own(model):
    (result,) = run(model, [{"image": random_image(45, 77)}])
    assert result["sem_seg"].shape == (13, 45, 77)


def test_results_without_no_grad_need_no_gradient(model):
    (result,) = model([{"image": random_image(32, 32)}])
    assert not result["sem_seg"].requires_grad and not result["instances"].scores.requires_grad


def test_caches_of_inference_mode_serve_later_training(model):
    """Position encodings cached in inference mode must not break a backward pass of the same size."""
    images = random_image(64, 160).float()[None].to(model.device)
    with torch.inference_mode():
        model.core(images)
    logits, _ = model.core(images)
    logits.sum().backward()
    model.zero_grad()


def test_training_mode_without_annotations_says_what_is_missing():
    model = build_model(mini_cfg("resnet50-mini"))
    with pytest.raises(ValueError, match=r"no 'instances'.*model.eval\(\)"):
        model([{"image": random_image(32, 32)}])


def test_panoptic_without_thing_classes_names_the_data_set():
    cfg = mini_cfg("resnet50-mini", ("DATASETS.TRAIN", ("no_things_here",)))
    with pytest.raises(ValueError, match=r"'no_things_here'.*thing_dataset_id_to_contiguous_id"):
        run(build_model(cfg).eval(), [{"image": random_image(32, 32)}])


def test_semantic_only_config_needs_no_thing_classes():
    key = "MODEL.MASK_FORMER.TEST."
    opts = ("DATASETS.TRAIN", ("nothing",), key + "PANOPTIC_ON", False, key + "INSTANCE_ON", False)
    (result,) = run(mini_model("resnet50-mini", opts), [{"image": random_image(40, 60)}])
    assert set(result) == {"sem_seg"} and result["sem_seg"].shape == (13, 40, 60)


def test_unknown_backend_lists_what_there_is():
    with pytest.raises(KeyError, match=r"MODEL\.BACKEND is 'tensort'.*Registered: 'torch'.*import d2_trt"):
        build_model(mini_cfg("resnet50-mini", ("MODEL.BACKEND", "tensort")))


def test_backend_of_the_config_runs_the_network():
    calls = []

    class Counting(TorchBackend):
        def __init__(self, model, cfg):
            super().__init__(model, cfg)
            self.queries = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES

        def prepare(self):
            calls.append("prepare")

        def __call__(self, images):
            calls.append((images.dtype, tuple(images.shape), self.queries))
            return super().__call__(images)

    BACKEND_REGISTRY._do_register("counting", Counting)
    try:
        model = build_model(mini_cfg("resnet50-mini", ("MODEL.BACKEND", "counting"))).eval()
        model.prepare()
        run(model, [{"image": random_image(40, 60)}])
    finally:
        del BACKEND_REGISTRY._obj_map["counting"]
    assert calls == ["prepare", (torch.float32, (1, 3, 64, 64), 20)]


def test_threads_that_ask_at_once_share_a_backend():
    class Slow(TorchBackend):
        def __init__(self, *args):
            time.sleep(0.2)
            super().__init__(*args)

    BACKEND_REGISTRY._do_register("slow", Slow)
    try:
        model = build_model(mini_cfg("resnet50-mini", ("MODEL.BACKEND", "slow")))
        backends = []
        threads = [threading.Thread(target=lambda: backends.append(model.backend)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        del BACKEND_REGISTRY._obj_map["slow"]
    assert len(backends) == 2 and backends[0] is backends[1]


def test_copy_of_a_model_runs_its_own_weights(model):
    run(model, [{"image": random_image(32, 32)}])
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.sem_seg_head.predictor.class_embed.weight)
    images = random_image(32, 32).float()[None].to(model.device)
    with torch.no_grad():
        assert not torch.equal(other.backend(images)[0], model.backend(images)[0])


# Checkpoints


def save_release_style(weights: dict, path) -> str:
    """As the release's model_final_*.pkl: numpy arrays in a pickled dict."""
    arrays = {k: v.cpu().numpy() for k, v in weights.items()}
    with open(path, "wb") as file:
        pickle.dump({"model": arrays, "__author__": "third_party"}, file)
    return str(path)


def old_keys(weights: dict) -> dict:
    """Keys of the release's first version: no pixel_decoder prefix, static_query."""
    return {
        k.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): v
        for k, v in weights.items()
    }


@pytest.mark.parametrize("keys", ["new", "old"])
@pytest.mark.parametrize("metadata", ["with metadata", "old version", "without metadata"])
def test_keys_of_every_version_load(model, keys, metadata):
    weights = OrderedDict(model.state_dict())
    if keys == "old":
        weights = OrderedDict(old_keys(weights))
    if metadata != "without metadata":
        weights._metadata = copy.deepcopy(model.state_dict()._metadata)
        if metadata == "old version":
            for entry in weights._metadata.values():
                entry["version"] = 1
    fresh = build_model(mini_cfg("resnet50-mini")).eval()
    fresh.load_state_dict(weights)  # strict: raises on missing or unexpected keys
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@pytest.mark.parametrize("keys", ["new", "old"])
def test_release_checkpoint_loads_through_the_checkpointer(model, keys, tmp_path):
    weights = model.state_dict() if keys == "new" else old_keys(model.state_dict())
    path = save_release_style(weights, tmp_path / "model_final.pkl")
    fresh = build_model(mini_cfg("resnet50-mini")).eval()
    checkpointer = DetectionCheckpointer(fresh)
    incompatible = []
    log = checkpointer._log_incompatible_keys
    checkpointer._log_incompatible_keys = lambda keys: (incompatible.append(keys), log(keys))
    checkpointer.load(path)
    (keys_left,) = incompatible
    assert not keys_left.missing_keys and not keys_left.unexpected_keys and not keys_left.incorrect_shapes
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_full_size_checkpoint_of_the_usual_config_name_loads(tmp_path):
    name = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
    cfg = get_mask2former_cfg(config_path(name), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    torch.manual_seed(1)
    path = save_release_style(build_model(cfg).state_dict(), tmp_path / "model_final.pkl")
    cfg.MODEL.WEIGHTS = path
    predictor = DefaultPredictor(cfg)
    with open(path, "rb") as file:
        saved = pickle.load(file)["model"]
    loaded = predictor.model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(np.array_equal(loaded[k].numpy(), v) for k, v in saved.items())


def test_default_predictor_gives_detectron2_outputs(tmp_path):
    """DefaultPredictor(cfg)(img), as in every detectron2 project."""
    weights = state_dict("resnet50-mini")
    cfg = mini_cfg("resnet50-mini")
    cfg.MODEL.WEIGHTS = save_release_style(weights, tmp_path / "mini.pkl")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 128
    outputs = DefaultPredictor(cfg)(random_image(50, 70).permute(1, 2, 0).numpy())
    assert set(outputs) == {"sem_seg", "panoptic_seg", "instances"}
    assert outputs["sem_seg"].shape == (13, 50, 70)
    assert outputs["instances"].pred_masks.shape[1:] == (50, 70)
