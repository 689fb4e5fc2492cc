"""The official release's outputs (tests/data/official), as models and expected results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from mask2former import get_mask2former_cfg

REPO = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data" / "official"
MINI_MODELS = ("resnet50-mini", "swin-mini")


def config_path(name: str) -> str:
    return str(REPO / "configs" / name)


def load_json(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text())


def load_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def register_things(name: str, things: list[int]) -> str:
    """A data set of this name whose metadata say which classes are things."""
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {i: i for i in things}
    return name


def mini_cfg(name: str, opts: tuple = ()):
    """Config of a mini model of the official data."""
    spec = load_json(name)
    cfg = get_mask2former_cfg(config_path(spec["config"]), spec["opts"])
    dataset = register_things(f"golden_{name}", spec["thing_contiguous_ids"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, "DATASETS.TRAIN", (dataset,), *opts])
    return cfg


def state_dict(name: str) -> dict[str, torch.Tensor]:
    """Weights of a mini model, as a plain dict without version metadata."""
    return {k[3:]: torch.from_numpy(v) for k, v in load_arrays(name).items() if k.startswith("sd/")}


def mini_model(name: str, opts: tuple = ()):
    """A mini model with the official weights, in evaluation mode; every key must match."""
    model = build_model(mini_cfg(name, opts)).eval()
    weights = state_dict(name)
    weights.setdefault("criterion.empty_weight", model.criterion.empty_weight)
    model.load_state_dict(weights)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def unpack_masks(packed: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    return np.unpackbits(packed)[: int(np.prod(shape))].reshape(shape).astype(bool)
