"""What tests of tools/build_engine.py share: the tool, and runs of it with doubles of what builds engines."""

from __future__ import annotations

import json
from pathlib import Path

import engine_config
import pytest
import torch

from d2_trt import requirements
from tests.d2_trt.backend_helpers import TinyModel
from tests.tools.loading import REPO, load_tool

CONFIG = REPO / "configs" / "coco" / "panoptic-segmentation" / "maskformer2_R50_bs16_50ep.yaml"
SIZES = ("64x64", "64x96", "128x128")
TOOL = load_tool("build_engine")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "model.pth"
    torch.save({"model": {}}, path)
    return path


@pytest.fixture
def shop(workshop, monkeypatch):
    """A workshop for a model of a moment."""
    monkeypatch.setattr(requirements, "require", lambda *_, **__: None)
    monkeypatch.setattr(engine_config, "load_model", lambda cfg: TinyModel())
    return workshop


@pytest.fixture
def run(checkpoint, tmp_path):
    """Exit status, and what was written as JSON."""

    def call(*words: str, opts=(), weights=True) -> tuple[int, list[dict]]:
        file = tmp_path / "built.json"
        chosen = ["--weights", str(checkpoint)] if weights else []
        words = ["--config-file", str(CONFIG), *chosen, "--json", str(file), *words]
        status = TOOL.main([*words, "--opts", "MODEL.DEVICE", "cpu", *opts])
        return status, json.loads(file.read_text())["engines"] if file.exists() else []

    return call
