#!/usr/bin/env python3
"""Make the project's virtual environment, or bring it up to date: .venv with pinned packages and detectron2.

`make demo`, `make test` and `make lint` call this first. It needs Python 3.10, 3.11 or 3.12 with its venv
module and pip's package index; no GPU, no compiler, no root. A second run with the same options takes a
moment; after one that was interrupted or failed, the next goes on from its last finished part.

Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import detectron2_wheel
from bootstrap_console import Console, SetupError
from bootstrap_detectron2 import Detectron2Source
from bootstrap_python import Interpreter, clean_environment, find_interpreter, probe

ROOT = Path(__file__).resolve().parent.parent
LOCK = "requirements.lock"
TORCHVISION_LOCK = "requirements-nodeps.lock"
INSTALLERS = ("pip", "setuptools", "wheel")
PARTS = ("base", "detectron2", "project")
STATE = "d2_trt-bootstrap.json"  # in the environment; what of it is finished, and from which inputs
MINIMUM_FREE_GB = 3.0  # torch's CPU build: 1.4 GB, and its wheels
CUDA_FREE_GB = 10.0  # torch's CUDA build: 5.2 GB, and its wheels while they are unpacked
BASE_RECIPE = 1  # raise it when this file installs the base packages in another way

# The pinned torchvision has no image codecs next to another torch, and says so at each import; nothing here uses them.
QUIET_PTH = "d2_trt-quiet.pth"
QUIET = (
    'import warnings; warnings.filterwarnings("ignore", message="Failed to load image Python extension")\n'
)

CHECK = """
import warnings
warnings.simplefilter("ignore")
import torch, torchvision, detectron2
import detectron2.engine, detectron2.evaluation, detectron2.projects.deeplab
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
print(f"READY torch {torch.__version__}, torchvision {torchvision.__version__}, on {device}")
"""


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(options.venv.parent / f"{options.venv.name}.log")
    try:
        with exclusive(options.venv, console) as lock:
            Setup(options, console, lock).run()
    except (SetupError, detectron2_wheel.SourceError) as error:
        console.say(f"\nset-up stopped: {error}")
        return 1
    except KeyboardInterrupt:
        console.say("\nset-up interrupted; the next run goes on from the last finished part.")
        return 130
    return 0


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bootstrap.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="where the environment goes (default: .venv)"
    )
    parser.add_argument(
        "--python", default="", help="interpreter to use (default: python3.11, else 3.10, else 3.12)"
    )
    parser.add_argument(
        "--detectron2",
        default="0.5",
        metavar="0.5|PATH|URL",
        help="0.5 (default, from PyPI), a checkout, or a git URL that may end in @tag, @branch or @commit",
    )
    parser.add_argument(
        "--detectron2-native",
        action="store_true",
        help="compile that detectron2's C++/CUDA operators (needs a compiler); default: a pure-Python wheel",
    )
    parser.add_argument("--torch", default="", metavar="VERSION", help=f"instead of the version in {LOCK}")
    parser.add_argument(
        "--torchvision", default="", metavar="VERSION", help=f"instead of the one in {TORCHVISION_LOCK}"
    )
    parser.add_argument(
        "--recreate", action="store_true", help="start over, even when the environment is up to date"
    )
    options = parser.parse_args(arguments)
    for name in ("torch", "torchvision"):
        value = getattr(options, name)
        if value and not re.fullmatch(r"\d+\.\d+[0-9A-Za-z.+]*", value):
            parser.error(f"--{name} is {value!r}; it must be a version such as 2.13.0.")
    options.detectron2 = options.detectron2 or "0.5"
    options.venv = options.venv.resolve()
    return options


@contextlib.contextmanager
def exclusive(venv: Path, console: Console):
    """Hold the environment's lock file, so that of several runs at a time one works and the others wait."""
    path = venv.parent / f"{venv.name}.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise SetupError(
            f"cannot write {path}: {error.strerror}. Name another place: make VENV=/path/to/environment ..."
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"waiting for another set-up of {venv} to end ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


