"""Loggers of d2_trt, in detectron2's format where detectron2's logging is set up."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator

ROOT = "d2_trt"


def get_logger(name: str = ROOT) -> logging.Logger:
    """The logger `d2_trt.NAME`; a name that begins with `d2_trt`, such as a module's __name__, is kept.

    No handler is added: what is shown where is the application's business (setup_logger, follow_detectron2), and
    shown_on_stderr() is for one that has not seen to it.
    """
    if name != ROOT and not name.startswith(ROOT + "."):
        name = f"{ROOT}.{name}"
    return logging.getLogger(name)


def setup_logger(
    output: str | os.PathLike | None = None, *, distributed_rank: int | None = None, color: bool = True
) -> logging.Logger:
    """Show d2_trt's messages as detectron2's `setup_logger` shows its own, and write them to the same file.

    Args:
        output: a log file, or the folder of log.txt, such as cfg.OUTPUT_DIR; None writes no file.
        distributed_rank: None asks detectron2. Only rank 0 prints; every rank writes a file.
    """
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger as detectron2_setup_logger

    rank = comm.get_rank() if distributed_rank is None else distributed_rank
    output = None if output is None else os.fspath(output)
    return detectron2_setup_logger(output, distributed_rank=rank, color=color, name=ROOT)


def follow_detectron2() -> bool:
    """Send d2_trt's messages where detectron2's go, unless the application has set up logging of its own.

    `setup_logger()` alone, as in detectron2's tutorials, covers the logger "detectron2" only; a build of minutes
    would then be silent. Returns whether handlers were taken over.
    """
    ours, theirs = logging.getLogger(ROOT), logging.getLogger("detectron2")
    if ours.handlers or logging.getLogger().handlers or not theirs.handlers:
        return False
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.setLevel(theirs.level)
    ours.propagate = False
    return True


class _Stderr(logging.StreamHandler):
    """Writes to what is sys.stderr at the moment, but nothing that another handler takes, as logging.lastResort does."""

    def __init__(self):
        logging.Handler.__init__(self, logging.INFO)  # StreamHandler's would keep today's sys.stderr
        self.setFormatter(logging.Formatter("[%(asctime)s %(name)s] %(message)s", "%m/%d %H:%M:%S"))
        self.builds = 0  # at work
        self.level_before = logging.NOTSET

    @property
    def stream(self):
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        if sys.stderr is not None:
            super().emit(record)


def _is_set_up() -> bool:
    ours, theirs = logging.getLogger(ROOT), logging.getLogger("detectron2")
    # detectron2's setup_logger turns propagation off, on ranks without a handler too.
    return bool(ours.handlers or logging.getLogger().handlers) or not (ours.propagate and theirs.propagate)


_stderr = _Stderr()
_guard = threading.Lock()


@contextlib.contextmanager
def shown_on_stderr() -> Iterator[None]:
    """Inside, d2_trt's messages reach stderr where nobody has set up logging: work of minutes must not look like a hang.

    A handler on the logger "d2_trt" or on the root logger, be it a NullHandler, keeps stderr as it is, and so does
    detectron2's setup_logger, which is silent on ranks other than 0, or a level that was set to leave INFO out. Afterwards
    all is as it was.
    """
    ours, root = logging.getLogger(ROOT), logging.getLogger()
    with _guard:
        if not _stderr.builds and not (follow_detectron2() or _is_set_up()):
            _stderr.level_before = ours.level
            if (
                ours.level == logging.NOTSET and logging.INFO < root.level <= logging.WARNING
            ):  # Python's default
                ours.setLevel(logging.INFO)
            ours.addHandler(_stderr)
        shown = _stderr in ours.handlers
        _stderr.builds += shown
    try:
        yield
    finally:
        with _guard:
            _stderr.builds -= shown
            if shown and not _stderr.builds:
                ours.removeHandler(_stderr)
                ours.setLevel(_stderr.level_before)
