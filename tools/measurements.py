"""Measurements of a checkpoint, a row each, in CSV files that are continued: for the ledger and the precision search."""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from mask2former.backend import BackendError

REPO = Path(__file__).resolve().parent.parent
MACHINE = ("gpu", "torch", "cuda", "tensorrt", "detectron2", "python")


def machine(device: str) -> dict[str, str]:
    """Columns of MACHINE: the GPU (or processor), and versions; TensorRT's is empty where it is not installed."""
    import detectron2

    from d2_trt import compat
    from d2_trt.errors import MissingDependencyError

    try:
        tensorrt = compat.tensorrt().__version__
    except MissingDependencyError:
        tensorrt = ""

    cuda = device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": (torch.version.cuda or "") if cuda else "",
        "tensorrt": tensorrt,
        "detectron2": detectron2.__version__,
        "python": platform.python_version(),
    }


def checkpoint_digest(path: str) -> str:
    """The first 12 digits of the sha256 of a checkpoint file."""
    digest = hashlib.sha256()
    with PathManager.open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def config_name(path: str) -> str:
    """A config's path below configs/, or as it is where it lies elsewhere."""
    absolute, root = Path(path).resolve(), REPO / "configs"
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(path)


def command_line(argv: Sequence[str]) -> str:
    """The command of this process, as it can be given again."""
    return shlex.join(["python", f"tools/{Path(sys.argv[0]).name}" if sys.argv[0] else "python", *argv])


def today() -> str:
    return datetime.date.today().isoformat()


def size_pair(text: str) -> tuple[int, int]:
    """An argument of the form MIN/MAX: values for INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST."""
    try:
        shortest, longest = (int(part) for part in text.split("/"))
    except ValueError:
        shortest = longest = 0
    if not 1 <= shortest <= longest:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not MIN/MAX, two whole numbers of pixels of which the second is not the smaller, such as 800/1333"
        )
    return shortest, longest


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def failure_reason(error: Exception) -> str:
    """The status of a measurement that an error kept from being made, in a line."""
    kind = "" if isinstance(error, BackendError) else f"{type(error).__name__}: "
    return f"failed: {kind}{' '.join(str(error).split())}"


def number(value: float, digits: int = 6) -> float | str:
    """What goes into a cell: rounded to so many significant digits, empty for NaN."""
    return "" if value != value else float(f"{value:.{digits}g}")


class MeasurementFile:
    """Rows of a CSV file, each on disk as soon as it is added; a run that was cut off is continued in the same file.

    Rows that agree in the identifying columns are the same measurement: the last one counts.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fields: Sequence[str],
        identity: Sequence[str],
        later: Sequence[str] = (),
        exclusive: bool = False,
    ):
        """
        Args:
            fields: columns.
            identity: those that say what was measured.
            later: columns that an older file may lack; it gets them with the first row that is added.
            exclusive: continue no file; where one of this name is made first, -2, -3 and so on goes to the name.

        Raises:
            ValueError: the file is there and has other columns.
        """
        self.path = Path(path)
        self._fields = list(fields)
        self._identity = list(identity)
        self._later = list(later)
        self._unmade = exclusive
        self._rows: dict[tuple[str, ...], dict[str, str]] = {}
        if not exclusive and self.path.exists():
            for row in read_rows(self.path, self._fields, self._later):
                self._rows[self._key(row)] = row

    @staticmethod
    def new_path(folder: str, what: str, columns: Mapping[str, str]) -> Path:
        """A file named by what was measured, the GPU, the versions and the time."""
        tensorrt = f"_trt{columns['tensorrt']}" if columns["tensorrt"] else ""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{what}_{columns['gpu']}_torch{columns['torch']}{tensorrt}_{stamp}.csv"
        return Path(folder) / "".join(c if c.isalnum() or c in "._-" else "-" for c in name)

    @property
    def rows(self) -> list[dict[str, str]]:
        """All measurements, in the order in which they were first made."""
        return list(self._rows.values())

    def find(self, columns: Mapping[str, Any]) -> dict[str, str] | None:
        """The measurement that agrees with these columns in all that identify one."""
        return self._rows.get(self._key(columns))

    def add(self, columns: Mapping[str, Any]) -> dict[str, str]:
        """Write a row; returns it as it reads in the file."""
        unknown = set(columns) - set(self._fields)
        if unknown:
            raise KeyError(f"{self.path} has no columns {sorted(unknown)}")
        row = {field: str(columns.get(field, "")) for field in self._fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._unmade:
            self.path = _made(self.path)
            self._unmade = False
        new = not self.path.exists() or self.path.stat().st_size == 0
        if not new and self._later:
            self._complete()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self._fields)
            if new:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
        self._rows[self._key(row)] = row
        return row

    def _complete(self) -> None:
        """Give an older file the columns that it lacks; it is replaced whole or not at all."""
        with open(self.path, newline="") as file:
            if next(csv.reader(file)) == self._fields:
                return
        rows = read_rows(self.path, self._fields, self._later)
        temporary = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._fields)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def _key(self, columns: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(columns.get(field, "")) for field in self._identity)


def _made(path: Path) -> Path:
    """An empty file that this process made: of this name, or with -2, -3 and so on where it is taken."""
    made, count = path, 1
    while True:
        try:
            made.touch(exist_ok=False)
            return made
        except FileExistsError:
            count += 1
            made = path.with_name(f"{path.stem}-{count}{path.suffix}")


def read_rows(
    path: str | os.PathLike, fields: Sequence[str], later: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Rows of a CSV file.

    A last line that was cut off in the middle, as by a kill, is left out and cut off from the file.

    Args:
        later: columns that an older file may lack; they are empty then.

    Raises:
        ValueError: its columns are not `fields`.
        OSError: it cannot be read.
    """
    path = Path(path)
    text = path.read_bytes().decode()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        with open(path, "r+b") as file:
            file.truncate(len(text.encode()))
    reader = csv.DictReader(text.splitlines(keepends=True))
    found = list(reader.fieldnames or ())
    if text and found != [field for field in fields if field in found or field not in later]:
        raise ValueError(
            f"{path} has the columns {', '.join(found or ['(none)'])}; expected {', '.join(fields)}. It is of "
            "another tool or version: name another file"
        )
    return [{field: row.get(field, "") for field in fields} for row in reader]
