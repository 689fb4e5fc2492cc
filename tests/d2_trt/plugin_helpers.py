"""What tests of our TensorRT plugins share: the double that knows them, their layers, marks of tests with real engines."""

from __future__ import annotations

import pytest
import torch

from d2_trt import plugin
from d2_trt.errors import MissingDependencyError

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def registered(trt):
    """The double with our plugin in its registry."""
    registry = trt.get_plugin_registry()
    if not registry._has_ours():
        registry._register_ours()
    yield trt
    registry._forget_ours()


def plugin_layers(network) -> list:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return [layer for layer in layers if layer.type.name.startswith("PLUGIN")]


def by_module(network) -> dict:
    return {layer.name.split(":")[0]: layer for layer in plugin_layers(network)}


def real(test):
    """Marks of a test that runs our plugin in TensorRT."""

    def built() -> bool:
        try:
            return plugin.is_built()
        except MissingDependencyError:
            return False

    why = "the TensorRT plugin is not built: python setup.py build_ext --inplace, with TENSORRT_INCLUDE_DIR"
    for mark in (pytest.mark.tensorrt, pytest.mark.gpu, pytest.mark.skipif(not built(), reason=why)):
        test = mark(test)
    return test
