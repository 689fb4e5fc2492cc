"""setup.py's build: what it compiles and for what, what it does without a compiler, and that a failing one is an error.

A stand-in for nvcc notes how it is called and writes what it is asked for, so that these run anywhere in seconds; where
there is a real nvcc, one small module is compiled with it and imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from bootstrap_console import advice_for

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "setup.py"
SUFFIX = "_kernels.*.so"

NVCC = """#!{python}
import json, os, sys
from pathlib import Path

arguments = sys.argv[1:]
if arguments == ["--list-gpu-code"]:
    print("sm_80 sm_90")
    sys.exit()
if arguments == ["--version"]:
    print(os.environ.get("NVCC_VERSION", "release 13.0"))
    sys.exit()
if os.environ.get("FAIL_ON", "nothing") in " ".join(arguments):
    sys.exit("stand-in: error: this source does not compile")
with open(os.environ["NVCC_LOG"], "a") as log:
    print(json.dumps(arguments), file=log)
target = arguments[arguments.index("-o") + 1]
Path(target).write_bytes(b"made by the stand-in")
if "-c" in arguments:
    source = arguments[arguments.index("-c") + 1]
    included = " \\\\\\n  csrc/common/check.h" if "other" in source else ""
    if "trt_plugin" in source and "-MD" in arguments:  # -MMD leaves out what -isystem finds
        included = " " + os.environ["TENSORRT_INCLUDE_DIR"] + "/NvInferRuntime.h"
    Path(arguments[arguments.index("-MF") + 1]).write_text(target + " : " + source + included + "\\n")
