"""Shows how far a build is, and lets Ctrl-C end it."""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from . import compat
from .logging import get_logger

logger = get_logger(__name__)

T = TypeVar("T")

# Seconds between two lines in the log, and seconds that a build has to end after Ctrl-C before it is left alone.
LOG_EVERY = 15.0
STOP_WITHIN = 20.0

# TensorRT's messages that begin another part of the work. The kernels of a layer are timed one by one.
_STAGES = (
    ("Applying generic optimizations", "simplifying the network"),
    ("Original: ", "simplifying the network"),
    ("Graph optimization time", "choosing kernels"),
    ("Engine generation completed", "writing the engine"),
)
_TIMING = re.compile(r"Timing Runner: (.+?)(?: \([^()]*\))?\s*$")


class Progress:
    """What a build is doing, by TensorRT's progress monitor (10 and newer) or by its messages. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._phases: dict[
            str, list[int]
        ] = {}  # open ones, the outer before the inner: steps done, of how many
        self._stage = ""
        self._layer = ""
        self._kernels = 0
        self._stopped = False

    def phase_start(self, name: str, steps: int) -> None:
        with self._lock:
            self._phases[name] = [0, steps]

    def step_complete(self, name: str) -> bool:
        """Whether the build is to go on."""
        with self._lock:
            if name in self._phases:
                self._phases[name][0] += 1
            return not self._stopped

    def phase_finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def hear(self, message: str) -> None:
        """One of TensorRT's messages."""
        if "Timing Runner" in message and (match := _TIMING.search(message)):
            with self._lock:
                self._layer = match[1]
                self._kernels += 1
            return
        stage = next((stage for start, stage in _STAGES if message.startswith(start)), "")
        if stage:
            with self._lock:
                self._stage, self._layer = stage, ""

    @property
    def kernels(self) -> int:
        """How many kernels TensorRT has timed, as far as its messages tell."""
        with self._lock:
            return self._kernels

    def stop(self) -> None:
        """Ask the build to end at its next step."""
        with self._lock:
            self._stopped = True

    def describe(self) -> str:
        """The work at hand; "" where TensorRT has told nothing."""
        with self._lock:
            if self._phases:
                return ", ".join(f"{name} {done}/{steps}" for name, (done, steps) in self._phases.items())
            if self._layer:
                return f"{self._kernels} kernels timed, now of {self._layer[:100]}"
            return self._stage


def monitor(progress: Progress):
    """A trt.IProgressMonitor that tells progress, and ends the build where progress was stopped."""
    trt = compat.tensorrt()

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name, parent_phase, num_steps):
            progress.phase_start(phase_name, num_steps)

        def step_complete(self, phase_name, step):
            return progress.step_complete(phase_name)

        def phase_finish(self, phase_name):
            progress.phase_finish(phase_name)

    return Monitor()


def run(work: Callable[[], T], progress: Progress, device: torch.device) -> T:
    """Do the work in a thread of its own, with a line in the log every now and then.

    TensorRT's builder returns after minutes; the calling thread waits in Python, where Ctrl-C reaches it.

    Args:
        work: the build. It must hold on to all that the build reads, and write nothing: it may be left to itself.
        device: made the thread's current one, where it is a GPU.

    Raises:
        KeyboardInterrupt: on Ctrl-C, as any exception of a signal's handler. From TensorRT 10 on the build has ended, or
            has not within STOP_WITHIN; 8.6 cannot stop one: it goes on, and its result is dropped. Should the process end
            before it, the process is killed by SIGINT: TensorRT's threads do not survive Python's.
        Exception: what the work raised.
    """
    done = threading.Event()
    result: list[T] = []
    errors: list[BaseException] = []

    def target():
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                torch.cuda.synchronize(
                    device
                )  # makes its context current for TensorRT's own CUDA runtime as well
            result.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    started = time.monotonic()
    try:
        threading.Thread(target=target, name="d2_trt build", daemon=True).start()
        while not done.wait(LOG_EVERY):
            doing = progress.describe()
            logger.info(
                "TensorRT builds: %.0f s so far%s", time.monotonic() - started, f" ({doing})" if doing else ""
            )
    except BaseException:
        _stop(progress, done)
        raise
    if errors:
        raise errors.pop()  # not kept here: its traceback holds this frame
    return result.pop()


def _stop(progress: Progress, done: threading.Event) -> None:
    progress.stop()
    try:
        if compat.has_progress_monitor():
            logger.warning("Interrupted: TensorRT ends the build. Nothing is kept of it.")
            done.wait(STOP_WITHIN)
    finally:  # also where a second Ctrl-C comes
        if not done.is_set():
            _left_alone.append(done)
            logger.warning(
                "TensorRT %s does not stop: the build goes on in the background as long as the process lives, and takes "
                "the GPU's time and memory. Nothing is kept of it.",
                compat.tensorrt().__version__,
            )


# Of builds that nobody waits for.
_left_alone: list[threading.Event] = []
os.register_at_fork(after_in_child=_left_alone.clear)  # they run in the parent


@atexit.register
def _end_with_build() -> None:
    """End a process in which a build runs on. Were Python to shut down beside it, TensorRT's next message would have its
    thread torn down in the middle of C++ code, which aborts the process with a core dump."""
    if all(done.is_set() for done in _left_alone):
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
