"""What Cityscapes' evaluators need, checked with a package of their scripts' shape."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator

from mask2former.evaluation import build_evaluator, cityscapes

INTERNAL = "deeplearning.projects.cityscapesApi.cityscapesscripts"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A stand-in for the package cityscapesscripts; imports of it are forgotten afterwards."""
    package = tmp_path / "cityscapesscripts" / "helpers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "labels.py").write_text("name2label = {'car': 26}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = dict(sys.modules)
    for name in [n for n in sys.modules if n.split(".")[0] in ("cityscapesscripts", "deeplearning")]:
        del sys.modules[name]
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in ("cityscapesscripts", "deeplearning")]:
        del sys.modules[name]
    sys.modules.update({n: m for n, m in before.items() if n.split(".")[0] == "cityscapesscripts"})


@pytest.fixture
def dataset():
    name = "evaltest_cityscapes"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(evaluator_type="cityscapes_panoptic_seg", thing_classes=["car"])
    return name


def test_scripts_that_are_missing_are_asked_for(cfg, dataset, monkeypatch):
    monkeypatch.setattr(cityscapes.importlib.util, "find_spec", lambda name: None)
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    with pytest.raises(ImportError, match="pip install cityscapesscripts"):
        build_evaluator(cfg, dataset)


def test_tasks_that_are_on_are_evaluated(cfg, dataset, scripts):
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    parts = build_evaluator(cfg, dataset)._evaluators
    kinds = (CityscapesSemSegEvaluator, CityscapesInstanceEvaluator)
    assert len(parts) == 2 and all(isinstance(p, kind) for p, kind in zip(parts, kinds))
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    assert isinstance(build_evaluator(cfg, dataset), CityscapesInstanceEvaluator)


def test_path_that_detectron2_main_imports_leads_to_the_scripts(cfg, dataset, scripts):
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    assert importlib.util.find_spec("deeplearning") is None
    build_evaluator(cfg, dataset)
    build_evaluator(cfg, dataset)
    own = importlib.import_module("cityscapesscripts.helpers.labels")
    namespace: dict = {}
    # Both forms that cityscapes_evaluation.py of the main branch has.
    exec(f"from {INTERNAL}.helpers.labels import name2label", namespace)
    exec(f"import {INTERNAL}.helpers.labels as labels", namespace)
    assert namespace["name2label"] is own.name2label
    assert namespace["labels"] is own
    with pytest.raises(ImportError):
        importlib.import_module(f"{INTERNAL}.no_such_module")


def test_several_machines_are_refused(cfg, dataset, scripts, monkeypatch):
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    monkeypatch.setattr(cityscapes.comm, "get_world_size", lambda: 4)
    with pytest.raises(RuntimeError, match="one machine"):
        build_evaluator(cfg, dataset)
