"""The engine cache between processes, some of which are killed."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2_trt.cache import EngineCache
from d2_trt.cache_files import FileLock
from tests.d2_trt.cache_helpers import Builder, engine, files, files_of, ingredients, key_of, put, warnings

ROOT = Path(__file__).resolve().parents[2]
KEY = key_of(0)

# What every process begins with. The package's own __init__ imports torch and detectron2, which take seconds and
# are not needed here: a module of the same name and path stands in for it.
PRELUDE = """
import logging, os, sys, time, types
sys.path.insert(0, sys.argv[1])
package = types.ModuleType("d2_trt")
package.__path__ = [os.path.join(sys.argv[1], "d2_trt")]
sys.modules["d2_trt"] = package
from d2_trt.cache import EngineCache
from tests.d2_trt.cache_helpers import Builder, engine, ingredients, key_of, put
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)

folder = sys.argv[2]
def say(text):
    print(text, flush=True)
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.005)
def note(text):
    with open(os.path.join(os.path.dirname(folder), "notes"), "a") as file:
        file.write(text + "\\n")
"""


def heed_interrupts() -> None:
    """In a child: a job that a shell put into the background ignores Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def captured(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    caplog.set_level(logging.INFO, logger="d2_trt")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def start(folder):
    """Start a process that runs some code; those still running at the end are killed."""
    started = []

    def start(code: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", PRELUDE + code, str(ROOT), str(folder), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(
            subprocess.Popen(command, text=True, start_new_session=True, preexec_fn=heed_interrupts, **pipes)
        )
        return started[-1]

    yield start
    for process in started:
        # The whole session: a test's process may have forked.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def expect(process: subprocess.Popen, line: str) -> None:
    got = process.stdout.readline()
    if got != line + "\n":
        process.kill()
        pytest.fail(f"expected {line!r}, got {got!r}: {process.stderr.read()}")


def notes(folder: Path) -> list[str]:
    return (folder.parent / "notes").read_text().split()


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def read_until(stream, text: str) -> str:
    """Lines of a stream up to the one that holds the text."""
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} is not in {lines}")


@pytest.mark.parametrize("mode", ["readwrite", "rebuild"])
def test_four_processes_that_ask_for_one_engine_build_it_once(folder, start, mode):
    if mode == "rebuild":
        put(EngineCache(folder), 0)
    code = """
def build():
    note(f"built-by-{os.getpid()}")
    wait_for(os.path.join(os.path.dirname(folder), "may-finish"))
    return Builder(7)()
cache = EngineCache(folder, sys.argv[3])
say("ready")
wait_for(os.path.join(os.path.dirname(folder), "go"))
entry = cache.get_or_build(ingredients(), build)
assert bytes(entry.data) == engine(7)
say(f"built {entry.built}")
"""
    processes = [start(code, mode) for _ in range(4)]
    for process in processes:
        expect(process, "ready")
    (folder.parent / "go").touch()
    wait_until(lambda: (folder.parent / "notes").exists() and notes(folder))
    builder = notes(folder)[0].removeprefix("built-by-")
    waiting = [p for p in processes if str(p.pid) != builder]
    assert len(waiting) == 3
    said = [read_until(p.stderr, "Waiting") for p in waiting]
    assert all(f"Waiting for process {builder} on " in text for text in said)
    (folder.parent / "may-finish").touch()
    outputs = [finish(p) for p in processes]
    assert sorted(out for out, _ in outputs) == ["built False\n"] * 3 + ["built True\n"]
    assert notes(folder) == [f"built-by-{builder}"]
    assert not any("Waiting" in err for _, err in outputs)  # said once each, and read above
    assert files(EngineCache(folder)) == files_of(KEY)


def test_build_of_another_engine_does_not_wait(folder, start):
    process = start("""
def build():
    say("building")
    sys.stdin.readline()
    return Builder(0)()
EngineCache(folder).get_or_build(ingredients(0), build)
say("done")
""")
    expect(process, "building")
    assert put(EngineCache(folder), 1).path.exists()
    assert put(EngineCache(folder), 1).built is False
    assert process.poll() is None
    process.stdin.write("\n")
    assert finish(process)[0] == "done\n"
    assert {e.key for e in EngineCache(folder).list()} == {key_of(0), key_of(1)}


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_next_in_line_builds_when_the_builder_dies_or_fails(folder, start, end):
    builder = start("""
def build():
    say("building")
    sys.stdin.readline()
    raise RuntimeError("no")
EngineCache(folder).get_or_build(ingredients(), build)
""")
    expect(builder, "building")
    waiting = start("""
entry = EngineCache(folder).get_or_build(ingredients(), Builder(0))
say(f"built {entry.built}")
""")
    read_until(waiting.stderr, f"Waiting for process {builder.pid} on ")
    if end == "killed":
        builder.kill()
    else:
        builder.stdin.write("\n")
        builder.stdin.flush()
    assert finish(waiting)[0] == "built True\n"
    assert builder.wait(10) != 0
    assert EngineCache(folder).load(KEY).data == engine()
    assert files(EngineCache(folder)) == files_of(KEY)


