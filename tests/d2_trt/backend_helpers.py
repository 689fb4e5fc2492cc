"""A TensorRT backend on a CPU: a small model, and doubles of what builds and runs its engines."""

from __future__ import annotations

import copy
import functools
import json
import logging
import threading
import types

import pytest
import torch
from torch import nn

from d2_trt import builder, compat, engine_source, plugin
from d2_trt.backend import TensorRTBackend
from d2_trt.build_report import BuildReport
from d2_trt.build_spec import BuildSpec
from d2_trt.cuda_graphs import GraphCache
from d2_trt.errors import BuildError
from mask2former import get_mask2former_cfg
from mask2former.data.datasets import shapes_scene

# A range that keeps the scenes to compare with small.
SHAPES = {"SHAPES": ["64x64", "64x96", "128x128"], "MAX_BATCH_SIZE": 2, "PRECISION": "fp32"}


class TinyModel(nn.Module):
    """What the backend needs of a MaskFormer: 5 queries, 3 classes and "no object"."""

    size_divisibility = 32
    around_network = frozenset({"core_calls"})

    def __init__(self, seed: int = 0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.backbone = nn.Conv2d(3, 5, 4, stride=4)
        self.head = nn.Linear(5, 20)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=rng) - 0.5
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 128.0), persistent=False)
        self.core_calls = 0

    @property
    def device(self):
        return self.pixel_mean.device

    def core(self, images):
        self.core_calls += 1
        masks = self.backbone((images - self.pixel_mean) / 64)
        return self.head(masks.mean((2, 3))).view(len(images), 5, 4), masks


class Workshop:
    """Doubles of builder.build_engine and of Engine, and what they were asked to do.

    A plan names a copy of the model as it was when it was built; an engine runs that copy.
    """

    def __init__(self):
        self.built: list[BuildSpec] = []
        self.traced: list[torch.Tensor] = []
        self.timings: list[bytes] = []
        self.deserialized = 0
        self.max_graphs: list[int] = []
        self.max_graph_bytes: list[int] = []
        self.disturb = lambda logits, masks: (logits, masks)
        self.refused: set[bytes] = set()
        self.fail: Exception | None = None
        self.gate: threading.Event | None = None
        self.models: dict[int, nn.Module] = {}

    def build_engine(self, model, spec, images, timing_cache=None):
        self.built.append(spec)
        self.traced.append(images)
        self.timings.append(timing_cache)
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.fail is not None:
            raise self.fail
        number = len(self.built)
        self.models[number] = copy.deepcopy(model)
        modes = {"autocast": torch.is_autocast_enabled("cpu"), "inference": torch.is_inference_mode_enabled()}
        plan = json.dumps({"number": number, **modes}).encode()
        return plan, BuildReport(engine_bytes=len(plan), layers={"CONVOLUTION": 1}), b"timings"

    def engine(self, plan, device, max_graphs=0, max_graph_bytes=0):
        self.deserialized += 1
        self.max_graphs.append(max_graphs)
        self.max_graph_bytes.append(max_graph_bytes)
        plan = bytes(plan)
        if plan in self.refused:
            raise BuildError("the engine does not load:\n  [double] of another driver")
        model = self.models[json.loads(plan)["number"]]

        def run(images):
            with torch.no_grad():
                return self.disturb(*model.core(images))

        run.graphs = GraphCache(max_graphs) if max_graphs else None
        return run


_draw_scene = functools.cache(shapes_scene.draw_scene)


@pytest.fixture
def workshop(monkeypatch, tmp_path):
    """TensorRT on a CPU, with an empty cache."""
    shop = Workshop()
    monkeypatch.setattr(shapes_scene, "draw_scene", _draw_scene)
    # Messages reach caplog even after another test set up detectron2's logging.
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compat, "tensorrt", lambda: types.SimpleNamespace(__version__="10.0.1"))
    # NVIDIA's plugin is registered and ours is not built, whatever this machine has.
    monkeypatch.setattr(plugin, "is_built", lambda: False)
    monkeypatch.setattr(
        compat, "plugin_creator", lambda name, *rest: object() if name == plugin.STOCK else None
    )
    monkeypatch.setattr(TensorRTBackend, "_require", lambda self: compat.tensorrt())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Double GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(builder, "build_engine", shop.build_engine)
    monkeypatch.setattr(engine_source, "Engine", shop.engine)
    return shop


def make_cfg(**options):
    """A config with options of MODEL.TENSORRT; "__" stands for a dot."""
    cfg = get_mask2former_cfg()
    words = []
    for key, value in {**SHAPES, **options}.items():
        words += ["MODEL.TENSORRT." + key.replace("__", "."), value]
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "MaskFormer", "MODEL.BACKEND", "tensorrt", *words])
    return cfg


def make_backend(model=None, **options) -> TensorRTBackend:
    return TensorRTBackend(model or TinyModel(), make_cfg(**options))


def images(batch: int = 1, height: int = 64, width: int = 96) -> torch.Tensor:
    rng = torch.Generator().manual_seed(batch + height + width)
    return torch.rand(batch, 3, height, width, generator=rng) * 255


def equal(actual, expected) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def entries(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "d2_trt").glob("*.engine"))
