"""Rows of tools/benchmark.py: the CSV file that each goes to as soon as it is there, and the table at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measurements import MeasurementFile

AGREEMENT = ("logit_error", "mask_error", "sign_agreement", "class_agreement")
# Columns that files of earlier versions lack: where the weights come from, the tasks that are on, the config's overrides.
LATER = ("weights", "tasks", "options", "weights_mib")
FIELDS = (
    *("date", "implementation", "gpu", "torch", "cuda", "tensorrt", "detectron2", "python", "config"),
    *("backend", "variant", "precision", "batch", "image", "padded", "output", "stage"),
    *("median_ms", "p10_ms", "p90_ms", "images_per_s", "iterations", "rounds"),
    *("peak_mib", "resident_mib", "segments", "instances"),
    *AGREEMENT,
    *("build_s", "cached_start_s", "engine_mib"),
    *("gflop", "moved_mb", "limit_ms", "times_limit", "layers_ms", "times_layers", "tflop_per_s", "gb_per_s"),
    *("note", "error", "command", *LATER),
)
_TABLE = ("implementation", "backend", "variant", "precision", "batch", "image", "padded", "stage")
_TABLE += ("median_ms", "p10_ms", "p90_ms", "images_per_s", "peak_mib", "segments", "instances", *AGREEMENT)
_TABLE += ("build_s", "cached_start_s", "engine_mib", "limit_ms", "times_limit", "layers_ms", "times_layers")
_TABLE += ("note",)

# Keys of the config that change nothing of what is measured.
_PLACES = ("MODEL.WEIGHTS", "MODEL.TENSORRT.CACHE.", "OUTPUT_DIR")

_ONE = ("implementation", "backend", "variant", "precision", "batch", "image", "padded")
_ALIKE = ("segments", "instances", *AGREEMENT, "build_s", "cached_start_s", "engine_mib", "note")


def options_column(words: Sequence[str]) -> str:
    """Overrides of the config, KEY VALUE ..., but for those that only say where something lies."""
    pairs = zip(words[::2], words[1::2])
    return shlex.join(word for pair in pairs if not pair[0].startswith(_PLACES) for word in pair)


class Report:
    """Collects rows and failures, on disk at once: what was measured survives what ends the run."""

    def __init__(self, folder: str | Path, common: dict[str, Any]):
        """
        Args:
            folder: where the CSV file goes, named by GPU, versions and time; it is made with the first row.
            common: columns of all rows; "command" stands in the file's first alone.
        """
        self._command = {"command": common.get("command", "")}
        self._common = {k: v for k, v in common.items() if k != "command"}
        self._file = MeasurementFile(
            MeasurementFile.new_path(folder, "benchmark", common), FIELDS, identity=FIELDS, exclusive=True
        )
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.ceilings: list[dict[str, Any]] = []

    @property
    def path(self) -> Path:
        return self._file.path

    def _write(self, columns: dict[str, Any]) -> None:
        self._file.add({**columns, **self._command})
        self._command = {}

    def row(self, columns: dict[str, Any]) -> None:
        """A measurement."""
        columns = {k: v for k, v in columns.items() if k in FIELDS}
        self.rows.append({**self._common, **columns})
        self._write(self.rows[-1])

    def ceiling(self, columns: dict[str, Any]) -> None:
        """What the machine reached in a measurement of its own: in the file, but no row of the table."""
        self.ceilings.append({**self._common, **columns})
        self._write(self.ceilings[-1])

    def failure(self, label: str, columns: dict[str, Any], message: str) -> None:
        """A row that could not be measured."""
        self.failures.append(f"{label}: {message}")
        columns = {k: v for k, v in columns.items() if k in FIELDS}
        self._write({**self._common, **columns, "error": " ".join(message.split())})
        print(self.failures[-1], file=sys.stderr, flush=True)

    def progress(self, label: str, columns: dict[str, Any]) -> None:
        """Say what a configuration took on the case that was timed last."""
        done = [row for row in self.rows if all(row.get(k, "") == columns.get(k, "") for k in _ONE)]
        times = ", ".join(f"{row['stage']} {row['median_ms']:.4g} ms" for row in done)
        where = columns.get("padded") or columns["image"]
        if done:
            print(f"{label} batch {columns['batch']} at {where}: {times}", file=sys.stderr, flush=True)

    def _place(self, row: dict[str, Any]) -> int:
        """Where a row's configuration and case first came: a table has their stages together."""
        same = [tuple(other.get(c, "") for c in _ONE) for other in self.rows]
        return same.index(tuple(row.get(c, "") for c in _ONE))

    def print_table(self) -> None:
        columns = [c for c in _TABLE if any(row.get(c, "") != "" for row in self.rows)]
        table = [columns]
        before = None
        for row in sorted(self.rows, key=self._place):
            same = tuple(row.get(c, "") for c in _ONE)
            # What all stages of a configuration have alike is written once.
            table.append([_cell("" if same == before and c in _ALIKE else row.get(c, "")) for c in columns])
            before = same
        widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
        first = self.rows[0]
        tensorrt = {f", TensorRT {row['tensorrt']}" for row in self.rows if row.get("tensorrt")}
        print(
            f"{first['config']}, {first['gpu']}, torch {first['torch']}{''.join(sorted(tensorrt))}, "
            f"detectron2 {first['detectron2']}, {first['date']}, weights: {first.get('weights', '')}"
        )
        for row in self.ceilings:
            speeds = [
                f"{row[key]:.4g} {unit}"
                for key, unit in (("tflop_per_s", "TFLOP/s"), ("gb_per_s", "GB/s"))
                if key in row
            ]
            print(f"measured ceiling: {row['stage'].removeprefix('ceiling_')} {', '.join(speeds)}")
        for line in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
