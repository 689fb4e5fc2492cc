"""Parity of full-size models with the transformers library: random weights, the same on both sides.

The golden data cover mini models; here the real configs are built, with the widths and depths of the released
checkpoints.

Masked attention is discontinuous: where a mask logit is zero within rounding, one side may attend to a pixel
and the other not, and a single such flip moves the final outputs by up to a few per cent. Among half a
million pixels some are that close, and which of them flip depends on the machine. So each decoder layer of
ours attends in their mask, which makes the outputs comparable to rounding on any machine, and the masks are
compared for themselves: ours may differ from theirs only where a logit is zero within rounding.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.nn import functional as F

from mask2former import get_mask2former_cfg
from mask2former.modeling.transformer_decoder import attention_core
from tests.golden import MINI_MODELS, config_path, mini_cfg, relative_error
from tests.mask2former.loss_reference import Points
from tests.mask2former.transformers_mapping import (
    convert_state_dict,
    randomize,
    their_keys,
    transformers_model,
)

# The mapping has the names of version 5.20 (the last for Python 3.10) to 5.23.
pytest.importorskip("transformers", minversion="5.20")

# Configs and seeds with which the masks that the layers attend in have both signs in good measure: see
# test_weights_matter.
MODELS = {
    "resnet50": ("coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml", 0),
    "swin-tiny": ("coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml", 1),
}
# In both, Swin's windows of 7 need padding. The second is no multiple of 32: Swin also pads patches and
# merges odd maps (37x54, 19x27).
SIZES = [(224, 288), (147, 214)]
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
]
CASES = [
    pytest.param((name, size, device), id=f"{name}-{size[0]}x{size[1]}-{device}", marks=marks)
    for device, marks in (("cpu", []), ("cuda", NEEDS_GPU))
    for name in MODELS
    for size in SIZES
]
FEATURE_TOLERANCE = 1e-5
# Attention logits of about ten amplify rounding a little in each of nine layers.
OUTPUT_TOLERANCE = 1e-4
# Networks in float64, losses in float32.
GRADIENT_TOLERANCE = 1e-4


@dataclass
class Pair:
    """Our model and theirs, with the same weights."""

    ours: nn.Module
    theirs: nn.Module


@dataclass
class Results:
    """What a model computes on the way to its outputs."""

    features: list[Tensor]  # res2 to res5
    levels: list[Tensor]  # coarse to fine
    mask_features: Tensor
    pred_logits: list[Tensor]  # of the bare queries, then of each decoder layer
    pred_masks: list[Tensor]
    blocked: list[Tensor]  # (B, Q, HW) bool, of each decoder layer

    def layers(self) -> list[dict[str, Tensor]]:
        """Float32 predictions under our names, the last layer's first."""
        pairs = [
            (x.to(torch.float32), y.to(torch.float32)) for x, y in zip(self.pred_logits, self.pred_masks)
        ]
        return [{"pred_logits": x, "pred_masks": y} for x, y in (pairs[-1], *pairs[:-1])]

    def attention_logits(self, layer: int) -> Tensor:
        """The mask logits that a decoder layer attends by: (B, Q, HW)."""
        size = self.levels[layer % 3].shape[-2:]
        masks = F.interpolate(self.pred_masks[layer], size=size, mode="bilinear", align_corners=False)
        return masks.flatten(2)


@functools.cache
def build_pair(name: str) -> Pair:
    config, seed = MODELS[name]
    return make_pair(
        get_mask2former_cfg(config_path(config), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]), seed
    )


def make_pair(cfg, seed: int) -> Pair:
    ours = build_model(cfg).eval()
    randomize(ours, seed)
    theirs = transformers_model(cfg)
    theirs.load_state_dict(convert_state_dict(ours.state_dict(), theirs.state_dict()))
    return Pair(ours, theirs)


@pytest.fixture(scope="module", autouse=True)
def free_models():
    yield
    build_pair.cache_clear()


@pytest.fixture(params=list(MODELS))
def pair(request):
    return build_pair(request.param)


