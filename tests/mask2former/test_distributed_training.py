"""Training by two processes, as on two GPUs: stopped, resumed and evaluated. Here on the CPU, through gloo."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from mask2former.data.datasets.shapes import register_shapes
from mask2former.engine import Trainer
from mask2former.engine import trainer as trainer_module
from mask2former.evaluation import evaluate_model
from tests.mask2former.test_training import PREFIX, make_cfg, one_thread, root

__all__ = ["one_thread", "root"]
# Processes ask each other for the time after every tenth iteration.
OPTS = ("SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 1000, "DATASETS.TEST", (f"{PREFIX}_val_panoptic",))


def _job(rank: int, port: int, root: str, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        # As detectron2's launch does, which wants GPUs.
        comm._LOCAL_PROCESS_GROUP = torch.distributed.group.WORLD
        trainer_module.create_ddp_model = DistributedDataParallel
        register_shapes(root, PREFIX)
        evaluated = []

        def record(cfg, model):
            evaluated.append({name: value.clone() for name, value in model.named_buffers()})
            return evaluate_model(cfg, model)

        trainer_module.evaluate_model = record
        seen = {}
        for name, seconds, resume in (("whole", 600, False), ("parts", 0, False), ("parts", 600, True)):
            cfg = make_cfg(f"{folder}/{name}", *OPTS)
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            torch.manual_seed(rank)  # of the initial weights, which are the first process's
            trainer = Trainer(cfg, time.monotonic() + seconds)
            trainer.resume_or_load(resume=resume)
            trainer.train()
            seen[f"{name} {resume}"] = trainer.iter + 1 if not trainer.finished else trainer.iter
        torch.save({"evaluated": evaluated, "iterations": seen}, f"{folder}/rank{rank}.pth")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory) -> Path:
    """What the two processes leave."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_job, (port, str(root), str(folder)), nprocs=2)
    return folder


def load(path: Path) -> dict:
    return torch.load(path, weights_only=False)


@pytest.mark.slow
def test_both_stop_together_and_resuming_ends_in_the_same_weights(folder):
    for rank in range(2):
        seen = load(folder / f"rank{rank}.pth")["iterations"]
        assert seen == {"whole False": 12, "parts False": 10, "parts True": 12}
    assert (folder / "parts" / "model_0000009.pth").exists()
    whole, parts = (load(folder / name / "model_final.pth")["model"] for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


@pytest.mark.slow
def test_both_evaluate_the_model_of_the_checkpoint(folder):
    final = load(folder / "whole" / "model_final.pth")["model"]
    for rank in range(2):
        first, second = load(folder / f"rank{rank}.pth")["evaluated"]
        norms = [name for name in first if name.endswith(("running_mean", "running_var"))]
        assert norms
        for name in norms:
            value = first[name]
            assert torch.equal(value, final[name]) and torch.equal(value, second[name]), name
    cfg = make_cfg(folder / "again", *OPTS)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(str(folder / "whole" / "model_final.pth"))
    evaluate_model(cfg, model)
    told = [(folder / name / "inference" / "results.json").read_text() for name in ("whole", "again")]
    assert told[0] == told[1]
