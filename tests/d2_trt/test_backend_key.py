"""What another engine is built for, and which entries of FP32_MODULES are refused."""

import importlib.util
import shutil
import sys
from pathlib import Path

import detectron2
import pytest
import torch

import mask2former
from d2_trt import cache_key
from d2_trt.build_spec import DEFAULT_FP32_MODULES, check_fp32_modules
from d2_trt.errors import OptionsError
from tests.d2_trt.backend_helpers import TinyModel, make_backend, workshop  # noqa: F401

pytestmark = pytest.mark.usefixtures("workshop")


def key(model=None, **options) -> str:
    backend = make_backend(model, **options)
    return backend.entry(backend.options.shapes).key


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("maskformer_model.py", True),
        ("modeling/fused_ops.py", True),
        ("modeling/backbone/swin.py", True),
        ("postprocessing.py", False),
        ("postprocessing_cuda.py", False),
        ("evaluation/__init__.py", False),
    ],
)
def test_edit_of_the_network_is_another_engine_and_of_the_rest_is_not(tmp_path, monkeypatch, file, counts):
    copy = tmp_path / "mask2former"
    shutil.copytree(
        Path(mask2former.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    real = cache_key.source_digest
    monkeypatch.setattr(
        cache_key,
        "source_digest",
        lambda package, *parts: real(copy if Path(package).name == "mask2former" else package, *parts),
    )
    before = key()
    (copy / file).write_text((copy / file).read_text() + "\n# edited\n")
    assert (key() != before) == counts


def test_who_only_runs_engines_needs_no_torch2trt(tmp_path, monkeypatch):
    """The key is the same with any torch2trt and with none; the sidecar tells which one it was."""
    monkeypatch.delitem(sys.modules, "torch2trt", raising=False)
    keys, versions = {key()}, set()
    for number in range(2):
        folder = tmp_path / str(number) / "torch2trt"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"raise RuntimeError('imported')  # {number}\n")
        monkeypatch.syspath_prepend(folder.parent)
        importlib.invalidate_caches()
        keys.add(key())
        versions.add(cache_key.package_version("torch2trt"))
    assert len(keys) == 1 and len(versions) == 2


@pytest.mark.parametrize("package", [torch, detectron2])
def test_another_version_of_what_the_network_is_made_of_is_another_engine(monkeypatch, package):
    before = key()
    monkeypatch.setattr(package, "__version__", "99.0")
    assert key() != before


def test_edit_of_this_package_is_another_engine(tmp_path, monkeypatch):
    before = key()
    real = cache_key.source_digest
    monkeypatch.setattr(
        cache_key,
        "source_digest",
        lambda package, *parts: "edited" if Path(package).name == "d2_trt" else real(package, *parts),
    )
    assert key() != before


def test_missing_package_has_a_version_too():
    assert cache_key.package_version("no_such_package") == "not installed"


def test_edit_of_the_users_own_model_is_another_engine(tmp_path, monkeypatch):
    source = "from tests.d2_trt.backend_helpers import TinyModel\nclass Own(TinyModel):\n    pass\n"
    file = tmp_path / "users_own_model.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("users_own_model", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "users_own_model", module)
    spec.loader.exec_module(module)
    before = key(module.Own())
    assert key(module.Own()) == before
    file.write_text(source + "    # edited\n")
    assert key(module.Own()) != before


@pytest.mark.parametrize(
    "by", ["from users_ops import scale", "import users_ops", "from users_more import half"]
)
def test_edit_of_what_the_users_own_model_imports_is_another_engine(tmp_path, monkeypatch, by):
    sources = {
        "users_ops": "def scale(x):\n    return x * 2\n",
        "users_more": "try:\n    import users_ops\nfinally:\n    half = 0.5\n",
        "users_model": f"from tests.d2_trt.backend_helpers import TinyModel\n{by}\nclass Own(TinyModel):\n    pass\n",
        "users_other": "print('nobody imports it')\n",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("users_model")
    before = key(module.Own())
    (tmp_path / "users_other.py").write_text("")
    assert key(module.Own()) == before
    (tmp_path / "users_ops.py").write_text(sources["users_ops"].replace("2", "3"))
    assert key(module.Own()) != before


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_misspelt_module_is_told_before_the_build(workshop, precision):  # noqa: F811
    backend = make_backend(PRECISION=precision, FP32_MODULES=["default", "bakbone"])
    with pytest.raises(OptionsError) as error:
        backend.prepare()
    message = str(error.value)
    assert message.startswith("MODEL.TENSORRT.FP32_MODULES has 'bakbone', which is no module of the model; ")
    assert "did you mean 'backbone'?" in message
    assert "allowed: 'default', and names as in model.named_modules()" in message
    assert workshop.built == []


@pytest.mark.parametrize(
    "pattern", ["backbone", "=head", "=", "bac*", "h?ad", "default", *DEFAULT_FP32_MODULES]
)
def test_patterns_that_cover_a_module_and_built_in_ones_are_taken(pattern):
    check_fp32_modules([pattern], TinyModel())


@pytest.mark.parametrize("pattern", ["backbone.*", "=head.weight", "model.head", "[x]*"])
def test_pattern_that_covers_no_module_is_refused(pattern):
    with pytest.raises(OptionsError, match="is no module of the model"):
        check_fp32_modules(["backbone", pattern], TinyModel())
