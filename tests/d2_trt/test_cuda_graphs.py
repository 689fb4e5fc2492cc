"""Which shapes become CUDA graphs, how many of them, and in how much memory."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch

from d2_trt import cuda_graphs
from d2_trt.cuda_graphs import RUNS_TO_REPLACE, GraphCache
from d2_trt.engine import Engine
from d2_trt.errors import BuildError
from tests.d2_trt.backend_helpers import make_backend, workshop  # noqa: F401
from tests.d2_trt.cuda_graphs_helpers import CPU, MIB, SHAPES, make_plan, run
from tests.doubles.cuda import cuda_double as cuda  # noqa: F401
from tests.doubles.fixtures import trt_double as trt  # noqa: F401


class Run:
    def __init__(self, nbytes=MIB, driver_bytes=0):
        self.nbytes, self.driver_bytes = nbytes + driver_bytes, driver_bytes


def feed(cache: GraphCache, shape, retired=None, nbytes=MIB, capture=None) -> str:
    """What an engine does with a call: "replayed", "captured" or "ran"."""
    if cache.find(shape) is not None:
        return "replayed"
    if cache.wants(shape, nbytes) and cache.add(
        shape, nbytes, capture or (lambda: Run(nbytes)), lambda: retired is None or retired.append(shape)
    ):
        return "captured"
    return "ran"


def test_shape_is_captured_when_it_comes_again():
    cache = GraphCache(2)
    assert [feed(cache, "a") for _ in range(4)] == ["ran", "captured", "replayed", "replayed"]
    assert cache.describe() == {
        "shapes": [["a"]],
        "mib": 1.0,
        "captures": 1,
        "replays": 3,
        "refused": [],
        "failure": "",
    }


def test_least_recently_used_graph_goes():
    cache, retired = GraphCache(2), []
    for shape in "aabbab":
        feed(cache, shape, retired)
    feed(cache, "a", retired)  # "b" is now the older
    actions = [feed(cache, "c", retired) for _ in range(RUNS_TO_REPLACE)]
    assert actions == ["ran"] * (RUNS_TO_REPLACE - 1) + ["captured"]
    assert retired == ["c"]
    assert [feed(cache, shape, retired) for shape in "acb"] == ["replayed", "replayed", "ran"]


def test_ever_new_shapes_are_not_captured_in_turn():
    cache = GraphCache(1)
    feed(cache, "a"), feed(cache, "a")
    actions = [feed(cache, n % 50) for n in range(50 * (RUNS_TO_REPLACE - 1))]
    assert set(actions) == {"ran"}
    assert feed(cache, "a") == "replayed"


def test_counts_of_shapes_are_bounded():
    cache = GraphCache(1)
    for n in range(cuda_graphs.MAX_COUNTED + 1):
        feed(cache, n)
    assert len(cache._seen) == cuda_graphs.MAX_COUNTED
    assert feed(cache, 0) == "ran"  # forgotten, so seen for the first time


def test_failure_is_said_once_and_ends_capturing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    cache = GraphCache(2)

    def fail():
        raise BuildError("the engine did not run:\n  no")

    for shape in "aabb":
        assert feed(cache, shape, capture=fail) == "ran"
    assert cache.describe()["failure"] == "BuildError: the engine did not run:"
    (record,) = caplog.records
    assert "MODEL.TENSORRT.CUDA_GRAPHS" in record.getMessage()


def shapes_of(cache: GraphCache) -> str:
    return "".join(shape for (shape,) in cache.describe()["shapes"])


def test_graphs_are_bounded_in_bytes():
    """A shape that wants more than is left comes often before the least recently used ones go, as many as it takes."""
    cache, retired = GraphCache(8, max_bytes=4 * MIB), []
    for shape in "aabbccddb":
        feed(cache, shape, retired)
    assert shapes_of(cache) == "acdb" and not retired
    actions = [feed(cache, "e", retired, nbytes=2 * MIB) for _ in range(RUNS_TO_REPLACE)]
    assert actions == ["ran"] * (RUNS_TO_REPLACE - 1) + ["captured"]
    assert shapes_of(cache) == "dbe" and cache.nbytes == 4 * MIB and len(retired) == 2


def test_what_the_driver_keeps_counts():
    cache = GraphCache(8, max_bytes=10 * MIB)
    for shape in "aabb":
        feed(cache, shape, capture=lambda: Run(MIB, driver_bytes=3 * MIB))
    assert shapes_of(cache) == "ab" and cache.nbytes == 8 * MIB
    # It is expected to be the same for others: they do not replace each other at every second run.
    assert [feed(cache, "c") for _ in range(3)] == ["ran"] * 3
    # Where it is more than was to be expected, older graphs go after all.
    cache = GraphCache(8, max_bytes=10 * MIB)
    for shape, kept in zip("abc", (1, 1, 8)):
        for _ in range(2):
            feed(cache, shape, capture=lambda kept=kept: Run(MIB, driver_bytes=kept * MIB))
    assert shapes_of(cache) == "c" and cache.nbytes == 9 * MIB


def test_graph_above_the_limit_by_itself_leaves_the_others(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    cache, retired = GraphCache(8, max_bytes=4 * MIB), []
    feed(cache, "a"), feed(cache, "a")
    actions = [
        feed(cache, shape, retired, nbytes=5 * MIB) for _ in range(2 * RUNS_TO_REPLACE) for shape in "bc"
    ]
    assert set(actions) == {"ran"} and not retired
    assert [feed(cache, shape) for shape in "add"] == ["replayed", "ran", "captured"]
    told = cache.describe()
    assert told["refused"] == [["b"], ["c"]] and not told["failure"]
    (record,) = caplog.records
    assert "5.0 of the 4.0 MiB" in record.getMessage()
    assert "MODEL.TENSORRT.CUDA_GRAPH_MEMORY" in record.getMessage()


NO_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    BuildError("the engine has no execution context:\n  "),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_capture_without_memory_gives_up_older_graphs_until_it_works(cuda, error):  # noqa: F811
    cache, retired, tries = GraphCache(8), [], []

    def capture():
        tries.append(shapes_of(cache))
        if len(tries) < 3:
            raise error
        return Run()

    for shape in "aabbcc":
        feed(cache, shape)
    assert [feed(cache, "d", retired, capture=capture) for _ in range(3)] == ["ran", "captured", "replayed"]
    assert tries == ["abc", "bc", "c"] and len(retired) == 2 and shapes_of(cache) == "cd"
    assert cuda.log.count(("empty cache",)) == 2
    assert not cache.failure and not cache.describe()["refused"]


def test_shape_without_memory_is_refused_alone_and_for_a_while(cuda, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    cache, tries = GraphCache(8), []

    def fail():
        tries.append(shapes_of(cache))
        raise NO_MEMORY[0]

    feed(cache, "a"), feed(cache, "a")
    for shape in "bbbbcc":
        assert feed(cache, shape, capture=fail) == "ran"
    # b: beside a, with PyTorch's memory given back in its place; c: at once and after that.
    assert tries == ["a", "", "", ""]
    told = cache.describe()
    assert told["refused"] == [["b"], ["c"]] and not told["failure"]
    (record,) = caplog.records
    assert "memory does not suffice (OutOfMemoryError: CUDA out of memory" in record.getMessage()
    assert [feed(cache, shape) for shape in "aa"] == ["ran", "captured"]  # others are captured still
    actions = [feed(cache, "b") for _ in range(cuda_graphs.RUNS_TO_RETRY)]
    assert actions[-1] == "captured" and set(actions[:-1]) == {"ran"}


def test_memory_of_a_failed_capture_is_free_for_the_next(cuda):  # noqa: F811
    cache, alive = GraphCache(8), []

    class Buffer:
        pass

    def capture():
        assert all(buffer() is None for buffer in alive)
        buffer = Buffer()
        alive.append(weakref.ref(buffer))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    gc.disable()  # no collection is needed for it
    try:
        feed(cache, "a", capture=capture), feed(cache, "a", capture=capture)
    finally:
        gc.enable()
    assert len(alive) == 2


def test_cache_of_no_graphs_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        GraphCache(0)


def test_engine_goes_on_capturing_after_memory_ran_out(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=2)
    cuda.fail = torch.cuda.OutOfMemoryError("CUDA out of memory")
    run(engine, SHAPES[1]), run(engine, SHAPES[1])
    assert engine.graphs.describe()["refused"] == [list(SHAPES[1])]
    cuda.fail = None
    for _ in range(3):
        run(engine, SHAPES[0]), run(engine, SHAPES[1])
    assert engine.graphs.describe()["shapes"] == [list(SHAPES[0])]


def test_engine_keeps_its_graphs_within_their_bytes(trt, cuda):  # noqa: F811
    """The plan's outputs are as large as the images."""
    sizes = [3 * 4 * torch.Size(shape).numel() for shape in SHAPES]
    engine = Engine(make_plan(trt), CPU, max_graphs=4, max_graph_bytes=sizes[1] + sizes[2])
    for shape, times in zip(SHAPES, (2, 2, 2, RUNS_TO_REPLACE)):
        for _ in range(times):
            run(engine, shape)
    told = engine.graphs.describe()
    assert told["shapes"] == [list(SHAPES[0]), list(SHAPES[1])] and told["refused"] == [list(SHAPES[3])]
    assert engine.graphs.nbytes == sizes[0] + sizes[1]


