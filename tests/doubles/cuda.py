"""As much of torch.cuda on a CPU as an Engine uses: streams and events that keep a record, graphs that replay."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from d2_trt import streams

from .runtime import FakeContext


class FakeEvent:
    def __init__(self, cuda, stream=None):
        self.cuda, self.stream = cuda, stream
        self.number = next(cuda.numbers)
        self.graph = cuda.recording_on(stream)  # whose capture it belongs to

    def record(self, stream=None):
        self.stream = stream or self.cuda.current_stream()
        self.graph = self.cuda.recording_on(self.stream)

    def synchronize(self):
        self.cuda.log.append(("host waits", self.number))


class FakeStream:
    def __init__(self, cuda, handle=None):
        self.cuda = cuda
        self.cuda_stream = next(cuda.numbers) if handle is None else handle

    def record_event(self):
        event = FakeEvent(self.cuda, self)
        self.cuda.log.append(("record", self.cuda_stream, event.number))
        return event

    def wait_event(self, event):
        if event.graph is not self.cuda.recording_on(self):
            raise RuntimeError("a capture and what is outside it cannot wait for each other")
        self.cuda.log.append(("wait", self.cuda_stream, event.number))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.cuda.log.append(("host waits for stream", self.cuda_stream))


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.work = cuda, None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert self.cuda.recording is None and self.cuda.current_stream() is not self.cuda.default
        assert capture_error_mode == "thread_local"
        self.cuda.recording, self.cuda.recording_stream = [], self.cuda.current_stream()
        self.cuda.log.append(("capture", self.cuda.current_stream().cuda_stream))

    def capture_end(self):
        self.work, self.cuda.recording = self.cuda.recording, None
        self.cuda.captured += 1

    def replay(self):
        self.cuda.log.append(("replay", self.cuda.current_stream().cuda_stream))
        for run in self.work:
            assert run()


class FakeDriver:
    """CUDA's driver library as far as PrivateStreams uses it: `made` and `gone` are the streams' handles."""

    def __init__(self, cuda):
        self.numbers = cuda.numbers
        self.made: list[int] = []
        self.gone: list[int] = []
        self.status = 0  # of what is asked for

    def cuStreamCreate(self, handle, flags):
        assert flags == 1  # non-blocking
        if self.status == 0:
            handle._obj.value = next(self.numbers)
            self.made.append(handle._obj.value)
        return self.status

    def cuStreamDestroy_v2(self, handle):
        self.gone.append(handle.value)


class FakeCuda:
    """What happened, in order, in `log`; what a graph under capture has recorded, in `recording`."""

    def __init__(self):
        self.numbers = itertools.count(1)
        self.log: list[tuple] = []
        self.recording: list | None = None
        self.recording_stream: FakeStream | None = None
        self.captured = 0
        self.total, self.used = 1 << 30, 1 << 20  # bytes of the GPU
        self.fail: Exception | None = None  # raised by work that is recorded
        self.default = FakeStream(self)
        self.driver = FakeDriver(self)
        self._pools: dict[int, Iterator[FakeStream]] = {}
        self._current = threading.local()

    def recording_on(self, stream) -> list | None:
        """What the capture that a stream is under has recorded."""
        return self.recording if stream is not None and stream is self.recording_stream else None

    def new_stream(self, priority=0):
        """One of a pool of 32, each in turn, as PyTorch has one for every priority."""
        if priority not in self._pools:
            self._pools[priority] = itertools.cycle([FakeStream(self) for _ in range(32)])
        return next(self._pools[priority])

    def current_stream(self, device=None):
        return getattr(self._current, "stream", self.default)

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def enqueue(self, run, handle: int) -> bool:
        """Do a context's work, or record it."""
        self.log.append(("enqueue", handle))
        if self.recording is None:
            return run()
        if self.fail is not None:
            raise self.fail
        self.recording.append(run)
        return True


@pytest.fixture(name="cuda")
def cuda_double(monkeypatch) -> FakeCuda:
    """torch.cuda on a CPU, for engines of the double of TensorRT."""
    cuda = FakeCuda()
    for name, value in {
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": cuda.current_stream,
        "stream": cuda.stream,
        "Stream": cuda.new_stream,
        "ExternalStream": lambda handle: FakeStream(cuda, handle),
        "mem_get_info": lambda device=None: (cuda.total - cuda.used, cuda.total),
        "memory_reserved": lambda device=None: 0,
        "empty_cache": lambda: cuda.log.append(("empty cache",)),
        "Event": lambda: FakeEvent(cuda),
        "CUDAGraph": lambda: FakeGraph(cuda),
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: cuda.recording_on(cuda.current_stream()) is not None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(streams, "_driver", lambda: cuda.driver)

    def record_stream(tensor, stream):
        cuda.log.append(("keep memory", stream.cuda_stream, tensor.data_ptr()))

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    execute = FakeContext.execute_async_v3

    def execute_or_record(context, stream_handle):
        shapes, addresses = dict(context._shapes), dict(context._addresses)

        def run():  # with what the context was set to, as a graph has it
            now = context._shapes, context._addresses
            context._shapes, context._addresses = dict(shapes), dict(addresses)
            try:
                return execute(context, stream_handle)
            finally:
                context._shapes, context._addresses = now

        return cuda.enqueue(run, stream_handle)

    monkeypatch.setattr(FakeContext, "execute_async_v3", execute_or_record)
    return cuda
