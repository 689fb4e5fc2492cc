"""Optimizer groups, clipping and learning rates."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from mask2former import get_mask2former_cfg
from mask2former.solver import build_lr_scheduler, build_optimizer
from tests.golden import mini_cfg


def options_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert names[id(p)] not in found, "a parameter is in two groups"
            found[names[id(p)]] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "swin-mini",
            {
                "backbone.layers.0.blocks.0.attn.qkv.weight": (1e-5, 0.05),
                "backbone.layers.0.blocks.0.attn.relative_position_bias_table": (1e-5, 0.0),
                "backbone.layers.0.blocks.0.norm1.weight": (1e-5, 0.0),
                "backbone.norm0.bias": (1e-5, 0.0),
            },
        ),
        ("resnet50-mini", {"backbone.res2.0.conv1.weight": (1e-5, 0.05)}),
    ],
)
def test_rates_and_decays_of_the_release(name, expected):
    cfg = mini_cfg(
        name, ("SOLVER.BASE_LR", 1e-4, "SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.WEIGHT_DECAY", 0.05)
    )
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    found = options_of(optimizer, model)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    head = "sem_seg_head.p"
    expected = {
        **expected,
        head + "redictor.query_feat.weight": (1e-4, 0.0),
        head + "redictor.query_embed.weight": (1e-4, 0.0),
        head + "redictor.level_embed.weight": (1e-4, 0.0),
        head + "redictor.decoder_norm.weight": (1e-4, 0.0),
        head + "redictor.class_embed.bias": (1e-4, 0.05),
        head + "ixel_decoder.transformer.level_embed": (1e-4, 0.05),
        head + "ixel_decoder.input_proj.0.1.weight": (1e-4, 0.0),  # GroupNorm
        head + "ixel_decoder.mask_features.weight": (1e-4, 0.05),
    }
    for key, (rate, decay) in expected.items():
        assert found[key] == (pytest.approx(rate), decay), key
    assert len(optimizer.param_groups) == len(set(found.values())) <= 4


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(2))


def step(cfg, gradient: float) -> torch.Tensor:
    """How far a step moves the parameters whose gradients are all that number."""
    model = Plain()
    optimizer = build_optimizer(cfg, model)
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    optimizer.step()
    return -torch.cat([model.a, model.b]).detach()


def sgd(clip: str, value: float, enabled: bool = True):
    cfg = get_mask2former_cfg()
    cfg.merge_from_list(
        ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.MOMENTUM", 0.0]
    )
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(["ENABLED", enabled, "CLIP_TYPE", clip, "CLIP_VALUE", value])
    return cfg


def test_full_model_clips_the_norm_over_all_parameters():
    moved = step(sgd("full_model", 0.5), 3.0)
    torch.testing.assert_close(moved.norm(), torch.tensor(0.5))
    torch.testing.assert_close(moved, torch.full((5,), 0.5 / 5**0.5))
    torch.testing.assert_close(step(sgd("full_model", 100.0), 3.0), torch.full((5,), 3.0))
    torch.testing.assert_close(step(sgd("full_model", 0.5, enabled=False), 3.0), torch.full((5,), 3.0))


def test_other_clippings_are_detectron2s():
    torch.testing.assert_close(step(sgd("value", 0.5), 3.0), torch.full((5,), 0.5))
    moved = step(sgd("norm", 0.5), 3.0)
    torch.testing.assert_close(moved[:3].norm(), torch.tensor(0.5))
    torch.testing.assert_close(moved[3:].norm(), torch.tensor(0.5))


def test_clipping_survives_a_checkpoint():
    cfg = sgd("full_model", 0.5)
    model = Plain()
    optimizer = build_optimizer(cfg, model)
    optimizer.load_state_dict(build_optimizer(cfg, model).state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    torch.testing.assert_close(torch.cat([model.a, model.b]).norm(), torch.tensor(0.5))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.OPTIMIZER", "ADAM", "SOLVER.OPTIMIZER is 'ADAM'; allowed: 'ADAMW', 'SGD'"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all", "CLIP_TYPE is 'all'; allowed: 'full_model'"),
    ],
)
def test_unknown_choices_are_listed(key, value, message):
    cfg = sgd("full_model", 0.5)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, Plain())


def rates(*opts, steps: int) -> list[float]:
    cfg = sgd("full_model", 0.5)
    cfg.merge_from_list(["SOLVER.MAX_ITER", 100, *opts])
    optimizer = build_optimizer(cfg, Plain())
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_polynomial_rates():
    found = rates("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 0, steps=100)
    assert found == pytest.approx([(1 - i / 100) ** 0.9 for i in range(100)])


def test_rates_in_steps():
    opts = ("SOLVER.STEPS", (60, 80), "SOLVER.WARMUP_ITERS", 10, "SOLVER.WARMUP_FACTOR", 1.0)
    found = rates(*opts, steps=100)
    assert found[:60] == pytest.approx([1.0] * 60)
    assert found[60:] == pytest.approx([0.1] * 20 + [0.01] * 20)