class Setup:
    """One run. Three parts; one is redone when its key, a hash of what goes into it, is not the recorded key:

    base        the virtual environment and every package of the lock files
    detectron2  from PyPI's sdist, a checkout or a git URL
    project     this project itself, in editable form

    A part's key is erased before work on it starts and written when it is finished: what an interrupted run
    left is never taken for good. Without a base the whole folder is made anew.
    """

    def __init__(self, options: argparse.Namespace, console: Console, lock: int):
        self.options = options
        self.console = console
        self.lock = (
            lock  # child processes get it too: were this one killed, a pip that lives on still holds it
        )
        self.venv = options.venv
        self.python = self.venv / "bin" / "python"
        self.source = Detectron2Source(options.detectron2, options.detectron2_native)

    def run(self) -> None:
        interpreter = self.current_interpreter()
        wanted = self.keys(interpreter.version) if interpreter else {}
        todo = self.outdated(wanted) if interpreter else list(PARTS)
        if not todo:
            self.console.say(f"{self.venv.name} is up to date (detectron2 {self.source.label}).")
            return
        if "base" in todo:
            self.check_place()
            interpreter = find_interpreter(self.options.python)
            wanted = self.keys(interpreter.version)
        self.console.begin(stage_count={"base": 6, "detectron2": 3, "project": 2}[todo[0]])
        if "base" in todo:
            self.make_base(interpreter, wanted["base"])
        if "detectron2" in todo:
            self.forget("detectron2")
            self.install_detectron2()
            self.remember("detectron2", wanted["detectron2"])
        self.forget("project")
        self.install_project()
        ready = self.check_imports()
        self.remember("project", wanted["project"])
        self.console.say(f"{self.venv} is ready in {self.console.total()}: {ready}")

    # ---- what there is and what is wanted

    def state(self) -> dict[str, str]:
        try:
            return json.loads((self.venv / STATE).read_text())
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return {}

    def write_state(self, state: dict[str, str]) -> None:
        temporary = self.venv / f"{STATE}.new"
        temporary.write_text(json.dumps(state, indent=1) + "\n")
        os.replace(temporary, self.venv / STATE)

    def forget(self, part: str) -> None:
        self.write_state({name: key for name, key in self.state().items() if name != part})

    def remember(self, part: str, key: str) -> None:
        self.write_state({**self.state(), part: key})

    def current_interpreter(self) -> Interpreter | None:
        """The environment's own Python if it runs; with --python, only if that is of the same version."""
        current = probe(str(self.python)) if self.python.exists() else None
        if current and self.options.python:
            asked = find_interpreter(self.options.python)
            return current if current.version == asked.version else None
        return current

    def keys(self, python_version: str) -> dict[str, str]:
        base = digest(
            BASE_RECIPE,
            read_lock(ROOT / LOCK),
            read_lock(ROOT / TORCHVISION_LOCK),
            python_version,
            self.options.torch,
            self.options.torchvision,
            str(self.venv),  # scripts in bin/ hold the path
        )
        converter = Path(detectron2_wheel.__file__).read_text()
        detectron2 = digest(base, self.source.spec, self.source.native, self.source.content_key(), converter)
        packages = [name for name in ("mask2former", "d2_trt") if (ROOT / name).is_dir()]
        recipe = [(ROOT / name).read_text() for name in ("setup.py", "pyproject.toml")]
        kernels = [(str(p.relative_to(ROOT)), p.read_text()) for p in sorted((ROOT / "csrc").rglob("*.*"))]
        project = digest(detectron2, recipe, packages, kernels, kernel_environment(), find_nvcc())
        return {"base": base, "detectron2": detectron2, "project": project}

    def outdated(self, wanted: dict[str, str]) -> list[str]:
        """Parts to redo: the first whose key differs, and all after it."""
        state = {} if self.options.recreate else self.state()
        for index, part in enumerate(PARTS):
            if state.get(part) != wanted[part]:
                return list(PARTS[index:])
        return []

    def check_place(self) -> None:
        if self.venv.exists() and not (self.venv / STATE).exists() and any(self.venv.iterdir()):
            raise SetupError(
                f"{self.venv} exists and was not made by tools/bootstrap.py, so it is left alone. "
                "Move it away, or name another place: make VENV=/path/to/environment ..."
            )
        free = shutil.disk_usage(self.venv.parent).free / 1e9
        if free < MINIMUM_FREE_GB:
            raise SetupError(
                f"{free:.1f} GB are free on the disk of {self.venv.parent}; {MINIMUM_FREE_GB:.0f} GB are "
                f"needed, and {CUDA_FREE_GB:.0f} GB for torch's CUDA build. Free some, or use another "
                "disk: make VENV=/big/disk/venv ..."
            )
        if free < CUDA_FREE_GB:
            self.console.say(
                f"note: {free:.1f} GB are free, enough for torch's CPU build. Its CUDA build, the usual "
                f"one for Linux, needs about {CUDA_FREE_GB:.0f} GB."
            )

    # ---- the parts

    def make_base(self, interpreter: Interpreter, key: str) -> None:
        console = self.console
        console.say(f"setting up {self.venv} (log: {console.log_path})")
        console.stage(f"virtual environment, Python {interpreter.version} ({interpreter.path})")
        if self.venv.exists():
            console.detail("removing what is there")
            self.write_state({})  # from here on nothing in it counts
            remove_environment(self.venv)
        self.venv.mkdir(parents=True)
        self.write_state({})  # marks the folder as ours before anything else is in it
        self.command([interpreter.path, "-m", "venv", str(self.venv)])
        console.done()

        console.stage(f"installers: {', '.join(INSTALLERS)}")
        pins = read_lock(ROOT / LOCK)
        installers = [line for line in pins if requirement_name(line) in INSTALLERS]
        self.pip("install", "--upgrade", *installers, bar="off")
        console.done()

        pins = replace_pin(pins, "torch", self.options.torch)
        torch = next(line for line in pins if requirement_name(line) == "torch")
        console.stage(f"packages of {LOCK}, {torch} among them: the longest part")
        with tempfile.TemporaryDirectory() as folder:
            requirements = Path(folder, "requirements.txt")
            requirements.write_text("\n".join(pins) + "\n")
            # Build isolation would fetch an unpinned setuptools for packages that PyPI has as sources only.
            # Python compiles a module when it is first imported; compiling all of them now doubles the time.
            self.pip("install", "--no-build-isolation", "--no-compile", "-r", str(requirements))
            pins = replace_pin(read_lock(ROOT / TORCHVISION_LOCK), "torchvision", self.options.torchvision)
            requirements.write_text("\n".join(pins) + "\n")
            self.pip("install", "--no-deps", "-r", str(requirements))
        if not self.options.torchvision:
            site = self.venv / "lib" / f"python{interpreter.minor}" / "site-packages"
            (site / QUIET_PTH).write_text(QUIET)
        console.done()
        self.remember("base", key)

    def install_detectron2(self) -> None:
        self.console.stage(f"detectron2 {self.source.label}")
        with tempfile.TemporaryDirectory(prefix="d2_trt-") as folder:
            source = self.source.fetch(Path(folder), self.pip, self.command)
            if self.source.native:
                package = detectron2_wheel.edited_copy(source, Path(folder, "native"))
            else:
                self.console.detail("making a pure-Python wheel")
                package = detectron2_wheel.build_wheel(source, Path(folder, "wheel"))
            self.pip("install", "--no-deps", "--no-build-isolation", "--force-reinstall", str(package))
        self.console.done()

    def install_project(self) -> None:
        nvcc = find_nvcc()
        kernels = (
            f", and its CUDA kernels by {nvcc}: minutes; D2_TRT_KERNELS=0 leaves them out" if nvcc else ""
        )
        self.console.stage(f"this project, editable{kernels}")
        install = [
            "install",
            "--progress-bar",
            "off",
            "--no-deps",
            "--no-build-isolation",
            "--editable",
            str(ROOT),
        ]
        env = {**clean_environment(), **kernel_environment()}
        self.command([str(self.python), "-m", "pip", *install], env=env)
        self.console.done()

    def check_imports(self) -> str:
        self.console.stage("check that torch, torchvision and detectron2 import together")
        try:
            output = self.command([str(self.python), "-c", CHECK])
        except SetupError as error:
            chosen = [f"TORCH={self.options.torch}"] if self.options.torch else []
            chosen += [f"TORCHVISION={self.options.torchvision}"] if self.options.torchvision else []
            if not chosen:
                raise
            raise SetupError(
                f"{error}\nThis is with {' '.join(chosen)}: torchvision must be the release made for that "
                "torch, both for the CPU or both for CUDA. Up to Python 3.11 one is used without TORCHVISION= "
                "that imports beside any torch."
            ) from error
        self.console.done()
        ready = next(line for line in output.splitlines() if line.startswith("READY "))
        return f"{ready[len('READY ') :]}, detectron2 {self.source.label}"

    def pip(self, *arguments: str, bar: str = "raw") -> None:
        # The pip that a new environment comes with may be too old for `--progress-bar raw`.
        self.command([str(self.python), "-m", "pip", arguments[0], "--progress-bar", bar, *arguments[1:]])

    def command(self, command: list[str], env: dict[str, str] | None = None) -> str:
        return self.console.run(command, env=env or clean_environment(), keep_open=(self.lock,))


