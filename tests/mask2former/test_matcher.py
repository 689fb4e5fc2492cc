"""The matcher, and values of masks at points."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from mask2former.modeling import matcher as matcher_module
from mask2former.modeling.matcher import HungarianMatcher, Targets
from mask2former.modeling.point_features import sample_logits, sample_masks, uncertain_points
from tests.mask2former.loss_reference import (
    Points,
    our_criterion,
    random_outputs,
    random_targets,
    their_criterion,
)

CLASSES = 5


@pytest.mark.parametrize("size", [(9, 7), (1, 5), (6, 1), (1, 1)])
def test_values_of_binary_masks_are_grid_samples(size):
    torch.manual_seed(0)
    masks = torch.rand(4, *size) < 0.5
    which = torch.tensor([3, 0, 0, 2, 1])
    points = torch.rand(5, 300, 2)
    # Corners and edges, where neighbours lie outside, and points beyond the map.
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 1.0]])
    points[:, 4:8] = torch.tensor([[-0.3, 0.5], [1.2, 0.5], [0.5, 7.0], [-9.0, -9.0]])
    expected = sample_logits(masks[which][:, None].float(), points)[:, 0]
    got = sample_masks(masks, which, points)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert got.dtype == torch.float32 and 0 < got.mean() < 1


def test_values_of_no_masks():
    empty = sample_masks(
        torch.zeros(0, 4, 5, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), torch.rand(0, 9, 2)
    )
    assert empty.shape == (0, 9)


def test_most_points_are_where_the_mask_is_least_certain():
    torch.manual_seed(0)
    # Zero on the middle column, sure at both sides.
    logits = torch.linspace(-8, 8, 33).expand(3, 21, 33).contiguous()
    points = uncertain_points(logits, 400, oversample_ratio=3.0, importance_sample_ratio=0.75)
    assert points.shape == (3, 400, 2) and not points.requires_grad
    distance = (points[..., 0] - 0.5).abs()
    # 300 of 1200 uniform points: the nearest quarter, but for a few near the border, beyond which the logits are zero.
    assert (distance[:, :300] < 0.16).float().mean() > 0.95
    assert distance[:, 300:].max() > 0.4, "the rest is uniform"


def test_uncertainty_is_that_of_the_point_not_of_its_neighbours(monkeypatch):
    from mask2former.modeling import point_features

    drawn = torch.tensor([[[0.25, 0.5], [0.5, 0.5], [0.75, 0.5]]])  # -5, 0 between both, 5
    monkeypatch.setattr(point_features, "uniform_points", lambda n, p, d: drawn if p == 3 else drawn[:, :0])
    points = uncertain_points(torch.tensor([[[-5.0, 5.0]]]), 1, 3.0, 1.0)
    assert points.tolist() == [[[0.5, 0.5]]]


@pytest.mark.parametrize("queries, counts", [(7, [3, 5, 1]), (4, [6, 2, 4]), (6, [2, 3, 6])])
def test_pairs_are_those_of_transformers(queries, counts, monkeypatch):
    pytest.importorskip("transformers", minversion="5.20")
    criterion = our_criterion(CLASSES, num_points=200)
    theirs = their_criterion(criterion)
    (outputs,) = random_outputs(len(counts), queries, CLASSES)
    targets = random_targets(counts, CLASSES)
    points = Points.of(criterion, 1, len(counts), 0)
    with monkeypatch.context() as patch:
        points.give_ours(patch)
        ours = criterion.matcher(outputs, targets)
    with monkeypatch.context() as patch:
        points.give_theirs(patch)
        expected = theirs.matcher(
            outputs["pred_masks"],
            outputs["pred_logits"],
            [t["masks"].float() for t in targets],
            [t["labels"] for t in targets],
        )
    assert [len(i) for i, _ in ours] == [min(queries, n) for n in counts]
    for (q, n), (their_q, their_n) in zip(ours, expected):
        assert q.tolist() == their_q.tolist() and n.tolist() == their_n.tolist()


def test_pairs_are_the_best_of_all_permutations(monkeypatch):
    torch.manual_seed(3)
    matcher = HungarianMatcher(2.0, 5.0, 3.0, num_points=50)
    (outputs,) = random_outputs(1, 5, CLASSES)
    targets = random_targets([3], CLASSES)
    points = torch.rand(1, 50, 2)
    monkeypatch.setattr(matcher_module, "uniform_points", lambda *_: points)
    ((queries, segments),) = matcher(outputs, targets)

    # Cost by its definition, in float64.
    probability = outputs["pred_logits"][0].detach().double().softmax(-1)
    logits = sample_logits(outputs["pred_masks"].detach().double(), points.double())[0]
    values = sample_logits(targets[0]["masks"][None].double(), points.double())[0]

    def cost(q: int, n: int) -> float:
        x, t = logits[q], values[n]
        dice = 1 - (2 * (x.sigmoid() * t).sum() + 1) / (x.sigmoid().sum() + t.sum() + 1)
        cross_entropy = F.binary_cross_entropy_with_logits(x, t)
        return float(5 * cross_entropy + 3 * dice - 2 * probability[q, targets[0]["labels"][n]])

    best = min(itertools.permutations(range(5), 3), key=lambda p: sum(cost(q, n) for n, q in enumerate(p)))
    assert dict(zip(segments.tolist(), queries.tolist())) == dict(enumerate(best))


def test_image_without_segments_has_no_pairs():
    matcher = HungarianMatcher(1.0, 1.0, 1.0, num_points=20)
    (outputs,) = random_outputs(3, 4, CLASSES)
    pairs = matcher(outputs, random_targets([0, 2, 0], CLASSES))
    assert [len(q) for q, _ in pairs] == [0, 2, 0]
    (outputs,) = random_outputs(2, 4, CLASSES)
    pairs = matcher(outputs, random_targets([0, 0], CLASSES))
    assert [(len(q), q.dtype) for q, _ in pairs] == [(0, torch.int64)] * 2


def test_layers_are_matched_as_one_by_one(monkeypatch):
    criterion = our_criterion(CLASSES)
    layers = random_outputs(2, 6, CLASSES, layers=3)
    targets = random_targets([2, 4], CLASSES)
    points = Points.of(criterion, 3, 2, 0)
    points.give_ours(monkeypatch)
    together = criterion.matcher.match(layers, Targets.of(targets))
    points.give_ours(monkeypatch)
    alone = [criterion.matcher.match([layer], Targets.of(targets))[0] for layer in layers]
    for a, b in zip(together, alone):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(together[0].queries, together[1].queries)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["pred_logits", "pred_masks"])
def test_predictions_that_are_not_finite_are_refused(name, value):
    layers = random_outputs(1, 4, CLASSES, layers=3)
    layers[2][name].data[0, 1] = value
    with pytest.raises(FloatingPointError, match=r"\[2\] of 3.*SOLVER.BASE_LR"):
        HungarianMatcher(1.0, 1.0, 1.0, 20).match(layers, Targets.of(random_targets([2], CLASSES)))


def test_all_costs_zero_is_refused():
    with pytest.raises(ValueError, match="CLASS_WEIGHT"):
        HungarianMatcher(0, 0, 0, 20)


def test_targets_that_do_not_fit_are_refused():
    targets = random_targets([2, 3], CLASSES)
    targets[1]["masks"] = targets[1]["masks"][:, :-1]
    with pytest.raises(ValueError, match=r"target 1 are \(47, 40\).*\(48, 40\)"):
        Targets.of(targets)
    targets[1]["masks"] = targets[0]["masks"]
    with pytest.raises(ValueError, match="target 1 has 3 labels and masks of shape"):
        Targets.of(targets)
