#!/usr/bin/env python3
"""Draw CSV files of tools/benchmark.py: time, images a second, memory, and what engines took to build.

    python tools/benchmark_plots.py results/benchmark_*.csv --output output/plots --format svg

Milliseconds of a stage are drawn for all stages: the median, and as a bar the 10th to 90th percentile. Images a second by
that are drawn for `throughput`, `stream`, `stream_files` and the evaluation. `memory` is the highest peak_mib of a case's
stages, `build` an engine's build_s. Each is drawn by batch where a size has several, by size where a batch has several, and
as bars else. Images that the network takes as they are have their padded size on the axis; those that were resized before
have their own, in a plot of their own. Grey: the floor that the arithmetic or the memory's bandwidth sets.

What was measured more than once (the same implementation, backend, precision, size, batch, stage, tasks, weights and
options, on the same GPU and versions) is drawn from its last row. Negative memory, which older files have where others used
the GPU, is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmark_table import FIELDS, LATER, options_column
from measurements import read_rows

_MACHINE = ("gpu", "torch", "config", "tasks", "weights")
_SERIES = ("implementation", "backend", "variant", "precision")
_VERSIONS = ("cuda", "tensorrt", "detectron2", "python")
_CASE = ("image", "padded", "batch", "stage")
_RATES = ("throughput", "stream", "stream_files", "evaluation", "evaluation_loader")
_LABEL_WIDTH = 44  # characters
_TITLE_WIDTH = 100  # likewise
_BATCH_AXIS = "images in a batch"
# How many pixels padding adds to a side, less than.
_DIVISIBILITY = 32


@dataclasses.dataclass(frozen=True)
class Point:
    """A number to draw.

    Attributes:
        about: columns of _MACHINE.
        kind: a stage, "memory" or "build".
        low, high, floor: in the value's unit; None where there is none.
    """

    about: tuple[str, ...]
    kind: str
    unit: str
    series: str
    precision: str
    batch: int
    image: str
    padded: str
    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None

    @property
    def resized(self) -> bool:
        """Whether the network took the image in another size than its own, padding aside."""
        if "x" not in self.padded:
            return False
        sides = zip(_sides(self.image), _sides(self.padded))
        return not all(0 <= padded - own < _DIVISIBILITY for own, padded in sides)

    @property
    def size(self) -> str:
        """Such as "800x1088", or "480x640 to 800x1088"."""
        return f"{self.image} to {self.padded}" if self.resized else self.padded or self.image


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--output", type=Path, default=Path("output/plots"), help="folder (%(default)s)")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    parser.add_argument(
        "--stages",
        nargs="+",
        help="only these, memory and build among them; default: all that the files have",
    )
    return parser.parse_args(argv)


def measured(paths: list[Path]) -> list[dict[str, str]]:
    """Rows with a time, the last one of each measurement.

    Raises:
        OSError, ValueError: a file cannot be read, or is none of benchmark.py's.
    """
    last: dict[tuple[str, ...], dict[str, str]] = {}
    for path in paths:
        rows = read_rows(path, FIELDS, LATER)
        earlier = _of_command(rows[0]["command"]) if rows and not rows[0]["tasks"] else {}
        for row in rows:
            if row["median_ms"] and not row["error"]:
                row.update(earlier)
                identity = (*_MACHINE, *_SERIES, *_VERSIONS, "options", *_CASE)
                last[tuple(row[field] for field in identity)] = row
    return list(last.values())


def _of_command(command: str) -> dict[str, str]:
    """Tasks and options of a file that has no columns of them, as far as its command tells."""
    words = shlex.split(command)
    options = words[words.index("--") + 1 :] if "--" in words else []
    tasks = "semantic+instance+panoptic" if "--all-tasks" in words else "the config's tasks"
    return {"tasks": tasks, "weights": "", "options": options_column(options)}


def points_of(rows: list[dict[str, str]]) -> list[Point]:
    """All that can be drawn of some rows."""
    labels = _labels(rows)
    points = []
    peaks: dict[tuple, Point] = {}
    builds: dict[tuple, Point] = {}
    for row, label in zip(rows, labels):
        about = tuple(row[field] for field in _MACHINE)
        case = {"series": label, "precision": row["precision"], "batch": int(row["batch"])}
        case |= {"image": row["image"], "padded": row["padded"]}
        median, low, high = (float(row[field]) for field in ("median_ms", "p10_ms", "p90_ms"))
        floor = float(row["limit_ms"]) if row["limit_ms"] else None
        points.append(Point(about, row["stage"], "ms", **case, value=median, low=low, high=high, floor=floor))
        if row["stage"] in _RATES:
            rate = float(row["images_per_s"])
            total = rate * median
            floor = total / floor if floor else None
            numbers = {"value": rate, "low": total / high, "high": total / max(low, 1e-9), "floor": floor}
            points.append(Point(about, row["stage"], "images a second", **case, **numbers))
        if row["peak_mib"] and float(row["peak_mib"]) >= 0:
            point = Point(about, "memory", "MiB", **case, value=float(row["peak_mib"]))
            key = (about, *case.values())
            peaks[key] = max(peaks.get(key, point), point, key=lambda one: one.value)
        if row["build_s"]:
            # An engine for a range of sizes serves all cases.
            own = {} if row["variant"] == "static" else {"batch": 0, "image": "", "padded": ""}
            point = Point(about, "build", "s", **{**case, **own}, value=float(row["build_s"]))
            builds[about, point.series, point.batch, point.padded] = point
    return [*points, *peaks.values(), *builds.values()]


def _labels(rows: list[dict[str, str]]) -> list[str]:
    """Such as "tensorrt static fp16", or "release fp32"; with versions and options where these are not all alike."""
    plain = [_label(row) for row in rows]
    groups: dict[tuple, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[(plain[place], *(row[field] for field in _MACHINE))].append(place)
    labels = list(plain)
    for places in groups.values():
        for field in _VERSIONS:
            if len({rows[place][field] for place in places}) > 1:
                for place in places:
                    labels[place] += f", {field} {rows[place][field] or 'none'}"
        options = [_pairs(rows[place]["options"]) for place in places]
        common = set(options[0]).intersection(*options)
        for place, pairs in zip(places, options):
            own = [f"{key} {value}" for key, value in pairs if (key, value) not in common]
            if own:
                labels[place] += f", {' '.join(own)}"
    return labels


def _pairs(options: str) -> list[tuple[str, str]]:
    words = shlex.split(options)
    return list(zip(words[::2], words[1::2]))


def _label(row: dict[str, str]) -> str:
    backend = "release" if row["implementation"] == "release" else row["backend"]
    return " ".join(word for word in (backend, row["variant"], row["precision"]) if word)


def drawings(points: list[Point]) -> dict[str, dict]:
    """What there is to draw: file name -> title, unit, axis label, and series of (x, y, low, high) with their floors."""
    groups = defaultdict(list)
    for point in points:
        groups[point.about, point.kind, point.unit].append(point)
    found: dict[str, dict] = {}

    def add(name: str, title: str, unit: str, some: list[Point], place: Callable, x: str | None = None):
        key, count = name, 1
        while key in found:  # of other tasks or weights
            count += 1
            key = f"{name}-{count}"
        drawing = _series(some, place)
        drawing["series"], shared = _without_shared(drawing["series"])
        if shared:
            title += "\n" + textwrap.fill(shared, _TITLE_WIDTH)
        found[key] = {"title": title, "unit": unit, **({"x": x} if x else {}), **drawing}

    for (about, kind, unit), group in groups.items():
        gpu, torch, config, tasks, weights = about
        config = Path(config).with_suffix("").as_posix()
        what = f"{kind}, images a second" if unit == "images a second" else kind
        told = ", ".join(filter(None, (gpu, f"torch {torch}", weights)))
        title = f"{what}: {config}\n{told}\n{tasks}"
        rate = "_rate" if unit == "images a second" else ""
        name = _file_name(f"{kind}{rate}_{config}_{gpu}{_initials(tasks)}")
        if kind == "build":
            if len(group) > 1:
                add(name, title, unit, _named_by_case(group), lambda _: 0.0)
            continue
        by_size = defaultdict(list)
        by_batch = defaultdict(list)
        for point in group:
            by_size[point.size].append(point)
            if point.padded:
                by_batch[point.batch, point.resized].append(point)
        for size, same in by_size.items():
            place = _file_name(size.split(" (")[0].replace(" to ", "-"))
            if len({point.batch for point in same}) > 1:
                add(f"{name}_batch_{place}", f"{title}, {size}", unit, same, lambda p: p.batch, _BATCH_AXIS)
            elif len(same) > 1:
                batch = f"batch {same[0].batch}"
                add(f"{name}_{place}", f"{title}, {size}, {batch}", unit, same, lambda _: 0.0)
        for (batch, resized), same in by_batch.items():
            if len({point.size for point in same}) > 1:
                which = "image" if resized else "padded"
                x = "pixels of the image before it is resized" if resized else "padded pixels"
                add(
                    *(
                        f"{name}_{'image' if resized else ''}size_{batch}",
                        f"{title}, batch {batch}",
                        unit,
                        same,
                    ),
                    *(lambda p, which=which: _pixels(getattr(p, which)), f"{x}, millions"),
                )
    return found


def _without_shared(series: dict[str, list]) -> tuple[dict[str, list], str]:
    """Series without the versions and options in their names that all of a plot have, and these."""
    ends = {name.partition(", ")[2] for name in series}
    short = {name.partition(", ")[0]: points for name, points in series.items()}
    if len(ends) > 1 or len(short) < len(series):
        return series, ""
    return short, ends.pop()


def _initials(tasks: str) -> str:
    """Such as "_sip" for all three tasks; nothing where a file does not tell."""
    known = [task for task in tasks.split("+") if task in ("semantic", "instance", "panoptic")]
    return "_" + "".join(task[0] for task in known) if known else ""


def _named_by_case(points: list[Point]) -> list[Point]:
    """With the size and batch that an engine is for in the series' names."""
    return [
        dataclasses.replace(p, series=f"{p.series}, {p.padded}, batch {p.batch}") if p.padded else p
        for p in points
    ]


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)


