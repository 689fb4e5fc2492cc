"""The accuracy ledger as a table in a Markdown file, between two markers."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str]
# Of a failure, in characters; the CSV file has it whole.
LONGEST_REASON = 200


class MarkerError(ValueError):
    """A file lacks the markers between which a table goes."""


def markers(section: str) -> tuple[str, str]:
    """The lines before and after a section's table: HTML comments, which are not shown."""
    return f"<!-- accuracy_ledger {section}: begin -->", f"<!-- accuracy_ledger {section}: end -->"


def find_section(text: str, section: str, path: str) -> tuple[int, int]:
    """Where the text between a section's markers begins and ends.

    Raises:
        MarkerError: they are not there, once each and in order.
    """
    begin, end = markers(section)
    places = [[m.start() for m in re.finditer(re.escape(marker), text)] for marker in (begin, end)]
    if [len(found) for found in places] != [1, 1] or places[0][0] > places[1][0]:
        raise MarkerError(
            f"{path} has no place for the table: it must hold the lines\n  {begin}\n  {end}\nonce each, in this order "
            "(--section names another)"
        )
    return places[0][0] + len(begin), places[1][0]


def check_section(path: str, section: str) -> None:
    """
    Raises:
        MarkerError, OSError: the file cannot take the table.
    """
    find_section(Path(path).read_text(encoding="utf-8"), section, path)


def write_section(path: str, section: str, content: str) -> None:
    """Put a text between a section's markers. All else stays byte for byte; the file is replaced whole or not at all.

    Raises:
        MarkerError, OSError
    """
    target = Path(os.path.realpath(path))
    text = target.read_bytes().decode("utf-8")  # line ends as they are
    first, last = find_section(text, section, path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(f"{text[:first]}\n\n{content.strip()}\n\n{text[last:]}".encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, target.stat().st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


# Heads of the table, and the columns that share a cell.
_METRICS = (
    ("PQ (SQ, RQ)", ("PQ", "SQ", "RQ")),
    ("PQ things, stuff", ("PQ_th", "PQ_st")),
    ("AP (AP50, AP75)", ("AP", "AP50", "AP75")),
    ("mIoU (fwIoU, mACC)", ("mIoU", "fwIoU", "mACC")),
)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of measurements, then what they were made with, and the commands."""
    metrics = [(head, names) for head, names in _METRICS if any(row[names[0]] for row in rows)]
    heads = ["backend", "precision", "MIN/MAX size", "batch", *(head for head, _ in metrics)]
    heads += [
        "class logits",
        "mask logits",
        "mask signs",
        "classes",
        "core ms",
        "padded",
        "engine MiB",
        "made",
    ]
    made = {maker: str(i) for i, maker in enumerate(dict.fromkeys(map(_maker, rows)), start=1)}
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = [row["backend"], row["precision"], f"{row['min_size']}/{row['max_size']}", row["batch"]]
        if row["status"] != "ok":
            cells += [_escape(row["status"]), *[""] * (len(heads) - len(cells) - 2), made[_maker(row)]]
        else:
            cells += [_metric_cell(row, names) for _, names in metrics]
            cells += [_short(row["logit_error"]), _short(row["mask_error"])]
            cells += [_percent(row["sign_agreement"]), _percent(row["class_agreement"])]
            cells += [row["core_ms"], row["padded"], row["engine_mib"], made[_maker(row)]]
        lines.append(cells)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    commands = list(dict.fromkeys(row["command"] for row in rows))
    notes = "\n".join(f"- ({number}) {maker}" for maker, number in made.items())
    blocks = "\n".join(commands)
    return f"{text}\n\n{notes}\n\n```bash\n{blocks}\n```"


def _maker(row: Row) -> str:
    """Config and overrides, checkpoint, data set, machine and date of a row, in words."""
    tensorrt = f", TensorRT {row['tensorrt']}" if row["tensorrt"] else ""
    cuda = f" (CUDA {row['cuda']})" if row["cuda"] else ""
    overrides = f" with `{row['overrides']}`" if row["overrides"] else ""
    return (
        f"`{row['config']}`{overrides}, checkpoint {row['checkpoint']}, {row['images']} images of {row['dataset']}, "
        f"tensors compared on {row['compared']} of them; {row['gpu']}, PyTorch {row['torch']}{cuda}{tensorrt}, detectron2 "
        f"{row['detectron2']}, Python {row['python']}, {row['date']}"
    )


def _metric_cell(row: Row, names: Sequence[str]) -> str:
    first, *rest = names
    if not row[first]:
        return ""
    change = row.get("d_" + first, "")
    text = f"{float(row[first]):.2f}"
    if change:
        error = row.get("se_" + first, "")
        text += f" [{float(change):+.3f}{f' ± {float(error):.3f}' if error else ''}]"
    shown = [f"{float(row[name]):.2f}" if row[name] else "-" for name in rest]
    return text + (f" ({', '.join(shown)})" if rest else "")


def _short(value: str) -> str:
    return f"{float(value):.1e}" if value and float(value) else value and "0"


def _percent(value: str) -> str:
    return f"{100 * float(value):.3f} %" if value else ""


def _escape(text: str) -> str:
    words = " ".join(text.split()).replace("|", "\\|")
    return words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + " ..."
