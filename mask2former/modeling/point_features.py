"""Values of masks at points: the mask losses look at some thousand points of a mask, not at all of its pixels.

Points are (x, y) in [0, 1] x [0, 1] over the whole map, so that the same point is meant in masks of any resolution. Values
are bilinear, with zeros outside of the map, as torch's grid_sample gives them without aligned corners.

Source: PointRend (Kirillov et al. 2020) as detectron2's project of that name and the Mask2Former release use it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def uniform_points(count: int, num_points: int, device: torch.device) -> Tensor:
    """Random points of `count` maps, (count, num_points, 2) float32."""
    return torch.rand(count, num_points, 2, device=device)


def sample_logits(logits: Tensor, points: Tensor) -> Tensor:
    """Values of maps at points; gradients flow to the maps.

    Args:
        logits: (N, C, H, W) floating.
        points: (N, P, 2); all C channels of a map are read at the same points.

    Returns:
        (N, C, P).
    """
    grid = (2.0 * points - 1.0).to(logits.dtype).unsqueeze(2)  # (N, P, 1, 2)
    return F.grid_sample(logits, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


def sample_masks(masks: Tensor, which: Tensor, points: Tensor) -> Tensor:
    """Values of binary masks at points, without a floating copy of the masks, which are large.

    Args:
        masks: (T, H, W) bool.
        which: (M,) int64, the mask of each row of points; a mask may occur in several rows or none.
        points: (M, P, 2).

    Returns:
        (M, P) float32 in [0, 1].
    """
    height, width = masks.shape[-2:]
    x = points[..., 0] * width - 0.5  # (M, P), 0 at the centre of the first pixel
    y = points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    x, y = x - left, y - top
    # The four neighbours of all points at once, (2, 2, M, P): the kernels are many and small.
    columns = torch.stack((left, left + 1)).long()  # (2, M, P)
    rows = torch.stack((top, top + 1)).long()
    row_shares = torch.stack((1 - y, y)) * ((rows >= 0) & (rows < height))
    column_shares = torch.stack((1 - x, x)) * ((columns >= 0) & (columns < width))
    rows = rows.clamp_(0, height - 1).add_((which * height)[:, None]).mul_(width)
    index = rows[:, None] + columns.clamp_(0, width - 1)
    return (masks.reshape(-1)[index] * row_shares[:, None] * column_shares).sum((0, 1))


def uncertain_points(
    logits: Tensor, num_points: int, oversample_ratio: float, importance_sample_ratio: float
) -> Tensor:
    """Points of which most are where the masks are least certain, that is, where their logits are nearest to zero.

    Args:
        logits: (N, H, W).
        num_points: P.
        oversample_ratio: P times this many points are drawn to choose from.
        importance_sample_ratio: the share of P that is chosen so; the others are uniform.

    Returns:
        (N, P, 2) float32, without gradient.
    """
    with torch.no_grad():
        drawn = uniform_points(len(logits), int(num_points * oversample_ratio), logits.device)
        # The logits are compared at the points. Where the map goes from -1 to 1, both neighbours look certain and the
        # point between them is not.
        distance = sample_logits(logits[:, None], drawn)[:, 0].abs()
        num_uncertain = int(importance_sample_ratio * num_points)
        chosen = distance.topk(num_uncertain, dim=1, largest=False).indices  # (N, num_uncertain)
        uncertain = drawn.gather(1, chosen[:, :, None].expand(-1, -1, 2))
        uniform = uniform_points(len(logits), num_points - num_uncertain, logits.device)
        return torch.cat((uncertain, uniform), dim=1)