def kernel_environment() -> dict[str, str]:
    """What decides, beside find_nvcc, how setup.py compiles csrc/: its variables."""
    names = ("CUDA_HOME", "CUDA_PATH", "TENSORRT_INCLUDE_DIR", "D2_TRT_CUDA_ARCHS", "D2_TRT_KERNELS")
    env = {name: os.environ[name] for name in names if name in os.environ}
    if shutil.which("nvidia-smi") is None:
        # No card to compile for: one architecture and its PTX, which newer cards take, instead of four.
        env.setdefault("D2_TRT_CUDA_ARCHS", "80")
    return env


def find_nvcc() -> str:
    """The nvcc with which setup.py compiles csrc/; empty where it does not."""
    if os.environ.get("D2_TRT_KERNELS") == "0":
        return ""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [str(Path(home, "bin", "nvcc")) for home in homes]
    found += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in found if path and Path(path).exists()), "")


def read_lock(path: Path) -> list[str]:
    """Requirement lines without comments and blank lines."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def requirement_name(line: str) -> str:
    return re.split(r"[=<>!;\[\s]", line, maxsplit=1)[0].lower()


def replace_pin(lines: list[str], name: str, version: str) -> list[str]:
    """The lines with `name` at `version` instead of its pin; unchanged when `version` is empty."""
    if not version:
        return list(lines)
    return [line for line in lines if requirement_name(line) != name] + [f"{name}=={version}"]


def remove_environment(venv: Path) -> None:
    """Remove an environment of ours, its mark last, so that an interrupted removal is still known as ours."""
    for path in venv.iterdir():
        if path.name != STATE:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    shutil.rmtree(venv)


def digest(*values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
