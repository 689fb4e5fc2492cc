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

from d2_trt.logging import follow_detectron2, get_logger, setup_logger

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
