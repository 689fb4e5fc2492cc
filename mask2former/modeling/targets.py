"""What the losses compare with, from the annotations of a batch."""

from __future__ import annotations

import torch
from detectron2.structures import BitMasks
from torch import Tensor


def prepare_targets(
    batched_inputs: list[dict], num_classes: int, padded_size: tuple[int, int], device: torch.device
) -> list[dict[str, Tensor]]:
    """Check the annotations of a batch and pad their masks to the batch's size.

    Args:
        batched_inputs: see `MaskFormer.forward`.
        padded_size: (H, W).

    Returns:
        for each image "labels" (N,) int64 and "masks" (N, H, W) bool, on the device.

    Raises:
        ValueError: annotations are missing or do not fit the image or the classes; says of which image.
    """
    found = [_checked_segments(i, inputs, num_classes) for i, inputs in enumerate(batched_inputs)]
    counts = [len(labels) for labels, _ in found]
    # One piece of memory for all, which need not be joined again.
    padded = torch.zeros(sum(counts), *padded_size, dtype=torch.bool, device=device)
    targets = []
    for (labels, masks), part in zip(found, padded.split(counts)):
        if len(labels):
            height, width = masks.shape[-2:]
            part[:, :height, :width].copy_(masks.to(device, non_blocking=True))
        targets.append({"labels": labels.to(device, non_blocking=True), "masks": part})
    return targets


def _checked_segments(index: int, inputs: dict, num_classes: int) -> tuple[Tensor, Tensor]:
    what = f"input {index} of the batch ({inputs.get('file_name', 'no file name')}"
    what += f", image_id {inputs['image_id']!r})" if "image_id" in inputs else ")"
    if "instances" not in inputs:
        raise ValueError(
            f"{what} has no 'instances', which training needs. Use a mapper that makes them, see INPUT.DATASET_MAPPER_NAME, "
            "or call model.eval() to segment images"
        )
    instances = inputs["instances"]
    for field in ("gt_classes", "gt_masks"):
        if not instances.has(field):
            raise ValueError(f"the instances of {what} have no {field}")
    labels, masks = instances.gt_classes, instances.gt_masks
    masks = masks.tensor if isinstance(masks, BitMasks) else masks
    if not isinstance(masks, Tensor):
        raise ValueError(
            f"gt_masks of {what} are {type(masks).__name__}; expected a tensor (N, height, width) or BitMasks. With "
            "detectron2's own mapper set INPUT.MASK_FORMAT bitmask"
        )
    size = tuple(inputs["image"].shape[-2:])
    if masks.dim() != 3 or len(masks) != len(labels) or (len(masks) and tuple(masks.shape[1:]) != size):
        raise ValueError(
            f"gt_masks of {what} have shape {tuple(masks.shape)}; expected ({len(labels)}, {size[0]}, {size[1]}): a mask "
            "for each of gt_classes, of the image's height and width"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"gt_classes of {what} go from {int(labels.min())} to {int(labels.max())}, but "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}: classes count from 0 to {num_classes - 1}"
        )
    return labels.long(), masks
