"""csrc/trt_plugin without TensorRT, its headers or CUDA: compiled over our own declarations (tests/native/tensorrt).

What these declarations say of TensorRT is not tested here: the build with its own headers does that, and the GPU's tests.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

import pytest

from d2_trt import plugin
from tests.mask2former.native_library import REPO, compiler

VERSIONS = {"8.6.1": "getPluginCreators", "10.13.0": "getCreators", "11.1.0": "getCreators"}


@pytest.fixture(scope="module", params=VERSIONS)
def library(request, tmp_path_factory):
    """The version of TensorRT, and the plugins' library for it without the kernels."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler (g++ or clang++) on the PATH")
    target = tmp_path_factory.mktemp("plugins") / "library.so"
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-z,lazy"]
    flags += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
    names = ("NV_TENSORRT_MAJOR", "NV_TENSORRT_MINOR", "NV_TENSORRT_PATCH")
    defines = [f"-D{name}={number}" for name, number in zip(names, request.param.split("."))]
    folders = ["-isystem", str(REPO / "tests/native/tensorrt"), f"-I{REPO / 'csrc'}"]
    sources = [str(path) for path in sorted((REPO / "csrc/trt_plugin").glob("*.cpp"))]
    done = subprocess.run(
        [compiler(), *flags, *defines, *folders, *sources, "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return request.param, target


def test_library_has_a_creator_for_each_plugin_and_tells_its_version(library):
    version, path = library
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.restype = ctypes.c_void_p
    handle = dlopen(
        str(path).encode(), os.RTLD_LAZY
    )  # ctypes' own binds at once, and the kernels are not there
    assert handle
    loaded = ctypes.CDLL(str(path), handle=handle)
    creators, count = getattr(loaded, VERSIONS[version]), ctypes.c_int32()
    creators.restype = ctypes.c_void_p
    assert creators(ctypes.byref(count)) and count.value == len(plugin.PLUGINS)
    major, minor, patch = map(int, version.split("."))
    assert loaded.d2_trt_tensorrt_version() == major * 10000 + minor * 100 + patch


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_library_needs_nothing_of_tensorrt_and_shows_what_it_asks_for(library):
    version, path = library
    names = {
        kind: subprocess.run(
            ["nm", "-D", "-C", f"--{kind}-only", path], capture_output=True, text=True, check=True
        ).stdout
        for kind in ("undefined", "defined")
    }
    assert "nvinfer" not in names["undefined"]
    exported = {line.split()[-1] for line in names["defined"].splitlines()}
    assert {VERSIONS[version], "setLoggerFinder", "d2_trt_tensorrt_version"} <= exported
