"""TensorRT's real Python bindings on a machine without TensorRT.

The bindings are a package of their own (1.3 MB, no dependency). They need libnvinfer and its companions to load, of
which stubs are compiled here: with those the enums, Dims, Weights and plug-in fields are the real ones, and nothing that
needs an implementation works. The doubles of this folder stand in for that.

Several versions can be imported into one process: each from its own folder, with its own stubs.

    python -m tests.doubles.trt_stubs       installs all versions of bindings.txt ahead of the tests
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "bindings.txt"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
LIBRARIES_BY_MAJOR = {8: (*LIBRARIES, "nvparsers")}
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    # of nvparsers, which only 8 has
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)
SOURCE = "".join(f"void* {name}(void) {{ return 0; }}\n" for name in FUNCTIONS)


class StubError(RuntimeError):
    """The bindings cannot be had on this machine; says why and what to do."""


def requirements() -> dict[str, str]:
    """Requirement of each version that exists for this Python, oldest first."""
    found = {}
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r'([\w-]+==([\d.]+))(?:; python_version < "3\.(\d+)")?', line)
        if match and (not match[3] or sys.version_info < (3, int(match[3]))):
            found[match[2]] = match[1]
    return found


def cache_folder() -> Path:
    """Where bindings and stubs are kept: in the virtual environment, or under the user's cache."""
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "tensorrt-bindings"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "d2_trt-tests" / f"bindings-py{sys.version_info[0]}{sys.version_info[1]}"


@contextlib.contextmanager
def _made(folder: Path):
    """Yield an empty folder to fill, or None where `folder` is there; one process makes it, others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            yield None
            return
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
        try:
            yield draft
            draft.chmod(0o755)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _run(command: list[str], what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise StubError(f"{what} failed: {' '.join(command)}\n{result.stdout}{result.stderr}")


def install(version: str) -> Path:
    """Folder with tensorrt_bindings of that version, installed from the package index on first use."""
    known = requirements()
    if version not in known:
        raise StubError(f"no bindings of TensorRT {version} for this Python; there are {list(known)}")
    folder = cache_folder() / version
    with _made(folder) as draft:
        if draft:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            pip += ["--only-binary", ":all:", "--target", str(draft), known[version]]
            _run(pip, f"installing {known[version]} for the tests")
    return folder


def stub_folder(major: int) -> Path:
    """Folder with the stub libraries that bindings of that major version load, compiled on first use."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    names = LIBRARIES_BY_MAJOR.get(major, LIBRARIES)
    key = hashlib.sha256(f"{SOURCE}{names}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"stubs-{major}-{key}"
    with _made(folder) as draft:
        if draft:
            if not compiler:
                raise StubError(
                    "no C compiler: install gcc or clang, or set CC, to run the TensorRT tests on a CPU"
                )
            (draft / "stub.c").write_text(SOURCE)
            for name in names:
                library = f"lib{name}.so.{major}"
                command = [*compiler.split(), "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}"]
                _run(
                    [*command, "-o", str(draft / library), str(draft / "stub.c")], "compiling a stub library"
                )
    return folder


_imported: dict[str, types.ModuleType] = {}


def import_bindings(version: str) -> types.ModuleType:
    """The real bindings of a version, over stubs. Their Builder and Runtime do not work.

    Raises:
        StubError: there are none for this Python, or they cannot be installed or the stubs not compiled.
    """
    if version not in _imported:
        folder, major = install(version), int(version.split(".")[0])
        stubs = stub_folder(major)
        for name in LIBRARIES_BY_MAJOR.get(major, LIBRARIES):
            # A library that is loaded under this SONAME is not searched for again.
            ctypes.CDLL(str(stubs / f"lib{name}.so.{major}"), mode=ctypes.RTLD_LOCAL)
        ours = [
            name for name in list(sys.modules) if name.split(".")[0] in ("tensorrt_bindings", "tensorrt_libs")
        ]
        others = {name: sys.modules.pop(name) for name in ours}
        sys.path.insert(0, str(folder))
        try:
            importlib.invalidate_caches()
            sys.modules["tensorrt_libs"] = None  # a real installation's libraries are not for these bindings
            module = importlib.import_module("tensorrt_bindings")
        finally:
            sys.path.remove(str(folder))
            for name in [
                n for n in list(sys.modules) if n.split(".")[0] in ("tensorrt_bindings", "tensorrt_libs")
            ]:
                del sys.modules[name]
            sys.modules.update(others)
        if module.__version__ != version:
            raise StubError(f"asked for the bindings of TensorRT {version}, got {module.__version__}")
        _imported[version] = module
    return _imported[version]


if __name__ == "__main__":
    for wanted in requirements():
        print(wanted, import_bindings(wanted).__file__)
