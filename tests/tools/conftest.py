"""What the tools' tests share."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def logger_as_before():
    """Tools set up d2_trt's logger; in the process of other tests, who read it through caplog, it must not stay so."""
    logger = logging.getLogger("d2_trt")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
