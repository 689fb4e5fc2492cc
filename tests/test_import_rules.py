"""Dependencies point one way: d2_trt -> mask2former -> detectron2."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What no file of a package may import, at its top or inside a function. Keys are folders below the root.
FORBIDDEN = {
    "mask2former": {"d2_trt", "torch2trt", "tensorrt", "tests", "tools"},
    "d2_trt": {"tests", "tools"},
}
# Of d2_trt only this file imports tensorrt, so that one place knows the versions' differences.
TENSORRT_IMPORTER = "compat.py"
# Packages that a package must be importable without.
OPTIONAL = {
    "mask2former": ["d2_trt", "torch2trt", "tensorrt", "panopticapi", "cityscapesscripts", "transformers"],
    "d2_trt": ["torch2trt", "tensorrt", "pycuda", "cuda", "transformers"],
}
PACKAGES = [name for name in FORBIDDEN if (ROOT / name / "__init__.py").is_file()]


def imported_modules(source: str) -> set[str]:
    """Top-level names of all absolute imports, import_module("x") and __import__("x") included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in {"import_module", "__import__", "find_spec"} and isinstance(
                node.args[0].value, str
            ):
                names.add(node.args[0].value)
    return {name.split(".")[0] for name in names if name}


def violations(package: Path, forbidden: set[str]) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        for name in sorted(imported_modules(path.read_text(encoding="utf-8")) & forbidden):
            found.append(f"{path.relative_to(package.parent)} imports {name}")
    return found


def import_without(
    package: str, blocked: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess:
    """Import every module of a package in a new process in which the blocked names cannot be imported."""
    program = f"""
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
for name in {blocked!r}:
    sys.modules[name] = None
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.startswith("d2_trt.libd2_trt_plugins"):  # TensorRT's, where it is built: no module of Python
        importlib.import_module(module.name)
present = [name for name in {blocked!r} if sys.modules.get(name) is not None]
assert not present, present
print("imported", sum(name.split(".")[0] == {package!r} for name in sys.modules))
"""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def cpu_only_environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def test_the_model_package_is_checked():
    assert "mask2former" in PACKAGES
    assert len(list((ROOT / "mask2former").rglob("*.py"))) > 10


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_what_its_package_may_not(package):
    assert violations(ROOT / package, FORBIDDEN[package]) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_tensorrt_is_imported_in_one_file_only(package):
    found = [
        line for line in violations(ROOT / package, {"tensorrt"}) if f"/{TENSORRT_IMPORTER} " not in line
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_without_optional_packages_and_gpu(package, cpu_only_environment):
    result = import_without(package, OPTIONAL[package], cpu_only_environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= len(list((ROOT / package).rglob("*.py")))


@pytest.mark.parametrize(
    "statement",
    [
        "import d2_trt",
        "import d2_trt.config as c",
        "from d2_trt.config import add_tensorrt_config",
        "def f():\n    from d2_trt import backend",
        "try:\n    import d2_trt\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('d2_trt.plugin')",
        "__import__('d2_trt')",
    ],
)
def test_checker_finds_every_way_to_import(statement, tmp_path):
    package = tmp_path / "mask2former" / "deep"
    package.mkdir(parents=True)
    (package / "module.py").write_text(statement + "\n")
    assert violations(tmp_path / "mask2former", FORBIDDEN["mask2former"]) == [
        "mask2former/deep/module.py imports d2_trt"
    ]


def test_checker_lets_relative_and_similar_names_pass(tmp_path):
    package = tmp_path / "mask2former"
    package.mkdir()
    (package / "module.py").write_text(
        "from .d2_trt_names import x\nimport d2_trt_like\nfrom . import tensorrt\n"
    )
    assert violations(package, FORBIDDEN["mask2former"]) == []


def test_import_check_fails_when_a_blocked_package_is_needed(cpu_only_environment):
    result = import_without("mask2former", ["detectron2"], cpu_only_environment)
    assert result.returncode != 0
    assert "detectron2" in result.stderr
