#!/usr/bin/env python3
"""Resolve requirements.in into requirements.lock for every supported Python.

    update_lock.py PYTHON [PYTHON ...]      one interpreter for each of 3.10, 3.11 and 3.12, with pip >= 22.2

Nothing is installed: `pip install --dry-run --report` resolves. Python 3.11 leads; the others keep its
versions where those exist for them, and get a line with a marker where they do not. Packages that only
torch's CUDA build needs are left out: torch pins them itself, and which of them exist depends on the
platform.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEADER = "3.11"
SUPPORTED = ("3.10", "3.11", "3.12")
PINNED_BY_TORCH = re.compile(r"^(nvidia-|cuda-|triton$)")
HEADER = """\
# Every package of .venv but detectron2 (made by tools/bootstrap.py) and torchvision
# (requirements-nodeps.lock). Made by `make lock` from requirements.in: edit that file, not this one.
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python_version(interpreter: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run(
        [interpreter, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def resolve(interpreter: str, constraints: dict[str, str]) -> dict[str, str]:
    """Versions pip picks for requirements.in, by canonical name. CalledProcessError if there are none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        limits = Path(folder, "constraints.txt")
        limits.write_text("".join(f"{name}=={version}\n" for name, version in constraints.items()))
        command = [interpreter, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-r", str(ROOT / "requirements.in"), "-c", str(limits)]
        subprocess.run(command, check=True)
        packages = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    # A local version (2.13.0+cpu) names one index's build; the lock holds for all of them.
    versions = {canonical(package["name"]): package["version"].split("+")[0] for package in packages}
    return {name: version for name, version in versions.items() if not PINNED_BY_TORCH.match(name)}


def follow(interpreter: str, leader: dict[str, str]) -> dict[str, str]:
    """As `resolve`, with the leader's version of every package for which this interpreter has it too."""
    constraints = dict(leader)
    free = resolve(interpreter, {})
    while True:
        try:
            return resolve(interpreter, constraints)
        except subprocess.CalledProcessError:
            differing = [name for name in constraints if free.get(name) != leader[name]]
            if not differing:
                raise
            for name in differing:
                del constraints[name]


def merge(resolved: dict[str, dict[str, str]]) -> list[str]:
    """Lock lines: one for a package that is the same everywhere, else one for each Python that has it."""
    lines = []
    for name in sorted({name for versions in resolved.values() for name in versions}):
        by_python = {python: versions[name] for python, versions in resolved.items() if name in versions}
        distinct = set(by_python.values())
        if len(distinct) == 1 and len(by_python) == len(resolved):
            lines.append(f"{name}=={distinct.pop()}")
            continue
        for version in sorted(distinct):
            pythons = [python for python in by_python if by_python[python] == version]
            marker = " or ".join(f'python_version == "{python}"' for python in pythons)
            lines.append(f"{name}=={version}; {marker}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    try:
        interpreters = {python_version(name): name for name in parser.parse_args().pythons}
    except (OSError, subprocess.CalledProcessError) as error:
        parser.error(f"{error}. Name interpreters of Python {', '.join(SUPPORTED)}")
    missing = [version for version in SUPPORTED if version not in interpreters]
    if missing:
        parser.error(
            f"no interpreter given for Python {', '.join(missing)}: the lock must hold for {SUPPORTED}."
        )
    resolved = {LEADER: resolve(interpreters[LEADER], {})}
    for version in SUPPORTED:
        if version != LEADER:
            resolved[version] = follow(interpreters[version], resolved[LEADER])
    lines = merge({version: resolved[version] for version in SUPPORTED})
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(lines) + "\n")
    print(f"requirements.lock: {len(lines)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
