"""Which edits of a model make it another network."""

from __future__ import annotations

import copy
import functools
import logging
import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from d2_trt import cache_key
from d2_trt.errors import CacheError
from d2_trt.module_tree import describe_modules
from mask2former import MaskFormer
from tests.golden import MINI_MODELS, REPO, mini_cfg


class Thing:
    def __init__(self, factor):
        self.factor, self.owner = factor, self


def scaled_by(factor):
    return lambda x: factor * x


def make_block() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(0.5)
    block.activation = F.relu
    block.partial = functools.partial(F.gelu, approximate="none")
    block.scale = scaled_by(2)
    block.choices = {"sizes": [1, 2, 3], "names": {"a", "b"}}
    block.table = torch.arange(3.0)
    block.array = np.arange(3)
    block.thing = Thing(1)
    block.dtype = torch.float32
    block.cfg = CfgNode({"MODEL": {"DEPTH": 50, "WEIGHTS": "a.pkl", "MASK_FORMER": {}}, "OUTPUT_DIR": "a"})
    block.hidden = [nn.Linear(1, 1)]
    nn.init.constant_(block.hidden[0].weight, 0.5)
    nn.init.constant_(block.hidden[0].bias, 0.5)
    return block


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = make_block()

    def core(self, images):
        return self.block(images)


