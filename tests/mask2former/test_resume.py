"""Training that is stopped, by a time limit or by kill -9, and goes on as if it had not been."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage

from mask2former.data.datasets.shapes import register_shapes
from mask2former.engine import Trainer
from mask2former.engine.checkpoint import WholeFileCheckpointer
from mask2former.engine.resumed_keys import changed_keys, training_keys
from mask2former.engine.time_limit import TimeIsUp, TimeLimit
from tests.mask2former.test_training import PREFIX, Crash, make_cfg, new_trainer, one_thread, root, weights_of

__all__ = ["one_thread", "root"]
POLY = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", 6)


class Rates(HookBase):
    """The learning rate of each iteration."""

    def __init__(self):
        self.values = []

    def before_step(self):
        self.values.append(self.trainer.optimizer.param_groups[0]["lr"])


def limited_trainer(cfg, seconds: float, resume: bool = False) -> Trainer:
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    torch.manual_seed(11)  # of the initial weights, as in new_trainer
    trainer = Trainer(cfg, time.monotonic() + seconds)
    trainer.resume_or_load(resume=resume)
    return trainer


def assert_same_weights(one: dict, other: dict) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_time_limit_writes_a_checkpoint_and_resuming_ends_in_the_same_weights(root, tmp_path, caplog):
    whole, rates = new_trainer(make_cfg(tmp_path / "whole", *POLY)), Rates()
    whole.register_hooks([rates])
    whole.train()
    assert whole.finished

    cfg = make_cfg(tmp_path / "limited", *POLY, "SOLVER.CHECKPOINT_PERIOD", 1000)
    seen = []
    with caplog.at_level(logging.WARNING):
        for resume, already in ((False, 0), (True, 1), (True, 2)):
            trainer, some = limited_trainer(cfg, 0, resume), Rates()
            trainer.register_hooks([some])
            assert trainer.start_iter == already
            trainer.train()
            assert not trainer.finished
            seen += some.values
    assert "the time limit is reached after 1 of 6 iterations" in caplog.text
    assert "--resume goes on from here" in caplog.text and "Exception during training" not in caplog.text
    assert (tmp_path / "limited" / "last_checkpoint").read_text() == "model_0000002.pth"
    last, some = limited_trainer(cfg, 1000, True), Rates()
    last.register_hooks([some])
    last.train()
    assert last.finished
    assert seen + some.values == rates.values and len(set(rates.values)) == 6
    assert_same_weights(weights_of(whole), weights_of(last))


def test_processes_of_a_job_stop_after_the_same_iteration(monkeypatch):
    """The first one's clock counts, and they ask each other now and then alone."""
    asked = []
    monkeypatch.setattr("mask2former.engine.time_limit.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(
        "mask2former.engine.time_limit.comm.all_gather", lambda mine: asked.append(mine) or [True, mine]
    )
    hook, saved = TimeLimit(time.monotonic() + 1000), []
    hook.trainer = SimpleNamespace(iter=0, max_iter=100)
    hook.trainer.checkpointer = SimpleNamespace(
        get_checkpoint_file=lambda: "", save=lambda name, iteration: saved.append((name, iteration))
    )
    for iteration in range(9):
        hook.trainer.iter = iteration
        hook.after_step()
    hook.trainer.iter = 9
    with pytest.raises(TimeIsUp):
        hook.after_step()
    assert asked == [False] and saved == [("model_0000009", 9)]


