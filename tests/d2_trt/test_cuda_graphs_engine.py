"""Engines that record and replay CUDA graphs, on doubles of TensorRT and CUDA: results, order of streams, whose memory."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from d2_trt import compat, cuda_graphs, streams
from d2_trt.cuda_graphs import RUNS_TO_REPLACE, CapturedRun
from d2_trt.engine import Engine
from d2_trt.errors import BuildError
from tests.d2_trt.cuda_graphs_helpers import CPU, SHAPES, make_plan, run
from tests.doubles.cuda import FakeGraph
from tests.doubles.cuda import cuda_double as cuda  # noqa: F401
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.doubles.runtime import FakeContext, FakeEngine


def test_engine_replays_with_right_results_at_every_shape(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=3)
    for round_ in range(4):
        for shape in SHAPES[:3]:
            run(engine, shape, seed=round_)
    assert cuda.captured == 3
    assert engine.graphs.describe()["replays"] == 9


def test_contexts_have_auxiliary_streams_of_the_engines_own(trt, cuda, monkeypatch):  # noqa: F811
    """TensorRT's own would block the legacy stream while a graph is recorded."""
    contexts = []
    make_context, make_engine = FakeContext.__init__, FakeEngine.__init__

    def context(self, *args, **kwargs):
        make_context(self, *args, **kwargs)
        contexts.append(self)

    def with_two_streams(self, *args, **kwargs):
        make_engine(self, *args, **kwargs)
        self._values["num_aux_streams"] = 2

    monkeypatch.setattr(FakeContext, "__init__", context)
    monkeypatch.setattr(FakeEngine, "__init__", with_two_streams)
    engine = Engine(make_plan(trt), CPU, max_graphs=2)
    for shape in SHAPES[:2] * 2:
        run(engine, shape)
    made = cuda.driver.made
    own = [handle for handle in made if handle != engine._recording.cuda_stream]
    assert len(own) == 2 and len(contexts) == 3 and all(c._aux_streams == own for c in contexts)
    contexts.clear()
    assert cuda.driver.gone == []
    del engine
    gc.collect()
    assert sorted(cuda.driver.gone) == sorted(made)


def test_graphs_are_recorded_on_a_stream_of_the_engines_own(trt, cuda):  # noqa: F811
    """PyTorch's come from pools that everybody takes from."""
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    run(engine, SHAPES[0]), run(engine, SHAPES[0])
    (recorded_on,) = [entry[1] for entry in cuda.log if entry[0] == "capture"]
    assert [recorded_on] == cuda.driver.made
    others = [torch.cuda.Stream(priority=priority) for priority in (0, -1) for _ in range(64)]
    assert recorded_on not in [stream.cuda_stream for stream in others]
    assert recorded_on not in cuda.driver.gone
    del engine
    gc.collect()
    assert cuda.driver.gone == [recorded_on]


def test_stream_that_the_driver_refuses_is_an_error(trt, cuda):  # noqa: F811
    cuda.driver.status = 2
    with pytest.raises(BuildError, match=r"made no stream .* error 2"):
        streams.PrivateStreams(CPU, 1)


def test_replays_give_tensors_that_the_caller_owns(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    images = [torch.full(SHAPES[0], float(n)) for n in range(4)]
    results = [engine(x) for x in images]
    for x, (total, product) in zip(images, results):
        assert torch.equal(total, x + x) and torch.equal(product, x * x)


def test_recording_collects_no_garbage(cuda):  # noqa: F811
    collects = []
    CapturedRun(
        lambda handle: collects.append((cuda.recording is not None, gc.isenabled())),
        torch.ones(1),
        [],
        torch.cuda.Stream(),
    )
    assert collects == [(False, True), (True, False)] and gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False], ids=["collecting", "not collecting"])
