"""What a checkpoint gave a model."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from mask2former.engine.checkpoint import NamingCheckpointer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.ones(3))


@pytest.mark.parametrize(
    "change, given",
    [
        (lambda weights: None, None),
        (lambda weights: weights.pop("criterion.empty_weight"), None),
        (lambda weights: weights.pop("head.bias"), 3),
        (lambda weights: weights.update({"head.weight": torch.zeros(5, 3)}), 3),
        (lambda weights: weights.clear(), 0),
    ],
)
def test_what_a_checkpoint_lacks_is_counted_in_one_line(tmp_path, caplog, change, given):
    weights = dict(Model().state_dict())
    change(weights)
    torch.save({"model": weights}, tmp_path / "model.pth")
    checkpointer = NamingCheckpointer(Model())
    checkpointer.logger = logging.getLogger("checkpoint_test")
    checkpointer.load(str(tmp_path / "model.pth"))
    lines = [r.getMessage() for r in caplog.records if "initial values" in r.getMessage()]
    if given is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"{given} of the model's 4 tensors were in the checkpoint; ")
