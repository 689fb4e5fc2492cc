"""What the tools' tests share."""

from __future__ import annotations

import logging

import pytest

LOGGERS = ("d2_trt", "detectron2", "fvcore", "mask2former")


@pytest.fixture(autouse=True)
def loggers_as_before():
    """Tools set up loggers; in the process of other tests, who read them through caplog, they must not stay so.

    Handlers that tests elsewhere have left, for a stream that pytest has closed since, are out of the way meanwhile.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = [
            h for h in logger.handlers if not getattr(getattr(h, "stream", None), "closed", False)
        ]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
