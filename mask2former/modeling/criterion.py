"""The training loss: cross entropy of the classes, cross entropy and dice of the masks, after every decoder layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from .matcher import Assignment, HungarianMatcher, Targets
from .point_features import sample_logits, sample_masks, uncertain_points


class SetCriterion(nn.Module):
    """Losses of matched queries and segments.

    The state dict has the class weights that the release's checkpoints carry as `criterion.empty_weight`.

    Source: Mask2Former (Cheng et al. 2022), section 3.3, and its release.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        *,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        no_object_weight: float,
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
        num_aux_outputs: int,
    ):
        """
        Args:
            num_classes: K, without "no object".
            no_object_weight: weight of "no object" in the cross entropy of the classes.
            num_points: where the mask losses are taken; for this and the next two see `uncertain_points`.
            num_aux_outputs: outputs of earlier layers that have losses too; 0 without deep supervision.
        """
        super().__init__()
        prefix = "MODEL.MASK_FORMER."
        if num_points < 1:
            raise ValueError(f"{prefix}TRAIN_NUM_POINTS is {num_points}; it must be at least 1")
        if oversample_ratio < 1:
            raise ValueError(f"{prefix}OVERSAMPLE_RATIO is {oversample_ratio}; it must be at least 1")
        if not 0 <= importance_sample_ratio <= 1:
            raise ValueError(
                f"{prefix}IMPORTANCE_SAMPLE_RATIO is {importance_sample_ratio}; it must be between 0 and 1"
            )
        self.num_classes = num_classes
        self.matcher = matcher
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.num_aux_outputs = num_aux_outputs
        weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        suffixes = ["", *(f"_{i}" for i in range(num_aux_outputs))]
        # What the caller multiplies each loss with.
        self.weight_dict = {name + suffix: w for suffix in suffixes for name, w in weights.items()}
        weight = torch.ones(num_classes + 1)
        weight[-1] = no_object_weight
        self.register_buffer("empty_weight", weight)  # (num_classes + 1,), the last for "no object"

    def forward(self, outputs: dict, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of a batch, in float32 also under autocast, before they are weighted.

        Args:
            outputs: "pred_logits" (B, Q, K + 1), "pred_masks" (B, Q, h, w), and with deep supervision "aux_outputs", a
                list with the same two of each layer before the last.
            targets: for each image "labels" (N,) int64 and "masks" (N, H, W) at the size of the padded batch.

        Returns:
            loss_ce, loss_mask and loss_dice of the last layer, and with "_0", "_1", ... of the layers before it: scalars.
            The mask losses are sums over the segments, divided by the segments of an average process.

        Raises:
            ValueError: targets that do not fit each other or the outputs.
            FloatingPointError: a prediction is NaN or infinite.
        """
        aux_outputs = outputs.get("aux_outputs", [])[: self.num_aux_outputs]
        if len(aux_outputs) != self.num_aux_outputs:
            raise ValueError(
                f"the losses of {self.num_aux_outputs} earlier layers are asked for (MODEL.MASK_FORMER.DEEP_SUPERVISION), "
                f"but there are outputs of {len(aux_outputs)}"
            )
        if len(targets) != len(outputs["pred_logits"]):
            raise ValueError(f"{len(targets)} targets for {len(outputs['pred_logits'])} images")
        layers = [outputs, *aux_outputs]
        packed = Targets.of(targets)
        with torch.autocast(packed.masks.device.type, enabled=False):
            assignments = self.matcher.match(layers, packed)
            num_masks = self._average_num_masks(packed)
            losses = {}
            for i, (layer, assignment) in enumerate(zip(layers, assignments)):
                suffix = f"_{i - 1}" if i else ""
                losses["loss_ce" + suffix] = self._class_loss(layer, packed, assignment)
                mask, dice = self._mask_losses(layer, packed, assignment)
                losses["loss_mask" + suffix] = mask / num_masks
                losses["loss_dice" + suffix] = dice / num_masks
        return losses

    def _average_num_masks(self, targets: Targets) -> float | Tensor:
        """Segments of all processes by the number of processes, at least 1."""
        count, processes = len(targets.labels), comm.get_world_size()
        if processes == 1:
            return max(count, 1)
        total = torch.tensor(float(count), device=targets.labels.device)
        torch.distributed.all_reduce(total)
        return (total / processes).clamp(min=1)

    def _class_loss(self, layer: dict, targets: Targets, assignment: Assignment) -> Tensor:
        """Weighted mean over all queries; those without a segment are to say "no object"."""
        logits = layer["pred_logits"].float()  # (B, Q, K + 1)
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        classes[assignment.images, assignment.queries] = targets.labels[assignment.targets]
        return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), self.empty_weight)

    def _mask_losses(self, layer: dict, targets: Targets, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """Cross entropy and dice, summed over the matched segments."""
        # Zeros with a gradient where nothing is matched: processes of one job must agree on which parameters have one.
        masks = layer["pred_masks"][assignment.images, assignment.queries].float()  # (M, h, w)
        if len(masks) == 0:
            return masks.sum(), masks.sum()
        points = uncertain_points(
            masks.detach(), self.num_points, self.oversample_ratio, self.importance_sample_ratio
        )
        values = sample_masks(targets.masks, assignment.targets, points)  # (M, P)
        logits = sample_logits(masks[:, None], points)[:, 0]
        mask = F.binary_cross_entropy_with_logits(logits, values, reduction="none").mean(1).sum()
        probability = logits.sigmoid()
        overlap = 2 * (probability * values).sum(1)
        dice = (1 - (overlap + 1) / (probability.sum(1) + values.sum(1) + 1)).sum()
        return mask, dice

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, num_points={self.num_points}, oversample_ratio={self.oversample_ratio}, "
            f"importance_sample_ratio={self.importance_sample_ratio}, num_aux_outputs={self.num_aux_outputs}"
        )


def build_criterion(cfg: CfgNode, num_classes: int) -> SetCriterion:
    """The loss that MODEL.MASK_FORMER describes; ValueError where a key has a value that it cannot have."""
    options = cfg.MODEL.MASK_FORMER
    matcher = HungarianMatcher(
        cost_class=options.CLASS_WEIGHT,
        cost_mask=options.MASK_WEIGHT,
        cost_dice=options.DICE_WEIGHT,
        num_points=options.TRAIN_NUM_POINTS,
    )
    return SetCriterion(
        num_classes,
        matcher,
        class_weight=options.CLASS_WEIGHT,
        mask_weight=options.MASK_WEIGHT,
        dice_weight=options.DICE_WEIGHT,
        no_object_weight=options.NO_OBJECT_WEIGHT,
        num_points=options.TRAIN_NUM_POINTS,
        oversample_ratio=options.OVERSAMPLE_RATIO,
        importance_sample_ratio=options.IMPORTANCE_SAMPLE_RATIO,
        # The release counts the prediction of the bare queries as a layer.
        num_aux_outputs=options.DEC_LAYERS - 1 if options.DEEP_SUPERVISION else 0,
    )