def test_garbage_waits_until_recording_is_over(cuda, request, enabled):  # noqa: F811
    """What frees it, such as CUDA memory or another graph, would break the recording. The caller's setting is kept."""
    freed_while_recording = []

    class Garbage:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            freed_while_recording.append(cuda.recording is not None)

    def enqueue(handle):
        if cuda.recording is not None:
            Garbage()
            for _ in range(100):
                [[] for _ in range(100)]  # ten thousand objects, where the second is enough for a collection

    before, thresholds = gc.isenabled(), gc.get_threshold()
    request.addfinalizer(gc.enable if before else gc.disable)
    request.addfinalizer(lambda: gc.set_threshold(*thresholds))
    gc.set_threshold(2, 1, 1)
    (gc.enable if enabled else gc.disable)()
    CapturedRun(enqueue, torch.ones(1), [], torch.cuda.Stream())
    assert gc.isenabled() == enabled
    gc.collect()
    assert freed_while_recording == [False]


def test_end_of_a_recording_starts_no_collections_in_another_threads():
    inside, leave, other_inside, over = (threading.Event() for _ in range(4))
    collects = []

    def first():
        with cuda_graphs._no_garbage_collection():
            inside.set()
            leave.wait(10)

    def second():
        with cuda_graphs._no_garbage_collection():
            other_inside.set()
            over.wait(10)
            collects.append(gc.isenabled())

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert inside.wait(10)
        pool.submit(second)
        other_inside.wait(0.2)
        leave.set()
        one.result(10)
        over.set()
    assert collects == [False] and gc.isenabled()


@pytest.mark.parametrize("max_graphs", [0, 2])
def test_calls_of_several_threads_take_turns(trt, cuda, max_graphs, monkeypatch):  # noqa: F811
    """A context has one shape and one set of addresses, from when they are set until its work is enqueued."""
    engine = Engine(make_plan(trt), CPU, max_graphs=max_graphs)
    owner, disturbed = [], []
    set_shape, execute = FakeContext.set_input_shape, FakeContext.execute_async_v3

    def mine():
        disturbed.extend(other for other in owner if other != threading.get_ident())

    def set_and_linger(context, name, shape):
        mine()
        owner[:] = [threading.get_ident()]
        time.sleep(0.005)  # for others to come between
        return set_shape(context, name, shape)

    def execute_after(context, stream_handle):
        mine()
        done = execute(context, stream_handle)
        owner.clear()
        return done

    monkeypatch.setattr(FakeContext, "set_input_shape", set_and_linger)
    monkeypatch.setattr(FakeContext, "execute_async_v3", execute_after)
    start = threading.Barrier(4)

    def call_often(number):
        start.wait(10)
        for i in range(4):
            run(engine, SHAPES[(number + i) % len(SHAPES)], seed=number)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(call_often, number) for number in range(4)]:
            future.result(60)
    assert not disturbed


