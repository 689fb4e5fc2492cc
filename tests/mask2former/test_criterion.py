"""The loss: values and gradients against transformers', and what it does where there is nothing to match."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.utils import comm

from mask2former import get_mask2former_cfg
from mask2former.modeling.criterion import build_criterion
from mask2former.modeling.targets import prepare_targets
from tests.golden import mini_cfg, mini_model
from tests.mask2former.loss_reference import (
    Points,
    our_criterion,
    random_outputs,
    random_targets,
    their_criterion,
)

CLASSES = 5
THEIR_NAMES = {"loss_ce": "loss_cross_entropy", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}


def with_aux(layers: list[dict]) -> dict:
    return {**layers[0], "aux_outputs": layers[1:]}


def their_losses(theirs, layers: list[dict], targets: list[dict]) -> dict[str, torch.Tensor]:
    """Transformers' losses under our names."""
    as_theirs = [
        {"masks_queries_logits": x["pred_masks"], "class_queries_logits": x["pred_logits"]} for x in layers
    ]
    masks, labels = [t["masks"].float() for t in targets], [t["labels"] for t in targets]
    losses = theirs(
        **as_theirs[0], mask_labels=masks, class_labels=labels, auxiliary_predictions=as_theirs[1:]
    )
    suffixes = ["", *(f"_{i}" for i in range(len(layers) - 1))]
    return {ours + s: losses[name + s] for s in suffixes for ours, name in THEIR_NAMES.items()}


@pytest.mark.parametrize("queries, counts", [(6, [2, 4]), (3, [5, 1]), (4, [0, 3])])
@pytest.mark.parametrize("importance", [0.75, 0.0, 1.0])
def test_losses_and_gradients_equal_transformers(queries, counts, importance, monkeypatch):
    pytest.importorskip("transformers", minversion="5.20")
    layers = random_outputs(len(counts), queries, CLASSES, layers=3)
    targets = random_targets(counts, CLASSES)
    criterion = our_criterion(CLASSES, num_aux_outputs=2, importance_sample_ratio=importance)
    matched = sum(min(queries, n) for n in counts)
    points = Points.of(criterion, 3, len(counts), matched)
    with monkeypatch.context() as patch:
        left = points.give_ours(patch)
        ours = criterion(with_aux(layers), targets)
        assert not left
    with monkeypatch.context() as patch:
        left = points.give_theirs(patch)
        if importance == 1.0:  # then theirs draws no uniform points, and ours draws none of them
            left[:] = [x for x in left if x.shape[1]]
        expected = their_losses(their_criterion(criterion), layers, targets)
        assert not left
    assert set(ours) == set(expected) == set(criterion.weight_dict)
    # Another factor for each, so that no two gradients can be exchanged.
    factors = {name: 1.0 + i for i, name in enumerate(sorted(ours))}
    leaves = [x for layer in layers for x in (layer["pred_logits"], layer["pred_masks"])]
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(sum(factors[k] * v for k, v in ours.items()), leaves)
    wanted = torch.autograd.grad(sum(factors[k] * v for k, v in expected.items()), leaves)
    for a, b in zip(got, wanted):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_whole_model_equal_transformers(monkeypatch):
    """Our model's outputs under their loss: every parameter gets the gradient that ours gives it."""
    pytest.importorskip("transformers", minversion="5.20")
    model = mini_model("resnet50-mini").train().cpu()
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 96) * 255
    generator_targets = random_targets([3, 2], model.sem_seg_head.num_classes)
    targets = [{**t, "masks": torch.nn.functional.pad(t["masks"], (0, 56, 0, 16))} for t in generator_targets]
    outputs = model._outputs(images)
    aux = outputs["aux_outputs"]
    criterion = our_criterion(model.sem_seg_head.num_classes, num_points=112, num_aux_outputs=len(aux))
    layers = [outputs, *aux]
    points = Points.of(criterion, len(layers), 2, 5)
    with monkeypatch.context() as patch:
        points.give_ours(patch)
        ours = criterion(outputs, targets)
    with monkeypatch.context() as patch:
        points.give_theirs(patch)
        expected = their_losses(their_criterion(criterion), layers, targets)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients(losses: dict) -> list[torch.Tensor]:
        total = sum(criterion.weight_dict[k] * v for k, v in losses.items())
        return torch.autograd.grad(total, list(parameters.values()), retain_graph=True)

    for name, a, b in zip(parameters, gradients(ours), gradients(expected)):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name
        assert torch.isfinite(a).all()


