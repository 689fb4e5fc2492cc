"""Which keys a resumed training has other values of than it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

# What a training depends on. MODEL.WEIGHTS is where it began; how long it goes on and how often it saves can change.
_PARTS = ("DATASETS.TRAIN", "DATALOADER", "INPUT", "MODEL", "SOLVER")
_FREE = (
    "DATALOADER.NUM_WORKERS",
    "MODEL.BACKEND",
    "MODEL.DEVICE",
    "MODEL.MASK_FORMER.TEST",
    "MODEL.TENSORRT",
    "MODEL.WEIGHTS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.MAX_ITER",
)
PROCESSES = "the number of processes"


def training_keys(cfg: CfgNode) -> dict[str, str]:
    """The keys that a training depends on, with their values as text, and under PROCESSES how many processes share it."""
    keys = {key: repr(value) for key, value in _leaves("", cfg) if _matters(key)}
    return {PROCESSES: str(comm.get_world_size()), **keys}


def changed_keys(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """Such as "SOLVER.IMS_PER_BATCH 8 (was 16)", for the keys that both have.

    Args:
        before: from a checkpoint; None where it has none.
    """
    return [
        f"{key} {value} (was {before[key]})"
        for key, value in sorted(now.items())
        if before is not None and before.get(key, value) != value
    ]


def _leaves(prefix: str, node: CfgNode) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(f"{prefix}{name}.", value)
        else:
            # Written as a list or as a tuple it is the same.
            yield f"{prefix}{name}", tuple(value) if isinstance(value, list) else value


def _matters(key: str) -> bool:
    def within(parts: tuple[str, ...]) -> bool:
        return any(key == part or key.startswith(f"{part}.") for part in parts)

    return within(_PARTS) and not within(_FREE) and not key.endswith("_TEST")
