"""The end of predictor.stream: early, by Ctrl-C, while something is at work that does not end, with the process."""

from __future__ import annotations

import gc
import itertools
import logging
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from d2_trt import streaming
from d2_trt.errors import D2TRTError
from tests.d2_trt.streaming_helpers import flat, threads
from tests.d2_trt.streaming_helpers import predictor as predictor
from tests.d2_trt.streaming_helpers import shared as shared

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", ["close", "drop", "break", "throw"])
def test_early_end_stops_all_threads(predictor, how):
    stream = predictor.stream(flat(n % 250) for n in itertools.count())
    next(stream)
    if how == "close":
        stream.close()
    elif how == "drop":
        del stream
        gc.collect()
    elif how == "break":
        for n, _ in enumerate(predictor.stream(itertools.repeat(flat(1)))):
            if n == 3:
                break
        stream.close()
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError("stop"))
    assert threads() == []


def test_stream_that_is_never_asked_starts_no_thread(predictor):
    stream = predictor.stream(itertools.repeat(flat(1)))
    assert threads() == []
    stream.close()


def test_ctrl_c_while_waiting_ends_the_stream(predictor, monkeypatch, request):
    gate = predictor.model.backend.gate = threading.Event()
    close = streaming._Pipeline._close

    def open_and_close(pipeline):
        gate.set()  # a network at work is waited for
        close(pipeline)

    monkeypatch.setattr(streaming._Pipeline, "_close", open_and_close)
    # A shell's background jobs start with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    stream = predictor.stream(itertools.repeat(flat(1)))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert threads() == []


def close_warnings(stream, monkeypatch, caplog) -> str:
    """Close a stream, of which something is at work that does not end; what the log says then."""
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    monkeypatch.setattr(streaming, "CLOSE_SECONDS", 0.3)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 5
    (record,) = caplog.records
    message = record.getMessage()
    assert "not all of its threads have ended in 0.3 s" in message
    return message.partition("returns: ")[2]


def test_source_that_blocks_does_not_block_closing(predictor, monkeypatch, caplog):
    waits, blocked = threading.Event(), threading.Event()

    def source():
        yield flat(1)
        waits.set()
        assert blocked.wait(20)
        yield flat(2)

    stream = predictor.stream(source())
    next(stream)
    assert waits.wait(10)
    assert close_warnings(stream, monkeypatch, caplog) == "`next` of its images"
    blocked.set()
    assert threads() == []


@pytest.mark.parametrize("more", ["3", ""], ids=["more to come", "all read"])
def test_file_that_blocks_does_not_block_closing(predictor, monkeypatch, caplog, more):
    waits, blocked = threading.Event(), threading.Event()

    def decode(path):
        if path == "2":
            waits.set()
        assert path == "1" or blocked.wait(20)
        return flat(int(path))

    monkeypatch.setattr(streaming, "_decode", decode)
    stream = predictor.stream(itertools.chain("12", itertools.repeat("3", 100 if more else 0)), workers=2)
    next(stream)
    assert waits.wait(10)
    told = close_warnings(stream, monkeypatch, caplog).split(", ")
    assert "the reading of image 1 (2)" in told and all(
        job.startswith("the reading of image ") for job in told
    )
    assert threads("reader") == threads("runner") == []
    blocked.set()
    assert threads() == []


def test_network_that_blocks_does_not_block_closing(predictor, monkeypatch, caplog):
    backend = predictor.model.backend
    backend.gate, backend.gated_from = threading.Event(), 1
    stream = predictor.stream(flat(n) for n in range(9))
    next(stream)
    assert backend.waits.wait(10)
    assert close_warnings(stream, monkeypatch, caplog) == "the network"
    backend.gate.set()
    assert threads() == []
    assert len(backend.batches) == 2  # the one at work, and none of those that were read


def test_closing_drops_what_is_read_but_has_not_run(predictor, monkeypatch, caplog):
    """A batch that waits for its last image, which never comes."""
    read, blocked = threading.Event(), threading.Event()

    def source():
        for n in range(4):
            yield flat(n)
        read.set()
        assert blocked.wait(20)

    stream = predictor.stream(source(), batch_size=3, prefetch=8)
    next(stream)
    assert read.wait(10)
    assert close_warnings(stream, monkeypatch, caplog) == "`next` of its images"
    blocked.set()
    assert threads() == []
    assert [shape[0] for shape in predictor.model.backend.batches] == [3]