def test_loss_of_a_config_is_that_of_its_keys(monkeypatch):
    """Against transformers with the same values, none of which is a default."""
    pytest.importorskip("transformers", minversion="5.20")
    keys = {
        "CLASS_WEIGHT": 2.0,
        "MASK_WEIGHT": 5.0,
        "DICE_WEIGHT": 3.0,
        "NO_OBJECT_WEIGHT": 0.3,
        "TRAIN_NUM_POINTS": 60,
        "OVERSAMPLE_RATIO": 2.0,
        "IMPORTANCE_SAMPLE_RATIO": 0.4,
        "DEC_LAYERS": 5,
    }
    words = [word for key, value in keys.items() for word in (f"MODEL.MASK_FORMER.{key}", value)]
    criterion = build_criterion(get_mask2former_cfg(opts=words), CLASSES)
    expected = our_criterion(
        CLASSES,
        num_points=60,
        num_aux_outputs=4,
        no_object_weight=0.3,
        oversample_ratio=2.0,
        importance_sample_ratio=0.4,
    )
    assert criterion.weight_dict == expected.weight_dict
    layers = random_outputs(2, 8, CLASSES, layers=5)
    targets = random_targets([4, 3], CLASSES)
    # So that each part of the matcher's cost decides about some pair.
    for layer in layers:
        layer["pred_logits"].data.mul_(2)
        layer["pred_masks"].data.div_(2)
    points = Points.of(expected, 5, 2, 7)
    with monkeypatch.context() as patch:
        left = points.give_ours(patch)
        losses = criterion(with_aux(layers), targets)
        assert not left
    with monkeypatch.context() as patch:
        left = points.give_theirs(patch)
        wanted = their_losses(their_criterion(expected), layers, targets)
        assert not left
    assert set(losses) == set(wanted) and len(losses) == 15
    for name in losses:
        torch.testing.assert_close(losses[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_no_object_weighs_less():
    (outputs,) = random_outputs(1, 4, CLASSES)
    targets = random_targets([1], CLASSES)
    criterion = our_criterion(CLASSES, no_object_weight=0.25)
    torch.manual_seed(0)
    loss = criterion(outputs, targets)["loss_ce"]
    torch.manual_seed(0)
    ((matched, _),) = criterion.matcher(outputs, targets)
    negative = -outputs["pred_logits"][0].log_softmax(-1)
    others = [q for q in range(4) if q != int(matched)]
    by_hand = negative[int(matched), targets[0]["labels"][0]] + 0.25 * negative[others, CLASSES].sum()
    torch.testing.assert_close(loss, by_hand / 1.75)


def test_batch_without_segments_has_zero_mask_losses_with_gradients():
    layers = random_outputs(2, 4, CLASSES, layers=2)
    losses = our_criterion(CLASSES, num_aux_outputs=1)(with_aux(layers), random_targets([0, 0], CLASSES))
    for suffix in ("", "_0"):
        assert losses["loss_mask" + suffix] == 0 and losses["loss_dice" + suffix] == 0
        assert losses["loss_ce" + suffix] > 0
    sum(losses.values()).backward()
    for layer in layers:
        # DistributedDataParallel waits for a gradient of every parameter.
        assert layer["pred_masks"].grad is not None and not layer["pred_masks"].grad.any()
        assert layer["pred_logits"].grad.abs().sum() > 0


def test_without_deep_supervision_only_the_last_layer_counts():
    layers = random_outputs(1, 4, CLASSES, layers=3)
    losses = our_criterion(CLASSES)(with_aux(layers), random_targets([2], CLASSES))
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}


def test_missing_outputs_of_earlier_layers_are_named():
    (outputs,) = random_outputs(1, 4, CLASSES)
    with pytest.raises(ValueError, match=r"2 earlier layers.*DEEP_SUPERVISION.*outputs of 0"):
        our_criterion(CLASSES, num_aux_outputs=2)(outputs, random_targets([2], CLASSES))


def test_mask_losses_are_divided_by_the_segments_of_an_average_process(monkeypatch):
    (outputs,) = random_outputs(1, 6, CLASSES)
    targets = random_targets([2], CLASSES)
    criterion = our_criterion(CLASSES)

    def losses() -> dict:
        torch.manual_seed(0)
        return criterion(outputs, targets)

    alone = losses()
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    # The three other processes have 18 segments.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(18))
    together = losses()
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(together[name], alone[name] * 2 / 5)
    assert together["loss_ce"] == alone["loss_ce"]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.zero_())
    torch.testing.assert_close(
        losses()["loss_mask"], alone["loss_mask"] * 2, msg="fewer than one counts as one"
    )