FAILING = """
from d2_trt import errors
def build():
    note(f"built-by-{os.getpid()}")
    say("building")
    sys.stdin.readline()
    raise getattr(errors, sys.argv[3])("the masks differ in\\n  backbone.res2")
try:
    entry = EngineCache(folder).get_or_build(ingredients(), build, {"max_error": float(sys.argv[4])})
except errors.D2TRTError as error:
    say(f"{type(error).__name__}: {' '.join(str(error).split())}")
"""


@pytest.mark.parametrize("kind", ["ParityError", "BuildError", "ConversionError"])
def test_refused_engine_is_not_built_again_by_those_that_waited(folder, start, kind):
    builder = start(FAILING, kind, "1e-3")
    expect(builder, "building")
    waiting = [start(FAILING, kind, "1e-3") for _ in range(3)]
    for process in waiting:
        read_until(process.stderr, f"Waiting for process {builder.pid} on ")
    builder.stdin.write("\n")
    assert finish(builder)[0] == f"{kind}: the masks differ in backbone.res2\n"
    for process in waiting:
        out, _ = finish(process)
        assert out.startswith(
            f"{kind}: the masks differ in backbone.res2 So it went for process {builder.pid} on "
        )
    assert notes(folder) == [f"built-by-{builder.pid}"]
    # A later start tries again.
    assert put(EngineCache(folder)).built
    assert not list((folder / "locks").glob("*.failed"))


@pytest.mark.parametrize(
    ("kind", "terms"),
    [("GPUMemoryError", "1e-3"), ("MissingDependencyError", "1e-3"), ("ParityError", "0.1")],
)
def test_next_in_line_builds_where_it_may_fare_better(folder, start, kind, terms):
    """Memory that another GPU may have, what another machine may have, other thresholds of the comparison."""
    builder = start(FAILING, kind, "1e-3")
    expect(builder, "building")
    waiting = start(FAILING, kind, terms)
    read_until(waiting.stderr, f"Waiting for process {builder.pid} on ")
    builder.stdin.write("\n")
    finish(builder)
    expect(waiting, "building")
    waiting.stdin.write("\n")
    assert finish(waiting)[0].startswith(f"{kind}: ")


def test_failure_of_before_is_nothing_to_those_that_wait_now(folder, start):
    first = start(FAILING, "BuildError", "1e-3")
    expect(first, "building")
    first.stdin.write("\n")
    finish(first)
    second = start(FAILING, "GPUMemoryError", "1e-3")  # leaves nothing
    expect(second, "building")
    waiting = start(FAILING, "BuildError", "1e-3")
    read_until(waiting.stderr, f"Waiting for process {second.pid} on ")
    second.kill()
    expect(waiting, "building")
    waiting.kill()
    waiting.wait(20)
    EngineCache(folder).prune(everything=True)
    assert sorted(os.listdir(folder / "locks")) == ["folder.lock"]


def test_waiting_can_be_interrupted(folder, start):
    lock = FileLock(folder / "locks" / f"{KEY}.lock")
    lock.path.parent.mkdir(parents=True)
    lock.acquire()
    waiting = start("EngineCache(folder).get_or_build(ingredients(), Builder(0))")
    read_until(waiting.stderr, f"Waiting for process {os.getpid()} on ")
    time.sleep(0.05)  # from the message into the wait
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=300)
    assert "KeyboardInterrupt" in err
    lock.release()
    assert put(EngineCache(folder)).built


# The call at which the process stands still until it is killed, and how many such calls it lets pass; then which
# engine is found afterwards when there was none, and when number 0 was there and was being replaced by number 5.
# None: neither is, and it is built.
MOMENTS = {
    "engine half written": ("write", "len(args[1]) == 1000", 2, None, 0),
    "engine written": ("fsync", "True", 0, None, 0),
    "sidecar written": ("fsync", "True", 1, None, 0),
    "before the renames": ("replace", "True", 0, None, 0),
    "between the renames": ("replace", "True", 1, 5, 5),
    "after the renames": ("fsync", "True", 2, 5, 5),
}


