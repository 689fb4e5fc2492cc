"""A build's progress in the log, and Ctrl-C while TensorRT is at work."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from d2_trt import builder, compat, progress
from d2_trt.build_spec import BuildSpec
from d2_trt.progress import Progress
from tests.conftest import REPO_ROOT
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import mini_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """Messages reach caplog even after another test set up detectron2's logging."""
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    caplog.set_level(logging.INFO, "d2_trt")
    return caplog


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the shell made this process ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_phases_are_told_from_the_outer_to_the_inner():
    told = Progress()
    assert told.describe() == ""
    told.phase_start("Building Engine", 2)
    told.phase_start("Tactic Selection", 120)
    for _ in range(37):
        assert told.step_complete("Tactic Selection")
    assert told.describe() == "Building Engine 0/2, Tactic Selection 37/120"
    told.phase_finish("Tactic Selection")
    assert told.step_complete("Building Engine") and told.describe() == "Building Engine 1/2"
    told.phase_finish("Building Engine")
    told.stop()
    assert told.describe() == "" and not told.step_complete("Building Engine")


def test_messages_tell_the_stage_without_a_monitor():
    told = Progress()
    told.hear("Original: 1411 layers")
    assert told.describe() == "simplifying the network"
    told.hear("Graph optimization time: 0.8 seconds.")
    assert told.describe() == "choosing kernels"
    for _ in range(3):
        told.hear(
            "--------------- Timing Runner: model.backbone.res2:0:CONVOLUTION + relu (CaskConvolution[0x80])"
        )
    told.hear("Tactic: 0x0f Time: 0.01")
    assert told.describe() == "3 kernels timed, now of model.backbone.res2:0:CONVOLUTION + relu"
    told.hear("Engine generation completed in 45.2 seconds.")
    assert told.describe() == "writing the engine"


def test_monitor_tells_progress_and_ends_a_stopped_build(trt):  # noqa: F811
    if not compat.has_progress_monitor():
        pytest.skip("TensorRT 8.6 has no progress monitor")
    told = Progress()
    monitor = progress.monitor(told)
    assert isinstance(monitor, trt.IProgressMonitor)
    monitor.phase_start("Tactic Selection", None, 3)
    assert monitor.step_complete("Tactic Selection", 0) and told.describe() == "Tactic Selection 1/3"
    told.stop()
    assert not monitor.step_complete("Tactic Selection", 1)


def test_result_and_errors_come_back_from_the_other_thread():
    def fail():
        raise ValueError("from below")

    assert progress.run(threading.get_ident, Progress(), CPU) != threading.get_ident()
    with pytest.raises(ValueError, match="from below"):
        progress.run(fail, Progress(), CPU)


def test_thread_works_on_the_callers_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: calls.append((d, threading.get_ident())))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d: calls.append((d, threading.get_ident())))
    worker = progress.run(threading.get_ident, Progress(), torch.device("cuda:3"))
    assert calls == [(torch.device("cuda:3"), worker)] * 2


def test_log_says_how_long_it_takes_and_what_is_done(log, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY", 0.02)
    told = Progress()

    def work():
        told.phase_start("Tactic Selection", 5)
        told.step_complete("Tactic Selection")
        deadline = time.monotonic() + 10
        while len(log.records) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)

    progress.run(work, told, CPU)
    assert log.messages[-1].startswith("TensorRT builds: 0 s so far (Tactic Selection 1/5)")


def interrupt_and(then):
    """Work that is interrupted as by Ctrl-C, and goes on with `then`."""

    def work():
        os.kill(os.getpid(), signal.SIGINT)
        return then()

    return work


def test_interrupt_waits_for_a_build_that_can_be_stopped(log, monkeypatch):
    monkeypatch.setattr(compat, "has_progress_monitor", lambda: True)
    told, ended = Progress(), []

    def steps():
        deadline = time.monotonic() + 10
        while told.step_complete("Tactic Selection") and time.monotonic() < deadline:
            time.sleep(0.01)
        ended.append(time.monotonic() < deadline)

    with pytest.raises(KeyboardInterrupt):
        progress.run(interrupt_and(steps), told, CPU)
    assert ended == [True]
    assert log.messages == ["Interrupted: TensorRT ends the build. Nothing is kept of it."]


