"""What depends on the images enters no engine as a constant: it is converted, or refused by name, module and line."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack, to_dlpack

from d2_trt.build_spec import BuildSpec
from d2_trt.errors import ConversionError
from mask2former.modeling import shape_ops
from tests.d2_trt.test_conversion import DYNAMIC, OTHERS, STATIC, TRACED, Wrapped, random_images, trace
from tests.doubles.fixtures import trt_double as trt  # noqa: F401


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.celu(x) * x.size(0)


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


scripted_module = torch.jit.script(Scripted())
recorded = torch.jit.trace(lambda y: y + 1, torch.ones(1))


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ops.aten.celu.default(x)


def refused(trt, function, shapes, monkeypatch) -> str:  # noqa: F811
    """The message of the one error, which names operation, module and line."""
    with pytest.raises(ConversionError) as caught:
        trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch)
    message = str(caught.value)
    assert message.count("in module '") == 1
    assert len(re.findall(r"test_silent_constants\.py:\d+: ", message)) == 1
    return message


def compared(network, function, shapes) -> None:
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        expected = function(images.clone())
        actual = network.evaluate({"images": images})["pred_masks"]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


BOTH = pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])


# Sizes

SIZES = {
    "numel": lambda x: x * (1 / x.numel()),
    "numel as a factor": lambda x: x * x.numel(),
    "numel as a float": lambda x: x * float(x.numel()),
    "numel as a divisor": lambda x: x / x.nelement(),
    "numel, compared": lambda x: x + 1 if x.numel() > 100 else x,
    "torch.numel": lambda x: x * (1 / torch.numel(x)),
    "numel of memory": lambda x: x + torch.zeros(x.numel())[:1],
    "len": lambda x: x * (1 / len(x)),
    "control flow": lambda x: x + 1 if x.shape[2] > 80 else x,
    "nbytes": lambda x: x * (1 / x.nbytes),
    "level_shapes": lambda x: x * shape_ops.level_shapes([x])[0][1],
    "level_shapes, unpacked": lambda x: next(x * h * w for h, w in shape_ops.level_shapes([x])),
}


@pytest.mark.parametrize("name", SIZES)
def test_size_is_no_constant_of_a_dynamic_engine(trt, name, monkeypatch):  # noqa: F811
    message = refused(trt, SIZES[name], DYNAMIC, monkeypatch)
    assert "size of a traced tensor is read, by " in message and "STATIC True" in message


@pytest.mark.parametrize("name", SIZES)
def test_size_is_a_constant_of_a_static_engine(trt, name, monkeypatch):  # noqa: F811
    compared(trace(trt, Wrapped(SIZES[name]), BuildSpec(**STATIC), monkeypatch), SIZES[name], STATIC)


def test_traced_tensor_is_not_empty(trt, monkeypatch):  # noqa: F811
    def function(x):
        assert x.numel() and x.numel() > 0 and x.numel() != 0
        return x * 2 if x.numel() == 0 else x * 3

    compared(trace(trt, Wrapped(function), BuildSpec(**DYNAMIC), monkeypatch), function, DYNAMIC)


def test_as_many_tensors_as_the_traced_image_has_rows_are_refused(trt, monkeypatch):  # noqa: F811
    message = refused(trt, lambda x: x.unbind(2)[0][:, :, None], DYNAMIC, monkeypatch)
    assert "torch.Tensor.unbind" in message and "unknown size" in message


# Values

VALUES = {
    "item": lambda x: x * x[0, 0, 0, 0].item(),
    "tolist": lambda x: x * x.tolist()[0][0][0][0],
    "int": lambda x: x * int(x[0, 0, 0, 0]),
    "float": lambda x: x * float(x[0, 0, 0, 0]),
    "index": lambda x: x * [1.0, 2.0, 3.0][(x[0, 0, 0, 0] / 200).long()],
    "bool": lambda x: x + 1 if x[0, 0, 0, 0] < 10 else x,
    "in": lambda x: x + 1 if 3.0 in x else x,
    "numpy": lambda x: x + torch.from_numpy(x.numpy()),
    "text": lambda x: x * float(f"{x[0, 0, 0, 0]:.3f}"),
    "data": lambda x: x + x.data,
    "equality": lambda x: x + (x == x),
    "end of a slice": lambda x: x + torch.arange(9.0)[: (x < 300)[0, 0, 0, 0]],
    "number to fill with": lambda x: x.masked_fill(x < 100, x[0, 0, 0, 0]),
    "factor of a sum": lambda x: x.add(x, alpha=x[0, 0, 0, 0]),
    "weights of a convolution": lambda x: F.conv2d(x, x[0:1, :, 0:3, 0:3]),
    "bias of a convolution": lambda x: F.conv2d(x, torch.ones(3, 3, 1, 1), x[0, :, 0, 0]),
    "weights of a linear layer": lambda x: F.linear(x.transpose(1, 3), x[0, :, 0:3, 0]),
    "weights of a norm": lambda x: F.layer_norm(x.transpose(1, 3), (3,), x[0, :, 0, 0]),
    "statistics of a norm": lambda x: F.batch_norm(x, x[0, :, 0, 0], torch.ones(3)),
    "elements where a mask is": lambda x: x + x[x < 300][0],
    "nonzero": lambda x: x + x.nonzero().shape[0],
}


@BOTH
@pytest.mark.parametrize("name", VALUES)
def test_value_is_no_constant(trt, name, shapes, monkeypatch):  # noqa: F811
    refused(trt, VALUES[name], shapes, monkeypatch)


# Past the functions that have converters

PAST = {
    "TorchScript": (lambda x: x + scripted(x), r"TorchScript's .*scripted"),
    "TorchScript alone": (lambda x: scripted(x), r"TorchScript's .*scripted"),
    "module of TorchScript": (lambda x: x + scripted_module(x), r"TorchScript's forward"),
    "recorded function of TorchScript": (lambda x: x + recorded(x), r"TorchScript's .*lambda"),
    "operator": (lambda x: x + torch.ops.aten.celu(x), "celu"),
    "operator's overload": (lambda x: x + torch.ops.aten.celu.default(x), "celu"),
    "autograd function": (lambda x: x + Opaque.apply(x), "celu"),
    "function that takes a parameter": (lambda x: x + F.celu(nn.Parameter(x)), "celu"),
    "parameter": (lambda x: x + nn.Parameter(x), "add"),
    "subclass": (lambda x: x * 2 + x.as_subclass(nn.Parameter) * 3, "mul"),
    "DLPack": (lambda x: x + from_dlpack(to_dlpack(x)), "add"),
    "copy": (lambda x: x + torch.Tensor(x), r"aten\.alias"),
    "no overrides": (lambda x: x + without_overrides(x), r"aten\.celu"),
    "each of a batch": (lambda x: x + torch.vmap(torch.celu)(x), "vmap|celu|size"),
}


def without_overrides(x):
    with torch._C.DisableTorchFunction():
        return torch.celu(x)


@BOTH
@pytest.mark.parametrize("name", PAST)
def test_what_goes_past_the_guard_is_refused_by_name(trt, name, shapes, monkeypatch):  # noqa: F811
    function, operation = PAST[name]
    assert re.search(operation, refused(trt, function, shapes, monkeypatch))


def test_torchscript_runs_on_constants_and_afterwards(trt, monkeypatch):  # noqa: F811
    def function(x):
        return x + scripted(torch.full((1,), 2.0))

    compared(trace(trt, Wrapped(function), BuildSpec(**DYNAMIC), monkeypatch), function, DYNAMIC)
    images = random_images(TRACED)
    assert torch.equal(scripted(images), torch.celu(images) * 2)


@BOTH
def test_function_of_c_that_a_module_took_before_the_trace_is_converted(trt, shapes, monkeypatch):  # noqa: F811
    relu = torch.relu

    def function(x, relu=relu):
        return relu(x - 100)

    compared(trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch), function, shapes)


def test_output_that_is_no_function_of_the_images_is_named(trt, monkeypatch):  # noqa: F811
    with pytest.raises(ConversionError, match=r"output pred_logits of module 'model'.*same for every image"):
        trace(trt, Wrapped(lambda x: torch.ones(1, 3)), BuildSpec(**STATIC), monkeypatch)


# In another thread


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def unseen(x):
    """In a thread whose error nobody looks at, and which leaves a number for what it could not compute."""
    found = [torch.zeros(1)]
    thread = Thread(target=lambda: found.append(torch.celu(x)))
    thread.start()
    thread.join()
    return x + found[-1]


def caught(x):
    try:
        return x + in_a_thread(lambda: x * 2)
    except ConversionError:
        return x + 1


POOL = ThreadPoolExecutor(1)
IN_A_THREAD = {
    "function that has a converter": (lambda x: x + in_a_thread(lambda: x * 2), "mul"),
    "function that has none": (lambda x: x + in_a_thread(lambda: torch.celu(x)), "celu"),
    "function of a module": (lambda x: x + in_a_thread(F.relu, x), "relu"),
    "in a list": (lambda x: x + in_a_thread(torch.cat, [x, x])[: len(TRACED)][:1], "cat"),
    "index": (lambda x: x + in_a_thread(lambda: x[:, 0:1]), "__getitem__"),
    "value": (lambda x: x + in_a_thread(lambda: x[0, 0, 0, 0].item()), "__getitem__"),
    "number": (lambda x: x + in_a_thread(lambda: (x * 2).item() if x.dim() == 0 else x.max().item()), "max"),
    "memory": (lambda x: x + in_a_thread(lambda: x.numpy()[0, 0, 0, 0]), "numpy"),
    "computed": (lambda x: x + in_a_thread(torch.celu, F.relu(x - 100) * 2), "celu"),
    "computed as a whole": (lambda x: x + in_a_thread(torch.celu, shape_ops.resize_like(x, x)), "celu"),
    "argument by name": (lambda x: x + in_a_thread(lambda: torch.mul(torch.ones(1), other=x)), "mul"),
    "in place": (lambda x: (lambda y: (in_a_thread(y.add_, 1), y)[1])(x * 2), "add_"),
    "copied to": (lambda x: x + in_a_thread(torch.zeros(TRACED).copy_, x), "copy_"),
    "parameter": (lambda x: x + in_a_thread(lambda: nn.Parameter(x)), "detach"),
    "operator": (lambda x: x + in_a_thread(lambda: torch.ops.aten.celu.default(x)), "celu"),
    "autograd function": (lambda x: x + in_a_thread(lambda: Opaque.apply(x)), "celu"),
    "TorchScript": (lambda x: x + in_a_thread(lambda: scripted(x)), "scripted"),
    "thread from before": (lambda x: x + POOL.submit(lambda: torch.celu(x)).result(), "celu"),
    "error that nobody sees": (unseen, "celu"),
    "error that is caught": (caught, "mul"),
}


@BOTH
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", IN_A_THREAD)
def test_traced_tensor_is_of_no_use_to_another_thread(trt, name, shapes, monkeypatch):  # noqa: F811
    POOL.submit(int).result()  # the thread is there
    function, operation = IN_A_THREAD[name]
    message = refused(trt, function, shapes, monkeypatch)
    assert re.search(operation, message.split(" in module ")[0]), message
    if operation != "scripted":
        assert "in another thread than that of the model" in message


@BOTH
def test_other_threads_work_for_themselves(trt, shapes, monkeypatch):  # noqa: F811
    """On constants, their own tensors and types of traced ones."""
    weight = nn.Parameter(torch.full((1, 3, 1, 1), 2.0))

    def elsewhere(x):
        assert x.dtype is torch.float32 and x.dim() == 4
        own = torch.rand(3, 4)
        own[0] = torch.from_numpy(own.numpy()[1])
        return scripted(torch.cat([F.relu(weight) + own.sum().item() * 0, weight * 2], 1)[:, 0:3]).clamp(1, 6)

    def function(x):
        return F.relu(x) * in_a_thread(elsewhere, x)

    network = trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch)
    for shape in (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,):
        images = random_images(shape)
        assert torch.equal(network.evaluate({"images": images})["pred_masks"], images * 2)


def test_tensors_are_for_all_threads_after_the_trace(trt, monkeypatch):  # noqa: F811
    kept = []

    def function(x):
        kept.append(x * 2)
        return kept[-1] + 1

    trace(trt, Wrapped(function), BuildSpec(**STATIC), monkeypatch)
    assert type(kept[0]) is torch.Tensor
    assert torch.equal(in_a_thread(torch.celu, kept[0]), random_images(TRACED) * 2)


# In place


def add_to_a_view(x):
    y = x * 2
    y[:, 0].add_(1)
    return y


def add_to_a_transposed(x):
    y = x * 2
    z = y.transpose(1, 2)
    z += 1
    return y


def add_under_a_view(x):
    y = x * 2
    z = y[:, 0:1]
    y += 1
    return y + z


def relu_of_a_detached(x):
    y = x - 100
    F.relu(y.detach(), inplace=True)
    return y


def write_to_a_constant(x):
    y = torch.zeros(TRACED)
    y += x
    return y * 2


def write_to_a_part_of_a_constant(x):
    y = torch.zeros(TRACED)
    y[:, 0].add_(x[:, 0])
    return y + x


def assign_a_part(x):
    y = x * 2
    y[:, 0] = 1
    return y


def write_out(x):
    y = x * 2
    torch.add(x, 1, out=y)
    return y


def softmax_out(x):
    y = x * 2
    z = y[:, 0:1]
    torch.softmax(x, 1, out=y)
    return z


def write_out_to_a_constant(x):
    y = torch.empty(TRACED)
    torch.matmul(x, x.transpose(2, 3), out=y)
    return y


def copied_to(x):
    return x + torch.zeros(TRACED).copy_(x)


@BOTH
@pytest.mark.parametrize(
    "function",
    [
        add_to_a_view,
        add_to_a_transposed,
        add_under_a_view,
        relu_of_a_detached,
        write_to_a_constant,
        write_to_a_part_of_a_constant,
        assign_a_part,
        write_out,
        softmax_out,
        write_out_to_a_constant,
        copied_to,
    ],
    ids=lambda function: function.__name__,
)
def test_write_that_others_see_is_refused(trt, function, shapes, monkeypatch):  # noqa: F811
    refused(trt, function, shapes, monkeypatch)


@pytest.mark.parametrize("write", ["add_", "zero_"])
def test_write_to_a_constant_that_was_repeated_for_each_image_is_refused(trt, write, monkeypatch):  # noqa: F811
    def function(x):
        c = torch.ones(1, 1, 1, 1)
        y = shape_ops.expand_batch_like(c, x)
        getattr(c, write)(*[1] * (write == "add_"))
        return x * y

    message = refused(trt, function, DYNAMIC, monkeypatch)
    assert write in message and "compute a new one instead" in message


def relu_in_place(x):
    y = x - 100
    F.relu(y, inplace=True)
    F.relu_(y)
    return y


def constants_in_place(x):
    c = torch.ones(1, 3, 1, 1)
    y = x * c
    c[:, 0].add_(1)
    c *= 5
    return y + x * c


@BOTH
@pytest.mark.parametrize(
    "function", [relu_in_place, constants_in_place], ids=lambda function: function.__name__
)
def test_write_that_nothing_else_sees_is_converted(trt, function, shapes, monkeypatch):  # noqa: F811
    compared(trace(trt, Wrapped(function), BuildSpec(**shapes), monkeypatch), function, shapes)


def test_a_constant_that_comes_through_is_left_a_constant(trt, monkeypatch):  # noqa: F811
    weight = torch.full((1, 3, 1, 1), 2.0)

    def function(x):
        return x * weight.type_as(x)

    for _ in range(2):  # a counterpart that stays would be of the first network
        compared(trace(trt, Wrapped(function), BuildSpec(**DYNAMIC), monkeypatch), function, DYNAMIC)
    assert not hasattr(weight, "_trt")


def test_tensor_that_the_model_kept_from_another_build_is_refused(trt, monkeypatch):  # noqa: F811
    kept = []

    def function(x):
        kept.append(x * 2)
        return x + kept[0]

    trace(trt, Wrapped(function), BuildSpec(**STATIC), monkeypatch)
    assert "another build, which the model kept" in refused(trt, function, STATIC, monkeypatch)
