"""Rows of the accuracy ledger together: differences to the reference, and files of several processes as one."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from ledger_evaluation import METRICS
from ledger_images import ImageTables, Resampled, standard_errors
from measurements import MACHINE, read_rows

Row = dict[str, str]
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
REFERENCE = ("torch", "fp32")
# What says which measurement a row is.
IDENTITY = (
    *("config", "overrides", "checkpoint", "dataset", "images", "min_size", "max_size", "batch", "compared"),
    *("backend", "precision", *MACHINE),
)
# What one run varies.
_VARIED = ("min_size", "max_size", "batch", "backend", "precision")
COLUMNS = tuple(column for column, _, _ in METRICS)
# Points that an engine may differ from the reference in a metric.
LIMITS = {"fp32": 0.05, "tf32": 0.05, "fp16": 0.1, "bf16": 0.1}
# The metric of each task.
LIMITED = ("PQ", "AP", "mIoU")
# Columns that files of before they were measured lack.
LATER = tuple("se_" + column for column in LIMITED)
TABLES = "per_image.npz"
# In points, between a row's metric and that of its images' counts.
_SAME = 1e-3
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def place(row: Mapping) -> tuple[str, ...]:
    """What a row and its reference have in common: all that identifies them but backend, precision and the engine's keys."""
    return (*_about(row), *(str(row[name]) for name in _VARIED if name not in ("backend", "precision")))


def _about(row: Mapping) -> tuple[str, ...]:
    """Model, data and machine of a row."""
    names = (name for name in IDENTITY if name not in (*_VARIED, "overrides"))
    return (*(str(row[name]) for name in names), without_engine_keys(row["overrides"]))


def without_engine_keys(overrides: str) -> str:
    """Overrides of a config but for MODEL.TENSORRT.*, which PyTorch does not read."""
    kept, engine = [], False
    for word in overrides.split():
        if _KEY.fullmatch(word) and "." in word:
            engine = word.startswith("MODEL.TENSORRT.")
        if not engine:
            kept.append(word)
    return " ".join(kept)


def is_reference(row: Mapping) -> bool:
    return (row["backend"], row["precision"]) == REFERENCE


