"""Loggers under d2_trt, and detectron2's handlers."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.utils import logger as detectron2_logger

from d2_trt import progress
from d2_trt.logging import follow_detectron2, get_logger, setup_logger, shown_on_stderr

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Loggers without handlers, and as they were afterwards."""
    for name in ("d2_trt", "detectron2"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger, "level", logging.NOTSET)
    detectron2_logger.setup_logger.cache_clear()
    get_logger().manager._clear_cache()
    yield
    detectron2_logger.setup_logger.cache_clear()
    get_logger().manager._clear_cache()


@contextlib.contextmanager
def root_handlers(*handlers: logging.Handler):
    """The root logger with these handlers only, without pytest's."""
    root = logging.getLogger()
    before, root.handlers[:] = list(root.handlers), handlers
    try:
        yield
    finally:
        root.handlers[:] = before


def test_names_are_below_d2_trt():
    assert get_logger().name == "d2_trt"
    assert get_logger("tensorrt").name == "d2_trt.tensorrt"
    assert get_logger("d2_trt.cache").name == "d2_trt.cache"
    assert get_logger("d2_trtish").name == "d2_trt.d2_trtish"


def test_import_adds_no_handler():
    program = """
import logging
import d2_trt, d2_trt.cache, d2_trt.options, d2_trt.logging
assert logging.getLogger("d2_trt").handlers == [] == logging.getLogger("d2_trt.cache").handlers
assert logging.getLogger().handlers == []
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)


def test_setup_prints_and_writes_beside_detectron2(tmp_path, capsys):
    detectron2_logger.setup_logger(str(tmp_path), distributed_rank=0)
    setup_logger(tmp_path, distributed_rank=0, color=False)
    setup_logger(tmp_path, distributed_rank=0, color=False)
    logging.getLogger("detectron2").info("from detectron2")
    get_logger("cache").info("from the cache")
    for handler in get_logger().handlers:
        handler.flush()
    assert capsys.readouterr().out.count("d2_trt.cache INFO: from the cache") == 1
    written = (tmp_path / "log.txt").read_text()
    assert "from detectron2" in written
    assert written.count("from the cache") == 1


def test_other_ranks_are_silent(capsys):
    setup_logger(distributed_rank=1)
    get_logger("cache").info("from rank 1")
    assert capsys.readouterr().out == ""


def test_messages_follow_detectron2_where_only_it_was_set_up():
    stream = io.StringIO()
    logging.getLogger("detectron2").addHandler(logging.StreamHandler(stream))
    logging.getLogger("detectron2").setLevel(logging.INFO)
    with root_handlers():
        assert follow_detectron2()
        assert not follow_detectron2()
    get_logger("builder").info("building")
    get_logger("builder").debug("details")
    assert stream.getvalue() == "building\n"


def test_logging_of_the_application_is_left_alone():
    logging.getLogger("detectron2").addHandler(logging.NullHandler())
    with root_handlers(logging.NullHandler()):
        assert not follow_detectron2()
    assert get_logger().handlers == []
    assert get_logger().propagate
    own = logging.NullHandler()
    get_logger().addHandler(own)
    with root_handlers():
        assert not follow_detectron2()
    assert get_logger().handlers == [own]
    assert get_logger().propagate


def test_nothing_to_follow():
    with root_handlers():
        assert not follow_detectron2()
    assert get_logger().propagate


# A build with progress, by an application that has set up logging in one way or another.
BUILD = """
import logging, sys, time
import torch
from d2_trt import progress
from d2_trt.cache import EngineCache
from tests.d2_trt.cache_helpers import Builder, ingredients

progress.LOG_EVERY = 0.1
MIDDLE = ""

def work():
    time.sleep(0.25)
    exec(MIDDLE)
    time.sleep(0.2)
    logging.getLogger("d2_trt.tensorrt").debug("a detail")
    return Builder(0)()

def build():
    logging.getLogger("d2_trt.backend").info("Building the engine")
    return progress.run(work, progress.Progress(), torch.device("cpu"))

{setup}
ours = logging.getLogger("d2_trt")
before = (list(ours.handlers), ours.level)
EngineCache(sys.argv[1], "{mode}").get_or_build(ingredients(), build)
if "{setup}".startswith("#"):
    assert (ours.handlers, ours.level) == before == ([], logging.NOTSET)
