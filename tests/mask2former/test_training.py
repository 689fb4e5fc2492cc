"""Training from end to end on a CPU: it learns, resumes exactly, and survives what data sets hold."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mask2former import get_mask2former_cfg
from mask2former.data import build_train_loader
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.data.errors import AnnotationError
from mask2former.engine import Trainer, torch_training_cfg
from mask2former.engine.trainer import TrainStep
from mask2former.solver import build_optimizer

PREFIX = "trainingtest"
CONFIG = Path(__file__).resolve().parents[2] / "configs/shapes/maskformer2_mini_shapes.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("training") / "shapes"
    make_shapes_dataset(root, ShapesOptions(train=6, val=2, seed=9, min_size=48, max_size=80))
    register_shapes(str(root), PREFIX)
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """Maps of a few pixels are not worth more, and threads that wait for each other are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_cfg(output: Path | str, *opts):
    return get_mask2former_cfg(
        CONFIG,
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SEED", 5, "OUTPUT_DIR", str(output)),
            *("DATASETS.TRAIN", (f"{PREFIX}_train_panoptic",), "DATASETS.TEST", ()),
            *("DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.AMP.ENABLED", False),
            *("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 1e-3),
            *("SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 0),
            *("INPUT.IMAGE_SIZE", 64, "INPUT.MIN_SCALE", 0.8, "INPUT.MAX_SCALE", 1.2),
            *("INPUT.MIN_SIZE_TEST", 64, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 128),
            *opts,
        ],
    )


def new_trainer(cfg, resume: bool = False) -> Trainer:
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    torch.manual_seed(11)  # of the initial weights
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


class Crash(HookBase):
    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise RuntimeError("power failure")


class Counted:
    """So many batches, and then a record that cannot be read."""

    def __init__(self, good: int):
        self.good, self.loaded = good, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.loaded == self.good:
            raise AnnotationError("a damaged record")
        self.loaded += 1
        return [{"image": torch.ones(3)}]


class OneLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return {"loss": (self.weight * batch[0]["image"]).sum()}


@pytest.mark.parametrize("good, readable", [(3, True), (2, False)])
def test_last_iteration_loads_no_batch_ahead(monkeypatch, good, readable):
    """As on a GPU, where the next batch is loaded while the GPU works."""
    model, loader = OneLoss(), Counted(good)
    step = TrainStep(model, loader, torch.optim.SGD(model.parameters(), 0.1), amp=False, max_iter=3)
    step._device_type = "cuda"
    monkeypatch.setattr(step, "_write_metrics", lambda *_: None)
    with contextlib.nullcontext() if readable else pytest.raises(AnnotationError):
        for step.iter in range(3):
            step.run_step()
            assert loader.loaded == min(step.iter + 2, 3)
    assert loader.loaded == good


class Batches:
    """Batches of one image, of these values."""

    def __init__(self, values):
        self._values = values

    def __iter__(self):
        return ([{"image": torch.full((3,), value)}] for value in self._values)


def test_scaled_losses_give_the_updates_of_unscaled_ones(monkeypatch):
    """A GradScaler's life on a GPU, by one for the CPU: it scales, grows, skips what overflows and shrinks."""
    values = [1.0, 2.0, float("inf"), 3.0]
    model = OneLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.125)
    step = TrainStep(model, Batches(values), optimizer, amp=False, max_iter=4)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    monkeypatch.setattr(step, "_write_metrics", lambda *_: None)
    gradients, weights, scales = [], [], []
    model.weight.register_hook(lambda gradient: gradients.append(gradient[0].item()))
    for step.iter in range(4):
        step.run_step()
        weights.append(model.weight[0].item())
        scales.append(step.grad_scaler.get_scale())
    assert gradients == [64.0, 128.0, float("inf"), 192.0]
    assert weights == [0.875, 0.625, 0.625, 0.25]
    assert scales == [64.0, 128.0, 64.0, 64.0]


