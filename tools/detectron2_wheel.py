#!/usr/bin/env python3
"""Make a pure-Python detectron2 wheel from a detectron2 source tree, without a compiler.

    detectron2_wheel.py SOURCE OUTPUT_DIR      SOURCE: a checkout, or PyPI's sdist detectron2-cdo==0.5

detectron2 is not on PyPI, and its own setup.py compiles C++/CUDA operators that Mask2Former never calls. The
wheel holds detectron2's Python files, its model zoo configs and its three packaged projects (point_rend,
deeplab, panoptic_deeplab). `detectron2._C` becomes a module whose operators raise NotImplementedError when
called, and what NumPy, Pillow, setuptools and PyTorch have since removed is replaced (EDITS). Works on 0.5,
0.6 and main.

Standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SDIST_REQUIREMENT = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"

PROJECTS = {
    "point_rend": "projects/PointRend/point_rend",
    "deeplab": "projects/DeepLab/deeplab",
    "panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}
MODEL_ZOO = "detectron2/model_zoo/model_zoo.py"
FAST_EVAL = "detectron2/evaluation/fast_eval_api.py"
PACKAGED_SUFFIXES = {".py", ".yaml"}

# What the packaged files import. detectron2's own list also names linters and Caffe2 drawing tools: left out.
REQUIRES = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7,<0.1.10",
    "matplotlib",
    "omegaconf>=2.1",
    "packaging",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

EXTENSION_STUB = '''"""Stands in for detectron2's compiled operators, which a pure-Python wheel lacks."""


def get_compiler_version():
    return "none: pure-Python wheel"


def get_cuda_version():
    return "none: pure-Python wheel"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args, **kwargs):
        raise NotImplementedError(
            f"detectron2._C.{name} is a compiled operator, and this detectron2 is a pure-Python wheel. "
            "Install a natively built detectron2 to use it."
        )

    unavailable.__name__ = name
    return unavailable
'''

FAST_EVAL_WITHOUT_EXTENSION = '''"""COCOeval_opt without compiled operators: pycocotools' own evaluation."""

from pycocotools.cocoeval import COCOeval


class COCOeval_opt(COCOeval):
    pass
