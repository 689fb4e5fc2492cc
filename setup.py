"""Packages mask2former (the model) and d2_trt (its TensorRT plugin), and what csrc/ compiles to.

    mask2former/_kernels.*.so            CUDA kernels behind pybind11, for any PyTorch
    d2_trt/libd2_trt_plugins_trtN.so     TensorRT plugins for major version N, loaded by d2_trt.plugin

Both need nvcc, the second TensorRT's C++ headers too. Where these are absent the install is pure Python and says so in
one line; where a compiler fails, so does the install. Environment variables:

    CUDA_HOME               where nvcc is; else PATH, else /usr/local/cuda
    TENSORRT_INCLUDE_DIR    folder of NvInfer.h; else /usr/include and its usual subfolders
    D2_TRT_CUDA_ARCHS       such as "86;90"; else those of the machine's cards, else DEFAULT_ARCHS
    D2_TRT_KERNELS          0: never compile; 1: a missing nvcc is an error; else compile where nvcc is
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
KERNELS = "mask2former._kernels"
PLUGINS = "d2_trt.plugins"
PLUGIN_SOURCES = CSRC / "trt_plugin"
# Folders of csrc/ whose kernels the plugins run.
PLUGIN_KERNELS = ("attention", "mlp", "ms_deform_attn", "normalization", "window_attention")
# Without a card to ask: Ampere, Ada, Hopper; newer cards compile the PTX of the last.
DEFAULT_ARCHS = ("80", "86", "89", "90")
# Commands that compile; the others, such as egg_info, neither look for a compiler nor talk about one.
COMPILING = {"build_ext", "build", "install", "bdist_wheel", "editable_wheel", "develop"}


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(home, "bin", "nvcc") for home in homes if home]
    on_path = shutil.which("nvcc")
    found += [Path(on_path)] if on_path else []
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in found if path.exists()), None)


def find_pybind11() -> str | None:
    """pybind11's headers: the package's, else the copy that PyTorch ships."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        pass
    try:
        import torch
    except ImportError:
        return None
    include = Path(torch.__file__).parent / "include"
    return str(include) if (include / "pybind11").is_dir() else None


def find_tensorrt() -> tuple[str, int, str] | None:
    """Folder of TensorRT's headers, their major version, and what NvInferVersion.h says of the whole version."""
    asked = os.environ.get("TENSORRT_INCLUDE_DIR")
    multiarch = f"/usr/include/{platform.machine()}-linux-gnu"
    for folder in [asked] if asked else [multiarch, "/usr/include", "/usr/local/tensorrt/include"]:
        header = Path(folder, "NvInferVersion.h")
        if header.exists() and Path(folder, "NvInferRuntime.h").exists():
            text = header.read_text()
            major = re.search(r"define\s+NV_TENSORRT_MAJOR\s+(\w+)", text).group(1)
            if not major.isdigit():  # from 10.x on: one macro names another
                major = re.search(rf"define\s+{major}\s+(\d+)", text).group(1)
            version = ", ".join(re.findall(r"define\s+(\w+\s+\w+)", text))
            return folder, int(major), version
    if asked:
        raise SystemExit(f"TENSORRT_INCLUDE_DIR is {asked!r}, which has no NvInferRuntime.h")
    return None


def architectures(nvcc: Path) -> list[str]:
    """Compute capabilities to compile for, ascending, without the dot."""
    asked = os.environ.get("D2_TRT_CUDA_ARCHS", "")
    if asked:
        found = [a.strip().replace(".", "") for a in re.split(r"[;, ]+", asked) if a.strip()]
        if not found or not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in found):
            raise SystemExit(f"D2_TRT_CUDA_ARCHS is {asked!r}; expected compute capabilities such as '86;90'")
        return sorted(set(found), key=lambda a: int(a.rstrip("af")))
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        cards = subprocess.run(query, capture_output=True, text=True, timeout=30)
        found = {line.strip().replace(".", "") for line in cards.stdout.splitlines()}
        found = {a for a in found if a.isdigit()} if cards.returncode == 0 else set()
    except (OSError, subprocess.TimeoutExpired):
        found = set()
    if not found:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        found = {a for a in DEFAULT_ARCHS if f"sm_{a}" in listed.split()} or set(DEFAULT_ARCHS)
    return sorted(found, key=int)


def is_plugin_source(path: Path) -> bool:
    return path.parent == PLUGIN_SOURCES or (path.suffix == ".cu" and path.parent.name in PLUGIN_KERNELS)


