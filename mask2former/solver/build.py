"""Optimizer and learning rate, as the release sets them."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
# Parameters of Swin that are not decayed.
_POSITION_PARAMETERS = ("relative_position_bias_table", "absolute_pos_embed")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that SOLVER describes.

    The backbone learns at SOLVER.BASE_LR times BACKBONE_MULTIPLIER. Norms decay by WEIGHT_DECAY_NORM, embeddings (queries,
    levels) by WEIGHT_DECAY_EMBED, Swin's position tables not at all, the rest by WEIGHT_DECAY. Parameters with equal
    rates are one group, where the release has a group for each: the updates are the same, and many times fewer kernels.

    With SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" the norm over all gradients is clipped, else detectron2's "value" and
    "norm" clip each parameter's own. Under AMP this sees unscaled gradients.

    Raises:
        ValueError: SOLVER.OPTIMIZER or CLIP_TYPE is none that there is.

    Source: the Mask2Former release.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in ("full_model", "value", "norm"):
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; allowed: 'full_model', 'value', 'norm'"
        )
    groups = parameter_groups(cfg, model)
    if cfg.SOLVER.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(groups, cfg.SOLVER.BASE_LR)
    elif cfg.SOLVER.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(groups, cfg.SOLVER.BASE_LR, momentum=cfg.SOLVER.MOMENTUM)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; allowed: 'ADAMW', 'SGD'")
    if clip.ENABLED and clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, optimizer)
    if clip.ENABLED and clip.CLIP_VALUE > 0:
        _clip_full_model(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer):
    """SOLVER.LR_SCHEDULER_NAME: DeepLab's WarmupPolyLR, or one of detectron2's own."""
    from detectron2.projects.deeplab import build_lr_scheduler

    return build_lr_scheduler(cfg, optimizer)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Trainable parameters by learning rate and weight decay, each once."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            rate = cfg.SOLVER.BASE_LR
            if "backbone" in module_name:
                rate *= cfg.SOLVER.BACKBONE_MULTIPLIER
            decay = cfg.SOLVER.WEIGHT_DECAY
            if any(word in name for word in _POSITION_PARAMETERS):
                decay = 0.0
            if isinstance(module, _NORMS):
                decay = cfg.SOLVER.WEIGHT_DECAY_NORM
            if isinstance(module, nn.Embedding):
                decay = cfg.SOLVER.WEIGHT_DECAY_EMBED
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def _clip_full_model(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float) -> None:
    def clip(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)
