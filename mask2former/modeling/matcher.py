"""Which query is to predict which segment: the assignment of least cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from .point_features import sample_logits, sample_masks, uniform_points


class Targets(NamedTuple):
    """The segments of a batch's images, one image after the other."""

    labels: Tensor  # (T,) int64
    masks: Tensor  # (T, H, W) bool
    images: Tensor  # (T,) int64, the image of each
    slots: Tensor  # (T,) int64, its place among the segments of its image
    counts: tuple[int, ...]  # segments of each image

    @classmethod
    def of(cls, targets: Sequence[dict[str, Tensor]]) -> Targets:
        """From the release's form, a dict for each image.

        Args:
            targets: "labels" (N,) int64 and "masks" (N, H, W), bool or any number type of zeros and ones. H and W are those
                of the padded batch.

        Raises:
            ValueError: no images, labels and masks of different numbers, or masks of different sizes.
        """
        if not targets:
            raise ValueError("no targets: one dict with 'labels' and 'masks' is needed for each image")
        for i, target in enumerate(targets):
            labels, masks = target["labels"], target["masks"]
            if masks.dim() != 3 or len(labels) != len(masks):
                raise ValueError(
                    f"target {i} has {len(labels)} labels and masks of shape {tuple(masks.shape)}; expected (labels, H, W)"
                )
            if masks.shape[1:] != targets[0]["masks"].shape[1:]:
                raise ValueError(
                    f"masks of target {i} are {tuple(masks.shape[1:])}, those of target 0 "
                    f"{tuple(targets[0]['masks'].shape[1:])} (height, width); pad them to the size of the batch"
                )
        counts = tuple(len(target["labels"]) for target in targets)
        device = targets[0]["masks"].device
        places = np.array([(i, slot) for i, n in enumerate(counts) for slot in range(n)], dtype=np.int64)
        images, slots = torch.from_numpy(places.reshape(-1, 2).T.copy()).to(device)
        return cls(
            torch.cat([target["labels"] for target in targets]),
            torch.cat([target["masks"].bool() for target in targets]),
            images,
            slots,
            counts,
        )


class Assignment(NamedTuple):
    """Pairs of a query and a segment, those of the first image first, queries ascending inside an image."""

    images: Tensor  # (M,) int64
    queries: Tensor  # (M,) int64
    targets: Tensor  # (M,) int64, places in Targets


class HungarianMatcher(nn.Module):
    """Assigns each segment of an image to a query of its own, so that the cost is least; other queries stay free.

    The cost is that of the losses: class probability, and cross entropy and dice of the masks at random points which all
    queries and segments of an image share. Where segments outnumber the queries, the dearest segments stay free.

    Source: DETR (Carion et al. 2020) and the Mask2Former release.
    """

    def __init__(self, cost_class: float, cost_mask: float, cost_dice: float, num_points: int):
        super().__init__()
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError(
                "MODEL.MASK_FORMER.CLASS_WEIGHT, MASK_WEIGHT and DICE_WEIGHT are all 0: nothing would tell which query "
                "is to predict which segment"
            )
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    def forward(self, outputs: dict, targets: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Match one layer's predictions, in the release's form.

        Args:
            outputs: "pred_logits" (B, Q, K + 1) and "pred_masks" (B, Q, h, w).
            targets: see `Targets.of`.

        Returns:
            for each image the matched queries and segments, two int64 tensors of min(Q, N).
        """
        packed = Targets.of(targets)
        (assignment,) = self.match([outputs], packed)
        pairs = []
        for i in range(len(packed.counts)):
            mine = assignment.images == i
            pairs.append((assignment.queries[mine], packed.slots[assignment.targets[mine]]))
        return pairs

    def match(self, layers: Sequence[dict], targets: Targets) -> list[Assignment]:
        """Match the predictions of several layers, waiting for the GPU once in all.

        Args:
            layers: each with "pred_logits" (B, Q, K + 1) and "pred_masks" (B, Q, h, w).

        Returns:
            an assignment for each layer, on the device of the targets.

        Raises:
            FloatingPointError: a prediction is NaN or infinite.
        """
        with torch.no_grad(), torch.autocast(targets.masks.device.type, enabled=False):
            # (layers, T, Q)
            costs = torch.stack([self._costs(layer, targets) for layer in layers]).cpu().numpy()
        if not np.isfinite(costs).all():
            bad = [i for i, cost in enumerate(costs) if not np.isfinite(cost).all()]
            raise FloatingPointError(
                f"predictions are NaN or infinite (in the outputs {bad} of {len(layers)}; 0 is the last layer): training "
                "has diverged. Lower SOLVER.BASE_LR, or set SOLVER.AMP.ENABLED False, and resume from an earlier checkpoint"
            )
        found = [_assign(cost, targets.counts) for cost in costs]
        # One copy to the GPU for all.
        joined = torch.from_numpy(np.concatenate(found, axis=1)).to(targets.masks.device)
        return [Assignment(*part) for part in joined.split([f.shape[1] for f in found], dim=1)]

    def _costs(self, layer: dict, targets: Targets) -> Tensor:
        """Cost of each query for each segment of its image, (T, Q) float32."""
        mask_logits = layer["pred_masks"].float()
        batch = len(mask_logits)
        points = uniform_points(batch, self.num_points, mask_logits.device)
        logits = sample_logits(mask_logits, points)  # (B, Q, P)
        everyone = torch.arange(len(targets.labels), device=points.device)
        values = sample_masks(targets.masks, everyone, points[targets.images])  # (T, P)
        # Segments by image, with empty places where an image has fewer than another.
        padded = values.new_zeros(batch, max((*targets.counts, 1)), self.num_points)  # (B, N, P)
        padded[targets.images, targets.slots] = values
        padded = padded.transpose(1, 2)

        # Cross entropy of logit x and value t: softplus(x) - x t.
        mask = (F.softplus(logits).sum(-1, keepdim=True) - logits @ padded) / self.num_points  # (B, Q, N)
        probability = logits.sigmoid()
        overlap = 2 * (probability @ padded)
        dice = 1 - (overlap + 1) / (probability.sum(-1)[:, :, None] + padded.sum(1)[:, None] + 1)
        cost = self.cost_mask * mask + self.cost_dice * dice
        classes = layer["pred_logits"].float().softmax(-1)  # (B, Q, K + 1)
        return (
            cost[targets.images, :, targets.slots]
            - self.cost_class * classes[targets.images, :, targets.labels]
        )

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}, "
            f"num_points={self.num_points}"
        )


def _assign(cost: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Cost (T, Q) of the segments of all images -> images, queries, segments: (3, M) int64."""
    queries, segments = [], []
    start = 0
    for count in counts:
        chosen, slots = linear_sum_assignment(cost[start : start + count].T)
        queries.append(chosen)
        segments.append(slots + start)
        start += count
    images = np.repeat(np.arange(len(counts)), [len(chosen) for chosen in queries])
    return np.stack((images, np.concatenate(queries), np.concatenate(segments))).astype(np.int64)
