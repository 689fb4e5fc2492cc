"""Processes at the end of an evaluation: results in order, errors as they are, and none left behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mask2former.evaluation import processes
from mask2former.evaluation.processes import ProcessError, in_processes, number_of_processes

LONG = 30.0  # seconds; nothing here takes so long unless it hangs
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def none_is_left():
    yield
    assert multiprocessing.active_children() == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # not even one that has ended


def test_results_come_in_order_from_processes_of_their_own():
    large = np.arange(300_000)  # more than a pipe holds

    def work(i: int):
        time.sleep(0.05 * (3 - i))
        return i, os.getpid(), large[i:]

    results = in_processes(work, 4)
    assert [i for i, _, _ in results] == [0, 1, 2, 3]
    assert len({pid for _, pid, _ in results} | {os.getpid()}) == 5
    assert all((array == large[i:]).all() for i, _, array in results)


def test_error_comes_out_as_it_is_and_ends_the_others():
    start = time.monotonic()

    def work(i: int):
        if i == 1:
            raise KeyError("image 7")
        time.sleep(LONG)

    with pytest.raises(KeyError, match="image 7") as caught:
        in_processes(work, 3)
    assert isinstance(caught.value.__cause__, ProcessError) and "in work" in str(caught.value.__cause__)
    assert time.monotonic() - start < LONG / 2


class TwoArguments(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def test_error_that_cannot_be_pickled_is_told():
    def work(i: int):
        raise TwoArguments("this", "that")

    with pytest.raises(RuntimeError, match="TwoArguments: this and that"):
        in_processes(work, 2)


def test_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(Exception, match="pickle"):
        in_processes(lambda i: threading.Lock(), 2)


def test_process_that_is_killed_is_told():
    def work(i: int):
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LONG)

    with pytest.raises(RuntimeError, match=r"exit code -9 .* TEST\.EVALUATION_THREADS 0"):
        in_processes(work, 3)


def test_what_cannot_be_started_is_done_here(monkeypatch):
    context = multiprocessing.get_context("fork")
    start, started = context.Process.start, []

    def fail(self):
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(self)
        start(self)

    monkeypatch.setattr(context.Process, "start", fail)
    pids = in_processes(lambda i: (i, os.getpid()), 3)
    assert [i for i, _ in pids] == [0, 1, 2]
    assert [pid == os.getpid() for _, pid in pids] == [False, True, True]


def test_locks_of_other_threads_do_not_matter():
    """A thread logs all the time, and the processes end without waiting for it or writing what it had begun."""
    stop = threading.Event()
    logger = logging.getLogger("test_processes")
    logger.addHandler(logging.StreamHandler(open(os.devnull, "w")))  # noqa: SIM115
    logger.propagate = False

    def log():
        while not stop.is_set():
            logger.warning("x" * 100)

    thread = threading.Thread(target=log)
    thread.start()
    try:
        for _ in range(10):
            assert in_processes(lambda i: i, 3) == [0, 1, 2]
    finally:
        stop.set()
        thread.join(LONG)


def test_interrupt_ends_all_of_them(tmp_path):
    """Ctrl-C goes to all processes of a terminal; only this one tells of it."""
    program = f"""
import os, sys, time
from mask2former.evaluation.processes import in_processes
def work(i):
    open({str(tmp_path)!r} + "/" + str(os.getpid()), "w").close()
    time.sleep({LONG})
try:
    in_processes(work, 3)
except KeyboardInterrupt:
    print("interrupted")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 2 * LONG
        while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        children = [int(path.name) for path in tmp_path.iterdir()]
        assert len(children) == 3
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=LONG / 2)
        assert (out, err, process.returncode) == ("interrupted\n", "", 0)
        for pid in children:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_output_that_was_waiting_is_written_once():
    program = """
import sys
from mask2former.evaluation.processes import in_processes
sys.stdout.write("waiting ")
in_processes(lambda i: i, 3)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=2 * LONG
    )
    assert (done.stdout, done.stderr) == ("waiting done\n", "")


@pytest.mark.parametrize(
    "wanted, images, expected",
    [
        (-1, 10_000, 6),
        (0, 10_000, 1),
        (1, 10_000, 1),
        (4, 10_000, 4),
        (-1, 120, 2),
        (-1, 0, 1),
        (99, 10**6, 32),
    ],
)
def test_processes_by_images_and_cpus(monkeypatch, wanted, images, expected):
    monkeypatch.setattr(processes, "available_cpus", lambda: 6)
    assert number_of_processes(wanted, images) == expected


def test_one_process_where_there_can_be_no_others(monkeypatch):
    assert number_of_processes(4, 10_000) == 4
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert number_of_processes(4, 10_000) == 1
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert number_of_processes(4, 10_000) == 1