def _sides(size: str) -> tuple[int, ...]:
    return tuple(int(side) for side in size.split("x"))


def _pixels(size: str) -> float:
    height, width = _sides(size)
    return height * width / 1e6


def _series(points: list[Point], place: Callable[[Point], float]) -> dict:
    """Sizes of as many pixels, such as 800x1088 and 1088x800, are points of the same x."""
    series = defaultdict(list)
    floors = defaultdict(set)
    for point in points:
        ends = (point.value if end is None else end for end in (point.low, point.high))
        series[point.series].append((place(point), point.value, *ends))
        if point.floor is not None:
            floors[point.precision].add((place(point), point.floor))
    return {
        "series": {name: sorted(some) for name, some in series.items()},
        "floors": {name: sorted(some) for name, some in floors.items()},
    }


def draw(drawing: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Text stays text, and the same rows give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure, axes = plt.subplots(figsize=(7.5, 4.5))
        if "x" in drawing:
            _draw_lines(axes, drawing)
        else:
            _draw_bars(axes, drawing)
        axes.set_title(drawing["title"], fontsize="small")
        axes.grid(alpha=0.3)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=metadata)
        plt.close(figure)


def _draw_lines(axes, drawing: dict) -> None:
    for name, points in drawing["series"].items():
        x, y, low, high = zip(*points)
        bars = [[b - a for a, b in zip(low, y)], [b - a for a, b in zip(y, high)]]
        axes.errorbar(x, y, yerr=bars, marker="o", markersize=4, capsize=3, label=_wrapped(name))
    styles = ("dotted", "dashed", "dashdot", "solid")
    for style, (precision, points) in zip(styles, drawing["floors"].items()):
        axes.plot(*zip(*points), linestyle=style, color="grey", label=f"floor, {precision}")
    axes.set_xlabel(drawing["x"])
    if drawing["x"] == _BATCH_AXIS:
        axes.set_xticks(sorted({point[0] for points in drawing["series"].values() for point in points}))
    axes.set_ylabel(drawing["unit"])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _wrapped(name: str) -> str:
    return textwrap.fill(name, _LABEL_WIDTH)


