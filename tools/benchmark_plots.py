#!/usr/bin/env python3
"""Draw CSV files of tools/benchmark.py: how long each stage takes, by size, by batch, and images a second.

    python tools/benchmark_plots.py results/benchmark_*.csv --output output/plots --format svg

A point is a row's median, its bar the 10th to 90th percentile. What was measured more than once (the same implementation,
backend, precision, size, batch and stage on the same GPU and versions) is drawn from its last row. Grey: the floor that
the arithmetic or the memory's bandwidth sets.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from benchmark_table import FIELDS, LATER
from measurements import read_rows

_MACHINE = ("gpu", "torch", "config")
_SERIES = ("implementation", "backend", "variant", "precision")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--output", type=Path, default=Path("output/plots"), help="folder (%(default)s)")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    parser.add_argument("--stages", nargs="+", help="only these; default: all that the files have")
    return parser.parse_args(argv)


def measured(paths: list[Path]) -> list[dict[str, str]]:
    """Rows with a time, the last one of each measurement.

    Raises:
        OSError, ValueError: a file cannot be read, or is none of benchmark.py's.
    """
    last: dict[tuple[str, ...], dict[str, str]] = {}
    for path in paths:
        for row in read_rows(path, FIELDS, LATER):
            if row["median_ms"] and not row["error"]:
                identity = (*_MACHINE, *_SERIES, "tensorrt", "image", "padded", "batch", "stage")
                last[tuple(row[field] for field in identity)] = row
    return list(last.values())


def label(row: dict[str, str]) -> str:
    """Such as "tensorrt static fp16", or "release fp32"."""
    backend = "release" if row["implementation"] == "release" else row["backend"]
    return " ".join(word for word in (backend, row["variant"], row["precision"]) if word)


def pixels(row: dict[str, str]) -> int:
    height, width = row["padded"].split("x")
    return int(height) * int(width)


def drawings(rows: list[dict[str, str]]) -> dict[str, dict]:
    """What there is to draw: file name -> title, axis labels, and series of (x, y, low, high) with their floors.

    A stage is drawn by batch where a size has several, by size where a batch has several, and as bars else.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[(*(row[field] for field in _MACHINE), row["stage"])].append(row)
    found: dict[str, dict] = {}
    for (gpu, torch, config, stage), group in groups.items():
        title = f"{stage}: {Path(config).stem}, {gpu}, torch {torch}"
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{stage}_{Path(config).stem}_{gpu}")
        by_size = defaultdict(list)
        by_batch = defaultdict(list)
        for row in group:
            by_size[row["padded"] or row["image"]].append(row)
            if row["padded"]:
                by_batch[row["batch"]].append(row)
        for size, same in by_size.items():
            if len({row["batch"] for row in same}) > 1:
                found[f"{name}_batch_{size.split(' ')[0]}"] = {
                    "title": f"{title}, {size}",
                    "x": "images in a batch",
                    **_series(same, lambda row: int(row["batch"])),
                }
        for batch, same in by_batch.items():
            if len({row["padded"] for row in same}) > 1:
                found[f"{name}_size_{batch}"] = {
                    "title": f"{title}, batch {batch}",
                    "x": "padded pixels, millions",
                    **_series(same, lambda row: pixels(row) / 1e6),
                }
        for size, same in by_size.items():
            if len({row["batch"] for row in same}) == 1 and len(same) > 1:
                found[f"{name}_{size.split(' ')[0]}"] = {
                    "title": f"{title}, {size}, batch {same[0]['batch']}",
                    **_series(same, lambda row: 0.0),
                }
    return found


def _series(rows: list[dict[str, str]], x) -> dict:
    series: dict[str, dict[float, tuple]] = defaultdict(dict)
    floors: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:  # of images of one padded size the last one's
        place = x(row)
        series[label(row)][place] = tuple(float(row[field]) for field in ("median_ms", "p10_ms", "p90_ms"))
        if row["limit_ms"]:
            floors[row["precision"]][place] = float(row["limit_ms"])
    return {
        "series": {
            name: [(place, *points[place]) for place in sorted(points)] for name, points in series.items()
        },
        "floors": {name: sorted(points.items()) for name, points in floors.items()},
    }


def draw(drawing: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    series = drawing["series"]
    if "x" in drawing:
        for name, points in series.items():
            x, y, low, high = zip(*points)
            bars = [[b - a for a, b in zip(low, y)], [b - a for a, b in zip(y, high)]]
            axes.errorbar(x, y, yerr=bars, marker="o", markersize=4, capsize=3, label=name)
        for style, (precision, points) in zip(
            ("dotted", "dashed", "dashdot", "solid"), drawing["floors"].items()
        ):
            axes.plot(*zip(*points), linestyle=style, color="grey", label=f"floor, {precision}")
        axes.set_xlabel(drawing["x"])
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    else:
        names = sorted(series, key=lambda name: series[name][0][1])
        values = [series[name][0] for name in names]
        bars = [[v[1] - v[2] for v in values], [v[3] - v[1] for v in values]]
        axes.barh(names, [v[1] for v in values], xerr=bars, capsize=3)
        axes.bar_label(axes.containers[-1], fmt="%.3g", padding=3)
        axes.set_xlabel("ms")
        axes.invert_yaxis()
    axes.set_title(drawing["title"], fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        rows = measured(args.files)
    except (OSError, ValueError) as error:
        print(f"benchmark_plots.py: error: {error}", file=sys.stderr)
        return 2
    stages = sorted({row["stage"] for row in rows})
    unknown = set(args.stages or ()) - set(stages)
    if unknown:
        print(
            f"benchmark_plots.py: error: no row has the stage {', '.join(sorted(unknown))}; there are {', '.join(stages)}",
            file=sys.stderr,
        )
        return 2
    found = drawings([row for row in rows if not args.stages or row["stage"] in args.stages])
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
