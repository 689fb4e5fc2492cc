"""Parity with the official release: whole mini models, and state-dict keys of the full-size ones."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from mask2former import get_mask2former_cfg
from tests.golden import (
    DATA,
    MINI_MODELS,
    config_path,
    load_arrays,
    load_json,
    mini_model,
    relative_error,
    unpack_masks,
)

MANIFESTS = sorted(p.name[: -len(".keys.json")] for p in DATA.glob("*.keys.json"))


@pytest.fixture(scope="module", params=MINI_MODELS)
def golden(request):
    return mini_model(request.param), load_arrays(request.param), load_json(request.param)


def test_core_equals_the_release(golden):
    model, arrays, spec = golden
    for case in range(len(spec["cases"])):
        images = torch.from_numpy(arrays[f"case{case}/images"]).float().to(model.device)
        with torch.no_grad():
            logits, masks = model.backend(images)
        assert relative_error(logits, torch.from_numpy(arrays[f"case{case}/pred_logits"])) < 1e-4
        assert relative_error(masks, torch.from_numpy(arrays[f"case{case}/pred_masks"])) < 1e-4


def test_auxiliary_outputs_equal_the_release(golden):
    model, arrays, _ = golden
    images = torch.from_numpy(arrays["case0/images"]).float().to(model.device)
    predictor = model.sem_seg_head.predictor
    predictor.train()
    try:
        with torch.no_grad():
            features = model.backbone((images - model.pixel_mean) / model.pixel_std)
            outputs = model.sem_seg_head(features)
    finally:
        predictor.eval()
    expected = [k for k in arrays if k.startswith("case0/aux")]
    assert len(outputs["aux_outputs"]) == len(expected) == predictor.num_layers
    for i, aux in enumerate(outputs["aux_outputs"]):
        assert (
            relative_error(aux["pred_logits"], torch.from_numpy(arrays[f"case0/aux{i}/pred_logits"])) < 1e-4
        )
        assert aux["pred_masks"].shape == outputs["pred_masks"].shape
    assert relative_error(outputs["pred_masks"], torch.from_numpy(arrays["case0/pred_masks"])) < 1e-4


def test_results_equal_the_release(golden):
    model, arrays, spec = golden
    for case in spec["cases"]:
        prefix, i = f"case{case['case']}", case["image"]
        image = torch.from_numpy(arrays[f"{prefix}/images"][i])
        with torch.no_grad():
            (result,) = model([{"image": image, "height": case["height"], "width": case["width"]}])
        size = (case["height"], case["width"])

        segments, info = result["panoptic_seg"]
        assert info == case["segments_info"]
        assert segments.dtype == torch.int32 and tuple(segments.shape) == size
        assert np.mean(segments.cpu().numpy() != arrays[f"{prefix}/{i}/panoptic_seg"]) <= 1e-3

        labels = result["sem_seg"].argmax(0).cpu().numpy()
        assert np.mean(labels != arrays[f"{prefix}/{i}/sem_seg_argmax"]) <= 1e-3

        instances = result["instances"].to("cpu")
        order = instances.scores.argsort(descending=True)
        scores = torch.from_numpy(arrays[f"{prefix}/{i}/scores"])
        assert len(instances) == case["num_instances"] == len(scores)
        torch.testing.assert_close(instances.scores[order], scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(instances.pred_classes[order].numpy(), arrays[f"{prefix}/{i}/classes"])
        masks = unpack_masks(arrays[f"{prefix}/{i}/masks_packed"], (len(scores), *size))
        assert np.mean(instances.pred_masks[order].numpy() != masks) <= 1e-3


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_state_dict_has_the_keys_and_shapes_of_the_release(manifest):
    expected = load_json(f"{manifest}.keys")
    cfg = get_mask2former_cfg(config_path(expected["config"]), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]


def test_all_seven_manifests_are_checked():
    assert len(MANIFESTS) == 7
