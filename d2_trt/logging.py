"""Loggers of d2_trt, in detectron2's format where detectron2's logging is set up."""

from __future__ import annotations

import logging
import os

ROOT = "d2_trt"


def get_logger(name: str = ROOT) -> logging.Logger:
    """The logger `d2_trt.NAME`; a name that begins with `d2_trt`, such as a module's __name__, is kept.

    No handler is added: what is shown where is the application's business (setup_logger, follow_detectron2).
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
