"""tools/precision_emulation.py: where it rounds, and that a TensorRT network with the same pins errs as much."""

from __future__ import annotations

import pytest
import torch
from precision_emulation import emulated, operation_times
from torch import nn
from torch.nn import functional as F

from d2_trt import builder
from d2_trt.build_spec import BuildSpec, precision_policy
from mask2former.modeling import fused_ops
from mask2former.modeling.transformer_decoder import attention_core
from mask2former.modeling.transformer_decoder.position_encoding import PositionEmbeddingSine
from tests.d2_trt.test_conversion import STATIC, TRACED, random_images, trace
from tests.doubles.fake_tensorrt import use_tensorrt
from tests.doubles.fixtures import VERSIONS
from tests.golden import mini_model, relative_error

HALF = torch.float16


def half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


class Net(nn.Module):
    """A function in the place of a model, with a module in it."""

    def __init__(self, function):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.pe_layer = PositionEmbeddingSine(4)
        self.norm = nn.BatchNorm2d(6)
        self.function = function
        torch.manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape) + 0.1
        self.norm.running_mean, self.norm.running_var = torch.rand(6), torch.rand(6) * 1e-7
        self.eval()

    def core(self, x):
        return self.function(self, x)


def run(function, is_low=lambda name: True, shape=(2, 6)):
    net = Net(function)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    with torch.no_grad(), emulated(net, is_low, HALF):
        return net.core(x), x, net


def test_operation_rounds_its_inputs_and_its_output_once():
    out, x, net = run(lambda net, x: net.inner(x))
    assert torch.equal(out, half(F.linear(half(x), half(net.inner.weight), half(net.inner.bias))))
    assert not torch.equal(out, net.inner(x)) and out.dtype == torch.float32


def test_module_decides_for_its_own_operations_alone():
    def function(net, x):
        return net.inner(x) * 3

    out, x, net = run(function, lambda name: name == "inner")
    assert torch.equal(out, half(F.linear(half(x), half(net.inner.weight), half(net.inner.bias))) * 3)
    out, x, net = run(function, lambda name: name == "")
    assert torch.equal(out, half(half(net.inner(x)) * 3))


def test_moved_elements_keep_their_type():
    out, x, _ = run(
        lambda net, x: torch.cat([x.flatten()[None].unsqueeze(0).transpose(1, 2), x.reshape(1, -1, 1)])
    )
    assert torch.equal(out[1].flatten(), x.flatten())


def test_operation_in_place_writes_to_its_argument():
    def function(net, x):
        x = x.clone()
        x.mul_(1.001)
        x += 0.1
        return x

    out, x, _ = run(function)
    assert torch.equal(out, half(half(half(x) * 1.001) + 0.1))


def test_statistics_of_a_norm_are_not_rounded():
    """Half of 1e-7 is none at all; an engine has them in its factors."""
    out, x, net = run(lambda net, x: net.norm(x), shape=(1, 6, 2, 2))
    with torch.no_grad():
        assert torch.equal(out, half(net.norm(half(x)))) and out.isfinite().all()


def test_attention_rounds_its_logits():
    out, x, _ = run(
        lambda net, x: F.scaled_dot_product_attention(x * 30, x * 30, x, scale=1.0), shape=(1, 1, 5, 6)
    )
    scaled = half(half(x) * 30)
    logits = half(scaled @ scaled.transpose(2, 3))
    assert torch.equal(out, half(half(logits.softmax(-1)) @ half(x)))


def test_position_encoding_is_always_float32():
    out, x, net = run(lambda net, x: net.pe_layer(x), shape=(1, 6, 3, 5))
    assert torch.equal(out, net.pe_layer(x))
    assert not torch.equal(out, half(out))


def test_attention_of_our_plugin_is_one_operation_with_an_exact_mask_embedding():
    rng = torch.Generator().manual_seed(5)
    q, pos, keys, values, embed, features = (
        torch.randn(1, n, 8, generator=rng) * 4 for n in (3, 3, 9, 9, 3, 9)
    )
    net = Net(lambda net, x: attention_core.masked_attention(q, pos, keys, values, 0, embed, features, 2))
    with torch.no_grad():
        with emulated(net, lambda name: True, HALF, ["attention"]):
            plugin = net.core(q)
        with emulated(net, lambda name: True, HALF):
            layers = net.core(q)
        with emulated(net, lambda name: False, HALF, ["attention"]):
            assert torch.equal(
                net.core(q), attention_core.masked_attention(q, pos, keys, values, 0, embed, features, 2)
            )
        rounded = (half(q), half(pos), half(keys), half(values), 0, embed, half(features), 2)
        assert torch.equal(plugin, half(attention_core.masked_attention(*rounded)))
    assert not torch.equal(plugin, layers)