def test_losses_are_float32_under_autocast():
    layers = random_outputs(1, 4, CLASSES)
    half = {k: v.detach().to(torch.bfloat16) for k, v in layers[0].items()}
    exact = {k: v.float() for k, v in half.items()}
    criterion = our_criterion(CLASSES)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = criterion(half, random_targets([2], CLASSES))
    torch.manual_seed(0)
    expected = criterion(exact, random_targets([2], CLASSES))
    for name, value in under.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])


@pytest.mark.parametrize(
    "option, value, key",
    [
        ("num_points", 0, "TRAIN_NUM_POINTS is 0"),
        ("oversample_ratio", 0.5, "OVERSAMPLE_RATIO is 0.5"),
        ("importance_sample_ratio", 1.5, "IMPORTANCE_SAMPLE_RATIO is 1.5"),
    ],
)
def test_impossible_options_name_their_key(option, value, key):
    with pytest.raises(ValueError, match=f"MODEL.MASK_FORMER.{key}"):
        our_criterion(CLASSES, **{option: value})


def test_model_weighs_the_losses():
    model = mini_model("resnet50-mini").train().cpu()
    torch.manual_seed(0)
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[0, :20], masks[1, 30:, 30:] = True, True
    inputs = {
        "image": torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8),
        "instances": Instances((48, 64), gt_classes=torch.tensor([0, 3]), gt_masks=masks),
    }
    torch.manual_seed(1)
    losses = model([inputs])
    cfg = mini_cfg("resnet50-mini").MODEL.MASK_FORMER
    assert len(losses) == 3 * cfg.DEC_LAYERS
    torch.manual_seed(1)
    images = model.preprocess([inputs])[0]
    targets = prepare_targets(
        [inputs], model.sem_seg_head.num_classes, tuple(images.shape[-2:]), images.device
    )
    plain = model.criterion(model._outputs(images), targets)
    weights = {"loss_ce": cfg.CLASS_WEIGHT, "loss_mask": cfg.MASK_WEIGHT, "loss_dice": cfg.DICE_WEIGHT}
    for name, value in losses.items():
        torch.testing.assert_close(value, plain[name] * weights["_".join(name.split("_")[:2])])
        assert math.isfinite(value)


# Annotations that do not fit.


def annotated(classes=(0,), masks=None, size=(32, 48)) -> dict:
    masks = torch.zeros(len(classes), *size, dtype=torch.bool) if masks is None else masks
    instances = Instances(size)
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances._fields["gt_masks"] = masks
    return {"file_name": "street.jpg", "image": torch.zeros(3, *size), "instances": instances}


def targets_of(*inputs: dict) -> list[dict]:
    return prepare_targets(list(inputs), CLASSES, (32, 64), torch.device("cpu"))


def test_masks_are_padded_to_the_batch():
    masks = torch.rand(2, 32, 48) < 0.5
    targets = targets_of(annotated([1, 4], masks), annotated([]), annotated([2], BitMasks(masks[:1])))
    assert [t["labels"].tolist() for t in targets] == [[1, 4], [], [2]]
    assert [tuple(t["masks"].shape) for t in targets] == [(2, 32, 64), (0, 32, 64), (1, 32, 64)]
    assert torch.equal(targets[0]["masks"][:, :, :48], masks) and not targets[0]["masks"][:, :, 48:].any()
    assert torch.equal(targets[2]["masks"][0, :, :48], masks[0])


@pytest.mark.parametrize(
    "inputs, message",
    [
        (annotated([0, 5]), r"street.jpg.*from 0 to 5.*NUM_CLASSES is 5"),
        (annotated([-1]), r"from -1 to -1"),
        (annotated([0], torch.zeros(2, 32, 48)), r"expected \(1, 32, 48\)"),
        (annotated([0], torch.zeros(1, 31, 48)), r"have shape \(1, 31, 48\)"),
        (annotated([0], PolygonMasks([[[0.0] * 6]])), "PolygonMasks.*INPUT.MASK_FORMAT bitmask"),
        ({"image": torch.zeros(3, 8, 8)}, "no 'instances'.*INPUT.DATASET_MAPPER_NAME"),
        ({"image": torch.zeros(3, 8, 8), "instances": Instances((8, 8))}, "no gt_classes"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        targets_of(annotated([0]), inputs)
    assert "input 1 of the batch" in str(error.value)
