"""Work at the end of an evaluation in several processes, which are forked and so see this one's objects without a copy."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from .overlapped import available_cpus

T = TypeVar("T")

# With fewer images for each process than this, forking costs more than it saves.
_IMAGES_PER_PROCESS = 50
# Forking more processes of the size of a model's, one after the other, would take longer than they have work.
_MOST_PROCESSES = 32


class ProcessError(Exception):
    """Stands behind an error that came from another process, with its traceback."""


def number_of_processes(wanted: int, images: int) -> int:
    """How many processes to share so many images out to; 1 where this process should do it all.

    Args:
        wanted: TEST.EVALUATION_THREADS, at most so many. 0 is as 1; -1 are all CPUs: a job's other processes wait.
    """
    # Elsewhere forked processes may crash in the system's libraries; a daemonic process may have no children.
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    most = available_cpus() if wanted == -1 else wanted
    return max(1, min(most, _MOST_PROCESSES, images // _IMAGES_PER_PROCESS))


def in_processes(work: Callable[[int], T], count: int) -> list[T]:
    """[work(0), ..., work(count - 1)], each from a process of its own; none is left when this returns or raises.

    Args:
        work: must not use CUDA, log or print: what other threads have locked when the process is forked stays locked there.
            What it returns is pickled.

    Raises:
        RuntimeError: a process was killed.
        Whatever `work` raises, the first that comes.
    """
    context = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    processes = []
    try:
        # The children keep it blocked: Ctrl-C reaches them too, but it is this process that ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for i in range(count):
                try:
                    reader, writer = context.Pipe(duplex=False)
                    readers.append(reader)
                    with writer:
                        process = context.Process(
                            target=_child, args=(work, i, writer, list(readers)), daemon=True
                        )
                        process.start()
                    processes.append(process)
                except OSError:  # no memory or no process number: the rest is done here
                    break
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        results: dict[int, T] = {}
        waiting = {readers[i]: i for i in range(len(processes))}
        while waiting:
            for reader in wait(list(waiting)):
                i = waiting.pop(reader)
                results[i] = _received(reader, processes[i])
        return [results[i] if i in results else work(i) for i in range(count)]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for reader in readers:
            reader.close()


def _received(reader: Connection, process: multiprocessing.Process) -> Any:
    try:
        message = reader.recv_bytes()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a process of the evaluation ended with exit code {process.exitcode} before it had its result; -9 mostly "
            "means that there is too little memory. TEST.EVALUATION_THREADS 0 does without processes"
        ) from None
    done, value = pickle.loads(message)
    if done:
        return value
    error, told = value
    raise error from ProcessError(f"\n{told}")


def _child(work: Callable[[int], Any], i: int, writer: Connection, readers: Sequence[Connection]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not with a handler of the parent's
    gc.disable()  # it would write to all objects, and so copy their memory
    try:
        # Where the parent is killed, nobody may be left who could read.
        for reader in readers:
            reader.close()
        try:
            message = pickle.dumps((True, work(i)), pickle.HIGHEST_PROTOCOL)
        except BaseException as error:
            message = _error_message(error)
        writer.send_bytes(message)
    finally:
        os._exit(0)  # without what the parent has set up to be done at its end


def _error_message(error: BaseException) -> bytes:
    told = traceback.format_exc()
    try:
        message = pickle.dumps((False, (error, told)))
        pickle.loads(message)  # not every exception can be made again
    except Exception:
        message = pickle.dumps((False, (RuntimeError(f"{type(error).__name__}: {error}"), told)))
    return message
