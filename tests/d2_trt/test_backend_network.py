"""An engine is kept as that of the network that it was built from, whatever becomes of the model meanwhile."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from d2_trt import builder, cache_key
from d2_trt.errors import BuildError
from tests.d2_trt.backend_helpers import TinyModel, entries, equal, images, make_backend
from tests.d2_trt.backend_helpers import workshop as workshop


def before_every_build(workshop, monkeypatch, edit):
    def build(model, *rest):
        edit(model)
        return workshop.build_engine(model, *rest)

    monkeypatch.setattr(builder, "build_engine", build)


def test_size_built_after_an_unannounced_edit_is_not_kept_as_the_old_weights(workshop):
    old = TinyModel()
    edited = copy.deepcopy(old)
    backend = make_backend(edited, STATIC=True)
    backend(images(1, 64, 64))
    with torch.no_grad():
        edited.head.weight.mul_(3)
    assert equal(backend(images(1, 64, 96)), edited.core(images(1, 64, 96)))
    assert equal(backend(images(1, 64, 64)), edited.core(images(1, 64, 64)))  # nor is what is in memory
    assert equal(make_backend(old, STATIC=True)(images(1, 64, 96)), old.core(images(1, 64, 96)))


def test_engine_of_the_old_weights_is_not_run_while_the_new_ones_are_read(workshop, monkeypatch):
    backend = make_backend(model := TinyModel(0))
    backend(images())
    digest, reading, results = cache_key.weights_digest, threading.Event(), []
    going_on = threading.Event()

    def slow(module):
        reading.set()
        assert going_on.wait(10)
        return digest(module)

    def ask():
        results.append(backend(images()))

    monkeypatch.setattr(cache_key, "weights_digest", slow)
    model.load_state_dict(TinyModel(1).state_dict())
    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert reading.wait(10)
    threads[1].start()
    threads[1].join(0.3)  # time to take what is in memory
    going_on.set()
    for thread in threads:
        thread.join(10)
    assert len(results) == 2 and all(equal(r, TinyModel(1).core(images())) for r in results)


@pytest.mark.parametrize("when", ["before the trace", "after it"])
def test_weights_loaded_during_a_build_begin_it_anew(workshop, monkeypatch, tmp_path, caplog, when):
    model, others = TinyModel(0), [TinyModel(7).state_dict()]

    def build(model, *rest):
        if when == "after it":
            built = workshop.build_engine(model, *rest)
        if others:
            model.load_state_dict(others.pop())
        return built if when == "after it" else workshop.build_engine(model, *rest)

    monkeypatch.setattr(builder, "build_engine", build)
    backend = make_backend(model)
    assert equal(backend(images()), TinyModel(7).core(images()))
    assert len(workshop.built) == 2 and len(entries(tmp_path)) == 1
    assert caplog.text.count("one of what it is now is to follow") == 1
    assert equal(make_backend(TinyModel(7))(images()), TinyModel(7).core(images()))
    assert len(workshop.built) == 2
    assert equal(make_backend(TinyModel(0))(images()), TinyModel(0).core(images()))
    assert len(workshop.built) == 3


def test_model_that_changes_in_every_build_is_an_error_and_keeps_nothing(workshop, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        before_every_build(workshop, patch, lambda model: model.head.bias.data.add_(1))
        backend = make_backend(model := TinyModel())
        with pytest.raises(BuildError, match="the model changed 3 times while its engine was built"):
            backend(images())
    assert entries(tmp_path) == []
    assert equal(backend(images()), model.core(images()))  # it has come to rest


def test_edit_before_the_first_real_image_is_told_from_a_wrong_engine(workshop):
    backend = make_backend(model := TinyModel())
    backend.prepare()  # compared on drawn scenes alone
    with torch.no_grad():
        model.backbone.weight.mul_(-1)
    assert equal(backend(images()), model.core(images()))
    assert len(workshop.built) == 2


def test_weights_loaded_before_an_engine_meets_its_first_image_count_there(workshop):
    backend = make_backend(model := TinyModel(0))
    backend.prepare()
    meet = backend._meet_real

    def meet_later(*args):
        backend._meet_real = meet
        model.load_state_dict(TinyModel(1).state_dict())
        return meet(*args)

    backend._meet_real = meet_later
    assert equal(backend(images()), TinyModel(1).core(images()))


class Activated(TinyModel):
    """A model with a module, an attribute, a table and a counter of its own in what core() computes."""

    around_network = frozenset({"core_calls", "threshold", "metadata"})

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act
        self.gain = 2.0
        self.table = {}
        self.threshold = 0.5  # of what follows the network

    def core(self, images):
        logits, masks = super().core(images)
        self.table[tuple(images.shape)] = len(self.table)
        return logits, self.gain * self.act(masks)

    def postprocess(self, masks):
        return masks > self.threshold


def test_another_module_is_another_engine(workshop):
    backend = make_backend(model := Activated(nn.ReLU()))
    backend(images())
    model.act = nn.Sigmoid()
    backend.weights_changed()
    assert equal(backend(images()), model.core(images()))
    other = Activated(nn.Tanh())
    assert equal(make_backend(other)(images()), other.core(images()))
    assert len(workshop.built) == 3


@pytest.mark.parametrize("edit", [lambda m: setattr(m, "gain", 3.0), lambda m: setattr(m.act, "alpha", 0.1)])
def test_another_attribute_is_another_engine(workshop, edit):
    backend = make_backend(model := Activated(nn.ELU()))
    backend(images())
    edit(model)
    backend.weights_changed()
    assert equal(backend(images()), model.core(images()))
    assert len(workshop.built) == 2


def test_size_built_after_an_edit_of_a_module_is_not_kept_as_the_old_one(workshop):
    backend = make_backend(model := Activated(nn.ReLU()), STATIC=True)
    backend(images(1, 64, 64))
    model.act = nn.Sigmoid()
    backend(images(1, 64, 96))
    old = Activated(nn.ReLU())
    assert equal(make_backend(old, STATIC=True)(images(1, 64, 96)), old.core(images(1, 64, 96)))


def test_what_running_the_model_writes_is_no_other_network(workshop):
    backend = make_backend(model := Activated(nn.ReLU()))
    backend(images())
    assert model.table and model.core_calls
    model.load_state_dict(model.state_dict())
    backend(images())
    assert (len(workshop.built), workshop.deserialized) == (1, 1)
    make_backend(Activated(nn.ReLU()))(images())
    assert len(workshop.built) == 1


def test_what_the_first_comparison_with_a_real_image_writes_is_no_other_network(workshop):
    make_backend(Activated(nn.ReLU())).prepare()
    backend = make_backend(model := Activated(nn.ReLU()))
    backend.prepare()
    backend(images())
    assert model.table
    model.load_state_dict(model.state_dict())
    backend(images())
    assert len(workshop.built) == 1


def test_what_follows_the_network_is_not_in_its_key(workshop):
    make_backend(Activated(nn.ReLU())).prepare()
    model = Activated(nn.ReLU())
    model.threshold, model.metadata = 0.9, object()
    make_backend(model).prepare()
    assert len(workshop.built) == 1
