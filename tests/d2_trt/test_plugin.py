"""Our plugins of TensorRT: finding and loading their library, and which of them are taken."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
import types
from pathlib import Path

import pytest

from d2_trt import compat, plugin
from d2_trt.errors import MissingDependencyError
from tests.doubles.fixtures import trt_double as trt  # noqa: F401


def test_list_of_plugins_is_that_of_the_cores():
    """Names and versions in csrc/trt_plugin, and the cores that plugins.h registers."""
    folder = Path(plugin.__file__).parent.parent / "csrc" / "trt_plugin"
    pattern = (
        r'struct (\w+) \{\s+static constexpr char const\* kName = "(\w+)";\s+'
        r'static constexpr char const\* kVersion = "(\w+)";'
    )
    text = "".join(path.read_text() for path in folder.glob("*_core.h"))
    cores = re.findall(pattern, text)
    assert len(cores) == text.count("kName =") == text.count("kVersion =")
    assert sorted(core[1:] for core in cores) == sorted((p.name, p.version) for p in plugin.PLUGINS)
    listed = (folder / "plugins.h").read_text()
    assert all(re.search(rf"\b{core}\b", listed) for core, *_ in cores)


@pytest.fixture
def built(trt, monkeypatch, tmp_path):  # noqa: F811
    """The double, not knowing our plugin, and a library of the version that the test writes into `built.version`."""
    trt.get_plugin_registry()._forget_ours()
    path = tmp_path / plugin.library().name
    path.touch()
    monkeypatch.setattr(plugin, "library", lambda: path)
    made = types.SimpleNamespace(version=compat.version()[0] * 10000, path=path, opened=0)

    def open_library(name):
        made.opened += 1
        assert name == str(path)
        return types.SimpleNamespace(d2_trt_tensorrt_version=lambda: made.version)

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    yield made
    trt.get_plugin_registry()._forget_ours()


def test_library_is_named_after_tensorrts_major_version(trt):  # noqa: F811
    assert plugin.library().name == f"libd2_trt_plugins_trt{trt.__version__.split('.')[0]}.so"


def test_library_is_loaded_once_by_whoever_comes_first(built):
    threads = [threading.Thread(target=plugin.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compat.register_plugins()
    assert built.opened == 1
    assert plugin.resolve("MSDA", "auto") == plugin.resolve("MSDA", "plugin") == "plugin"


def test_attention_is_ours_only_on_gpus_that_have_its_instructions(built):
    assert plugin.resolve("ATTENTION", "auto", (7, 5)) == "native"
    with pytest.raises(
        MissingDependencyError,
        match=r"ATTENTION 'plugin' needs.* 8\.0.*7\.5: set MODEL\.TENSORRT\.ATTENTION to native",
    ):
        plugin.resolve("ATTENTION", "plugin", (7, 5))
    assert built.opened == 0
    for capability in ((8, 0), (9, 0), (12, 0), None):
        assert plugin.resolve("ATTENTION", "auto", capability) == "plugin"
        assert plugin.resolve("ATTENTION", "plugin", capability) == "plugin"
    assert (
        plugin.resolve("NORMALIZATION", "auto", (7, 5)) == plugin.resolve("MSDA", "auto", (7, 5)) == "plugin"
    )
    assert plugin.resolve("ATTENTION", "native", (7, 5)) == "native"


def test_registering_plugins_registers_ours(built):
    compat.register_plugins()
    assert built.opened == 1
    for kind in plugin.PLUGINS:
        assert compat.plugin_creator(kind.name, kind.version, plugin.NAMESPACE), kind


def test_library_of_another_tensorrt_is_refused(built, caplog):
    built.version = 90302
    with pytest.raises(
        MissingDependencyError, match=r"built for TensorRT 9\.3; this is .*TENSORRT_INCLUDE_DIR"
    ):
        plugin.load()
    for msda in ("plugin", "auto"):
        with pytest.raises(MissingDependencyError, match="built for TensorRT 9"):
            plugin.resolve("MSDA", msda)
    assert plugin.resolve("MSDA", "stock") == "stock"


def test_engine_without_our_plugin_needs_no_library_that_loads(built, monkeypatch):
    said = []
    monkeypatch.setattr(compat.logger, "warning", said.append)
    built.version = 90303
    compat.register_plugins()
    compat.register_plugins()
    assert len(said) == 1 and "built for TensorRT 9" in said[0]
    assert "set MODEL.TENSORRT.MSDA, NORMALIZATION and ATTENTION to native" in said[0]


def test_damaged_library_is_named(built, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(plugin, "library", lambda: built.path)
    built.path.write_bytes(b"no library")
    with pytest.raises(
        MissingDependencyError, match=r"libd2_trt_plugins_trt\d+\.so does not load.*setup\.py build_ext"
    ):
        plugin.load()


def test_missing_library_is_named(built):
    built.path.unlink()
    with pytest.raises(MissingDependencyError, match=r"which is not built in .*TENSORRT_INCLUDE_DIR"):
        plugin.load()
    assert not plugin.is_built() and plugin.resolve("MSDA", "auto") == "stock"


def test_library_that_registers_nothing_is_told(built, monkeypatch):
    monkeypatch.setattr(plugin, "library", lambda: built.path.rename(built.path.with_name("other.so")))
    monkeypatch.setattr(plugin, "_check_version", lambda *unused: None)
    with pytest.raises(MissingDependencyError, match="does not register the plugin"):
        plugin.load()


LIBRARIES = sorted(Path(plugin.__file__).parent.glob("libd2_trt_plugins_trt*.so"))


@pytest.mark.skipif(
    not LIBRARIES or shutil.which("nm") is None, reason="no plugin library is built, or no nm"
)
def test_library_needs_no_symbol_of_tensorrt():
    """So that it loads beside any library of its major version, whatever that is called."""
    for path in LIBRARIES:
        names = {
            kind: subprocess.run(
                ["nm", "-D", "-C", f"--{kind}-only", path], capture_output=True, text=True, check=True
            ).stdout
            for kind in ("undefined", "defined")
        }
        assert "nvinfer" not in names["undefined"] and "Infer" not in names["undefined"], path
        creators = "getPluginCreators" if path.stem.endswith("trt8") else "getCreators"
        exported = {line.split()[-1] for line in names["defined"].splitlines()}
        assert {creators, "setLoggerFinder", "d2_trt_tensorrt_version"} <= exported, path