def test_what_the_driver_says_counts_for_a_graph(trt, cuda, monkeypatch):  # noqa: F811
    engine = Engine(make_plan(trt), CPU, max_graphs=4)
    new_context = engine._new_context

    def context():
        cuda.used += 3 * MIB
        return new_context()

    monkeypatch.setattr(engine, "_new_context", context)
    run(engine, SHAPES[0]), run(engine, SHAPES[0])
    assert engine.graphs.nbytes == 3 * MIB + 3 * 4 * torch.Size(SHAPES[0]).numel()


def test_graphs_may_take_a_twentieth_of_the_gpu(trt, cuda):  # noqa: F811
    need = 3 * 4 * torch.Size(SHAPES[0]).numel()
    for total, captures in ((20 * need, 1), (20 * need - 1, 0)):
        cuda.total = total
        engine = Engine(make_plan(trt), CPU, max_graphs=4)
        run(engine, SHAPES[0]), run(engine, SHAPES[0])
        assert engine.graphs.describe()["captures"] == captures


def test_without_graphs_nothing_is_recorded(trt, cuda):  # noqa: F811
    engine = Engine(make_plan(trt), CPU)
    for _ in range(3):
        run(engine, SHAPES[0])
    assert engine.graphs is None and cuda.captured == 0


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 8), ({"MAX_CUDA_GRAPHS": 3}, 3), ({"CUDA_GRAPHS": False}, 0)],
    ids=str,
)
def test_config_says_how_many_graphs_an_engine_keeps(workshop, options, most):  # noqa: F811
    backend = make_backend(**options)
    backend.prepare()
    assert workshop.max_graphs == [most]
    (told,) = backend.describe()["engines"]
    assert (told["cuda_graphs"] is None) == (most == 0)


def test_config_says_how_much_memory_graphs_may_take(workshop):  # noqa: F811
    for options in ({}, {"CUDA_GRAPH_MEMORY": 1.5}):
        make_backend(**options).prepare()
    assert workshop.max_graph_bytes == [0, 3 << 29]