def test_limit_in_the_last_iteration_is_the_end_of_training(root, tmp_path):
    trainer = limited_trainer(make_cfg(tmp_path, "SOLVER.MAX_ITER", 1), 0)
    trainer.train()
    assert trainer.finished and (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_another_number_of_iterations_moves_the_end_of_the_schedule(root, tmp_path, caplog):
    limited_trainer(make_cfg(tmp_path, *POLY), 0).train()
    longer = make_cfg(tmp_path, *POLY, "SOLVER.MAX_ITER", 8)
    trainer, rates = new_trainer(longer, resume=True), Rates()
    trainer.register_hooks([rates])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "the job began with 6" in caplog.text
    # The first rate is the checkpoint's; from then on along the new schedule.
    assert rates.values[1:] == pytest.approx([1e-3 * (1 - i / 8) ** 0.9 for i in range(2, 8)])


def test_keys_that_changed_are_named_in_one_warning(root, tmp_path, caplog):
    limited_trainer(make_cfg(tmp_path, *POLY), 0).train()
    changed = (
        "SOLVER.IMS_PER_BATCH",
        3,
        "INPUT.IMAGE_SIZE",
        96,
        "DATASETS.TRAIN",
        (f"{PREFIX}_val_panoptic",),
    )
    free = ("SOLVER.MAX_ITER", 7, "SOLVER.CHECKPOINT_PERIOD", 3, "INPUT.MIN_SIZE_TEST", 32)
    free += ("DATALOADER.NUM_WORKERS", 1, "MODEL.WEIGHTS", "gone.pkl", "TEST.BATCH_SIZE", 2)
    with caplog.at_level(logging.WARNING):
        new_trainer(make_cfg(tmp_path, *POLY, *changed, *free), resume=True)
    (told,) = (r.getMessage() for r in caplog.records if "other values" in r.getMessage())
    assert told.startswith(
        "--resume with other values than the job began with: "
        f"DATASETS.TRAIN ('{PREFIX}_val_panoptic',) (was ('{PREFIX}_train_panoptic',)), INPUT.IMAGE_SIZE 96 (was 64), "
        "SOLVER.IMS_PER_BATCH 3 (was 2). "
    )


def test_keys_that_did_not_change_are_not_spoken_of(root, tmp_path, caplog, monkeypatch):
    limited_trainer(make_cfg(tmp_path, *POLY), 0).train()
    with caplog.at_level(logging.WARNING):
        trainer = new_trainer(make_cfg(tmp_path, *POLY), resume=True)
    assert "other values" not in caplog.text and trainer.start_iter == 1
    # Each process draws images of its own: another number of them is another order.
    monkeypatch.setattr("mask2former.engine.resumed_keys.comm.get_world_size", lambda: 4)
    assert changed_keys(
        torch.load(tmp_path / "model_0000000.pth")["trainer"]["keys"], training_keys(trainer.cfg)
    ) == ["the number of processes 4 (was 1)"]
    assert changed_keys(None, training_keys(trainer.cfg)) == []


def test_batches_that_are_loaded_ahead_come_in_their_order(root, tmp_path):
    """On a GPU a step loads the next batch while the GPU works; here a step that takes the CPU for one."""
    plain = new_trainer(make_cfg(tmp_path / "plain", *POLY))
    plain.train()
    ahead = limited_trainer(make_cfg(tmp_path / "ahead", *POLY, "SOLVER.CHECKPOINT_PERIOD", 1000), 0)
    ahead._trainer._device_type = "cuda"
    ahead.train()
    assert ahead._trainer._next_batch is not None
    ahead = limited_trainer(make_cfg(tmp_path / "ahead", *POLY), 1000, resume=True)
    ahead._trainer._device_type = "cuda"
    assert ahead.start_iter == 1
    ahead.train()
    assert_same_weights(weights_of(plain), weights_of(ahead))


class Evaluations:
    """In the place of `evaluate_model`: an accuracy, and a crash in the evaluation of this number."""

    def __init__(self, crash: int | None = None):
        self.seen, self.iterations, self.crash = [], [], crash

    def __call__(self, cfg, model):
        if len(self.seen) + 1 == self.crash:
            raise RuntimeError("power failure")
        self.iterations.append(get_event_storage().iter)
        self.seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"sem_seg": {"mIoU": float(len(self.seen))}}


EVALUATED = (*POLY, "DATASETS.TEST", (f"{PREFIX}_val_panoptic",), "TEST.EVAL_PERIOD", 2)