CHANGES = {
    "type": lambda b: b.__setitem__(1, nn.Sigmoid()),
    "order": lambda b: b.add_module("1", b._modules.pop("1")) or b.add_module("3", nn.Identity()),
    "stride": lambda b: setattr(b[0], "stride", (2, 2)),
    "function": lambda b: setattr(b, "activation", F.gelu),
    "partial": lambda b: setattr(b, "partial", functools.partial(F.gelu, approximate="tanh")),
    "closure": lambda b: setattr(b, "scale", scaled_by(3)),
    "lambda": lambda b: setattr(b, "scale", lambda x: x - 1),
    "nested list": lambda b: b.choices["sizes"].append(4),
    "set": lambda b: b.choices["names"].add("c"),
    "tensor": lambda b: b.table.add_(1),
    "array": lambda b: b.array.__setitem__(0, 9),
    "object": lambda b: setattr(b.thing, "factor", 2),
    "dtype": lambda b: setattr(b, "dtype", torch.float16),
    "config": lambda b: setattr(b.cfg.MODEL, "DEPTH", 101),
    "hidden module": lambda b: nn.init.constant_(b.hidden[0].weight, 0.6),
    "hook": lambda b: b.register_forward_hook(lambda module, inputs, output: -output),
    "own forward": lambda b: setattr(b[1], "forward", torch.tanh),
    "new attribute": lambda b: setattr(b[1], "slope", 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_edit_that_may_change_what_is_computed_is_noticed(change):
    model = Model()
    before = describe_modules(model)
    CHANGES[change](model.block)
    assert describe_modules(model) != before


KEPT = {
    "mode": lambda b: b.train(),
    "gradients": lambda b: b.requires_grad_(False),
    "output folder": lambda b: setattr(b.cfg, "OUTPUT_DIR", "b"),
    "file of the weights": lambda b: setattr(b.cfg.MODEL, "WEIGHTS", "b.pkl"),
    "equal values": lambda b: (setattr(b, "scale", scaled_by(2)), setattr(b, "thing", Thing(1))),
}


@pytest.mark.parametrize("change", KEPT)
def test_edit_that_changes_nothing_computed_is_not(change):
    model = Model()
    before = describe_modules(model)
    KEPT[change](model.block)
    assert describe_modules(model) == before == describe_modules(copy.deepcopy(model))


def test_what_lies_around_a_network_is_taken_by_its_type():
    descriptions = []
    for name in "ab":
        model = Model()
        model.block.lock, model.block.log = threading.Lock(), logging.getLogger(name)
        model.block.place = torch.device("cuda", ord(name) - ord("a"))
        descriptions.append(describe_modules(model))
    assert descriptions[0] == descriptions[1]


def test_attribute_without_data_is_refused():
    model = Model()
    model.block.table = torch.zeros(3, device="meta")
    with pytest.raises(CacheError, match="an attribute of a module is a tensor on meta"):
        describe_modules(model)


def scaling(core):
    @functools.wraps(core)
    def scaled(self, images):
        return self.gain * core(self, images)

    return scaled


def test_attribute_counts_however_deeply_it_lies():
    descriptions = []
    for value in (1, 2):
        model = Model()
        for _ in range(2000):
            value = [value]
        model.block.table = value
        descriptions.append(describe_modules(model))
    assert descriptions[0] != descriptions[1]


@pytest.mark.parametrize(
    "core",
    [
        lambda self, images: getattr(self, "gain") * images,  # noqa: B009
        lambda self, images: outside(self, images),
        lambda model, images: outside(model, images),
        lambda *args: outside(*args),
        lambda self, images: (lambda: self.gain * images)(),
        lambda self, images: self.helper(images),
        lambda self, images: self.held * images,
        lambda self, images: self.missing * images,
        scaling(lambda self, images: images),
        functools.partialmethod(lambda self, factor, images: self.gain * factor * images, 2),
    ],
    ids=[
        "by its name",
        "in a function",
        "under another name",
        "among arguments",
        "in a closure",
        "in a method",
        "in a cached property",
        "in __getattr__",
        "in a decorator",
        "in a part of a method",
    ],
)
def test_attributes_of_the_model_itself_count_however_core_comes_by_them(core):
    class Own(Model):
        def helper(self, images):
            return self.gain * images

        @functools.cached_property
        def held(self):
            return self.gain

        def __getattr__(self, name):
            return self.gain if name == "missing" else super().__getattr__(name)

    Own.core = core
    model = Own()
    model.gain = 2.0
    before = describe_modules(model)
    model.gain = 3.0
    assert describe_modules(model) != before


def outside(model, images):
    return model.gain * images


def test_attribute_counts_that_forward_may_set():
    class Lazy(nn.Module):
        mode = None

        def forward(self, x):
            if self.mode is None:
                self.mode = "nearest"
            return F.interpolate(x, scale_factor=2, mode=self.mode)

    models = [Model(), Model()]
    for model, mode in zip(models, ("nearest", "bilinear")):
        model.block[1] = Lazy()
        model.block[1].mode = mode
    assert describe_modules(models[0]) != describe_modules(models[1])


@pytest.mark.parametrize("edited", ["forward", "of a property", "called by it", "number"])
def test_class_typed_into_an_interpreter_counts_with_its_code(monkeypatch, edited):
    def typed(forward="x + self.shift", shift="1", helped="x - 1", number="2"):
        module = types.ModuleType("typed")
        monkeypatch.setitem(sys.modules, "typed", module)
        exec(
            "from torch import nn\n"
            f"NUMBER = {number}\n"
            f"def helper(x): return {helped}\n"
            "class Typed(nn.Module):\n"
            f"    shift = property(lambda self: {shift})\n"
            f"    def forward(self, x): return NUMBER * helper({forward})\n",
            vars(module),
        )
        model = Model()
        model.block[1] = module.Typed()
        return describe_modules(model)

    change = {
        "forward": {"forward": "x - self.shift"},
        "of a property": {"shift": "2"},
        "called by it": {"helped": "x - 2"},
        "number": {"number": "3"},
    }
    assert typed() == typed() != typed(**change[edited])


def test_subclass_says_itself_what_its_network_does_not_read():
    class Own(MaskFormer):
        def core(self, images):
            return super().core(images * self.size_divisibility)

    class Told(MaskFormer):
        around_network = MaskFormer.around_network | {"tag"}

    for kind, attribute, counts in (
        (MaskFormer, "size_divisibility", False),
        (MaskFormer, "tag", True),
        (Own, "size_divisibility", True),
        (Told, "tag", False),
    ):
        model = build_model(mini_cfg(MINI_MODELS[0]))
        model.__class__ = kind
        before = describe_modules(model)
        setattr(model, attribute, 64)
        assert (describe_modules(model) != before) == counts, (kind, attribute)


def test_description_is_the_same_in_every_process():
    lines = "from tests.d2_trt.test_module_tree import *; print(cache_key.digest(describe_modules(Model())))"
    other = subprocess.run(
        [sys.executable, "-c", lines],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.split() == [cache_key.digest(describe_modules(Model()))]


@pytest.mark.parametrize("name", MINI_MODELS)
def test_both_meta_architectures_are_one_network_which_running_does_not_change(name):
    models = []
    for architecture in ("MaskFormer", "TensorRTMaskFormer"):
        cfg = mini_cfg(name, ("MODEL.META_ARCHITECTURE", architecture, "MODEL.TENSORRT.ON_ERROR", "torch"))
        models.append(build_model(cfg).eval())
    first, second = map(describe_modules, models)
    assert first == second
    assert not any(path.startswith(("criterion", ":")) for path in first)  # training and post-processing
    with torch.no_grad():
        models[0].core(torch.rand(1, 3, 64, 96) * 255)
    assert describe_modules(models[0]) == first
