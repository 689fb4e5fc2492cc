"""Evaluation that ended early and goes on with what it had, to the results of one that did not."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from torch import nn

from mask2former.data.datasets.shapes import register_shapes
from mask2former.evaluation import evaluate_model, kept_images
from tests.mask2former.evaluation.conftest import NUM_IMAGES, Oracle


class Failing(nn.Module):
    """Predicts what another model does, and fails in a batch."""

    def __init__(self, model: nn.Module, batch: int | None = None, how=None):
        super().__init__()
        self.model, self.batch, self.how = [model], batch, how
        self.weight = nn.Parameter(torch.ones(3))
        self.seen: list[list[int]] = []

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        if len(self.seen) + 1 == self.batch:
            (self.how or fail)()
        self.seen.append([inputs["image_id"] for inputs in batched_inputs])
        return self.model[0](batched_inputs)


def fail() -> None:
    raise RuntimeError("power failure")


def files(folder: Path) -> dict[str, bytes | str]:
    """What they hold; pickles of the same may differ in which strings are one object."""
    return {
        str(p.relative_to(folder)): repr(torch.load(p, weights_only=False))
        if p.suffix == ".pth"
        else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def kept_files(cfg) -> list[Path]:
    """What is kept in between, in order."""
    folder = Path(cfg.OUTPUT_DIR, "inference", kept_images.FOLDER)
    return sorted(p for p in folder.rglob("*") if p.is_file())


def crash(cfg, oracle, batch: int, resume: bool = False) -> Failing:
    model = Failing(oracle, batch)
    with pytest.raises(RuntimeError, match="power failure"):
        evaluate_model(cfg, model, resume=resume)
    return model


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_crashed_evaluation_goes_on_to_the_results_of_a_whole_one(
    cfg, make_oracle, tmp_path, threads, batch_size
):
    cfg.TEST.EVALUATION_THREADS, cfg.TEST.BATCH_SIZE = threads, batch_size
    cfg.OUTPUT_DIR = str(tmp_path / "whole")
    whole = Failing(make_oracle(shift=2))
    expected = evaluate_model(cfg, whole)
    cfg.OUTPUT_DIR = str(tmp_path / "crashed")
    crash(cfg, make_oracle(shift=2), 4)
    # Twice; the second time in what the first had not done.
    second = crash(cfg, make_oracle(shift=2), 2, resume=True)
    third = Failing(make_oracle(shift=2))
    results = evaluate_model(cfg, third, resume=True)
    assert repr(results) == repr(expected)
    assert files(tmp_path / "crashed") == files(tmp_path / "whole")
    assert not Path(cfg.OUTPUT_DIR, "inference", kept_images.FOLDER).exists()
    # The batches are those of the whole one; images that were under way in threads are run again.
    done = len(whole.seen) - len(third.seen)
    assert third.seen == whole.seen[done:] and (threads or done == 4)
    assert second.seen == whole.seen[3:4] or threads


def test_nothing_is_taken_over_unless_asked_for(cfg, make_oracle, caplog):
    cfg.TEST.EVALUATION_THREADS = 0
    crash(cfg, make_oracle(), 5)
    assert len(kept_files(cfg)) == 1
    assert [len(p.parts) - len(Path(cfg.OUTPUT_DIR).parts) for p in kept_files(cfg)] == [6]
    model = crash(cfg, make_oracle(), 5)
    assert len(model.seen) == 4
    evaluate_model(cfg, model := Failing(make_oracle()), resume=True)
    assert len(model.seen) == NUM_IMAGES - 4


def other_weights(cfg, model, root) -> None:
    model.weight.data[1] = 2


def other_batches(cfg, model, root) -> None:
    cfg.TEST.BATCH_SIZE = 2


def other_threshold(cfg, model, root) -> None:
    cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.5


def other_truth(cfg, model, root) -> None:
    os.utime(
        next((root / "panoptic_val").glob("*.png"), None) or next(root.rglob("panoptic*/*2.png")), (1, 1)
    )


def other_labels(cfg, model, root) -> None:
    os.utime(MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file, (1, 1))


def other_image(cfg, model, root) -> None:
    os.utime(DatasetCatalog.get(cfg.DATASETS.TEST[0])[7]["file_name"], (1, 1))


def nothing(cfg, model, root) -> None:
    cfg.DATALOADER.NUM_WORKERS, cfg.TEST.EVALUATION_THREADS = 1, 3


@pytest.fixture
def own(shapes, cfg, tmp_path, request) -> Path:
    """A copy of the data set, which a test may change."""
    root = tmp_path / "shapes"
    shutil.copytree(Path(MetadataCatalog.get(f"{shapes}_val_panoptic").json_file).parents[1], root)
    prefix = f"kept{abs(hash(request.node.name))}"
    register_shapes(str(root), prefix)
    cfg.DATASETS.TEST = (f"{prefix}_val_panoptic",)
    return root


@pytest.mark.parametrize(
    "change",
    [other_weights, other_batches, other_threshold, other_truth, other_labels, other_image, nothing],
)
def test_only_images_of_the_same_evaluation_are_taken_over(cfg, make_oracle, own, caplog, change):
    cfg.TEST.EVALUATION_THREADS = 0
    crash(cfg, make_oracle(), 7)
    model = Failing(make_oracle())
    change(cfg, model, own)
    with caplog.at_level(logging.WARNING):
        evaluate_model(cfg, model, resume=True)
    same = change is nothing
    assert sum(map(len, model.seen)) == (NUM_IMAGES - 6 if same else NUM_IMAGES)
    assert ("was of other weights, data, keys or code" in caplog.text) != same


def test_damaged_file_ends_what_is_taken_over(cfg, make_oracle, monkeypatch, caplog):
    monkeypatch.setattr(kept_images, "_SECONDS", 0.0)
    cfg.TEST.EVALUATION_THREADS = 0
    expected = evaluate_model(cfg, Failing(make_oracle(shift=2)), resume=False)
    crash(cfg, make_oracle(shift=2), 8)
    found = kept_files(cfg)
    assert len(found) == 7
    found[3].write_bytes(found[3].read_bytes()[:-1])
    found[5].write_bytes(b"")
    second = crash(cfg, make_oracle(shift=2), 3, resume=True)
    assert caplog.text.count("is damaged and left out") == 2 and len(second.seen) == 2
    third = Failing(make_oracle(shift=2))
    assert repr(evaluate_model(cfg, third, resume=True)) == repr(expected)
    # Three, two of the second, and behind them what the first had done.
    assert len(third.seen) == NUM_IMAGES - 5


def test_disk_that_is_full_does_not_end_the_evaluation(cfg, make_oracle, monkeypatch, caplog):
    monkeypatch.setattr(kept_images, "_SECONDS", 0.0)

    replace, written, left = os.replace, [], []

    def full(source, target):
        if kept_images.FOLDER in target:
            if len(written) == 2:
                raise OSError("No space left on device")
            written.append(target)
        replace(source, target)

    expected = evaluate_model(cfg, Failing(make_oracle()))
    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(
        "mask2former.evaluation.inference.save_results", lambda *_: left.extend(kept_files(cfg))
    )
    assert repr(evaluate_model(cfg, Failing(make_oracle()), resume=False)) == repr(expected)
    assert caplog.text.count("a crash from here on loses this evaluation (No space left on device)") == 1
    # They make room for the results.
    assert len(written) == 2 and left == []


def test_much_is_written_before_the_time_is_over(cfg, make_oracle, monkeypatch):
    cfg.TEST.EVALUATION_THREADS = 0
    monkeypatch.setattr(kept_images, "_MOST_BYTES", 1)
    crash(cfg, make_oracle(), 5)
    assert len(kept_files(cfg)) == 4


def test_data_set_that_was_done_is_not_run_again(cfg, make_oracle, shapes):
    cfg.TEST.EVALUATION_THREADS = 0
    cfg.DATASETS.TEST = (f"{shapes}_val_sem_seg", f"{shapes}_val_panoptic")
    expected = evaluate_model(cfg, Failing(make_oracle(shift=2)))
    crash(cfg, make_oracle(shift=2), NUM_IMAGES + 3)
    model = Failing(make_oracle(shift=2))
    assert repr(evaluate_model(cfg, model, resume=True)) == repr(expected)
    assert len(model.seen) == NUM_IMAGES - 2


class Counting:
    """A backend that tells what ran each image: PyTorch every fifth one."""

    def __init__(self):
        self.images, self.reasons = {"tensorrt": 0, "torch": 0}, []

    def ran(self, image_id: int) -> None:
        self.images["tensorrt" if image_id % 5 else "torch"] += 1
        if not image_id % 5:
            self.reasons.append(f"why {image_id}")

    def describe(self) -> dict:
        return {"backend": "tensorrt", "images": dict(self.images), "reasons": list(self.reasons)}


@pytest.mark.parametrize("threads", [0, 2])
def test_results_name_what_ran_the_images_before(cfg, make_oracle, monkeypatch, threads):
    cfg.TEST.EVALUATION_THREADS = threads

    class Told(Failing):
        def __init__(self, *args):
            super().__init__(*args)
            self.backend = Counting()

        def forward(self, batched_inputs):
            outputs = super().forward(batched_inputs)
            for inputs in batched_inputs:
                self.backend.ran(inputs["image_id"])
            return outputs

    told = []
    monkeypatch.setattr(
        "mask2former.evaluation.inference.save_results", lambda path, found: told.append(found["backend"])
    )
    evaluate_model(cfg, Told(make_oracle()), resume=False)
    with pytest.raises(RuntimeError, match="power failure"):
        evaluate_model(cfg, Told(make_oracle(), 9), resume=False)
    evaluate_model(cfg, Told(make_oracle()), resume=True)
    assert sum(told[0]["images"].values()) == NUM_IMAGES and told[0]["images"]["torch"] > 1
    assert told[1]["images"] == told[0]["images"] and told[1]["backend"] == told[0]["backend"]
    assert sorted(told[1]["reasons"]) == sorted(told[0]["reasons"])


def _killed(rank: int, root: str, cfg) -> None:
    torch.set_num_threads(1)
    register_shapes(root, "evaltest")
    kept_images._SECONDS = 0.0
    evaluate_model(
        cfg, Failing(Oracle("evaltest", 2), 9, lambda: os.kill(os.getpid(), signal.SIGKILL)), resume=False
    )


@pytest.mark.slow
def test_killed_evaluation_goes_on(cfg, make_oracle, shapes):
    cfg.TEST.EVALUATION_THREADS = 0
    expected = evaluate_model(cfg, Failing(make_oracle(shift=2)))
    root = Path(MetadataCatalog.get(f"{shapes}_val_panoptic").json_file).parents[1]
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as killed:
        torch.multiprocessing.spawn(_killed, (str(root), cfg))
    assert killed.value.exit_code == -signal.SIGKILL
    model = Failing(make_oracle(shift=2))
    assert repr(evaluate_model(cfg, model, resume=True)) == repr(expected)
    assert len(model.seen) == NUM_IMAGES - 8


def _job(rank: int, port: int, root: str, cfg) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        comm._LOCAL_PROCESS_GROUP = torch.distributed.group.WORLD
        register_shapes(root, "evaltest")
        # Both fail, each behind another image: the one that went on would wait for the other.
        crash(cfg, Oracle("evaltest", 2), 3 + rank)
        model = Failing(Oracle("evaltest", 2))
        results = evaluate_model(cfg, model, resume=True)
        torch.save({"results": repr(results), "seen": len(model.seen)}, f"{cfg.OUTPUT_DIR}/rank{rank}.pth")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_go_on_each_with_its_own(cfg, make_oracle, shapes):
    cfg.TEST.EVALUATION_THREADS = 0
    expected = evaluate_model(cfg, Failing(make_oracle(shift=2)))
    root = Path(MetadataCatalog.get(f"{shapes}_val_panoptic").json_file).parents[1]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_job, (port, str(root), cfg), nprocs=2)
    one, other = (torch.load(f"{cfg.OUTPUT_DIR}/rank{rank}.pth") for rank in range(2))
    assert one["results"] == repr(expected)
    assert (one["seen"], other["seen"]) == (7 - 2, 6 - 3)


def _machine(rank: int, port: int, root: str, cfg) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        comm._LOCAL_PROCESS_GROUP = [torch.distributed.new_group([i]) for i in range(2)][rank]
        register_shapes(root, "evaltest")
        cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/{rank}"
        crash(cfg, Oracle("evaltest", 2), 3)
        model = Failing(Oracle("evaltest", 2))
        evaluate_model(cfg, model, resume=False)
        left = Path(cfg.OUTPUT_DIR, "inference", kept_images.FOLDER).exists()
        torch.save({"seen": len(model.seen), "left": left}, f"{cfg.OUTPUT_DIR}/told.pth")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_machines_that_share_no_folder_begin_anew_and_keep_nothing(cfg, shapes):
    cfg.TEST.EVALUATION_THREADS = 0
    root = Path(MetadataCatalog.get(f"{shapes}_val_panoptic").json_file).parents[1]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_machine, (port, str(root), cfg), nprocs=2)
    told = [torch.load(f"{cfg.OUTPUT_DIR}/{rank}/told.pth") for rank in range(2)]
    assert told == [{"seen": 7, "left": False}, {"seen": 6, "left": False}]


def test_remote_files_are_not_told_apart(cfg, shapes, caplog):
    records = {f"{shapes}_val_panoptic": [{"file_name": "s3://bucket/1.jpg"}]}
    with caplog.at_level(logging.INFO):
        assert kept_images.keep_images(cfg, nn.Linear(1, 1), records, cfg.OUTPUT_DIR, resume=True) is None
    assert "begins anew" in caplog.text and not os.path.exists(cfg.OUTPUT_DIR)
    kept_images.forget_images(None)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fingerprint_is_of_each_weight(cfg, shapes, device):
    name = f"{shapes}_val_panoptic"
    records = {name: DatasetCatalog.get(name)}
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(device)
    before = kept_images.fingerprint(cfg, model, records)
    assert kept_images.fingerprint(cfg, model, records) == before
    found = {before}
    for value in model.state_dict().values():
        value.view(-1)[-1:].add_(1)
        found.add(kept_images.fingerprint(cfg, model, records))
    assert len(found) == 1 + len(model.state_dict())
    found.add(kept_images.fingerprint(cfg, model.half(), records))
    assert len(found) == 2 + len(model.state_dict())


def test_fingerprint_is_of_the_code(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_images, "__file__", str(tmp_path / "evaluation" / "kept_images.py"))
    model = nn.Linear(1, 1)
    before = kept_images.fingerprint(cfg, model, {})
    (tmp_path / "notes.txt").write_text("")
    assert kept_images.fingerprint(cfg, model, {}) == before
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "ap.py").write_text("ap = 1")
    assert kept_images.fingerprint(cfg, model, {}) != before


def test_fingerprint_is_of_the_code_that_runs_the_network(cfg, tmp_path, monkeypatch):
    (tmp_path / "otherrunner").mkdir()
    (tmp_path / "otherrunner" / "__init__.py").write_text("")
    (tmp_path / "otherrunner" / "backend.py").write_text("class Backend:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = nn.Linear(1, 1)
    own = kept_images.fingerprint(cfg, model, {})
    model.backend = importlib.import_module("otherrunner.backend").Backend()
    before = kept_images.fingerprint(cfg, model, {})
    assert kept_images.fingerprint(cfg, model, {}) == before != own
    (tmp_path / "otherrunner" / "kernels.so").write_bytes(b"compiled")
    assert kept_images.fingerprint(cfg, model, {}) != before
