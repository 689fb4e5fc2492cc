"""Transformers' loss as a reference for ours: its configuration, and the same random points for both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mask2former.modeling import matcher, point_features
from mask2former.modeling.criterion import SetCriterion

WEIGHTS = {"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 3.0}


def our_criterion(
    num_classes: int, num_points: int = 40, num_aux_outputs: int = 0, **options
) -> SetCriterion:
    return SetCriterion(
        num_classes,
        matcher.HungarianMatcher(
            WEIGHTS["class_weight"], WEIGHTS["mask_weight"], WEIGHTS["dice_weight"], num_points
        ),
        **WEIGHTS,
        **{
            "no_object_weight": 0.1,
            "num_points": num_points,
            "oversample_ratio": 3.0,
            "importance_sample_ratio": 0.75,
            "num_aux_outputs": num_aux_outputs,
            **options,
        },
    )


def their_criterion(ours: SetCriterion):
    """Transformers' Mask2FormerLoss with the options of ours."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = Mask2FormerConfig(
        num_labels=ours.num_classes,
        no_object_weight=float(ours.empty_weight[-1]),
        train_num_points=ours.num_points,
        oversample_ratio=ours.oversample_ratio,
        importance_sample_ratio=ours.importance_sample_ratio,
        **WEIGHTS,
    )
    return Mask2FormerLoss(config, weight_dict={})


@dataclass
class Points:
    """Random points by what they are for. The two sides draw the same ones in another order."""

    matching: list[Tensor]  # of each layer: (B, P, 2)
    drawn: list[Tensor]  # (M, oversample_ratio * P, 2)
    uniform: list[Tensor]  # (M, the part of P that is not chosen, 2)

    @classmethod
    def of(cls, criterion: SetCriterion, layers: int, images: int, matched: int, seed: int = 0) -> Points:
        generator = torch.Generator().manual_seed(seed)

        def make(count: int, points: int) -> list[Tensor]:
            return [torch.rand(count, points, 2, generator=generator) for _ in range(layers)]

        number = criterion.num_points
        chosen = int(criterion.importance_sample_ratio * number)
        return cls(
            make(images, number),
            make(matched, int(number * criterion.oversample_ratio)),
            make(matched, number - chosen),
        )

    def give_ours(self, monkeypatch) -> list[Tensor]:
        """Ours matches all layers first. Returns what is left of the points: empty once all were drawn."""
        queue = [*self.matching]
        for drawn, uniform in zip(self.drawn, self.uniform):
            queue += [drawn, uniform]

        def uniform_points(count: int, num_points: int, device) -> Tensor:
            points = queue.pop(0)
            assert points.shape == (count, num_points, 2)
            return points.to(device)

        for module in (matcher, point_features):
            monkeypatch.setattr(module, "uniform_points", uniform_points)
        return queue

    def give_theirs(self, monkeypatch) -> list[Tensor]:
        """Theirs goes layer by layer, and matches image by image."""
        queue = []
        for matching, drawn, uniform in zip(self.matching, self.drawn, self.uniform):
            queue += [*matching.split(1), drawn, uniform]

        def rand(*shape, device=None) -> Tensor:
            points = queue.pop(0)
            assert tuple(points.shape) == shape
            return points

        monkeypatch.setattr(torch, "rand", rand)
        return queue


def random_outputs(images: int, queries: int, num_classes: int, layers: int = 1, seed: int = 0) -> list[dict]:
    """Predictions of several layers that need gradients; masks are 12x10."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "pred_logits": torch.randn(
                images, queries, num_classes + 1, generator=generator, requires_grad=True
            ),
            "pred_masks": (3 * torch.randn(images, queries, 12, 10, generator=generator)).requires_grad_(),
        }
        for _ in range(layers)
    ]


def random_targets(counts: list[int], num_classes: int, seed: int = 1) -> list[dict]:
    """Segments of images of 48x40 pixels: rectangles, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        masks = torch.zeros(count, 48, 40, dtype=torch.bool)
        for mask in masks:
            top, bottom = sorted(torch.randint(0, 49, (2,), generator=generator).tolist())
            left, right = sorted(torch.randint(0, 41, (2,), generator=generator).tolist())
            mask[top:bottom, left:right] = True
        targets.append(
            {"labels": torch.randint(0, num_classes, (count,), generator=generator), "masks": masks}
        )
    return targets
