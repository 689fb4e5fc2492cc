"""What the plugins of LayerNorm, GroupNorm and images' normalisation refuse."""

from __future__ import annotations

import pytest

from d2_trt import compat, plugin
from tests.d2_trt.plugin_helpers import BF16, F32
from tests.d2_trt.plugin_helpers import registered as registered
from tests.doubles.fake_tensorrt import build_network
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.doubles.trt_api import Refused

IMAGES = {"out_type": F32, "channels": 3}
LAYER = {"x_type": F32, "residual_type": -1, "position_type": -1, "out_type": F32, "epsilon": 1e-5}
GROUP = {"x_type": F32, "out_type": F32, "channels": 8, "groups": 2, "relu": 0, "epsilon": 1e-5}


def network_of(trt, kind, fields, *shapes):  # noqa: F811
    network = build_network(trt)
    inputs = [network.add_input(f"input{i}", trt.float32, shape) for i, shape in enumerate(shapes)]
    network.mark_output(plugin.add_layer(network, kind, inputs, fields).get_output(0))
    return network


@pytest.mark.parametrize(
    ("kind", "fields", "shapes", "told"),
    [
        (plugin.LAYER_NORM, LAYER, [(2, 8), (7,), (8,)], r"weight \(7,\) and bias \(8,\) for x \(2, 8\)"),
        (plugin.LAYER_NORM, LAYER, [(2, 8), (8,)], "2 inputs; D2TRTLayerNorm takes 3"),
        (plugin.LAYER_NORM, LAYER, [(2, 8), (8,), (8,), (2, 8)], "4 inputs; D2TRTLayerNorm takes 3"),
        (
            plugin.LAYER_NORM,
            {**LAYER, "residual_type": F32},
            [(2, 8), (8,), (8,), (1, 8)],
            r"a residual \(1, 8\) for x \(2, 8\)",
        ),
        (
            plugin.LAYER_NORM,
            {**LAYER, "position_type": F32},
            [(2, 3, 8), (8,), (8,), (2, 3, 8)],
            r"a position \(2, 3, 8\) for x \(2, 3, 8\)",
        ),
        (
            plugin.LAYER_NORM,
            {**LAYER, "position_type": F32},
            [(2, 8), (8,), (8,)],
            "3 inputs; D2TRTLayerNorm takes 4",
        ),
        (plugin.GROUP_NORM, GROUP, [(2, 8, 3), (8,), (8,)], "ranks must be 4, 1, 1"),
        (plugin.GROUP_NORM, GROUP, [(2, 12, 3, 3), (12,), (12,)], "12 weights, 12 biases; made for 8"),
        (plugin.NORMALIZE_IMAGES, IMAGES, [(3, 4, 4), (3,), (3,)], "ranks must be 4, 1, 1"),
        (plugin.NORMALIZE_IMAGES, IMAGES, [(2, 3, 4, 4), (3,), (1,)], "3 means, 1 deviations"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(registered, kind, fields, shapes, told):
    with pytest.raises(Refused, match=told):
        network_of(registered, kind, fields, *shapes).check()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (plugin.LAYER_NORM, {**LAYER, "residual_type": 3}),
        (plugin.LAYER_NORM, {**LAYER, "position_type": 3}),
        (plugin.LAYER_NORM, {**LAYER, "epsilon": -1.0}),
        (plugin.GROUP_NORM, {**GROUP, "groups": 3}),
        (plugin.GROUP_NORM, {**GROUP, "relu": 2}),
        (plugin.GROUP_NORM, {**GROUP, "groups": 0}),
        (plugin.NORMALIZE_IMAGES, {**IMAGES, "channels": 0}),
    ],
)
def test_fields_that_are_not_allowed(registered, kind, fields):
    with pytest.raises(
        ValueError, match=f"{kind.name} is not to be had with {next(iter(fields))} torch.float32"
    ):
        network_of(registered, kind, fields, (2, 8), (8,), (8,))


def test_bfloat16_needs_tensorrt_10(registered):
    fields = {**LAYER, "out_type": BF16}
    if compat.strongly_typed():
        network_of(registered, plugin.LAYER_NORM, fields, (2, 8), (8,), (8,)).check()
    else:
        with pytest.raises(ValueError, match=r"out_type torch\.bfloat16"):
            network_of(registered, plugin.LAYER_NORM, fields, (2, 8), (8,), (8,))