def _draw_bars(axes, drawing: dict) -> None:
    series = drawing["series"]
    names = sorted(series, key=lambda name: series[name][0][1])
    values = [series[name][0] for name in names]
    bars = [[v[1] - v[2] for v in values], [v[3] - v[1] for v in values]]
    axes.barh([_wrapped(name) for name in names], [v[1] for v in values], xerr=bars, capsize=3)
    axes.bar_label(axes.containers[-1], fmt="%.4g", padding=3)
    axes.margins(x=0.12)  # of the numbers beside the bars
    axes.set_xlabel(drawing["unit"])
    axes.invert_yaxis()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        points = points_of(measured(args.files))
    except (OSError, ValueError) as error:
        print(f"benchmark_plots.py: error: {error}", file=sys.stderr)
        return 2
    kinds = sorted({point.kind for point in points})
    unknown = set(args.stages or ()) - set(kinds)
    if unknown:
        print(
            f"benchmark_plots.py: error: no row has the stage {', '.join(sorted(unknown))}; there are {', '.join(kinds)}",
            file=sys.stderr,
        )
        return 2
    found = drawings([point for point in points if not args.stages or point.kind in args.stages])
    if not found:
        print(
            "benchmark_plots.py: error: nothing to compare: no stage has two sizes, batches or configurations",
            file=sys.stderr,
        )
        return 1
    for name, drawing in found.items():
        path = args.output / f"{name}.{args.format}"
        draw(drawing, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
