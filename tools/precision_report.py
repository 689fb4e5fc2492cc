"""What tools/precision_search.py prints: tables of blocks and of sets of pins, and the config to use."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from precision_strategy import Block

_NUMBERS = ("logit_error", "mask_error", "sign_agreement", "class_agreement")
_HEADS = ("class logits", "mask logits", "mask signs", "classes")


def blocks_table(
    measured: Sequence[tuple[Block, Mapping[str, float]]], pinned: Sequence[Block], precision: str
) -> str:
    """Every block with what it does alone in half precision, the most damaging first."""
    heads = ("block", "operations", "float32 ms", f"{precision} ms", *_HEADS, "pinned")
    rows = []
    for block, numbers in sorted(measured, key=lambda pair: pair[0].damage, reverse=True):
        times = block.times
        rows.append(
            [
                block.pattern,
                str(times.count),
                f"{times.float32_ms:.3f}",
                f"{times.half_ms:.3f}",
                *_cells(numbers),
                "yes" if block in pinned else "",
            ]
        )
    return (
        f"\nEach block alone in {precision}, all others in exact float32. Agreement with PyTorch in float32: emulated. "
        "Times: of its operations one by one in PyTorch (on a GPU float32's products in TF32), one image; no engine's.\n\n"
        + _aligned([heads, *rows])
        + "\n"
    )


def sets_table(rows: Sequence[Mapping[str, str]], named: Sequence[tuple[str, str]]) -> str:
    """Sets of pins: all that engines were built of, and the emulated ones that have a name.

    Args:
        rows: of the file of measurements.
        named: names, and what the column fp32_modules has for them.
    """
    heads = ("figures", "precision", *_HEADS, "core ms", "build s", "MiB", "in float32")
    lines = []
    for row in rows:
        pins = row["fp32_modules"]
        names = [name for name, named_pins in named if named_pins == pins]
        if row["how"] != "engine" and not names:
            continue
        listed = pins if pins and not pins.startswith("(") else ""
        what = ": ".join(text for text in (", ".join(names), listed) if text)
        how = "ENGINE" if row["how"] == "engine" else row["how"]
        if row["status"] == "ok":
            numbers = _cells({name: float(row[name] or "nan") for name in _NUMBERS})
            values = [*numbers, row["core_ms"], row["build_s"], row["engine_mib"], what]
        else:
            values = [*[""] * 7, f"{what}\n    {row['status']}"]
        lines.append([how, row["precision"], *values])
    return (
        "\nSets of modules in float32. Emulated: by rounding, in PyTorch. ENGINE: of a TensorRT engine that was built, its "
        "time for one image.\n\n" + _aligned([heads, *lines]) + "\n"
    )


def config_text(precision: str, patterns: Sequence[str], how: str) -> str:
    """The set as a config file has it, and as an override."""
    about = "confirmed by an engine" if how == "engine" else "emulated only: no engine has confirmed it"
    as_list = json.dumps(list(patterns))
    override = shlex.join(
        ["MODEL.TENSORRT.PRECISION", precision, "MODEL.TENSORRT.FP32_MODULES", str(list(patterns))]
    )
    return (
        f"\n# {about}\nMODEL:\n  TENSORRT:\n    PRECISION: {precision}\n    FP32_MODULES: {as_list}\n\n"
        f"# or on a command line\n{override}\n"
    )


def _cells(numbers: Mapping[str, float]) -> list[str]:
    return [f"{numbers[name]:.1e}" for name in _NUMBERS[:2]] + [
        f"{100 * numbers[name]:.3f} %" for name in _NUMBERS[2:]
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([*cells, str(row[-1])]).rstrip())
    return "\n".join(lines)
