"""Cityscapes' evaluators of detectron2, with what they need checked first."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator, DatasetEvaluator
from detectron2.utils import comm

from .formats import DecodingMixin, LabelsMixin

_PREFIX = "deeplearning.projects.cityscapesApi"


class _SemSegEvaluator(LabelsMixin, CityscapesSemSegEvaluator):
    pass


class _InstanceEvaluator(DecodingMixin, CityscapesInstanceEvaluator):
    pass


_KINDS = {"sem_seg": _SemSegEvaluator, "instance": _InstanceEvaluator}


def require_scripts(dataset_name: str) -> None:
    """
    Raises:
        ImportError: cityscapesscripts is not installed.
    """
    if importlib.util.find_spec("cityscapesscripts") is None:
        raise ImportError(
            f"evaluating {dataset_name} needs Cityscapes' own scripts: pip install cityscapesscripts. "
            "Without them, only PQ is evaluated: MODEL.MASK_FORMER.TEST.SEMANTIC_ON False "
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON False"
        )


def build_cityscapes_evaluator(kind: str, dataset_name: str) -> DatasetEvaluator:
    """mIoU ("sem_seg") or AP ("instance") with Cityscapes' own scripts.

    Raises:
        ImportError: cityscapesscripts is not installed.
        RuntimeError: there are several machines; the ranks share a temporary directory.
    """
    require_scripts(dataset_name)
    if comm.get_world_size() != comm.get_local_size():
        raise RuntimeError("Cityscapes' evaluators run on one machine only: use --num-machines 1")
    _alias_internal_path()
    return _KINDS[kind](dataset_name)


class _AliasFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `deeplearning.projects.cityscapesApi.cityscapesscripts.X` as `cityscapesscripts.X`."""

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname == _PREFIX or _PREFIX.startswith(fullname + "."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if fullname.startswith(_PREFIX + ".cityscapesscripts"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        if not module.__name__.startswith(_PREFIX + "."):
            return
        # The very module, not a copy: the evaluators set attributes of it.
        sys.modules[module.__name__] = importlib.import_module(module.__name__[len(_PREFIX) + 1 :])


def _alias_internal_path() -> None:
    """detectron2's main branch, unlike 0.5 and 0.6, imports the scripts under a path of its authors."""
    if importlib.util.find_spec("deeplearning") is None:
        # First, since the path finder would load second copies of the scripts under this name.
        sys.meta_path.insert(0, _AliasFinder())