def test_modes_of_the_first_caller_do_not_bind_later_ones(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    with torch.inference_mode():
        run(engine, SHAPES[0]), run(engine, SHAPES[0])
    assert cuda.captured == 1
    run(engine, SHAPES[0])
    outputs = engine(torch.ones(SHAPES[0], requires_grad=True))
    assert not any(t.requires_grad for t in outputs)


def test_calls_wait_for_the_call_before_and_recording_has_its_own_stream(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    streams = [torch.cuda.Stream() for _ in range(4)]
    for stream in streams:
        with torch.cuda.stream(stream):
            run(engine, SHAPES[0])
    (recorded_on,) = [entry[1] for entry in cuda.log if entry[0] == "capture"]
    assert recorded_on == engine._recording.cuda_stream
    log = cuda.log
    for before, after in itertools.pairwise(streams):
        last = max(i for i, e in enumerate(log) if e[:2] == ("record", before.cuda_stream))
        work = min(i for i, e in enumerate(log) if e[0] != "wait" and e[1] == after.cuda_stream)
        assert ("wait", after.cuda_stream, log[last][2]) in log[last:work]
    # Recording runs the engine once: after the calls before it, and before the replay that it is made for.
    replayed = streams[1].cuda_stream
    numbers = {e[1]: e[2] for e in log[: log.index(("capture", recorded_on))] if e[0] == "record"}
    assert ("wait", recorded_on, numbers[replayed]) in log
    first_replay = log.index(("replay", replayed))
    done = next(e[2] for e in reversed(log[:first_replay]) if e[:2] == ("record", recorded_on))
    assert ("wait", replayed, done) in log[:first_replay]


def test_capture_of_the_callers_own_takes_the_engines_kernels(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    images = torch.rand(SHAPES[0])

    def capture():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(capture_error_mode="thread_local")
            outputs = engine(images)
            graph.capture_end()
        return graph, outputs

    run(engine, SHAPES[0])
    captured = [capture() for _ in range(RUNS_TO_REPLACE)]
    assert engine.graphs.describe()["captures"] == 0
    run(engine, SHAPES[0])
    captured.append(capture())  # the shape has a graph now
    told = engine.graphs.describe()
    assert told["captures"] == told["replays"] == 1 and not told["failure"]
    for n, (graph, (total, product)) in enumerate(captured):
        images.fill_(n + 2)
        graph.replay()
        assert torch.equal(total, images + images) and torch.equal(product, images * images)
    run(engine, SHAPES[0])


@pytest.mark.parametrize("graphs", [0, 1])
def test_images_are_kept_for_the_stream_that_reads_them(trt, cuda, graphs):  # noqa: F811
    """The caller may let go of them at once: PyTorch gives their memory to the stream that they come from."""
    engine = Engine(make_plan(trt), CPU, max_graphs=graphs)
    images = torch.rand(SHAPES[0])
    for _ in range(3):  # an ordinary run, a capture, a replay
        cuda.log.clear()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            engine(images)
        assert ("keep memory", stream.cuda_stream, images.data_ptr()) in cuda.log


def test_contexts_share_one_scratch_memory(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=2)
    contexts = [engine._context]
    new_context = engine._new_context
    engine._new_context = lambda: contexts.append(new_context()) or contexts[-1]
    for shape in (*SHAPES[:2], *SHAPES[:2]):
        run(engine, shape)
    assert len(contexts) == 3
    assert {c.device_memory for c in contexts} == {engine._scratch.data_ptr()}
    assert engine._scratch.numel() == compat.device_memory(engine._engine)


def test_graph_goes_only_when_the_gpu_is_done(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    run(engine, SHAPES[0]), run(engine, SHAPES[0])
    last = engine._last.number
    for _ in range(RUNS_TO_REPLACE):
        waited = len(cuda.log)
        run(engine, SHAPES[1])
    assert last < engine._last.number and any(e[0] == "host waits" for e in cuda.log[waited:])
    assert engine.graphs.describe()["shapes"] == [list(SHAPES[1])]


def test_capture_that_fails_leaves_the_ordinary_path(trt, cuda, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    cuda.fail = RuntimeError("operation not permitted when stream is capturing")
    for _ in range(4):
        run(engine, SHAPES[0])
    assert cuda.recording is None and len(caplog.records) == 1
    assert "not permitted" in engine.graphs.describe()["failure"]
    assert gc.isenabled()


@pytest.mark.parametrize("method", ["capture_begin", "capture_end"])
def test_interrupt_leaves_no_stream_recording(trt, cuda, monkeypatch, method):  # noqa: F811
    """Ctrl-C comes anywhere; what waits for a stream that still records would be recorded too."""
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    run(engine, SHAPES[0])
    original = getattr(FakeGraph, method)

    def interrupted(graph, *args, **kwargs):
        monkeypatch.setattr(FakeGraph, method, original)
        if method == "capture_begin":
            original(graph, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeGraph, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine(torch.rand(SHAPES[0]))
    assert cuda.recording is None and gc.isenabled()
    run(engine, SHAPES[0])


def test_context_of_a_failed_capture_goes_when_the_gpu_is_done(trt, cuda, monkeypatch):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=1)
    monkeypatch.setattr(
        FakeContext, "__del__", lambda self: cuda.log.append(("context goes",)), raising=False
    )
    cuda.fail = torch.cuda.OutOfMemoryError  # the class: an error that nobody keeps
    run(engine, SHAPES[0]), run(engine, SHAPES[0])
    gone = cuda.log.index(("context goes",))
    worked = cuda.log.index(("enqueue", engine._recording.cuda_stream))
    assert ("host waits for stream", engine._recording.cuda_stream) in cuda.log[worked:gone]
