"""Training on a GPU: the losses of a CPU, mixed precision, and the whole loop."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.engine import HookBase

from tests.mask2former.loss_reference import Points, our_criterion, random_outputs, random_targets
from tests.mask2former.test_training import PREFIX, Crash, make_cfg, new_trainer, root, weights_of

pytestmark = pytest.mark.gpu
CLASSES = 5
__all__ = ["root"]


def on(device: str, layers: list[dict]) -> list[dict]:
    return [{k: v.detach().to(device).requires_grad_() for k, v in layer.items()} for layer in layers]


@pytest.mark.parametrize("counts", [[2, 4], [0, 3], [0, 0], [9, 1]])
def test_losses_and_gradients_are_those_of_the_cpu(counts, monkeypatch):
    layers = random_outputs(2, 6, CLASSES, layers=3)
    targets = random_targets(counts, CLASSES)
    results = []
    for device in ("cpu", "cuda"):
        criterion = our_criterion(CLASSES, num_aux_outputs=2).to(device)
        mine = on(device, layers)
        points = Points.of(criterion, 3, 2, sum(min(6, n) for n in counts))
        with monkeypatch.context() as patch:
            points.give_ours(patch)
            losses = criterion(
                {**mine[0], "aux_outputs": mine[1:]},
                [{k: v.to(device) for k, v in t.items()} for t in targets],
            )
        sum((i + 1) * v for i, v in enumerate(losses.values())).backward()
        results.append((losses, mine))
    (cpu, cpu_layers), (cuda, cuda_layers) = results
    for name, value in cpu.items():
        torch.testing.assert_close(cuda[name].cpu(), value, rtol=1e-4, atol=1e-5)
    for a, b in zip(cuda_layers, cpu_layers):
        for name in a:
            torch.testing.assert_close(a[name].grad.cpu(), b[name].grad, rtol=1e-3, atol=1e-5)


def gpu_cfg(output, *opts):
    return make_cfg(output, "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, *opts)


class Losses(HookBase):
    def __init__(self):
        self.values = []

    def after_step(self):
        self.values.append(self.trainer.storage.latest()["total_loss"][0])


def test_mixed_precision_learns(root, tmp_path):
    opts = ("SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 1000)
    trainer = new_trainer(gpu_cfg(tmp_path, *opts))
    losses, dtypes = Losses(), set()
    trainer.register_hooks([losses])
    trainer.model.sem_seg_head.predictor.class_embed.register_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype)
    )
    trainer.train()
    assert dtypes == {torch.float16}
    assert sum(losses.values[-10:]) < 0.7 * sum(losses.values[:10])
    assert all(torch.isfinite(v).all() for v in weights_of(trainer).values())


def test_crashed_job_goes_on(root, tmp_path):
    whole, seen = new_trainer(gpu_cfg(tmp_path / "whole")), Losses()
    whole.register_hooks([seen])
    whole.train()
    first = new_trainer(gpu_cfg(tmp_path / "crashed"))
    first.register_hooks([Crash(2)])
    with pytest.raises(RuntimeError, match="power failure"):
        first.train()
    second, again = new_trainer(gpu_cfg(tmp_path / "crashed"), resume=True), Losses()
    second.register_hooks([again])
    assert second.start_iter == 2
    # A fresh one counts from no iteration and knows of none that overflowed.
    saved = torch.load(tmp_path / "crashed" / "model_0000001.pth", weights_only=True)["trainer"]["_trainer"]
    scaler = second._trainer.grad_scaler
    assert scaler.state_dict() == saved["grad_scaler"] != torch.amp.GradScaler("cuda").state_dict()
    second.train()
    # Other kernels may sum in another order; other images or points would show in the first digits.
    assert again.values == pytest.approx(seen.values[2:], rel=0.02)


@pytest.mark.slow
def test_evaluation_in_between_and_after(root, tmp_path):
    cfg = gpu_cfg(tmp_path, "DATASETS.TEST", (f"{PREFIX}_val_panoptic",), "TEST.EVAL_PERIOD", 2)
    trainer = new_trainer(cfg)
    trainer.train()
    results = json.loads((tmp_path / "inference" / "results.json").read_text())
    assert {"panoptic_seg", "segm", "sem_seg"} <= set(results[f"{PREFIX}_val_panoptic"])
    assert trainer.model.training