def test_closing_drops_files_that_are_not_read_yet(predictor, monkeypatch, caplog):
    decoded, waits, blocked = [], threading.Event(), threading.Event()

    def decode(path):
        decoded.append(path)
        if path == "1":
            waits.set()
        assert path == "0" or blocked.wait(20)
        return flat(int(path))

    monkeypatch.setattr(streaming, "_decode", decode)
    stream = predictor.stream(list("012345"), workers=1)
    next(stream)
    assert waits.wait(10)
    assert close_warnings(stream, monkeypatch, caplog) == "the reading of image 1 (1)"
    blocked.set()
    assert threads() == []
    assert decoded == ["0", "1"]


def test_pixels_of_files_are_gone_once_used(predictor, monkeypatch):
    pixels = []

    def decode(path):
        image = flat(int(path))
        pixels.append(weakref.ref(image))
        return image

    monkeypatch.setattr(streaming, "_decode", decode)
    stream = predictor.stream(itertools.chain("1", (flat(n) for n in range(5))), prefetch=1, workers=1)
    next(stream), next(stream)
    for _ in range(100):
        if pixels[0]() is None:
            break
        time.sleep(0.02)
    assert pixels[0]() is None
    stream.close()


def test_nothing_is_read_after_closing(predictor):
    read = []

    def source():
        for n in itertools.count():
            read.append(n)
            yield flat(n % 250)

    stream = predictor.stream(source(), prefetch=2)
    next(stream)
    for _ in range(500):
        if len(read) == 3:
            break
        time.sleep(0.01)
    stream.close()
    assert threads() == [] and len(read) == 3


def test_stream_may_be_dropped_by_a_thread_of_its_own(predictor, monkeypatch):
    """A collection of garbage runs wherever it becomes due."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    backend = predictor.model.backend
    backend.gate, backend.gated_from = threading.Event(), 1
    collected = []

    class Collecting:
        def __init__(self):
            self.__dict__.update(vars(backend))

        def __call__(self, images):
            outputs = backend(images)
            if len(backend.batches) == 2:
                collected.append((threading.current_thread().name, gc.collect()))
            return outputs

    predictor.model.backend = Collecting()
    gc.disable()
    try:
        cycle = [predictor.stream(flat(n % 250) for n in itertools.count())]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        assert backend.waits.wait(10)
        backend.gate.set()
        assert threads() == []
    finally:
        gc.enable()
    assert [name for name, _ in collected] == ["d2_trt stream runner"]
    assert unraisable == []


def test_stream_that_ends_with_the_process_does_not_look_complete(predictor):
    backend = predictor.model.backend
    backend.gate, backend.gated_from = threading.Event(), 1
    stream = predictor.stream(flat(n) for n in range(9))
    next(stream)
    caught = []

    def consume():
        try:
            caught.append(next(stream, "the end"))
        except D2TRTError as error:
            caught.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert backend.waits.wait(10)
    ending = threading.Thread(target=streaming._close_all)
    ending.start()
    assert threads("reader") == []  # it is closed
    backend.gate.set()
    ending.join(10), consumer.join(10)
    assert not ending.is_alive() and not consumer.is_alive()
    assert "before its last image" in str(caught[0])
    assert next(stream, "the end") == "the end"


UNFINISHED = """
import sys, threading, time
import torch
from d2_trt import TensorRTPredictor, streaming
from tests.d2_trt.predictor_helpers import make
from tests.d2_trt.streaming_helpers import SMALL, Backend, flat

streaming.CLOSE_SECONDS = 0.2
predictor = make(TensorRTPredictor, *SMALL)

class Busy(Backend):
    def __call__(self, images):
        if self.batches:
            self.waits.set()
            end = time.monotonic() + 1.5
            matrix = torch.ones(1000, 1000, device=images.device)
            while time.monotonic() < end:
                (matrix @ matrix).cpu()
        return super().__call__(images)

def source():
    for n in range(4):
        yield flat(n)
    all_read.set()
    threading.Event().wait()

all_read = threading.Event()
backend = predictor.model.backend = Busy(predictor.model)
stream = predictor.stream(source())
next(stream)
assert backend.waits.wait(20) and all_read.wait(20)
if sys.argv[1] == "closed":
    stream.close()
print("end")
"""


def check_end(how: str) -> None:
    command = [sys.executable, "-c", UNFINISHED, how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "end"
    assert done.stderr.count("they end when this returns: ") == 1
    assert "returns: `next` of its images, the network" in done.stderr
    assert "terminate" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("how", ["left open", "closed"])
def test_process_with_a_stream_at_work_ends_cleanly(how):
    """In a process of its own, with a network at work for longer than closing waits, and a source that never returns."""
    check_end(how)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["left open", "closed"])
def test_gpu_process_with_a_stream_at_work_ends_cleanly(how):
    check_end(how)
