"""What tests of predictor.stream share: a predictor whose network costs nothing, images that tell which they are."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from d2_trt import TensorRTPredictor
from tests.d2_trt.predictor_helpers import make

SMALL = ("INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 96, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False)
SMALL += ("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False)


class Backend:
    """Quick outputs that tell images apart; keeps what it was asked for."""

    def __init__(self, model):
        self.device = model.device
        self.num_classes = model.postprocess_options.num_classes
        self.batches: list[tuple[int, ...]] = []
        self.fail_at: float | None = None  # images of this mean
        self.gate: threading.Event | None = None  # what batches wait for
        self.gated_from = 0  # the first batch that does
        self.waits = threading.Event()  # set when one waits

    def prepare(self):
        pass

    def __call__(self, images):
        if self.gate is not None and len(self.batches) >= self.gated_from:
            self.waits.set()
            assert self.gate.wait(10)
        self.batches.append(tuple(images.shape))
        means = images.mean((1, 2, 3))
        if self.fail_at is not None and any(abs(m - self.fail_at) < 0.5 for m in means.tolist()):
            raise RuntimeError("the network does not like this image")
        logits = torch.zeros(len(images), 4, self.num_classes + 1, device=images.device)
        logits[:, :, 0] = means[:, None] / 100
        masks = torch.nn.functional.avg_pool2d(images, 4).mean(1, keepdim=True).expand(-1, 4, -1, -1) / 100
        return logits, masks.contiguous()


@pytest.fixture(scope="module")
def shared():
    return make(TensorRTPredictor, *SMALL)


@pytest.fixture
def predictor(shared, monkeypatch):
    """A predictor whose network costs nothing."""
    shared.model.backend = Backend(shared.model)
    yield shared
    assert threads() == []


def threads(kind: str = "") -> list[str]:
    """The streams' threads of a kind, after those that are about to end had the time."""
    for _ in range(500):
        names = [t.name for t in threading.enumerate() if t.name.startswith(f"d2_trt stream {kind}")]
        if not names:
            break
        time.sleep(0.02)
    return names


def flat(value: int, size=(32, 32)) -> np.ndarray:
    """An image whose mean tells which it is; whole multiples of 32, so that padding leaves that alone."""
    return np.full((*size, 3), value, np.uint8)


def same(result, expected) -> bool:
    return torch.equal(result["sem_seg"], expected["sem_seg"])