def optional_extensions() -> list[Extension]:
    wish = os.environ.get("D2_TRT_KERNELS", "")
    if wish == "0":
        return []
    nvcc, pybind11 = find_nvcc(), find_pybind11()
    if nvcc is None or pybind11 is None:
        missing = "nvcc (set CUDA_HOME)" if nvcc is None else "pybind11 (pip install pybind11)"
        if wish == "1":
            raise SystemExit(f"D2_TRT_KERNELS is 1, but there is no {missing}")
        print(f"d2_trt: no {missing}: installing without CUDA kernels", file=sys.stderr)
        return []
    sources = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cpp"))
    relative = [str(p.relative_to(ROOT)) for p in sources]
    headers = [str(p.relative_to(ROOT)) for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh")]
    plugin = str(PLUGIN_SOURCES.relative_to(ROOT))
    kernels = [p for p in relative if not p.startswith(plugin)]
    extensions = [Extension(KERNELS, kernels, include_dirs=[pybind11], depends=headers, language="c++")]
    tensorrt = find_tensorrt()
    if tensorrt is None:
        print(
            "d2_trt: no TensorRT headers (set TENSORRT_INCLUDE_DIR): installing without its plugins",
            file=sys.stderr,
        )
        return extensions
    folder, major, version = tensorrt
    # What the plugins run: kernels, without their Python bindings.
    parts = [str(p.relative_to(ROOT)) for p in sources if is_plugin_source(p)]
    extension = Extension(PLUGINS, parts, include_dirs=[folder], depends=headers, language="c++")
    extension.tensorrt_major = major
    extension.tensorrt_version = version
    return [*extensions, extension]


def is_newest(target: Path, rule: Path) -> bool:
    """Whether a file is newer than all that a rule of make, as compilers write them, says it was made from."""
    if not (target.exists() and rule.exists()):
        return False
    made_from = rule.read_text().replace("\\\n", " ").partition(":")[2].split()
    made = target.stat().st_mtime
    return all(Path(p).exists() and Path(p).stat().st_mtime < made for p in made_from)


class BuildCuda(build_ext):
    """Compiles with nvcc, whose host compiler takes the .cpp files too, and links its static CUDA runtime."""

    def get_ext_filename(self, name):
        extension = self.ext_map.get(name) if getattr(self, "ext_map", None) else None
        major = getattr(extension, "tensorrt_major", None)
        if major is None and name.endswith(PLUGINS.rpartition(".")[2]):
            major = next((e.tensorrt_major for e in self.extensions if hasattr(e, "tensorrt_major")), None)
        if major is not None:
            return str(Path(*name.split(".")[:-1], f"libd2_trt_plugins_trt{major}.so"))
        return super().get_ext_filename(name)

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def build_extension(self, ext):
        nvcc = find_nvcc()
        output = Path(self.get_ext_fullpath(ext.name))
        archs = architectures(nvcc)
        flags = ["-O3", "-std=c++17", "-lineinfo"]
        flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"]
        flags += ["--expt-relaxed-constexpr", f"-I{CSRC}"]
        flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        flags += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        # -isystem: warnings in other people's headers are theirs. All extensions get the folders of all, so that a kernel
        # that two of them link is compiled once.
        folders = [folder for e in self.extensions for folder in e.include_dirs]
        for folder in [*folders, sysconfig.get_paths()["include"], str(nvcc.parent.parent / "include")]:
            flags += ["-isystem", folder]
        # Headers of another version may be older than the objects, whose rules then tell nothing.
        compiler = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        tensorrt = getattr(ext, "tensorrt_version", None)
        objects_in = Path(self.build_temp, "objects")
        plugins = PLUGIN_SOURCES.relative_to(ROOT)
        objects_in.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target = objects_in / (source.replace("/", "_") + ".o")
            command = [str(nvcc), *flags, "-c", source, "-o", str(target)]
            versions = [compiler, tensorrt if Path(source).parent == plugins else None]
            made_by = str([command, versions])
            recipe, headers = target.with_suffix(".command"), target.with_suffix(".d")
            if not (recipe.exists() and recipe.read_text() == made_by and is_newest(target, headers)):
                recipe.unlink(missing_ok=True)
                self.spawn([*command, "-MD", "-MF", str(headers)])
                recipe.write_text(made_by)
            return str(target)

        with concurrent.futures.ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        output.parent.mkdir(parents=True, exist_ok=True)
        arch = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        self.spawn([str(nvcc), "-shared", "-cudart=static", *arch, *objects, "-o", str(output)])


setup(
    name="d2_trt",
    version="0.1.0",
    description="Mask2Former on detectron2, with a TensorRT backend",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mask2former", "mask2former.*", "d2_trt", "d2_trt.*"]),
    package_data={"mask2former.data.datasets": ["categories/*.json"]},
    ext_modules=optional_extensions() if COMPILING & set(sys.argv) else [],
    cmdclass={"build_ext": BuildCuda},
    # torch has no version here, so that installing this never replaces a GPU machine's own build.
    # detectron2 is needed too, but PyPI does not have it: see README.md.
    install_requires=[
        "torch",
        "numpy",
        "Pillow",
        "fvcore",
        "iopath",
        "pycocotools",
        "scipy",
        "tabulate",
    ],
    extras_require={
        "demo": ["opencv-python-headless", "tqdm"],
        "test": ["pytest", "pytest-xdist", "ruff", "transformers"],
    },
)