EngineCache(sys.argv[1]).get_or_build(ingredients(), Builder(0))
"""
TO_STDOUT = "logging.StreamHandler(sys.stdout)"


def program_of(setup: str, mode: str = "readwrite") -> str:
    return BUILD.replace("{setup}", setup).replace("{mode}", mode)


def build_in_a_process(tmp_path, setup: str) -> tuple[list[str], list[str]]:
    """Lines on stdout and stderr."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program_of(setup), str(tmp_path / "engines")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines(), process.stderr.splitlines()


@pytest.fixture
def build_here(tmp_path, capsys, monkeypatch):
    """As build_in_a_process, without the seconds that a process takes to start."""
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path / "engines")])
    monkeypatch.setattr(progress, "LOG_EVERY", progress.LOG_EVERY)
    level = logging.getLogger().level

    def build(setup: str, mode: str = "readwrite") -> tuple[list[str], list[str]]:
        with root_handlers():
            exec(program_of(setup, mode), {"__name__": "build"})
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()

    yield build
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(level)


def check_shown_once(lines: list[str]) -> None:
    assert sum("Building the engine" in line for line in lines) == 1
    assert sum("TensorRT builds: 0 s so far" in line for line in lines) >= 3


def check_shown_on_stderr(out: list[str], err: list[str]) -> None:
    check_shown_once(err)
    assert out == []
    assert not any("a detail" in line for line in err)
    assert not any("Using the cached engine" in line for line in err)  # no work of minutes


def test_build_is_shown_where_nobody_has_set_up_logging(tmp_path):
    check_shown_on_stderr(*build_in_a_process(tmp_path, "# nothing"))


@pytest.mark.parametrize("mode", ["read", "rebuild", "off"])
def test_build_is_shown_in_every_mode_of_the_cache(build_here, mode):
    check_shown_on_stderr(*build_here("# nothing", mode))


@pytest.mark.parametrize(
    "setup",
    [
        f"logging.basicConfig(level=logging.INFO, handlers=[{TO_STDOUT}])",
        "from detectron2.utils.logger import setup_logger; setup_logger(color=False)",
    ],
)
def test_build_is_shown_once_where_logging_is_set_up(tmp_path, setup):
    out, err = build_in_a_process(tmp_path, setup)
    check_shown_once(out)
    assert err == []


@pytest.mark.parametrize(
    "setup",
    [
        f"logging.getLogger('d2_trt').addHandler({TO_STDOUT}); logging.getLogger('d2_trt').setLevel('INFO')",
        "from d2_trt.logging import setup_logger; setup_logger(color=False)",
    ],
)
def test_build_is_shown_once_where_only_our_logging_is_set_up(build_here, setup):
    out, err = build_here(setup)
    check_shown_once(out)
    assert err == []


@pytest.mark.parametrize(
    "setup",
    [
        "logging.basicConfig()",
        "logging.getLogger('d2_trt').addHandler(logging.NullHandler())",
        "logging.getLogger('d2_trt').setLevel(logging.WARNING)",
        "logging.getLogger().setLevel(logging.ERROR)",
        "logging.disable(logging.INFO)",
        "from d2_trt.logging import setup_logger; setup_logger(distributed_rank=1)",
        "from detectron2.utils.logger import setup_logger; setup_logger(distributed_rank=1)",
    ],
)
def test_build_is_silent_where_the_application_wants_it(build_here, setup):
    assert build_here(setup) == ([], [])


def test_logging_that_is_set_up_during_a_build_takes_over(tmp_path):
    out, err = build_in_a_process(
        tmp_path, f"MIDDLE = 'logging.basicConfig(level=logging.INFO, handlers=[{TO_STDOUT}])'"
    )
    check_shown_once([*out, *err])
    assert "so far" in err[-1] and "so far" in out[0]


def test_builds_at_the_same_time_share_the_handler(capsys):
    with root_handlers():
        with shown_on_stderr(), shown_on_stderr():
            get_logger("builder").info("both")
        get_logger("builder").info("neither")
        with shown_on_stderr():
            get_logger("builder").info("one")
            assert len(get_logger().handlers) == 1
    assert get_logger().handlers == []
    assert [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()] == ["both", "one"]
