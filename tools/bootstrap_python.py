"""Which Python the environment is made with, and the process environment of its commands. Stdlib only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from bootstrap_console import SetupError

PREFERRED_PYTHONS = ("3.11", "3.10", "3.12")  # 3.11 is what CI runs


class Interpreter:
    """A Python that was looked at: its path, version "3.11.7", and what is wrong with it ("" if nothing)."""

    def __init__(self, path: str, version: str, problem: str):
        self.path = path
        self.version = version
        self.problem = problem

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


def probe(command: str) -> Interpreter | None:
    """Look at an interpreter; None when there is none by that name or it does not run."""
    path = shutil.which(command)
    if path is None:
        return None
    code = (
        "import sys\n"
        "print(getattr(sys, '_base_executable', sys.executable))  # of a virtual environment, what made it\n"
        "print('%d.%d.%d' % sys.version_info[:3])\n"
        "for name in ('venv', 'ensurepip', 'ssl', 'ctypes', 'zlib'):\n"
        "    try: __import__(name)\n"
        "    except ImportError: print(name)\n"
    )
    try:
        result = subprocess.run([path, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode != 0:
        return None
    executable, version, *missing = result.stdout.split("\n")[:-1]
    interpreter = Interpreter(executable, version, "")
    if interpreter.minor not in PREFERRED_PYTHONS:
        interpreter.problem = f"not one of {', '.join(sorted(PREFERRED_PYTHONS))}"
    elif {"venv", "ensurepip"} & set(missing):
        interpreter.problem = f"its venv module is missing: apt-get install python{interpreter.minor}-venv"
    elif missing:
        interpreter.problem = (
            f"built without {', '.join(missing)}; use the distribution's python{interpreter.minor}"
        )
    return interpreter


def find_interpreter(asked: str) -> Interpreter:
    """The interpreter to make the environment with. Raises SetupError that lists what was found instead."""
    names = [f"python{version}" for version in PREFERRED_PYTHONS] + ["python3", sys.executable]
    if asked:
        names = [asked]
    found = [(name, probe(name)) for name in names]
    usable = [interpreter for _, interpreter in found if interpreter is not None and not interpreter.problem]
    if usable:
        return min(usable, key=lambda interpreter: PREFERRED_PYTHONS.index(interpreter.minor))
    lines = [
        f"no usable Python: one of {', '.join(sorted(PREFERRED_PYTHONS))} with its venv module is needed."
    ]
    for name, interpreter in found:
        state = (
            f"{interpreter.version}, {interpreter.problem}" if interpreter else "not found, or does not run"
        )
        lines.append(f"    {name}: {state}")
    lines.append(
        "On Debian 12: apt-get install python3 python3-venv. Or name one: make PYTHON=/path/to/python3.11 ..."
    )
    raise SetupError("\n".join(lines))


def clean_environment() -> dict[str, str]:
    """The caller's environment without what would lead Python or pip out of the virtual environment."""
    env = dict(os.environ)
    for name in (
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONSTARTUP",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_ROOT",
        "PIP_REQUIRE_HASHES",
    ):
        env.pop(name, None)
    return {
        **env,
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONNOUSERSITE": "1",
    }