@pytest.mark.parametrize("there", [False, True], ids=["fresh", "rebuild"])
@pytest.mark.parametrize(
    ("function", "condition", "passes", "found_fresh", "found_rebuilt"), MOMENTS.values(), ids=MOMENTS
)
def test_kill_during_a_write_loses_nothing(
    folder, start, caplog, there, function, condition, passes, found_fresh, found_rebuilt
):
    for number in range(1, 3):
        put(EngineCache(folder), number)
    if there:
        put(EngineCache(folder), 0)
    process = start(
        f"""
from d2_trt import cache_files
cache_files._CHUNK = 1000
real, calls = os.{function}, []
def stopping(*args):
    if {condition}:
        calls.append(args)
        if len(calls) > {passes}:
            say("stopped")
            time.sleep(60)
    return real(*args)
os.{function} = stopping
EngineCache(folder, sys.argv[3]).get_or_build(ingredients(), Builder(5))
""",
        "rebuild" if there else "readwrite",
    )
    expect(process, "stopped")
    process.kill()
    process.wait(10)

    cache, build = EngineCache(folder), Builder(5)
    entry = cache.get_or_build(ingredients(), build)
    found = found_rebuilt if there else found_fresh
    assert bytes(entry.data) == engine(5 if found is None else found)
    assert build.calls == len(warnings(caplog)) == (1 if found is None else 0)
    cache.prune()
    assert files(cache) == files_of(*map(key_of, range(3)))
    assert [e.problem for e in cache.verify()] == ["", "", ""]


@pytest.mark.parametrize("mode", ["read", "require", "readwrite"])
def test_kill_between_the_renames_leaves_an_engine_to_everyone(folder, start, caplog, mode):
    put(EngineCache(folder), 0)
    process = start("""
real, calls = os.replace, []
def stopping(*args):
    calls.append(args)
    if len(calls) == 2:
        say("stopped")
        time.sleep(60)
    return real(*args)
os.replace = stopping
EngineCache(folder, "rebuild").get_or_build(ingredients(), Builder(5, 5000))
""")
    expect(process, "stopped")
    process.kill()
    process.wait(10)

    cache, build = EngineCache(folder, mode), Builder(7)
    assert [(e.problem, e.sidecar["engine"]["size"]) for e in cache.list()] == [("", 5000)]
    assert [e.problem for e in cache.verify()] == [""]
    assert bytes(cache.get_or_build(ingredients(), build).data) == engine(5, 5000)
    assert build.calls == len(warnings(caplog)) == 0
    cache.close()
    cache = EngineCache(folder)
    assert cache.prune() == []
    assert files(cache) == files_of(KEY)
    assert bytes(cache.load(KEY).data) == engine(5, 5000)


def test_engine_that_another_process_uses_is_not_dropped(folder, start):
    put(EngineCache(folder), 0)
    user = start("""
cache = EngineCache(folder)
entry = cache.load(key_of(0))
del entry
say("loaded")
time.sleep(60)
""")
    expect(user, "loaded")
    cache = EngineCache(folder, max_bytes=10)
    assert cache.prune() == cache.prune(everything=True) == cache.prune(everything=True, dry_run=True) == []
    user.kill()
    user.wait(10)
    assert [e.key for e in cache.prune()] == [key_of(0)]


def test_child_of_a_killed_builder_does_not_keep_its_lock(folder, start):
    process = start("""
def build():
    if os.fork() == 0:
        say("forked")
        time.sleep(60)
    os.waitpid(-1, 0)
EngineCache(folder).get_or_build(ingredients(), build)
""")
    expect(process, "forked")
    lock = FileLock(folder / "locks" / f"{KEY}.lock")
    assert not lock.acquire(blocking=False)
    process.kill()
    process.wait(10)
    os.killpg(process.pid, 0)  # the child lives
    wait_until(lambda: lock.acquire(blocking=False), 5)
    lock.release()


def test_forked_child_that_ends_leaves_the_lock_to_its_parent(folder, start):
    process = start("""
def build():
    child = os.fork()
    if child == 0:
        raise SystemExit(0)  # through every `with` of the parent's stack
    assert os.waitpid(child, 0)[1] == 0
    say("building")
    sys.stdin.readline()
    return Builder(0)()
EngineCache(folder).get_or_build(ingredients(), build)
""")
    expect(process, "building")
    assert not FileLock(folder / "locks" / f"{KEY}.lock").acquire(blocking=False)
    process.stdin.write("\n")
    finish(process)
    assert EngineCache(folder).load(KEY).data == engine()


def test_processes_that_drop_each_others_engines_stay_consistent(folder, start):
    code = """
import random
draw = random.Random(int(sys.argv[3]))
cache = EngineCache(folder, max_bytes=20_000)  # about three engines
for _ in range(25):
    number = draw.randrange(6)
    entry = put(cache, number)
    assert bytes(entry.data) == engine(number)
    if draw.random() < 0.2:
        cache.prune(everything=True)
say("done")
"""
    outputs = [finish(p) for p in [start(code, str(seed)) for seed in range(4)]]
    assert [out for out, _ in outputs] == ["done\n"] * 4
    assert "WARNING" not in "".join(err for _, err in outputs)
    cache = EngineCache(folder, max_bytes=20_000)
    cache.prune()
    assert all(e.problem == "" for e in cache.verify())
    assert sum(e.size for e in cache.list()) <= 20_000
    assert files(cache) == files_of(*(e.key for e in cache.list()))