def references(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """The rows of PyTorch in float32 that were measured, by `place`."""
    return {place(row): row for row in rows if is_reference(row) and row["status"] == "ok"}


def differences(row: Mapping, reference: Mapping | None) -> dict[str, float | str]:
    """Columns d_*, in points: of a row to its reference; empty where one of them lacks the metric, and for a reference."""
    columns: dict[str, float | str] = {}
    for column in COLUMNS:
        both = reference and not is_reference(row) and row.get(column, "") != "" and reference[column] != ""
        columns[f"d_{column}"] = round(float(row[column]) - float(reference[column]), 4) if both else ""
    return columns


def row_folder(work: str, row: Mapping) -> str:
    """Where a row's evaluation writes, in the tool's --work."""
    size = f"{row['min_size']}-{row['max_size']}"
    name = f"{row['dataset']}_{size}_batch{row['batch']}_{row['backend']}_{row['precision']}"
    if row["overrides"]:
        name += "_" + hashlib.sha256(row["overrides"].encode()).hexdigest()[:8]
    return os.path.join(work, row["checkpoint"], name)


def standard_error_columns(row: Mapping, reference: Mapping | None, work: str) -> dict[str, float | str]:
    """Columns se_*, in points: the standard errors of d_*, for the choice of the images.

    Empty where the counts of single images that they are made of are not in `work`, cannot be read, or do not give the rows'
    metrics: those of another measurement, and mIoU by detectron2 0.5 where it counts a class that is predicted and in no
    image.
    """
    columns: dict[str, float | str] = {f"se_{name}": "" for name in LIMITED}
    if reference is None or is_reference(row):
        return columns
    both = [_resampled(work, one) for one in (row, reference)]
    if None not in both:
        for name, value in standard_errors(*both).items():
            if all(_is_of(one, measured, name) for one, measured in zip(both, (row, reference))):
                columns[f"se_{name}"] = round(value, 4)
    return columns


def _resampled(work: str, row: Mapping) -> Resampled | None:
    path = os.path.join(row_folder(work, row), TABLES)
    try:
        return _load_resampled(path, os.stat(path).st_mtime_ns)
    except OSError:
        return None


@functools.cache
def _load_resampled(path: str, changed: int) -> Resampled | None:
    """One file's, once for all rows that it is compared with."""
    try:
        return Resampled(ImageTables.load(path))
    except (OSError, ValueError) as error:
        print(
            f"accuracy_ledger.py: warning: no standard errors of {path}, which cannot be read: {error}",
            file=sys.stderr,
        )
        return None


def _is_of(tables: Resampled, row: Mapping, metric: str) -> bool:
    """Whether these images' counts give a row's metric."""
    return row.get(metric, "") != "" and abs(float(row[metric]) - tables.whole[metric]) <= _SAME


def joined(paths: Sequence[str], fields: Sequence[str], work: str) -> list[Row]:
    """Rows of several files as if one process had measured them all: differences filled in, PyTorch's rows first.

    Of rows of the same measurement the last one counts that did not fail.

    Args:
        work: where the evaluations wrote; what is not there any more leaves the standard errors that the files have.

    Raises:
        ValueError, OSError: see `read_rows`.
    """
    found: dict[tuple[str, ...], Row] = {}
    for path in paths:
        for row in read_rows(path, fields, LATER):
            key = tuple(row[name] for name in IDENTITY)
            if row["status"] == "ok" or found.get(key, row)["status"] != "ok":
                found[key] = row
    rows = list(found.values())
    known = references(rows)
    for row in rows:
        if row["status"] != "ok":
            continue
        reference = known.get(place(row))
        columns = differences(row, reference)
        columns.update({k: v for k, v in standard_error_columns(row, reference, work).items() if v != ""})
        row.update({name: str(value) for name, value in columns.items()})
    return _ordered(rows)


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """By model, data and machine in the order in which they first come, then backend, precision, size and batch."""

    def parts(row: Row) -> tuple:
        return _about(row), row["backend"], (row["min_size"], row["max_size"])

    groups, backends, sizes = (
        ([*dict.fromkeys(part)] for part in zip(*map(parts, rows))) if rows else ([], [], [])
    )
    backends = sorted(backends, key=lambda name: name != REFERENCE[0])  # the others as they come

    def order(row: Row) -> tuple[int, ...]:
        group, backend, size = parts(row)
        first = groups.index(group), backends.index(backend), PRECISIONS.index(row["precision"])
        return (*first, sizes.index(size), int(row["batch"]))

    return sorted(rows, key=order)


def named(row: Mapping) -> str:
    """A row in words."""
    return f"{row['backend']} {row['precision']} {row['min_size']}/{row['max_size']} batch {row['batch']}"


def without_reference(rows: Sequence[Row]) -> list[str]:
    """Measured rows that there is nothing to compare with, in words."""
    known = references(rows)
    lost = [row for row in rows if row["status"] == "ok" and place(row) not in known]
    return [
        f"{named(row)}: there is no row of PyTorch in float32 with the same checkpoint, data set, machine and versions"
        for row in lost
    ]


def engine_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of engines that were measured."""
    return [row for row in rows if row["backend"] != "torch" and row["status"] == "ok"]


def compared_metrics(rows: Sequence[Row], metrics: Sequence[str] = ()) -> list[str]:
    """Those of the metrics (without names of LIMITED) that an engine and its reference both have."""
    known = references(rows)
    pairs = [(row, known[place(row)]) for row in engine_rows(rows) if place(row) in known]
    return [name for name in metrics or LIMITED if any(row[name] and ref[name] for row, ref in pairs)]


def beyond_limits(rows: Sequence[Row], metrics: Sequence[str] = ()) -> list[str]:
    """Where engines differ from the reference by more than LIMITS, in words.

    A metric that the reference has and the engine lacks, or the reverse, is a difference too, and so is nothing to compare:
    no engine that was measured, or one without any of the metrics. Rows that failed are not looked at.

    Args:
        metrics: each engine must have them all; without names those of LIMITED that were measured, at least one.
    """
    known = references(rows)
    engines = engine_rows(rows)
    wrong = [] if engines else ["no limits were checked: there is no row of an engine that was measured"]
    for row in engines:
        if place(row) not in known:
            wrong.append(f"{named(row)}: there is no reference to compare with")
            continue
        reference, limit = known[place(row)], LIMITS[row["precision"]]
        lost = []
        for metric in metrics or LIMITED:
            if bool(row[metric]) != bool(reference[metric]):
                wrong.append(
                    f"{named(row)}: {metric} is {row[metric] or 'missing'}, PyTorch's {reference[metric] or 'missing'}"
                )
            elif row[metric]:
                difference = float(row[metric]) - float(reference[metric])
                if abs(difference) > limit:
                    error = row.get(f"se_{metric}", "")
                    error = f" (standard error {float(error):.3f})" if error else ""
                    wrong.append(
                        f"{named(row)}: {metric} differs by {difference:+.3f} points{error}, allowed are {limit}"
                    )
            else:
                lost.append(metric)
        if lost and (metrics or len(lost) == len(LIMITED)):
            wrong.append(f"{named(row)}: nothing to compare, neither it nor PyTorch has {', '.join(lost)}")
    return wrong