"""

MODULE = """#include <Python.h>
#include <cuda_runtime.h>
__global__ void add_one(int* x) { *x += 1; }
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", "as small as it gets", -1};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__kernels() {
    PyObject* module = PyModule_Create(&definition);
    PyModule_AddIntConstant(module, "ANSWER", 42);
    return module;
}
"""

# Runs setup.py as if the machine had no nvcc, wherever it may be.
WITHOUT_NVCC = """
import pathlib, runpy, shutil, sys
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **kw: self.name != "nvcc" and exists(self, **kw)
which = shutil.which
shutil.which = lambda name, *args, **kw: None if name == "nvcc" else which(name, *args, **kw)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Checkout:
    """A small tree with this project's setup.py."""

    def __init__(self, root: Path):
        self.root = root
        self.log = root / "nvcc.log"
        shutil.copy(SETUP, root)
        self.sources = {
            "csrc/bindings.cpp",
            "csrc/other/other.cu",
            "csrc/ms_deform_attn/ms_deform_attn.cu",
            "csrc/trt_plugin/library.cpp",
        }
        for name in (*self.sources, "csrc/common/check.h", "mask2former/__init__.py", "d2_trt/__init__.py"):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        nvcc = root / "cuda/bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(NVCC.format(python=sys.executable))
        nvcc.chmod(0o755)
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("D2_TRT_", "TENSORRT_", "CUDA_"))}
        self.environment = {
            **keep,
            "CUDA_HOME": str(root / "cuda"),
            "NVCC_LOG": str(self.log),
            "D2_TRT_CUDA_ARCHS": "86;90",
        }

    def run(self, *command: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess:
        """`python setup.py command`, through a piece of Python before it if there is one."""
        python = [sys.executable, *(["-c", code] if code else []), "setup.py"]
        return subprocess.run(
            [*python, *command],
            cwd=self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def pip(self, *command: str) -> subprocess.CompletedProcess:
        """`pip command`, in an environment without what this one has where pip builds something."""
        return subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", *command],
            cwd=self.root,
            env={**self.environment, "PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "20"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def build(self, **environment: str) -> subprocess.CompletedProcess:
        done = self.run("-q", "build_ext", "--inplace", **environment)
        assert done.returncode == 0, done.stderr
        return done

    def calls(self) -> list[list[str]]:
        """Arguments of nvcc's calls since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def compiled(self) -> list[str]:
        """Sources compiled since the last look."""
        return sorted(call[call.index("-c") + 1] for call in self.calls() if "-c" in call)

    def touch(self, name: str) -> None:
        """As if edited a little later than all that was built, and both a while ago: what is built next is the newest."""
        files = [path for path in self.root.rglob("*") if path.is_file()]
        for path in files:
            earlier = max(0.0, path.stat().st_mtime - 10)
            os.utime(path, (earlier, earlier))
        newest = max(path.stat().st_mtime for path in files)
        os.utime(self.root / name, (newest + 1, newest + 1))


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def ours(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("d2_trt:")]


def with_tensorrt(checkout: Checkout, version: str) -> dict[str, str]:
    """The environment that names a folder of TensorRT's headers; `version` is the text that defines the major one."""
    folder = checkout.root / "tensorrt"
    folder.mkdir()
    (folder / "NvInferVersion.h").write_text(version)
    (folder / "NvInferRuntime.h").write_text("")
    return {"TENSORRT_INCLUDE_DIR": str(folder)}


def test_all_but_the_plugins_is_compiled_into_the_module_for_each_architecture_and_ptx(checkout):
    checkout.build()
    calls = checkout.calls()
    compiling, linking = [c for c in calls if "-c" in c], [c for c in calls if "-shared" in c]
    assert {c[c.index("-c") + 1] for c in compiling} == checkout.sources - {"csrc/trt_plugin/library.cpp"}
    for call in compiling:
        targets = [a.removeprefix("-gencode=") for a in call if a.startswith("-gencode=")]
        assert targets == [
            "arch=compute_86,code=sm_86",
            "arch=compute_90,code=sm_90",
            "arch=compute_90,code=compute_90",
        ]
    (link,) = linking
    assert "-cudart=static" in link and len([a for a in link if a.endswith(".o")]) == 3
    assert len(list((checkout.root / "mask2former").glob(SUFFIX))) == 1


def test_only_what_changed_is_compiled_again(checkout):
    checkout.build()
    assert len(checkout.compiled()) == 3
    checkout.build()
    assert checkout.compiled() == []
    checkout.touch("csrc/other/other.cu")
    checkout.build()
    assert checkout.compiled() == ["csrc/other/other.cu"]
    checkout.touch("csrc/common/check.h")  # which that one includes
    checkout.build()
    assert checkout.compiled() == ["csrc/other/other.cu"]
    (checkout.root / "csrc/common/check.h").unlink()
    checkout.build()
    assert checkout.compiled() == ["csrc/other/other.cu"]
    checkout.build(D2_TRT_CUDA_ARCHS="90")
    assert len(checkout.compiled()) == 3


def test_another_compiler_compiles_all_again(checkout):
    checkout.build()
    assert len(checkout.compiled()) == 3
    checkout.build(NVCC_VERSION="release 13.1")
    assert len(checkout.compiled()) == 3
    checkout.build(NVCC_VERSION="release 13.1")
    assert checkout.compiled() == []


def test_headers_of_tensorrt_that_are_others_now_compile_what_includes_them_again(checkout):
    version = "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR {}\n"
    environment = with_tensorrt(checkout, version.format(5))
    checkout.build(**environment)
    checkout.calls()
    checkout.touch("tensorrt/NvInferRuntime.h")
    checkout.build(**environment)
    assert checkout.compiled() == ["csrc/trt_plugin/library.cpp"]
    # As an archive unpacks them: with times of their own, before those of the objects.
    header = checkout.root / "tensorrt/NvInferVersion.h"
    header.write_text(version.format(6))
    os.utime(header, (0, 0))
    checkout.build(**environment)
    assert checkout.compiled() == ["csrc/trt_plugin/library.cpp"]
    checkout.build(**environment)
    assert checkout.compiled() == []


@pytest.mark.parametrize(
    "version",
    ["#define NV_TENSORRT_MAJOR 8\n", "#define TRT_MAJOR_ENTERPRISE 8\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n"],
    ids=["number", "another macro"],
)  # fmt: skip
def test_plugins_are_built_where_tensorrts_headers_are(checkout, version):
    done = checkout.build(**with_tensorrt(checkout, version))
    assert ours(done.stderr) == []
    assert (checkout.root / "d2_trt/libd2_trt_plugins_trt8.so").exists()
    (link,) = [c for c in checkout.calls() if "-shared" in c and c[-1].endswith("trt8.so")]
    objects = {Path(a).name for a in link if a.endswith(".o")}
    assert objects == {"csrc_trt_plugin_library.cpp.o", "csrc_ms_deform_attn_ms_deform_attn.cu.o"}


def test_what_module_and_plugins_share_is_compiled_once(checkout):
    checkout.build(**with_tensorrt(checkout, "#define NV_TENSORRT_MAJOR 8\n"))
    assert checkout.compiled() == sorted(checkout.sources)


def test_a_folder_without_tensorrts_headers_is_an_error(checkout):
    done = checkout.run("-q", "build_ext", "--inplace", TENSORRT_INCLUDE_DIR=str(checkout.root))
    assert done.returncode != 0
    assert "TENSORRT_INCLUDE_DIR" in done.stderr and "NvInferRuntime.h" in done.stderr


@pytest.mark.parametrize("source", ["csrc/other/other.cu", "-shared"], ids=["compiling", "linking"])
def test_a_failing_compile_is_an_error_and_leaves_no_module(checkout, source):
    done = checkout.run("-q", "build_ext", "--inplace", FAIL_ON=source)
    assert done.returncode != 0
    assert "this source does not compile" in done.stderr
    assert not list((checkout.root / "mask2former").glob(SUFFIX))


def test_what_failed_to_compile_is_compiled_by_the_next_build(checkout):
    assert checkout.run("-q", "build_ext", "--inplace", FAIL_ON="csrc/other/other.cu").returncode != 0
    checkout.calls()
    checkout.build()
    assert "csrc/other/other.cu" in checkout.compiled()


def test_without_nvcc_the_install_is_pure_python_and_says_so_in_one_line(checkout):
    done = checkout.run("-q", "build", code=WITHOUT_NVCC, CUDA_HOME="")
    assert done.returncode == 0, done.stderr
    assert ours(done.stderr) == ["d2_trt: no nvcc (set CUDA_HOME): installing without CUDA kernels"]
    built = list((checkout.root / "build").rglob("*"))
    assert any(p.name == "__init__.py" for p in built) and not any(p.suffix == ".so" for p in built)


def test_without_nvcc_kernels_that_must_be_built_are_an_error(checkout):
    done = checkout.run("-q", "build", code=WITHOUT_NVCC, CUDA_HOME="", D2_TRT_KERNELS="1")
    assert done.returncode != 0
    assert "D2_TRT_KERNELS is 1, but there is no nvcc" in done.stderr


def test_kernels_can_be_declined(checkout):
    done = checkout.run("-q", "build", D2_TRT_KERNELS="0")
    assert done.returncode == 0, done.stderr
    assert ours(done.stderr) == [] and checkout.calls() == []


def test_commands_that_compile_nothing_do_not_look_for_a_compiler(checkout):
    done = checkout.run("--version", code=WITHOUT_NVCC, CUDA_HOME="", D2_TRT_KERNELS="1")
    assert done.returncode == 0, done.stderr
    assert ours(done.stderr) == []


@pytest.mark.parametrize("wrong", ["hopper", ";", "9.0a1"])
def test_architectures_that_are_none_are_named(checkout, wrong):
    done = checkout.run("-q", "build_ext", "--inplace", D2_TRT_CUDA_ARCHS=wrong)
    assert done.returncode != 0
    assert f"D2_TRT_CUDA_ARCHS is {wrong!r}" in done.stderr


def test_pip_compiles_the_kernels_in_a_build_environment_of_its_own(checkout):
    shutil.copy(ROOT / "pyproject.toml", checkout.root)
    done = checkout.pip("wheel", "--no-deps", "--wheel-dir", "dist", "-v", ".")
    if done.returncode != 0 and "could not be reached" in advice_for(done.stdout + done.stderr):
        pytest.skip("pip reaches no package index, from which it takes what a build needs")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (checkout.root / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("mask2former/_kernels.")], names
    assert "py3-none-any" not in wheel.name
    assert len(checkout.compiled()) == 3


def test_source_distribution_has_what_the_build_compiles(checkout):
    shutil.rmtree(checkout.root / "csrc")
    shutil.copytree(ROOT / "csrc", checkout.root / "csrc")
    for name in ("pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, checkout.root)
    done = checkout.run("-q", "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout.root / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        (top,) = {name.split("/")[0] for name in tar.getnames()}
        names = {name.removeprefix(top + "/") for name in tar.getnames()}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert there <= names
    assert {"setup.py", "pyproject.toml"} <= names


def real_nvcc() -> str | None:
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return found if Path(found).exists() else None


def toolkit_of(nvcc: str) -> str:
    """The folder of the toolkit: nvcc on the PATH may be a script that calls the one inside of it."""
    lines = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    (top,) = [line.split("TOP=")[1] for line in lines.stderr.splitlines() if "TOP=" in line]
    return os.path.normpath(top)


@pytest.mark.skipif(real_nvcc() is None, reason="there is no nvcc")
def test_real_nvcc_builds_a_module_that_can_be_imported(checkout):
    for name in checkout.sources:
        (checkout.root / name).unlink()
    (checkout.root / "csrc/module.cu").write_text(MODULE)
    checkout.build(CUDA_HOME=toolkit_of(real_nvcc()), D2_TRT_CUDA_ARCHS="90")
    code = "import mask2former._kernels as kernels; print(kernels.ANSWER)"
    told = subprocess.run([sys.executable, "-c", code], cwd=checkout.root, capture_output=True, text=True)
    assert told.stdout.strip() == "42", told.stderr
    (rule,) = (checkout.root / "build").rglob("*module.cu.d")
    assert "/cuda_runtime.h" in rule.read_text()  # a folder of -isystem
