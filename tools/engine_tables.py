"""What tools/build_engine.py and tools/inspect_engine.py share: kinds of arguments, and tables. Quick to import."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping

from tabulate import tabulate

# As in d2_trt.options, which would import more than wrong arguments should wait for.
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


def size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a padded size HEIGHTxWIDTH, such as 800x1088")
    return int(height), int(width)


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def megabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def parity_table(parity) -> list[dict]:
    """Rows for tabulate of what a sidecar holds of the comparison with PyTorch."""
    return [
        {
            name.replace("_", " "): _shown(name, v)
            for name, v in row.items()
            if isinstance(v, (int, float, str))
        }
        for row in parity.get("sizes") or []
    ]


def compared_on(parity) -> str:
    """What a sidecar says of the images of the comparison; empty where it says nothing."""
    if "given_images" not in parity:
        return ""
    given, drawn = parity["given_images"], parity.get("drawn_scenes", 0)
    if not given:
        return "on drawn scenes alone: the first image that comes is compared, too"
    text = f"on {given} real image{'s'[: given != 1]}"
    return text + (f" and {drawn} drawn scene{'s'[: drawn != 1]}" if drawn else "")


def _shown(name: str, value) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if "error" in name else f"{value:.5f}"
    return str(value)


def show_sidecar(name: str, bytes_: int, sidecar: Mapping | None, problem: str) -> None:
    """Print what a sidecar says of its engine."""
    print(f"{name}: {megabytes(bytes_)}")
    if problem:
        print(f"PROBLEM: {problem}")
    if sidecar is None:
        if not problem:
            print("no sidecar is beside it: where it comes from is not known")
        return
    made_from, by = sidecar["ingredients"], sidecar["built_by"]
    rows = {
        "key": sidecar["key"],
        "built": f"{sidecar['created']} on {by.get('host', '?')} in {by.get('seconds', '?')} s",
        "GPU": f"{made_from.get('gpu', '?')}, compute capability {made_from.get('compute_capability', '?')}",
        "TensorRT": made_from.get("tensorrt", "?"),
        "weights": made_from.get("weights", "?"),
        **{
            f"{name} shape": _shape((made_from.get("shapes") or {}).get(name))
            for name in ("min", "opt", "max")
        },
        **{name.replace("_", " "): _text(v) for name, v in (made_from.get("options") or {}).items()},
        "computed by": _text(made_from.get("plugins", "?")),
        **{f"version of {name}": v for name, v in (made_from.get("versions") or {}).items()},
        **_flat("build:", sidecar["report"]),
    }
    print(tabulate(rows.items(), tablefmt="plain", disable_numparse=True))
    parity = parity_table(sidecar["parity"])
    if parity:
        print("\nAgainst PyTorch float32:")
        print(tabulate(parity, headers="keys", disable_numparse=True))
        if on := compared_on(sidecar["parity"]):
            print(on)
    else:
        print("not compared with PyTorch when it was built")


def _flat(prefix: str, value: Mapping) -> dict[str, str]:
    """Rows of a dict; of dicts in it that hold further ones, rows of their own."""
    rows = {}
    for key, v in value.items():
        name = f"{prefix} {key.replace('_', ' ')}"
        if isinstance(v, Mapping) and any(isinstance(x, Mapping) for x in v.values()):
            rows |= _flat(name, v)
        else:
            rows[name] = _text(v)
    return rows


def _shape(value) -> str:
    return "batch {}, {}x{}".format(*value) if isinstance(value, list) and len(value) == 3 else _text(value)


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(v)}" for name, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def show_layers(tensors, layers, summary, shape, args: argparse.Namespace) -> None:
    print("\nInputs and outputs:")
    rows = [
        {name: "x".join(map(str, v)) if isinstance(v, list) else v for name, v in t.items()} for t in tensors
    ]
    print(tabulate(rows, headers="keys", disable_numparse=True))
    print(
        f"\n{summary['count']} layers{'' if shape is None else ' for images of ' + 'x'.join(map(str, shape))}:"
    )
    if not summary["detailed"]:
        print("the engine tells their names alone: it was not built with the profiling verbosity DETAILED")
    rows = {
        "by kind": _text(summary["kinds"]),
        "by precision": _text(summary["precisions"]),
        "plugins": _text(summary["plugins"]),
        "reformats": summary["reformats"],
    }
    print(tabulate(rows.items(), tablefmt="plain", disable_numparse=True))
    if args.layers:
        print()
        rows = [
            {
                "kind": x.kind,
                "precision": x.precision,
                "output": "x".join(map(str, x.output)),
                "module": x.module,
                "name": x.name,
            }
            for x in layers
        ]
        print(tabulate(rows, headers="keys", disable_numparse=True, showindex=True))


def show_times(milliseconds: float, timings, groups, args: argparse.Namespace) -> None:
    size = "x".join(map(str, args.profile))
    print(
        f"\nTimes for {args.batch} image{'s'[: args.batch > 1]} of {size}, mean of {args.runs} runs: "
        f"{milliseconds:.3f} ms a run, {sum(t.ms for t in timings):.3f} ms all layers under the profiler"
    )
    rows = [
        {
            "ms": f"{t.ms:.4f}",
            "share": f"{t.share:.1%}",
            "kind": t.layer.kind,
            "precision": t.layer.precision,
            "layer": _short(t.layer.name),
        }
        for t in timings[: args.top]
    ]
    print(tabulate(rows, headers="keys", disable_numparse=True))
    if len(timings) > args.top:
        rest = sum(t.share for t in timings[args.top :])
        print(f"and {len(timings) - args.top} more with {rest:.1%} (--top, --csv)")
    for name, entries in groups.items():
        rows = [
            {"ms": f"{g.ms:.4f}", "share": f"{g.share:.1%}", "layers": g.layers, name: g.name}
            for g in entries[: args.top]
        ]
        print(f"\nBy {name}:")
        print(tabulate(rows, headers="keys", disable_numparse=True))
        if len(entries) > args.top:
            print(
                f"and {len(entries) - args.top} more with {sum(g.share for g in entries[args.top :]):.1%} (--top)"
            )


def _short(name: str, most: int = 120) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 2]}...{name[-most // 2 + 1 :]}"


def write_csv(file: str, layers, times) -> None:
    """Every layer in its order, and after them what the profiler alone knows."""
    known = {layer.name for layer in layers}
    rows = [*layers, *(t.layer for name, t in times.items() if name not in known)]
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(
            ["index", "ms", "share", "kind", "precision", "plugin", "module", "output", "tactic", "name"]
        )
        for index, x in enumerate(rows):
            timing = times.get(x.name)
            ms, share = ("", "") if timing is None else (f"{timing.ms:.6f}", f"{timing.share:.6f}")
            output = "x".join(map(str, x.output))
            writer.writerow(
                [index, ms, share, x.kind, x.precision, x.plugin, x.module, output, x.tactic, x.name]
            )