@pytest.mark.parametrize("number, resumed_at", [(1, 2), (2, 4), (3, 6)])
def test_evaluation_that_a_crash_cut_off_is_made_up_for(root, tmp_path, monkeypatch, number, resumed_at):
    cfg = make_cfg(tmp_path, *EVALUATED)
    first, rest = Evaluations(crash=number), Evaluations()
    monkeypatch.setattr("mask2former.engine.trainer.evaluate_model", first)
    with pytest.raises(RuntimeError, match="power failure"):
        new_trainer(cfg).train()
    # As detectron2 counts: that after the last iteration is told behind it.
    expected = [1, 3, 6]
    assert first.iterations == expected[: number - 1]

    monkeypatch.setattr("mask2former.engine.trainer.evaluate_model", rest)
    trainer = new_trainer(cfg, resume=True)
    assert trainer.start_iter == resumed_at
    trainer.train()
    assert rest.iterations == expected[number - 1 :] and trainer.finished and trainer.model.training
    assert_same_weights(rest.seen[0], torch.load(tmp_path / f"model_{resumed_at - 1:07d}.pth")["model"])
    assert (tmp_path / "last_evaluation").read_text() == "6"


def test_evaluation_that_came_to_its_end_is_not_run_again(root, tmp_path, monkeypatch):
    cfg = make_cfg(tmp_path, *EVALUATED)
    # As if another training in this folder had come to its end.
    (tmp_path / "last_evaluation").write_text("6")
    runs = [Evaluations(), Evaluations()]
    monkeypatch.setattr("mask2former.engine.trainer.evaluate_model", runs[0])
    first = new_trainer(cfg)
    first.register_hooks([Crash(2)])
    with pytest.raises(RuntimeError, match="power failure"):
        first.train()
    assert (tmp_path / "last_evaluation").read_text() == "2"
    monkeypatch.setattr("mask2former.engine.trainer.evaluate_model", runs[1])
    second = new_trainer(cfg, resume=True)
    assert second.start_iter == 2
    second.train()
    assert [run.iterations for run in runs] == [[1], [3, 6]]


def test_evaluation_behind_a_checkpoint_that_was_gone_back_to_does_not_count(root, tmp_path, monkeypatch):
    cfg = make_cfg(tmp_path, *EVALUATED)
    runs = [Evaluations(), Evaluations(crash=1), Evaluations()]
    monkeypatch.setattr("mask2former.engine.trainer.evaluate_model", runs[0])
    new_trainer(cfg).train()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    for run, at in zip(runs[1:], (2, 4)):
        monkeypatch.setattr("mask2former.engine.trainer.evaluate_model", run)
        trainer = new_trainer(cfg, resume=True)
        assert trainer.start_iter == at
        with pytest.raises(RuntimeError, match="power failure") if run.crash else contextlib.nullcontext():
            trainer.train()
    assert [run.iterations for run in runs] == [[1, 3, 6], [], [3, 6]]


class Kill(HookBase):
    """kill -9 in the middle of a checkpoint of the iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            save = torch.save

            def save_half(data, file):
                save(data, file)
                file.flush()
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = save_half


def _killed_job(rank: int, root: str, output: str) -> None:
    torch.set_num_threads(1)
    register_shapes(root, PREFIX)
    trainer = new_trainer(make_cfg(output, *POLY))
    trainer.register_hooks([Kill(3)])
    trainer.train()


@pytest.mark.slow
def test_job_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(root, tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as killed:
        torch.multiprocessing.spawn(_killed_job, (str(root), str(tmp_path / "killed")))
    assert killed.value.exit_code == -signal.SIGKILL
    folder = tmp_path / "killed"
    assert sorted(p.name for p in folder.glob("model*")) == ["model_0000001.pth", "model_0000003.pth.part"]
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"

    second = new_trainer(make_cfg(folder, *POLY), resume=True)
    assert second.start_iter == 2
    second.train()
    whole = new_trainer(make_cfg(tmp_path / "whole", *POLY))
    whole.train()
    assert_same_weights(weights_of(whole), weights_of(second))
    assert not list(folder.glob("*.part"))


def test_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    checkpointer = WholeFileCheckpointer(model, str(tmp_path))
    checkpointer.save("model", iteration=1)
    before = (tmp_path / "model.pth").read_bytes()

    def disk_full(data, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        checkpointer.save("model", iteration=2)
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
    assert Path(checkpointer.get_checkpoint_file()) == tmp_path / "model.pth"