'''


class SourceError(Exception):
    """The given source is not a detectron2 tree this converter understands."""


class Edit(NamedTuple):
    """A change to the text of each Python file whose path in the wheel `applies` accepts."""

    reason: str
    applies: Callable[[str], bool]
    change: Callable[[str], str]
    with_extension: bool = True  # also needed where the operators are compiled


def _substitution(pattern: str, replacement: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(replacement, text)


def _one_file(path: str) -> Callable[[str], bool]:
    return lambda name: name == path


def _every_file(name: str) -> bool:
    return True


def _configs_beside_module(text: str) -> str:
    """Look configs up beside model_zoo.py: setuptools no longer ships pkg_resources."""
    text = re.sub(r"^import pkg_resources\n", "", text, flags=re.MULTILINE)
    text = re.sub(
        r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo",\s*(os\.path\.join\([^()]*\))\s*\)',
        r"os.path.join(os.path.dirname(os.path.abspath(__file__)), \1)",
        text,
    )
    if "pkg_resources" in text:
        raise SourceError(f"{MODEL_ZOO} uses pkg_resources in a way this converter does not know.")
    return text


def _caffe2_export_optional(text: str) -> str:
    """0.5 and 0.6 import Caffe2, which PyTorch no longer has, for the whole export package."""
    guarded = "try:\n    from .api import *\nexcept ImportError:  # Caffe2 is gone from PyTorch\n    pass\n"
    return re.sub(r"^from \.api import \*\n", guarded, text, flags=re.MULTILINE)


EDITS = (
    Edit(
        "NumPy 1.24 removed its aliases of Python's own types",
        _every_file,
        _substitution(r"\bnp\.(bool|int|float|object|str)\b", r"\1"),
    ),
    Edit(
        "Pillow 10 removed Image.LINEAR, an alias of BILINEAR",
        _every_file,
        _substitution(r"\bImage\.LINEAR\b", "Image.BILINEAR"),
    ),
    Edit(
        "setuptools removed pkg_resources",
        _one_file(MODEL_ZOO),
        _configs_beside_module,
    ),
    Edit(
        "fast COCO evaluation is a compiled operator",
        _one_file(FAST_EVAL),
        lambda text: FAST_EVAL_WITHOUT_EXTENSION,
        with_extension=False,
    ),
    Edit(
        "Caffe2 is gone from PyTorch",
        _one_file("detectron2/export/__init__.py"),
        _caffe2_export_optional,
    ),
)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def source_tree(source: Path) -> Iterator[Path]:
    """Yield the root of a detectron2 tree: `source`, or what is in the sdist once its sha256 is checked."""
    if source.is_dir():
        yield checked_root(source)
        return
    if not source.is_file():
        raise SourceError(
            f"{source} does not exist; give a detectron2 checkout or the sdist of {SDIST_REQUIREMENT}."
        )
    actual = sha256_of(source)
    if actual != SDIST_SHA256:
        raise SourceError(
            f"{source} has sha256 {actual}; the sdist of {SDIST_REQUIREMENT} has {SDIST_SHA256}. "
            "The file is damaged or is not that release."
        )
    with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
        with tarfile.open(source) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(folder, filter="data")
            else:  # Python before 3.10.12; the checksum above already fixes the content
                archive.extractall(folder)
        yield checked_root(next(path for path in Path(folder).iterdir() if path.is_dir()))


def checked_root(root: Path) -> Path:
    wanted = ["detectron2/__init__.py", *(f"{folder}/__init__.py" for folder in PROJECTS.values())]
    missing = [name for name in wanted if not (root / name).is_file()]
    if missing:
        raise SourceError(
            f"{root} is not a detectron2 source tree: {', '.join(missing)} not found. "
            "Give the root of a checkout (the folder that holds setup.py, detectron2/ and projects/)."
        )
    return root


def read_version(root: Path) -> str:
    text = (root / "detectron2" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, flags=re.MULTILINE)
    if match is None:
        raise SourceError(f'{root}/detectron2/__init__.py has no line like __version__ = "0.6".')
    return match.group(1)


def _packaged_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in PACKAGED_SUFFIXES and path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def collect(root: Path) -> dict[str, bytes]:
    """Files of the wheel's `detectron2` package by their path in it, edits applied, metadata not included."""
    files = {f"detectron2/{name}": data for name, data in _packaged_files(root / "detectron2")}
    if not any(name.startswith("detectron2/model_zoo/configs/") for name in files):
        # An sdist carries the configs inside the package, a checkout beside it.
        for name, data in _packaged_files(root / "configs"):
            files[f"detectron2/model_zoo/configs/{name}"] = data
    for project, folder in PROJECTS.items():
        for name, data in _packaged_files(root / folder):
            files[f"detectron2/projects/{project}/{name}"] = data
    for name in list(files):
        if name.endswith(".py"):
            files[name] = apply_edits(name, files[name].decode("utf-8")).encode("utf-8")
    missing = [name for name in (MODEL_ZOO, FAST_EVAL) if name not in files]
    if missing:
        raise SourceError(f"{root} lacks {', '.join(missing)}, which this converter has to replace.")
    files["detectron2/_C.py"] = EXTENSION_STUB.encode("utf-8")
    return files


def apply_edits(name: str, text: str, with_extension: bool = False) -> str:
    for edit in EDITS:
        if edit.applies(name) and (edit.with_extension or not with_extension):
            text = edit.change(text)
    return text


def edited_copy(source: Path, destination: Path) -> Path:
    """Copy a checkout with the edits applied that a native build needs too; setup.py then compiles the copy."""
    shutil.copytree(
        checked_root(source), destination, symlinks=True, ignore=shutil.ignore_patterns(".git", "build")
    )
    for folder in ("detectron2", "projects"):
        for path in (destination / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            edited = apply_edits(path.relative_to(destination).as_posix(), text, with_extension=True)
            if edited != text:
                path.write_text(edited, encoding="utf-8")
    return destination


def fingerprint(root: Path) -> str:
    """sha256 over everything of a tree that goes into its wheel, so that an edited checkout is noticed."""
    digest = hashlib.sha256()
    for name, data in sorted(collect(checked_root(root)).items()):
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def build_wheel(source: Path, output_dir: Path) -> Path:
    """Write `detectron2-VERSION+purepy-py3-none-any.whl` into `output_dir`; returns its path.

    `source` is a checkout or the sdist. Raises SourceError when it is neither. The same source gives the
    same bytes.
    """
    with source_tree(source) as root:
        version = f"{read_version(root)}+purepy"
        files = collect(root)
        info = f"detectron2-{version}.dist-info"
        metadata = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {version}", "License: Apache-2.0"]
        metadata += [f"Requires-Dist: {requirement}" for requirement in REQUIRES]
        files[f"{info}/METADATA"] = ("\n".join(metadata) + "\n").encode()
        files[f"{info}/WHEEL"] = (
            b"Wheel-Version: 1.0\nGenerator: detectron2_wheel\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        licence = root / "LICENSE"
        if licence.is_file():
            files[f"{info}/LICENSE"] = licence.read_bytes()
    record = [_record_line(name, data) for name, data in files.items()] + [f"{info}/RECORD,,"]
    files[f"{info}/RECORD"] = ("\n".join(record) + "\n").encode()

    output_dir.mkdir(parents=True, exist_ok=True)
    wheel = output_dir / f"detectron2-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # A fixed date makes the same source give the same bytes.
            archive.writestr(zipfile.ZipInfo(name, (2021, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return wheel


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(build_wheel(Path(arguments[0]), Path(arguments[1])))
    except SourceError as error:
        print(f"detectron2_wheel.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
