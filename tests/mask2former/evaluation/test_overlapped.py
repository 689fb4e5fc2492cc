"""Evaluators in threads beside the model: results, errors, and how much is under way."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from mask2former.evaluation import (
    OverlappedEvaluators,
    PanopticEvaluator,
    build_evaluator,
    evaluate_model,
    overlapped,
)
from mask2former.evaluation.overlapped import PerImageMixin, number_of_threads

LONG = 30.0  # seconds; nothing here takes so long unless it hangs


class Recorder(PerImageMixin, DatasetEvaluator):
    """Keeps numbers; `before` is called in the thread that examines one."""

    def __init__(self, before=lambda number: None):
        self.before, self.fetched, self.kept = before, 0, []

    def reset(self):
        self.fetched, self.kept = 0, []

    def fetch(self, output, copies):
        self.fetched += 1
        return copies.start(output["number"])

    def examine(self, image, fetched):
        self.before(int(fetched))
        return image["image_id"], int(fetched)

    def add(self, examined):
        self.kept.append(examined)

    def evaluate(self):
        return {"numbers": list(self.kept)}


def batch(*numbers: int) -> tuple[list[dict], list[dict]]:
    return [{"image_id": n, "image": None} for n in numbers], [{"number": torch.tensor(n)} for n in numbers]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("evaluation")]


def test_images_are_kept_in_their_order_whatever_they_take():
    recorder = Recorder(before=lambda number: time.sleep(0.02 * (number % 3 == 0)))
    evaluators = OverlappedEvaluators([recorder], 4)
    evaluators.reset()
    for number in range(0, 24, 2):
        evaluators.process(*batch(number, number + 1))
    assert evaluators.evaluate() == {"numbers": [(n, n) for n in range(24)]}
    assert threads() == []


def test_no_more_than_a_few_images_are_under_way():
    go = threading.Event()
    recorder = Recorder(before=lambda number: go.wait(LONG))
    evaluators = OverlappedEvaluators([recorder], 2)
    evaluators.reset()

    def process():
        for number in range(20):
            evaluators.process(*batch(number))

    caller = threading.Thread(target=process)
    caller.start()
    try:
        deadline = time.monotonic() + LONG
        while recorder.fetched < evaluators.most_pending and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # would go on, if nothing held it
        assert recorder.fetched == evaluators.most_pending == 4
        assert caller.is_alive() and len(threads()) == 2
    finally:
        go.set()
        caller.join(LONG)
    assert evaluators.evaluate() == {"numbers": [(n, n) for n in range(20)]}


@pytest.mark.parametrize("when", ["later image", "end", "wait"])
def test_error_in_a_thread_ends_the_evaluation(when):
    def fail(number):
        if number == 2:
            raise ValueError("image 2 is wrong")

    recorder = Recorder(before=fail)
    evaluators = OverlappedEvaluators([recorder], 1)
    evaluators.reset()
    with pytest.raises(ValueError, match=r"^image 2 is wrong$"):
        for number in range(30 if when == "later image" else 3):
            evaluators.process(*batch(number))
        assert when != "later image"
        if when == "end":
            evaluators.evaluate()
        evaluators.wait()
    assert recorder.kept == [(0, 0), (1, 1)]
    assert threads() == []


def test_first_of_several_errors_is_raised():
    def fail(number):
        if number:
            raise ValueError(f"image {number} is wrong")
        time.sleep(0.1)

    evaluators = OverlappedEvaluators([Recorder(before=fail)], 3)
    with pytest.raises(ValueError, match="image 1 is wrong"):
        evaluators.process(*batch(0, 1, 2))
        evaluators.evaluate()


def test_reset_drops_what_is_under_way():
    started, go = threading.Event(), threading.Event()

    def block(number):
        if number < 100:
            started.set()
            go.wait(LONG)

    recorder = Recorder(before=block)
    evaluators = OverlappedEvaluators([recorder], 1)
    evaluators.process(*batch(0, 1))
    assert started.wait(LONG)
    timer = threading.Timer(0.1, go.set)
    timer.start()
    evaluators.reset()
    assert go.is_set() and threads() == []
    evaluators.process(*batch(100, 101))
    assert evaluators.evaluate() == {"numbers": [(100, 100), (101, 101)]}
    timer.join()


def test_without_threads_all_is_done_in_the_callers():
    seen = []
    recorder = Recorder(before=lambda number: seen.append(threading.current_thread()))
    evaluators = OverlappedEvaluators([recorder], 0)
    evaluators.process(*batch(5, 6))
    assert recorder.kept == [(5, 5), (6, 6)] and set(seen) == {threading.current_thread()}


def test_evaluator_of_another_kind_stays_in_the_callers_thread():
    class Other(DatasetEvaluator):
        threads = set()  # noqa: RUF012

        def process(self, inputs, outputs):
            self.threads.add((threading.current_thread(), len(inputs), inputs[0].keys() >= {"image"}))

    evaluators = OverlappedEvaluators([Recorder(), Other()], 2)
    evaluators.process(*batch(1, 2))
    evaluators.wait()
    assert Other.threads == {(threading.current_thread(), 2, True)}


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_results_and_files_do_not_depend_on_the_threads(cfg, make_oracle, tmp_path, monkeypatch):
    examine = PanopticEvaluator.examine

    def slow_at_first(self, image, fetched):
        time.sleep(0.05 * (image["image_id"] % 3 == 0))
        return examine(self, image, fetched)

    monkeypatch.setattr(PanopticEvaluator, "examine", slow_at_first)
    cfg.TEST.BATCH_SIZE = 2
    found = []
    for count in (0, 1, 5):
        cfg.OUTPUT_DIR, cfg.TEST.EVALUATION_THREADS = str(tmp_path / str(count)), count
        found.append((repr(evaluate_model(cfg, make_oracle(shift=2))), files(tmp_path / str(count))))
    assert found[1] == found[0] and found[2] == found[0]
    assert len(found[0][1]) > 13 and threads() == []


@pytest.mark.parametrize("count", [0, 3])
def test_wrong_prediction_is_said_in_the_same_words(cfg, shapes, tmp_path, count):
    cfg.TEST.EVALUATION_THREADS = count
    tasks = cfg.MODEL.MASK_FORMER.TEST
    tasks.INSTANCE_ON = tasks.SEMANTIC_ON = False
    record = DatasetCatalog.get(f"{shapes}_val_panoptic")[0]
    ids = torch.ones(record["height"], record["width"], dtype=torch.int32)
    evaluators = build_evaluator(cfg, f"{shapes}_val_panoptic", str(tmp_path))
    evaluators.reset()
    image = {"image_id": record["image_id"], "file_name": record["file_name"]}
    segments = [{"id": 1, "isthing": True, "category_id": 40}]
    expected = rf"^image {record['image_id']}: the model predicted a thing segment of class 40, but"
    with pytest.raises(ValueError, match=expected):
        evaluators.process([image], [{"panoptic_seg": (ids, segments)}])
        evaluators.evaluate()
    assert list(tmp_path.iterdir()) == []


def test_model_that_fails_leaves_no_threads(cfg, make_oracle):
    class Failing(nn.Module):
        def __init__(self, oracle):
            super().__init__()
            self.oracle, self.calls = oracle, 0

        def forward(self, batched_inputs):
            self.calls += 1
            if self.calls == 5:
                assert threads()
                raise RuntimeError("out of memory")
            return self.oracle(batched_inputs)

    cfg.TEST.EVALUATION_THREADS = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_model(cfg, Failing(make_oracle()))
    assert threads() == []


def test_number_of_threads_is_that_of_the_cpus(cfg, shapes, monkeypatch):
    assert (number_of_threads(0), number_of_threads(11)) == (0, 11)
    monkeypatch.setattr(overlapped.os, "sched_getaffinity", lambda process: set(range(6)))
    assert number_of_threads(-1) == 6
    monkeypatch.setattr(overlapped.comm, "get_local_size", lambda: 4)
    assert number_of_threads(-1) == 1
    monkeypatch.setattr(overlapped.comm, "get_local_size", lambda: 8)
    assert number_of_threads(-1) == 1
    monkeypatch.setattr(overlapped.os, "sched_getaffinity", lambda process: set(range(256)))
    assert number_of_threads(-1) == 8
    cfg.TEST.EVALUATION_THREADS = -2
    with pytest.raises(ValueError, match=r"TEST\.EVALUATION_THREADS is -2; allowed"):
        build_evaluator(cfg, f"{shapes}_val_panoptic")


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 3])
def test_outputs_on_the_gpu_give_the_results_of_the_cpu(cfg, make_oracle, shapes, tmp_path, count):
    """What the threads read has arrived: copies and the overwriting of freed memory are queued behind long work."""
    records = DatasetCatalog.get(f"{shapes}_val_panoptic")
    inputs = [{"image_id": r["image_id"], "file_name": r["file_name"]} for r in records]
    oracle, results = make_oracle(shift=2), {}
    busy = torch.rand(4096, 4096, device="cuda")
    for device in ("cpu", "cuda"):
        cfg.TEST.EVALUATION_THREADS = count
        evaluators = build_evaluator(cfg, f"{shapes}_val_panoptic", str(tmp_path / device))
        evaluators.reset()
        for image in inputs:
            (output,) = oracle([image])
            ids, segments = output["panoptic_seg"]
            output = {
                "panoptic_seg": (ids.to(device), segments),
                "sem_seg_labels": output["sem_seg"].argmax(0).to(device),
                "instances": output["instances"].to(device),
            }
            if device == "cuda":
                for _ in range(5):
                    busy = (busy @ busy).clamp_(0, 1)
            evaluators.process([image], [output])
            del output
            torch.full((512, 512), -7, device=device)
        results[device] = (repr(evaluators.evaluate()), files(tmp_path / device))
    assert results["cuda"] == results["cpu"]
