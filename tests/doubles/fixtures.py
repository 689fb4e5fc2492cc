"""The fixture `trt`: `from tests.doubles.fixtures import trt_double` in a test file, or in its conftest.py."""

from __future__ import annotations

import pytest

from .fake_tensorrt import use_tensorrt
from .trt_stubs import requirements

VERSIONS = list(requirements())


@pytest.fixture(name="trt", params=VERSIONS, ids=lambda version: f"tensorrt-{version}")
def trt_double(request):
    """The double of each version of TensorRT in turn: weakly typed 8.6, strongly typed 10 and 11."""
    with use_tensorrt(request.param) as module:
        yield module