@pytest.mark.slow
def test_one_batch_is_learnt_by_heart(root, tmp_path):
    cfg = make_cfg(
        tmp_path, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 512, "INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = next(iter(build_train_loader(cfg)))
    optimizer = build_optimizer(cfg, model)
    history = []
    for i in range(120):
        torch.manual_seed(i)
        losses = model(batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    assert history[0] > 30
    # What is left: the borders of the segments, which are finer than the masks' pixels and of which the losses choose their
    # points, and the classes of the bare queries, which do not see the image. The next test: coarse borders, one image.
    assert sum(history[-10:]) / 10 < 0.13 * history[0]
    assert losses["loss_ce"] < 0.05

    model.eval()
    with torch.no_grad():
        images = model.preprocess(batch)[0]
        logits, masks = model.core(images)
    masks = nn.functional.interpolate(masks, size=images.shape[-2:], mode="bilinear") > 0
    segments = 0
    for i, inputs in enumerate(batch):
        found = logits[i].argmax(-1)
        for label, mask in zip(inputs["instances"].gt_classes, inputs["instances"].gt_masks):
            if mask.sum() < 100:
                continue
            segments += 1
            union = (masks[i] | mask).flatten(1).sum(1)
            overlap = (masks[i] & mask).flatten(1).sum(1) / union
            best = int(overlap.argmax())
            assert overlap[best] > 0.8 and found[best] == label
        # A query for each segment, and no more.
        assert int((found != model.sem_seg_head.num_classes).sum()) == len(inputs["instances"])
    assert segments >= 3


def drawn_with_rectangles(size: tuple[int, int], parts: dict[int, tuple[int, int, int, int]], seed: int):
    """An input of training: a rectangle (y0, y1, x0, x1) of one colour for each class."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    masks = torch.zeros(len(parts), *size, dtype=torch.bool)
    colors = torch.randint(0, 256, (len(parts), 3), generator=torch.Generator().manual_seed(seed))
    for color, mask, (y0, y1, x0, x1) in zip(colors, masks, parts.values()):
        mask[y0:y1, x0:x1] = True
        image[:, y0:y1, x0:x1] = color[:, None, None]
    instances = Instances(size, gt_classes=torch.tensor(list(parts)), gt_masks=masks)
    return {"image": image, "instances": instances}


@pytest.mark.slow
def test_loss_of_one_batch_falls_to_zero(tmp_path):
    """With the points that training draws. Borders lie between the cells of the stride-4 masks, which can represent them."""
    side, iterations = 128, 240
    cfg = make_cfg(tmp_path, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 1024)
    batch = [
        drawn_with_rectangles(
            (side, side), {0: (0, side, 0, 40), 9: (0, 88, 40, side), 3: (88, side, 40, side)}, 2
        )
    ]
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 - i / iterations) ** 0.9)
    history = []
    for i in range(iterations):
        torch.manual_seed(i)
        losses = model(batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        history.append(float(total.detach()))
    assert len(losses) == 12 and history[0] > 30
    # What is left is at borders, where most points are drawn: within a pixel the annotation goes from 0 to 1, and the cross
    # entropy of a share is not zero. It is weighted with 5, and summed over four layers.
    assert sum(history[-10:]) / 10 < 0.03 * history[0]
    for name, loss in losses.items():
        assert loss < 0.25, name
    assert losses["loss_ce"] < 0.01

    # Points of the whole image have fewer at borders.
    model.criterion.importance_sample_ratio = 0.0
    torch.manual_seed(0)
    with torch.no_grad():
        evenly = model(batch)
    assert sum(evenly.values()) < 0.012 * history[0]
    assert all(evenly[name] < 0.1 for name in evenly if not name.startswith("loss_ce_"))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_job_that_crashed_goes_on_as_if_it_had_not(root, tmp_path, workers):
    opts = ("DATALOADER.NUM_WORKERS", workers)
    whole = new_trainer(make_cfg(tmp_path / "whole", *opts))
    whole.train()

    first = new_trainer(make_cfg(tmp_path / "crashed", *opts))
    first.register_hooks([Crash(2)])  # an iteration after the checkpoint
    with pytest.raises(RuntimeError, match="power failure"):
        first.train()
    # Another seed for what is not in the checkpoint, to notice what is not restored.
    cfg = make_cfg(tmp_path / "crashed", *opts, "SEED", -1)
    second = new_trainer(cfg, resume=True)
    assert second.start_iter == 2 and second.seed == 5
    second.train()

    expected, got = weights_of(whole), weights_of(second)
    assert set(expected) == set(got)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    a, b = whole.optimizer.state_dict(), second.optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for i, state in a["state"].items():
        assert all(torch.equal(state[k], b["state"][i][k]) for k in ("exp_avg", "exp_avg_sq", "step"))
    # The learning rate has gone down at iteration 3.
    assert [g["lr"] for g in b["param_groups"]] == pytest.approx([1e-4] * len(b["param_groups"]))
    assert any(not torch.equal(expected[n], weights_of(first)[n]) for n in expected), (
        "training changed nothing"
    )


def test_scale_of_the_losses_goes_on_after_a_crash(root, tmp_path, monkeypatch):
    """By a GradScaler for the CPU, which grows after every third iteration."""
    plain = new_trainer(make_cfg(tmp_path / "plain"))
    plain.train()
    real = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: real("cpu", init_scale=256.0, growth_interval=3)
    )

    whole = new_trainer(make_cfg(tmp_path / "whole"))
    whole.train()
    first = new_trainer(make_cfg(tmp_path / "crashed"))
    fresh = first._trainer.grad_scaler.state_dict()
    first.register_hooks([Crash(2)])
    with pytest.raises(RuntimeError, match="power failure"):
        first.train()
    second = new_trainer(make_cfg(tmp_path / "crashed"), resume=True)
    assert second.start_iter == 2
    restored = second._trainer.grad_scaler.state_dict()
    assert restored == {**fresh, "_growth_tracker": 2}
    second.train()
    # A fresh one would not have grown in the two iterations that were left.
    for trainer in (whole, second):
        assert trainer._trainer.grad_scaler.state_dict() == {**fresh, "scale": 512.0, "_growth_tracker": 1}
    # Scaling by powers of two, undone before gradients are clipped, is exact.
    for name, value in weights_of(plain).items():
        assert torch.equal(value, weights_of(whole)[name]), name
        assert torch.equal(value, weights_of(second)[name]), name


def test_checkpoint_has_the_names_of_the_release_and_loads(root, tmp_path):
    trainer = new_trainer(make_cfg(tmp_path, "SOLVER.MAX_ITER", 1))
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert set(saved["model"]) == set(trainer.model.state_dict())
    assert "criterion.empty_weight" in saved["model"]
    assert saved["trainer"]["iteration"] == saved["iteration"] == 0 and saved["trainer"]["seed"] == 5
    assert {"optimizer", "grad_scaler", "iteration"} == set(saved["trainer"]["_trainer"])


def test_checkpoint_of_another_trainer_resumes_without_its_optimizer(root, tmp_path, caplog):
    trainer = new_trainer(make_cfg(tmp_path, "SOLVER.MAX_ITER", 1))
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    del saved["trainer"]["_trainer"], saved["trainer"]["seed"]
    torch.save(saved, tmp_path / "model_final.pth")
    with caplog.at_level(logging.WARNING):
        again = new_trainer(make_cfg(tmp_path, "SOLVER.MAX_ITER", 2), resume=True)
    assert "no state of the optimizer" in caplog.text and again.start_iter == 1


def test_resume_without_a_checkpoint_starts_anew_and_says_so(root, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = new_trainer(make_cfg(tmp_path), resume=True)
    assert "there is no checkpoint" in caplog.text and trainer.start_iter == 0


def test_mixed_precision_on_a_cpu(root, tmp_path):
    trainer = new_trainer(make_cfg(tmp_path, "SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 2))
    dtypes = set()
    predictor = trainer.model.sem_seg_head.predictor
    predictor.class_embed.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    before = weights_of(trainer)
    trainer.train()
    assert dtypes == {torch.bfloat16}
    after = weights_of(trainer)
    assert all(torch.isfinite(v).all() and v.dtype == before[k].dtype for k, v in after.items())
    changed = [k for k in after if not torch.equal(before[k], after[k])]
    assert any(k.startswith("backbone") for k in changed) and any("query_feat" in k for k in changed)


def segments(count: int, size: tuple[int, int]) -> Instances:
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for i in range(count):
        masks[i, i * 4 : i * 4 + 8] = True
    return Instances(size, gt_classes=torch.arange(count), gt_masks=masks)


@pytest.mark.parametrize("counts", [(0,), (0, 0), (0, 3), (3, 0), (25, 1)])
def test_images_without_segments_and_with_more_than_queries_train(counts, tmp_path):
    model = build_model(make_cfg(tmp_path)).train()
    size = (64, 128)
    batch = [
        {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8), "instances": segments(n, size)}
        for n in counts
    ]
    for inputs in batch:
        inputs["instances"].gt_classes %= 13
    losses = model(batch)
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_segments_that_the_crop_removed_train(tmp_path):
    """They stay with empty masks, as in the release."""
    model = build_model(make_cfg(tmp_path)).train()
    some, none = segments(3, (64, 64)), segments(3, (64, 64))
    none.gt_masks[:] = False
    some.gt_masks[1] = False
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    losses = model([{"image": image, "instances": some}, {"image": image, "instances": none}])
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_diverged_training_stops_with_a_reason(root, tmp_path):
    trainer = new_trainer(make_cfg(tmp_path))
    trainer.model.sem_seg_head.predictor.query_feat.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"training has diverged\. Lower SOLVER.BASE_LR"):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))


def test_losses_that_diverge_stop_the_training_too():
    """Where predictions were finite."""
    model = OneLoss()
    step = TrainStep(model, Counted(2), torch.optim.SGD(model.parameters(), 0.1), amp=False, max_iter=3)
    model.weight.data.fill_(float("inf"))
    step.iter = 0
    reason = r"losses are NaN or infinite \(.*'loss': .*inf.*training has diverged\. Lower SOLVER.BASE_LR"
    with EventStorage(0), pytest.raises(FloatingPointError, match=reason):
        step.run_step()


@pytest.mark.slow
def test_evaluation_during_training(root, tmp_path):
    cfg = make_cfg(
        tmp_path,
        *("DATASETS.TEST", (f"{PREFIX}_val_sem_seg",), "TEST.EVAL_PERIOD", 2),
        *(
            "DATASETS.TRAIN",
            (f"{PREFIX}_train_sem_seg",),
            "INPUT.DATASET_MAPPER_NAME",
            "mask_former_semantic",
        ),
        *("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "MODEL.BACKEND", "tensorrt"),
    )
    assert "MODEL.BACKEND tensorrt takes effect with --eval-only" in torch_training_cfg(cfg)
    trainer = new_trainer(cfg)
    evaluated = []

    class Watch(HookBase):
        def after_step(self):
            latest = self.trainer.storage.latest()
            if "sem_seg/mIoU" in latest and latest["sem_seg/mIoU"][1] not in evaluated:
                evaluated.append(latest["sem_seg/mIoU"][1])

        def after_train(self):
            self.after_step()

    trainer.register_hooks([Watch()])
    trainer.train()
    assert evaluated == [1, 4] and trainer.model.training
    results = json.loads((tmp_path / "inference" / "results.json").read_text())
    assert results["backend"] == {"backend": "torch"}
    assert 0 <= results[f"{PREFIX}_val_sem_seg"]["sem_seg"]["pACC"] <= 100
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("total_loss" in line for line in lines)


@pytest.mark.parametrize(
    "keys, told",
    [
        (("MODEL.BACKEND", "torch"), ""),
        (("MODEL.BACKEND", "tensorrt"), "MODEL.BACKEND tensorrt takes effect with --eval-only"),
        (
            ("MODEL.META_ARCHITECTURE", "TensorRTMaskFormer"),
            "TensorRTMaskFormer takes effect with --eval-only",
        ),
    ],
)
def test_training_runs_in_pytorch_and_says_so(keys, told, tmp_path):
    cfg = make_cfg(tmp_path, *keys)
    message = torch_training_cfg(cfg)
    assert (told in message) if told else message == ""
    assert cfg.MODEL.BACKEND == "torch" and cfg.MODEL.META_ARCHITECTURE == "MaskFormer"


def test_trainer_refuses_another_backend(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL.BACKEND is 'tensorrt': training runs in PyTorch"):
        Trainer(make_cfg(tmp_path, "MODEL.BACKEND", "tensorrt"))


def _distributed_job(rank: int, port: int, root: str, output: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        register_shapes(root, PREFIX)
        cfg = make_cfg(output)
        torch.manual_seed(rank)  # DistributedDataParallel starts all from the first one's weights
        model = DistributedDataParallel(build_model(cfg).train(), broadcast_buffers=False)
        optimizer = build_optimizer(cfg, model)
        assert comm.get_world_size() == 2
        size = (64, 64)
        # One process has no segments at all: the others must neither wait for it nor be divided by zero.
        for count in ((4, 0)[rank], 2):
            image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
            losses = model([{"image": image, "instances": segments(count, size)}])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        loader = build_train_loader(cfg)
        result = {
            "weights": dict(model.module.named_parameters()),
            "images": [x["image_id"] for _, batch in zip(range(3), loader) for x in batch],
        }
        torch.save(result, f"{output}/rank{rank}.pth")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_stay_together(root, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_distributed_job, (port, str(root), str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2))
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name
        assert torch.isfinite(value).all()
    # An epoch of six images, half for each.
    assert len(one["images"]) == len(other["images"]) == 3
    assert len({*one["images"], *other["images"]}) == 6
