"""Processes at the end of an evaluation: results in order, errors as they are, and none left behind."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mask2former.evaluation import processes
from mask2former.evaluation.processes import ProcessError, in_processes, number_of_processes

LONG = 30.0  # seconds; nothing here takes so long unless it hangs
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def children() -> set[int]:
    """Process numbers of this process's children, also of those that have ended and were not waited for."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(number) for one in lists for number in one.read_text().split()}


@pytest.fixture(autouse=True)
def none_is_left():
    before = children()  # of other tests, such as multiprocessing's helpers
    yield
    assert multiprocessing.active_children() == []
    assert children() <= before


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


@contextlib.contextmanager
def started(folder: Path, result: str) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A program with three processes that work for a while, and their ids."""
    program = f"""
import os, time
from mask2former.evaluation.processes import in_processes
def work(i):
    with open(os.path.join({str(folder)!r}, str(os.getpid())), "w"):
        pass
    {result}
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
        while len(list(folder.iterdir())) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        children = [int(path.name) for path in folder.iterdir()]
        assert len(children) == 3
        yield process, children
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_interrupt_ends_all_of_them(tmp_path):
    """Ctrl-C goes to all processes of a terminal; only this one tells of it."""
    with started(tmp_path, f"time.sleep({LONG})") as (process, children):
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=LONG / 2)
        assert (out, err, process.returncode) == ("interrupted\n", "", 0)
        assert not any(map(running, children))


def test_none_waits_for_a_process_that_was_killed(tmp_path):
    """Results are larger than a pipe: who writes one waits for the reader."""
    with started(tmp_path, "time.sleep(1); return bytes(10**6)") as (process, children):
        process.kill()
        deadline = time.monotonic() + LONG / 2
        while any(map(running, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(running, children))


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
