"""Every entry of the converter table runs, and gives what PyTorch gives: in the mini models, or in a call of its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from d2_trt import builder
from d2_trt.build_spec import BuildSpec
from d2_trt.converters import registry
from mask2former.modeling.transformer_decoder import attention_core
from tests.d2_trt.test_conversion import (
    DYNAMIC,
    OTHERS,
    STATIC,
    TRACED,
    Wrapped,
    attend,
    random_images,
    trace,
)
from tests.doubles.fake_tensorrt import use_tensorrt
from tests.doubles.fixtures import VERSIONS
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import MINI_MODELS, mini_model

WEIGHT = torch.linspace(-1, 1, 4 * 3 * 3 * 3).reshape(4, 3, 3, 3)
THREE = torch.tensor([1.0, 2.0, 3.0])


def in_place(operation):
    def function(x):
        y = x * 2 - 100
        return getattr(y, operation)(3.0) if operation != "relu_" else y.relu_()

    return function


def assigned(operation):
    """With the operator itself (+=, *=), on a tensor of its own."""

    def function(x):
        y = x + 1
        exec(f"y {operation} 3.0", None, scope := {"y": y})
        return scope["y"]

    return function


# By the entry of CONVERTERS that each is to run. What is not here, the mini models run.
CALLS = {
    "mask2former.modeling.transformer_decoder.attention_core.attention_mask": lambda x: (
        x.flatten(2)[:, None] * 0 + 1
    ).masked_fill(attention_core.attention_mask((x - 100).flatten(2)), -1.0),
    "torch.Tensor.__gt__": lambda x: x.masked_fill(x > 100, 0.0),
    "torch.Tensor.__lt__": lambda x: x.masked_fill(x < 100, 0.0),
    "torch.Tensor.gt": lambda x: x.masked_fill(x.gt(100), 0.0),
    "torch.Tensor.lt": lambda x: x.masked_fill(x.lt(100), 0.0),
    "torch.Tensor.masked_fill": lambda x: x.masked_fill(x < 100, 1.5),
    "torch.Tensor.__imul__": assigned("*="),
    "torch.Tensor.__isub__": assigned("-="),
    "torch.Tensor.__itruediv__": assigned("/="),
    "torch.Tensor.__mul__": lambda x: x * 3,
    "torch.Tensor.__radd__": lambda x: 3 + x,
    "torch.Tensor.__rdiv__": lambda x: (x + 1).__rdiv__(3),
    "torch.Tensor.__rmul__": lambda x: 3 * x,
    "torch.Tensor.__rsub__": lambda x: 3 - x,
    "torch.Tensor.__rtruediv__": lambda x: 3 / (x + 1),
    "torch.Tensor.add": lambda x: x.add(3),
    "torch.Tensor.add_": in_place("add_"),
    "torch.Tensor.clone": lambda x: x.clone() + 1,
    "torch.Tensor.detach": lambda x: x.detach() + 1,
    "torch.Tensor.div": lambda x: x.div(3),
    "torch.Tensor.half": lambda x: x.half().float(),
    "torch.Tensor.matmul": lambda x: (x / 255).matmul(
        torch.ones(1, 1, 1, 1).expand(1, 3, 1, 1) * x.transpose(2, 3)
    ),
    "torch.Tensor.mul": lambda x: x.mul(3),
    "torch.Tensor.relu_": in_place("relu_"),
    "torch.Tensor.roll": lambda x: x.roll((-3, 2), (2, 3)),
    "torch.Tensor.softmax": lambda x: (x / 50).softmax(1),
    "torch.Tensor.sub": lambda x: x.sub(3),
    "torch.Tensor.to": lambda x: x.to(torch.float32) + 1,
    "torch.Tensor.type_as": lambda x: x.type_as(THREE) + 1,
    "torch.Tensor.unsqueeze": lambda x: x.unsqueeze(-1),
    "torch.add": lambda x: torch.add(x, 3),
    "torch.batch_norm": lambda x: torch.batch_norm(
        x, THREE, THREE - 5, THREE * 10, THREE * 100, False, 0.1, 1e-5, False
    ),
    "torch.concat": lambda x: torch.concat([x, x + 1], 1),
    "torch.concatenate": lambda x: torch.concatenate([x, x + 1], -1),
    "torch.conv2d": lambda x: torch.conv2d(x, WEIGHT, None, 2, 1),
    "torch.div": lambda x: torch.div(x, 3),
    "torch.flatten": lambda x: torch.flatten(x, 1, 2),
    "torch.group_norm": lambda x: torch.group_norm(x, 3, THREE),
    "torch.layer_norm": lambda x: torch.layer_norm(x.transpose(1, 3), (3,), THREE, THREE),
    "torch.matmul": lambda x: torch.matmul(x / 255, x.transpose(2, 3)),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x - 300, 3, 2, 1),
    "torch.mul": lambda x: torch.mul(x, 3),
    "torch.nn.functional.relu": lambda x: F.relu(x - 100),
    "torch.nn.functional.scaled_dot_product_attention": lambda x: attend(
        x[:, :, 0::8, 0::8].flatten(2).transpose(1, 2)[:, None]
    ),
    "torch.nn.functional.softmax": lambda x: F.softmax(x / 50, 1),
    "torch.permute": lambda x: torch.permute(x, (0, 2, 3, 1)),
    "torch.relu": lambda x: torch.relu(x - 100),
    "torch.relu_": lambda x: torch.relu_(x - 100),
    "torch.softmax": lambda x: torch.softmax(x / 50, 1),
    "torch.sub": lambda x: torch.sub(x, 3),
    "torch.transpose": lambda x: torch.transpose(x, 1, -1),
    "torch.unbind": lambda x: torch.unbind(x, 1)[2],
    "torch.unsqueeze": lambda x: torch.unsqueeze(x, 2),
}


@pytest.fixture
def ran(monkeypatch) -> set[str]:
    """The entries of the table whose converters ran."""
    names = set()
    counterparts = registry._counterparts
    monkeypatch.setattr(
        registry, "_counterparts", lambda g, name, ctx: (names.add(name), counterparts(g, name, ctx))[1]
    )
    return names


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_entry_runs_and_equals_pytorch(trt, name, shapes, ran, monkeypatch):  # noqa: F811
    function = CALLS[name]
    network = trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch)
    assert name in ran
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        expected = function(images.clone())
        actual = network.evaluate({"images": images})["pred_masks"]
        loose = name == "torch.Tensor.half"  # precision is the policy's business: float32 here
        torch.testing.assert_close(actual, expected, rtol=1e-3 if loose else 1e-4, atol=1e-4)


@pytest.mark.slow
def test_no_entry_is_left_out(ran, monkeypatch):
    """A new converter needs a call above, where no mini model runs it (these are compared in test_conversion.py)."""
    with use_tensorrt(VERSIONS[0]) as module:
        for name in MINI_MODELS:
            trace(module, builder.Core(mini_model(name).cpu()), BuildSpec(**DYNAMIC), monkeypatch)
    known = [name for name in registry.CONVERTERS if registry.resolve(name) is not None]
    assert sorted(known) == sorted(registry.CONVERTERS), "names that no function has"
    assert not set(CALLS) - set(registry.CONVERTERS)
    assert not set(registry.CONVERTERS) - ran - set(CALLS)