def test_norm_of_our_plugin_rounds_as_its_norm_says():
    norm = nn.LayerNorm(6)

    def function(net, x):
        return fused_ops.residual_layer_norm(x, x * 100, norm)

    net = Net(function)
    net.normalise = norm  # a module of the model
    x = torch.rand(2, 6)
    with torch.no_grad():
        whole, mixed = half(norm(x + x * 100)), norm(x + half(half(x) * 100))
        with emulated(net, lambda name: name == "normalise", HALF, ["normalization"]):
            assert torch.equal(net.core(x), whole)
        with emulated(net, lambda name: name == "", HALF, ["normalization"]):
            assert torch.equal(net.core(x), mixed)


def test_images_that_our_plugin_normalises_are_rounded_once():
    mean, std = torch.tensor(123.675), torch.tensor(58.395)
    net = Net(lambda net, x: fused_ops.normalize_images(x, mean, std))
    x = torch.rand(2, 6) * 255
    exact = net.core(x)
    with emulated(net, lambda name: True, HALF, ["normalization"]):
        assert torch.equal(net.core(x), half(exact))
    with emulated(net, lambda name: True, HALF):
        assert not torch.equal(net.core(x), half(exact))
    with emulated(net, lambda name: False, HALF, ["normalization"]):
        assert torch.equal(net.core(x), exact)


def test_norm_with_positions_rounds_each_output_once():
    norm, position = nn.LayerNorm(6), torch.rand(1, 4, 6)

    def function(net, x):
        return fused_ops.residual_layer_norm_and_position(x, x, norm, position)

    net = Net(function)
    net.normalise = norm  # a module of the model
    x = torch.rand(2, 4, 6)
    with torch.no_grad():
        out = norm(x + x)
        with emulated(net, lambda name: name == "normalise", HALF, ["normalization"]):
            assert all(map(torch.equal, net.core(x), (half(out), half(out + position))))
        with emulated(net, lambda name: False, HALF, ["normalization"]):
            assert all(map(torch.equal, net.core(x), (out, out + position)))


def test_overflow_shows():
    out, _, _ = run(lambda net, x: x * 1e6)
    assert out.isinf().all()


def test_model_is_as_before_afterwards():
    def function(net, x):
        if x.sum() > 0:
            raise RuntimeError("in the middle")
        return net.inner(x)

    net = Net(function)
    with pytest.raises(RuntimeError, match="in the middle"), emulated(net, lambda name: True, HALF):
        net.core(torch.ones(1, 6))
    assert not net.inner._forward_hooks and not net.inner._forward_pre_hooks
    x = torch.rand(2, 6)
    assert torch.equal(net.inner(x), F.linear(x, net.inner.weight, net.inner.bias))


def test_times_are_of_computing_operations_by_module():
    net = Net(
        lambda net, x: (net.inner(x).flatten() * 2 + 1).relu_() + net.pe_layer(x[None, :, :, None]).sum()
    )
    with torch.no_grad():
        times = operation_times(net, torch.rand(2, 6), HALF, repeats=2)
    assert {name: entry.count for name, entry in times.items()} == {"inner": 1, "": 5}
    assert all(entry.float32_ms > 0 and entry.half_ms > 0 for entry in times.values())


def test_pinned_modules_of_a_model_are_exact():
    model = mini_model("resnet50-mini").cpu()
    images = random_images((1, 3, 64, 96))
    with torch.no_grad():
        logits, masks = model.core(images)
        with emulated(model, lambda name: False, HALF):
            assert all(map(torch.equal, model.core(images), (logits, masks)))
        with emulated(model, lambda name: name.endswith("class_embed"), HALF):
            low_logits, low_masks = model.core(images)
    assert torch.equal(low_masks, masks) and 0 < relative_error(low_logits, logits) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("pins", [(), ("sem_seg_head.predictor*",), ("=sem_seg_head.predictor", "backbone")])
def test_error_is_that_of_the_network_with_the_same_pins(pins, monkeypatch):
    """The double of TensorRT 8.6 computes each layer in its type. Sums in another order, and pixels at which an attention
    mask flips, make other numbers of it: the size of most errors is compared."""
    model = mini_model("resnet50-mini").cpu()
    images = random_images(TRACED)
    spec = BuildSpec(**STATIC, precision="fp16", fp32_modules=pins)
    with use_tensorrt(VERSIONS[0]) as trt:
        outputs = trace(trt, builder.Core(model), spec, monkeypatch).evaluate({"images": images})
    policy = precision_policy(spec)
    with torch.no_grad():
        expected = model.core(images)
        with emulated(model, lambda name: policy(name) == HALF, HALF):
            actual = model.core(images)
    for name, emulation, reference in zip(builder.OUTPUTS, actual, expected):
        engine_error, emulated_error = ((x - reference).abs().median() for x in (outputs[name], emulation))
        assert 1e-5 < engine_error and 1 / 3 < emulated_error / engine_error < 3, name