@pytest.fixture
def left_alone(monkeypatch):
    """Builds that a test leaves alone; afterwards they may end."""
    builds, gate = [], threading.Event()
    monkeypatch.setattr(progress, "_left_alone", builds)
    yield builds, gate
    gate.set()
    assert all(done.wait(10) for done in builds)


@pytest.mark.parametrize("stoppable", [False, True], ids=["8.6", "10 that does not listen"])
def test_interrupt_leaves_a_build_alone_that_does_not_stop(stoppable, left_alone, log, monkeypatch, trt):  # noqa: F811
    monkeypatch.setattr(compat, "has_progress_monitor", lambda: stoppable)
    monkeypatch.setattr(progress, "STOP_WITHIN", 0.05)
    builds, gate = left_alone
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        progress.run(interrupt_and(lambda: gate.wait(30)), Progress(), CPU)
    assert time.monotonic() - started < 10
    assert len(builds) == 1 and not builds[0].is_set()
    assert (
        f"TensorRT {trt.__version__} does not stop: the build goes on in the background" in log.messages[-1]
    )


def test_second_interrupt_does_not_wait(left_alone, monkeypatch, trt):  # noqa: F811
    monkeypatch.setattr(compat, "has_progress_monitor", lambda: True)
    monkeypatch.setattr(progress, "STOP_WITHIN", 30)
    builds, gate = left_alone
    told = Progress()

    def again():
        deadline = time.monotonic() + 10
        while told.step_complete("x") and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # into the wait
        os.kill(os.getpid(), signal.SIGINT)
        gate.wait(30)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        progress.run(interrupt_and(again), told, CPU)
    assert time.monotonic() - started < 20 and len(builds) == 1


PROGRAM = """
import os, signal, threading, time, torch
from d2_trt import compat, progress
signal.signal(signal.SIGINT, signal.default_int_handler)
compat.has_progress_monitor = lambda: False
compat.tensorrt = lambda: type("TensorRT", (), {"__version__": "8.6.1"})

def work():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(SECONDS)

try:
    progress.run(work, progress.Progress(), torch.device("cpu"))
except KeyboardInterrupt:
    print("interrupted", flush=True)
time.sleep(PAUSE)
print("at the end")
"""


@pytest.mark.parametrize(("seconds", "pause", "status"), [(900, 0, -signal.SIGINT), (0.1, 0.5, 0)])
def test_process_ends_at_once_beside_a_build_and_as_always_after_it(seconds, pause, status):
    program = PROGRAM.replace("SECONDS", str(seconds)).replace("PAUSE", str(pause))
    # On a loaded machine it takes long to start, but never as long as the build.
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO_ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == status, ended.stderr
    assert ended.stdout.split("\n")[:2] == ["interrupted", "at the end"]


# On TensorRT itself


def build_mini():
    # At the lowest level, on which a build takes well over the second after which one is interrupted, and not minutes.
    spec = BuildSpec((1, 64, 64), (1, 96, 128), (2, 256, 256), precision="fp16", opt_level=0)
    return builder.build_engine(mini_model("resnet50-mini"), spec, torch.rand(1, 3, 96, 128).cuda() * 255)


@pytest.mark.tensorrt
@pytest.mark.gpu
@pytest.mark.slow
def test_real_build_tells_what_it_does(log, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY", 0.2)
    build_mini()
    lines = [message for message in log.messages if message.startswith("TensorRT builds: ")]
    assert len(lines) >= 3 and any(line.endswith(")") for line in lines), lines


@pytest.mark.tensorrt
@pytest.mark.gpu
@pytest.mark.slow
def test_real_build_is_interrupted(left_alone, log, monkeypatch):
    builds, _ = left_alone
    started = []

    def interrupt():
        started.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    work = progress.run

    def run(*args):
        threading.Timer(1.0, interrupt).start()
        return work(*args)

    monkeypatch.setattr(progress, "run", run)
    with pytest.raises(KeyboardInterrupt):
        build_mini()
    assert time.monotonic() - started[0] < progress.STOP_WITHIN + 5
    assert (len(builds) == 1) == (not compat.has_progress_monitor())
    assert all(done.wait(300) for done in builds)
    monkeypatch.setattr(progress, "run", work)
    assert build_mini()[1].engine_bytes > 0