@pytest.fixture(scope="module", params=CASES)
def results(request):
    """Ours and theirs."""
    name, size, device = request.param
    pair = build_pair(name)
    pair.ours.to(device)
    pair.theirs.to(device)
    try:
        images = make_images(pair.ours, size)
        with exact_float32():
            with torch.no_grad():
                theirs = run_theirs(pair, images)
            return run_ours(pair.ours, images, theirs.blocked), theirs
    finally:
        pair.ours.cpu()
        pair.theirs.cpu()


def make_images(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Two smooth random images with noise, the second smaller and padded: (2, 3, H, W), not normalised."""
    generator = torch.Generator().manual_seed(0)
    images = model.pixel_mean.cpu().repeat(2, 1, *size)
    for image, (height, width) in zip(images, (size, (size[0] - 13, size[1] - 30)), strict=True):
        coarse = torch.rand(1, 3, 6, 8, generator=generator)
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0]
        noise = torch.rand(3, height, width, generator=generator)
        image[:, :height, :width] = (180 * smooth + 75 * noise).clamp(0, 255)
    return images.to(model.device)


@contextlib.contextmanager
def exact_float32():
    """Without TF32, which cuDNN uses by default and which has ten bits of mantissa."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run_theirs(pair: Pair, images: Tensor) -> Results:
    blocked = []

    def keep_mask(module, args, kwargs):
        mask = kwargs["encoder_attention_mask"].bool().unflatten(0, (len(images), -1))  # (B, heads, Q, HW)
        assert torch.equal(mask, mask[:, :1].expand_as(mask))
        blocked.append(mask[:, 0])

    layers = pair.theirs.model.transformer_module.decoder.layers
    handles = [layer.register_forward_pre_hook(keep_mask, with_kwargs=True) for layer in layers]
    try:
        normalised = (images - pair.ours.pixel_mean) / pair.ours.pixel_std
        outputs = pair.theirs(normalised, output_hidden_states=True, output_auxiliary_logits=True)
    finally:
        for handle in handles:
            handle.remove()
    earlier = outputs.auxiliary_logits
    return Results(
        features=list(outputs.encoder_hidden_states),
        levels=list(outputs.pixel_decoder_hidden_states),
        mask_features=outputs.pixel_decoder_last_hidden_state,
        pred_logits=[x["class_queries_logits"] for x in earlier] + [outputs.class_queries_logits],
        pred_masks=[x["masks_queries_logits"] for x in earlier] + [outputs.masks_queries_logits],
        blocked=blocked,
    )


@contextlib.contextmanager
def attending_in(masks: list[Tensor]):
    """Have each decoder layer of ours attend in the mask given for it; its own go to the list that this gives."""
    blocked = []
    make_mask = attention_core.attention_mask

    def replace_mask(mask_logits):
        blocked.append(make_mask(mask_logits).squeeze(1))
        return masks[len(blocked) - 1].unsqueeze(1)

    attention_core.attention_mask = replace_mask
    try:
        yield blocked
    finally:
        attention_core.attention_mask = make_mask


@torch.no_grad()
def run_ours(model: nn.Module, images: Tensor, masks: list[Tensor]) -> Results:
    """Our model, where each decoder layer attends in the mask given for it; its own are in the result."""
    predictor = model.sem_seg_head.predictor
    features, decoder_inputs = [], []
    handles = [
        model.backbone.register_forward_hook(lambda module, args, output: features.append(output)),
        predictor.register_forward_pre_hook(lambda module, args: decoder_inputs.append(args)),
    ]
    try:
        with attending_in(masks) as blocked:
            pred_logits, pred_masks = model.core(images)
            levels, mask_features = decoder_inputs[0]
            # The decoder once more, for what it returns in training alone.
            blocked.clear()
            predictor.train()
            earlier = predictor(levels, mask_features)["aux_outputs"]
    finally:
        predictor.eval()
        for handle in handles:
            handle.remove()
    return Results(
        features=[features[0][name] for name in ("res2", "res3", "res4", "res5")],
        levels=levels,
        mask_features=mask_features,
        pred_logits=[x["pred_logits"] for x in earlier] + [pred_logits],
        pred_masks=[x["pred_masks"] for x in earlier] + [pred_masks],
        blocked=blocked,
    )


def assert_equal_within(tolerance: float, actual: list[Tensor], expected: list[Tensor]) -> None:
    assert [x.shape for x in actual] == [x.shape for x in expected]
    errors = [relative_error(x, y) for x, y in zip(actual, expected, strict=True)]
    assert all(error < tolerance for error in errors), errors


def test_backbone_features_are_equal(results):
    ours, theirs = results
    assert len(ours.features) == 4
    assert_equal_within(FEATURE_TOLERANCE, ours.features, theirs.features)


def test_pixel_decoder_outputs_are_equal(results):
    ours, theirs = results
    assert len(ours.levels) == 3
    assert_equal_within(FEATURE_TOLERANCE, ours.levels, theirs.levels)
    assert_equal_within(FEATURE_TOLERANCE, [ours.mask_features], [theirs.mask_features])


def test_class_logits_are_equal_after_every_decoder_layer(results):
    ours, theirs = results
    assert len(ours.pred_logits) == 10
    assert_equal_within(OUTPUT_TOLERANCE, ours.pred_logits, theirs.pred_logits)


def test_mask_logits_are_equal_after_every_decoder_layer(results):
    ours, theirs = results
    assert len(ours.pred_masks) == 10
    assert_equal_within(OUTPUT_TOLERANCE, ours.pred_masks, theirs.pred_masks)


def test_attention_masks_differ_only_where_a_logit_is_zero_within_rounding(results):
    ours, theirs = results
    assert len(ours.blocked) == len(theirs.blocked) == 9
    for layer, (own, expected) in enumerate(zip(ours.blocked, theirs.blocked, strict=True)):
        assert own.dtype == torch.bool and own.shape == expected.shape
        logits = theirs.attention_logits(layer)
        rounding = OUTPUT_TOLERANCE * logits.std()
        near_zero = logits.abs() < rounding
        # Where the highest logit of a query is near zero, the mask may be empty, which unblocks all pixels.
        near_empty = logits.amax(dim=-1, keepdim=True).abs() < rounding
        unexplained = (own != expected) & ~near_zero & ~near_empty
        assert not unexplained.any(), f"layer {layer}: {int(unexplained.sum())} of {own.numel()} pixels"
        assert near_zero.float().mean() < 1e-3 and near_empty.float().mean() < 0.1


def test_weights_matter(results):
    """The comparison would say little of queries that are all alike, or that attend everywhere."""
    _, theirs = results
    any_empty = False
    for layer, blocked in enumerate(theirs.blocked):
        logits = theirs.attention_logits(layer)
        any_empty |= bool((logits < 0).all(dim=-1).any())
        assert 0.1 < (logits > 0).float().mean() < 0.9, f"layer {layer}: most masks have one sign"
        assert blocked.any(dim=-1).float().mean() > 0.75, f"layer {layer}: too many queries attend everywhere"
    assert any_empty, "no query has an empty mask, with which it must attend everywhere"
    for logits in theirs.pred_logits:
        assert logits.std(dim=1).mean() > 0.2 * logits.std(), "the queries are alike"
    for logits in theirs.pred_logits[1:]:
        assert (logits[0] - logits[1]).std() > 0.1 * logits.std(), "the image hardly matters"


def rectangles(size: tuple[int, int], classes: list[int]) -> dict[str, Tensor]:
    """Segments of an image."""
    height, width = size
    masks = torch.zeros(len(classes), height, width, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[8 * i : height - 19 * i, 31 * i : 31 * i + width // 3] = True
    return {"labels": torch.tensor(classes), "masks": masks}


@pytest.mark.parametrize("name", MINI_MODELS)
def test_loss_gives_every_parameter_the_gradient_of_theirs(name, monkeypatch):
    """From images to the loss, forward and back, by two implementations that share nothing but weights and points.

    The networks compute in float64: in float32 rounding grows to almost a per cent of a gradient on its way to the first
    layers, in which a small fault could hide.
    """
    pair = make_pair(mini_cfg(name, ("MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 400)), 0)
    ours, theirs = pair.ours.double(), pair.theirs.double()
    for model in (ours, theirs):
        model.criterion.float()
    size = (96, 128)
    images = make_images(ours, size).double()
    targets = [rectangles(size, [3, 7, 3]), rectangles(size, [0, 12])]
    points = Points.of(ours.criterion, 4, len(targets), 5)

    results = run_theirs(pair, images)
    last, *earlier = (
        {"class_queries_logits": x["pred_logits"], "masks_queries_logits": x["pred_masks"]}
        for x in results.layers()
    )
    with monkeypatch.context() as patch:
        left = points.give_theirs(patch)
        their_losses = theirs.get_loss_dict(
            **last,
            mask_labels=[t["masks"].float() for t in targets],
            class_labels=[t["labels"] for t in targets],
            auxiliary_predictions=earlier,
        )
        assert not left
    theirs.get_loss(their_losses).backward()

    with monkeypatch.context() as patch, attending_in(results.blocked) as blocked:
        # The pixel decoder asks for float32, as the release's does under autocast.
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        ours.sem_seg_head.predictor.train()
        outputs = ours._outputs(images)
    assert len(blocked) == 3 and outputs["pred_masks"].dtype == torch.float64
    with monkeypatch.context() as patch:
        left = points.give_ours(patch)
        losses = ours.criterion(outputs, targets)
        assert not left
    total = sum(ours.criterion.weight_dict[name] * loss for name, loss in losses.items())
    total.backward()

    assert len(losses) == len(their_losses) == 12
    torch.testing.assert_close(total, sum(their_losses.values()), rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(float(x.norm()) for x in gradients.values() if x is not None)
    errors = {}
    for name, parameter in ours.named_parameters():
        expected = torch.cat([gradients.pop(key) for key in their_keys(name)])
        error = (parameter.grad - expected).norm()
        # A bias of the keys moves all logits of a softmax: its gradient is zero, and both have rounding there.
        errors[name] = float(error / expected.norm().clamp(min=1e-6 * largest))
    wrong = {name: error for name, error in errors.items() if not error < GRADIENT_TOLERANCE}
    assert not wrong
    # What is no parameter of ours: frozen norms, and a norm that their backbone does not use.
    buffers = {key for name, _ in ours.named_buffers() if "pixel_" not in name for key in their_keys(name)}
    assert {name for name, gradient in gradients.items() if gradient is not None} <= buffers


def test_layers_have_the_same_constants(pair):
    """A wrong epsilon could hide in the tolerances."""
    constants = ("eps", "num_groups", "stride", "padding", "dilation", "groups")
    compared = dict.fromkeys(constants, 0)
    for key in (k for k in pair.ours.state_dict() if k.endswith(".weight")):
        ours = pair.ours.get_submodule(key.rpartition(".")[0])
        for their_key in their_keys(key):
            theirs = pair.theirs.get_submodule(their_key.rpartition(".")[0])
            for name in constants:
                assert hasattr(ours, name) == hasattr(theirs, name), (key, name)
                if hasattr(ours, name):
                    assert getattr(ours, name) == getattr(theirs, name), (key, name)
                    compared[name] += 1
    assert all(compared.values()), compared


def test_window_positions_are_equal(pair):
    """The one tensor of ours that the mapping leaves out."""
    compared = 0
    for key, index in pair.ours.state_dict().items():
        if key.endswith("relative_position_index"):
            table = key.replace("relative_position_index", "relative_position_bias_table")
            module = pair.theirs.get_submodule(their_keys(table)[0].rpartition(".")[0])
            assert torch.equal(index.flatten(), module.relative_position_index.flatten())
            compared += 1
    assert compared == (12 if hasattr(pair.ours.backbone, "layers") else 0)


def test_mapping_refuses_tensors_without_a_counterpart(pair):
    ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
    with pytest.raises(ValueError, match="nothing of ours is mapped to"):
        convert_state_dict({k: v for k, v in ours.items() if "predictor.level_embed" not in k}, theirs)
    with pytest.raises(ValueError, match="which they lack"):
        convert_state_dict(ours, {k: v for k, v in theirs.items() if k != "class_predictor.bias"})
    with pytest.raises(ValueError, match="0 rules"):
        convert_state_dict({**ours, "backbone.extra.weight": torch.zeros(1)}, theirs)
    with pytest.raises(ValueError, match="here,"):
        convert_state_dict(ours, {**theirs, "class_predictor.bias": torch.zeros(3)})
