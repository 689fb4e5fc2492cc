"""What ran the network, as the results tell it."""

from __future__ import annotations

import types

from torch import nn

from mask2former.backend import TorchBackend
from mask2former.evaluation import describe_backend, inference


def model_with(told: dict) -> nn.Module:
    model = nn.Module()
    model.backend = types.SimpleNamespace(describe=lambda: dict(told))
    return model


def test_pytorch_is_told():
    model = nn.Module()
    assert describe_backend(model) == {"backend": "torch"}
    model.backend = TorchBackend(model)
    assert describe_backend(model) == {"backend": "torch"}


def test_images_and_reasons_of_all_processes_are_told(monkeypatch):
    mine = {"backend": "tensorrt", "images": {"tensorrt": 5, "torch": 0}, "reasons": []}
    other = {"backend": "torch (fallback: no)", "images": {"tensorrt": 0, "torch": 5}, "reasons": ["no"]}
    third = {"backend": "tensorrt", "images": {"tensorrt": 3, "torch": 1}, "reasons": ["no", "size"]}
    monkeypatch.setattr(inference.comm, "gather", lambda told: [told, other, third])
    told = describe_backend(model_with(mine))
    assert told["backend"] == "tensorrt (8 images) and torch (6 images)"
    assert told["images"] == {"tensorrt": 8, "torch": 6}
    assert told["reasons"] == ["no", "size"]


def test_processes_without_images_ran_nothing(monkeypatch):
    mine = {"backend": "tensorrt", "images": {"tensorrt": 0, "torch": 0}, "reasons": []}
    other = {"backend": "torch (fallback: no)", "images": {"tensorrt": 0, "torch": 5}, "reasons": ["no"]}
    monkeypatch.setattr(inference.comm, "gather", lambda told: [told, other])
    told = describe_backend(model_with(mine))
    assert told["backend"] == "torch (fallback: no)" and told["images"] == {"tensorrt": 0, "torch": 5}


def test_other_processes_than_the_main_one_tell_their_own(monkeypatch):
    monkeypatch.setattr(inference.comm, "gather", lambda told: [])  # as detectron2's does there
    mine = {"backend": "tensorrt", "images": {"tensorrt": 5, "torch": 0}, "reasons": []}
    assert describe_backend(model_with(mine)) == mine
