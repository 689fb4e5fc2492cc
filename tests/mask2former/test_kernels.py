"""What mask2former/kernels.py says of compiled modules that it cannot use."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

from mask2former import kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def found(monkeypatch):
    """Call with what an import gives or raises."""

    def use(module):
        def import_module(name):
            assert name == kernels.MODULE
            if isinstance(module, Exception):
                raise module
            return module

        monkeypatch.setattr(kernels.importlib, "import_module", import_module)
        kernels._load.cache_clear()

    yield use
    kernels._load.cache_clear()


@pytest.mark.parametrize("module", [types.SimpleNamespace(), types.SimpleNamespace(INTERFACE=1)])
def test_kernels_of_another_state_are_not_used(found, module):
    found(module)
    assert not kernels.available()
    with pytest.raises(kernels.KernelsMissing, match=r"interface 1, this package needs \d.*build_ext"):
        kernels.load()


def test_kernels_of_this_state_are_used(found):
    module = types.SimpleNamespace(INTERFACE=kernels.INTERFACE)
    found(module)
    assert kernels.available() and kernels.load() is module


def test_missing_library_is_told(found):
    found(ImportError("libcudart.so.13: cannot open shared object file"))
    with pytest.raises(kernels.KernelsMissing, match=r"do not load: libcudart\.so\.13"):
        kernels.load()


def test_numbers_in_python_and_in_the_library_are_the_same():
    source = (ROOT / "csrc" / "bindings.cpp").read_text()
    assert int(re.search(r'attr\("INTERFACE"\) = (\d+);', source)[1]) == kernels.INTERFACE
