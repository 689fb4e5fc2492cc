"""How tools/benchmark.py lets configurations take turns, so that a drift of the clock hits all alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from benchmark_bench import LocalBench, MeasureError, joined_notes, work_of
from benchmark_table import Report
from benchmark_timing import summary

# A configuration is added to those that take turns while so much of the GPU's memory is free.
_FREE_SHARE = 0.35
# Warm-up in later rounds: others have used the caches meanwhile.
_LATER_WARMUP = 2


class _Member:
    """A configuration of a bench, and the columns of its rows."""

    def __init__(self, bench, index: int, columns: dict[str, Any]):
        self.bench, self.index, self.columns = bench, index, columns

    @property
    def label(self) -> str:
        columns = self.columns
        words = [columns["backend"], columns.get("variant", ""), columns["precision"]]
        if columns["implementation"] == "release":
            words[0] = "release"
        return " ".join(word for word in words if word)


def run_all(benches: list, args, report: Report, limits) -> None:
    """Time every configuration of some benches on every case and batch.

    Args:
        limits: (case, batch, stage, columns) -> further columns of a row.
    """
    members = [
        _Member(bench, index, columns)
        for bench in benches
        for index, columns in enumerate(bench.configurations)
    ]
    for group, note in _groups(members, args, report):
        for member in group:
            member.columns = {**member.columns, "note": note}
        try:
            for case, _ in enumerate(work_of(args)):
                for batch in args.batch:
                    _run_case(group, case, batch, args, report, limits)
        finally:
            for member in group:
                _uninstall(member)


def _groups(members: list[_Member], args, report: Report) -> Iterator[tuple[list[_Member], str]]:
    """Configurations that are installed together, as many as the memory holds; each group is done before the next.

    With each a note for its rows, where the memory did not hold all of them.
    """
    group: list[_Member] = []
    waiting = list(members)
    split = False
    while waiting:
        member = waiting[0]
        if group and (args.no_interleave or _memory_is_short()):
            split = split or not args.no_interleave
            yield group, _group_note(group, split)
            group = []
        try:
            installed = member.bench.install(member.index)
        except MeasureError as error:
            _uninstall(member)
            if error.memory and group:  # once more, alone
                split = True
                yield group, _group_note(group, split)
                group = []
                continue
            report.failure(member.label, member.columns, str(error))
        else:
            member.columns = {**member.columns, **installed}
            group.append(member)
        waiting.pop(0)
    if group:
        yield group, _group_note(group, split)


def _group_note(group: list[_Member], split: bool) -> str:
    if not split:
        return ""
    labels = [member.label for member in group]
    together = f"{', '.join(labels)} took turns" if len(group) > 1 else f"{labels[0]} ran alone"
    return f"the GPU's memory did not hold all configurations: {together}, the others ran at another time"


def _memory_is_short() -> bool:
    if not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < _FREE_SHARE * total


def _uninstall(member: _Member) -> None:
    try:
        member.bench.uninstall(member.index)
    except MeasureError as error:  # of a process that has ended; said where it was to do something
        print(f"{member.label}: {error}", file=sys.stderr)


def _run_case(group: list[_Member], case: int, batch: int, args, report: Report, limits) -> None:
    prepared: list[tuple[_Member, dict[str, Any], list[str]]] = []
    for member in group:
        try:
            told = member.bench.prepare(member.index, case, batch)
        except MeasureError as error:
            hint = (
                "; --no-interleave leaves the GPU to one configuration"
                if error.memory and len(group) > 1
                else ""
            )
            report.failure(
                f"{member.label} batch {batch} at {_case_name(args, case)}",
                {**member.columns, "batch": batch, "image": _case_name(args, case)},
                f"{error}{hint}",
            )
            _forget(member)  # what it had made by then
            continue
        note = joined_notes(member.columns["note"], told["columns"].get("note"))
        prepared.append((member, {**member.columns, **told["columns"], "note": note}, told["stages"]))
    for stage in expand(args.stages):
        able = [(member, columns) for member, columns, stages in prepared if stage in stages]
        for row in _run_stage(able, stage, args, report):
            report.row({**row, **limits(case, batch, stage, row)})
    for member, columns, _ in prepared:
        _forget(member)
        report.progress(member.label, columns)


def _forget(member: _Member) -> None:
    try:
        member.bench.forget(member.index)
    except MeasureError as error:
        print(f"{member.label}: {error}", file=sys.stderr)


def _run_stage(able: list[tuple[_Member, dict]], stage: str, args, report: Report) -> list[dict[str, Any]]:
    """Rows of a stage, a round after another of all configurations, each round starting with another one."""
    rounds = min(args.rounds, args.iterations)
    told: dict[int, list[dict]] = {place: [] for place in range(len(able))}
    for number in range(rounds):
        share = args.iterations * (number + 1) // rounds - args.iterations * number // rounds
        for turn in range(len(able)):
            place = (turn + number) % len(able)
            if place not in told:
                continue
            member, columns = able[place]
            warmup = args.warmup if number == 0 else min(args.warmup, _LATER_WARMUP)
            try:
                told[place].append(member.bench.measure(member.index, stage, share, warmup))
            except MeasureError as error:
                del told[place]
                report.failure(
                    f"{member.label} batch {columns['batch']} at {columns['image']}, {stage}",
                    {**columns, "stage": stage},
                    str(error),
                )
    rows = []
    for place, parts in told.items():
        times = [time for part in parts for time in part["times"]]
        row = {**able[place][1], "stage": stage, "rounds": rounds, **summary(times, parts[0]["images"])}
        rows.append({**row, **_memory(parts, row.get("note"))})
    return rows


def _memory(parts: list[dict], note: str | None) -> dict[str, Any]:
    """Columns of memory, or a note why there are none: a wrong figure is worse than none."""
    reason = next((part["void"] for part in parts if part["void"]), "")
    if reason:
        return {"note": joined_notes(note, f"memory is not told: {reason}")}
    if "resident_mib" not in parts[-1]:  # no GPU
        return {}
    resident = parts[-1]["resident_mib"]
    peak = resident + max(part["call_mib"] for part in parts)
    return {
        "resident_mib": round(resident),
        "peak_mib": round(peak),
        "weights_mib": round(parts[-1]["weights_mib"]),
    }


def expand(stages: list[str]) -> list[str]:
    """Names of stages as they are asked for -> as they stand in the rows."""
    names = []
    for stage in stages:
        if stage == "host":
            names += ["host_resize", "host_float", "host_upload", "host_preprocess", "host_trt_load"]
        elif stage == "stream":
            names += ["stream", "stream_files"]
        elif stage == "evaluation":
            names += ["evaluation", "evaluation_loader"]
        else:
            names.append(stage)
    return names


def _case_name(args, case: int) -> str:
    kind, size = work_of(args)[case]
    return kind if size is None else "x".join(map(str, size))


def start_release(script: str, args, argv: list[str], local: LocalBench, folder: str, report: Report):
    """A RemoteBench of the official checkout with this model's weights, or None where it does not start."""
    from pathlib import Path

    from benchmark_release import RemoteBench

    weights = str(Path(folder) / "weights.pth")
    torch.save({"model": local.subject.model.state_dict()}, weights)
    try:
        return RemoteBench(script, args, argv, weights)
    except MeasureError as error:
        report.failure("release", {"implementation": "release", "backend": "torch"}, str(error))
        return None
