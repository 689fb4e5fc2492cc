"""The training loss's place in the model."""

import torch
from torch import nn


class SetCriterion(nn.Module):
    """Holds the class weights that the release's checkpoints carry as `criterion.empty_weight`.

    The loss itself arrives with training.
    """

    def __init__(self, num_classes: int, no_object_weight: float):
        super().__init__()
        weight = torch.ones(num_classes + 1)
        weight[-1] = no_object_weight
        self.register_buffer("empty_weight", weight)  # (num_classes + 1,), the last for "no object"

    def forward(self, outputs, targets):
        raise NotImplementedError(
            "this version evaluates models and does not train them yet: call model.eval() first"
        )
