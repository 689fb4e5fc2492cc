#!/usr/bin/env python3
"""Show what a TensorRT engine was made from, what is in it, and where its time goes.

    python tools/inspect_engine.py 3fa9c1                           # one of the cache, by how its key begins
    python tools/inspect_engine.py engines/KEY.engine --layers      # a file; with every layer
    python tools/inspect_engine.py --config-file FILE --weights model_final.pkl    # the one that this config runs
    python tools/inspect_engine.py 3fa9c1 --profile 800x1088 --batch 2 --csv layers.csv

The sidecar is shown anywhere; layers and times need TensorRT and the GPU that the engine was built for. Times are means of
--runs runs with TensorRT's profiler, under which layers wait for each other: their sum is more than a run takes.

Exit status: 0, shown; 1, the engine is damaged, or does not load or run; 2, the command could not be carried out, or
nothing tells that the file is an engine; 130, stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The package beside this tool, installed or not, and the modules that the tools share.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_tables import PRECISIONS, count, show_layers, show_sidecar, show_times, size, write_csv


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_argument_group("which engine")
    which.add_argument("engine", nargs="?", metavar="ENGINE", help="a file, or how a key of the cache begins")
    which.add_argument(
        "--dir",
        metavar="DIR",
        help="the cache's folder, for a key; default: $XDG_CACHE_HOME/d2_trt, else ~/.cache/d2_trt",
    )
    which.add_argument(
        "--config-file", metavar="FILE", help="the engine that this config runs, from the cache"
    )
    weights = which.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="FILE", help="with --config-file: short for MODEL.WEIGHTS")
    weights.add_argument("--random-weights", action="store_true", help="with --config-file: no checkpoint")
    which.add_argument("--precision", choices=PRECISIONS, help="with --config-file: MODEL.TENSORRT.PRECISION")
    what = parser.add_argument_group("what to show")
    what.add_argument("--layers", action="store_true", help="every layer")
    what.add_argument(
        "--profile", type=size, metavar="HxW", help="time the layers on images of this padded size"
    )
    what.add_argument("--batch", type=count, default=1, metavar="N", help="images at a time (1)")
    what.add_argument("--runs", type=count, default=20, metavar="N", help="runs to take the mean of (20)")
    what.add_argument("--top", type=count, default=25, metavar="N", help="rows of a table of times (25)")
    what.add_argument(
        "--depth", type=count, default=3, metavar="N", help="names of a module path to group times by (3)"
    )
    what.add_argument("--csv", metavar="FILE", help="also write every layer, with its time, as CSV")
    what.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    # Last, since it takes the rest of the line.
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="with --config-file: config overrides; last on the line",
    )
    args = parser.parse_args(argv)
    if (args.engine is None) == (args.config_file is None):
        parser.error("name an engine: a file, how a key begins, or --config-file; one of them")
    of_config = {
        "--weights": args.weights,
        "--random-weights": args.random_weights,
        "--precision": args.precision,
        "--opts": args.opts,
    }
    if args.config_file is None and any(of_config.values()):
        parser.error(f"{next(k for k, v in of_config.items() if v)} goes with --config-file")
    if args.config_file is not None and args.dir is not None:
        parser.error("--dir goes with a key; with --config-file add --opts MODEL.TENSORRT.CACHE.DIR DIR")
    for name in ("csv", "json"):
        file = getattr(args, name)
        if file and not Path(file).absolute().parent.is_dir():
            parser.error(f"--{name} {file}: there is no folder {Path(file).parent}")
    return args


@dataclass
class Found:
    """An engine, and what is known of it. `problem` says what is wrong with its file or its sidecar."""

    name: str
    data: bytes
    sidecar: dict[str, Any] | None = None
    problem: str = ""


def find(args: argparse.Namespace) -> Found:
    """The engine that the arguments name.

    Raises:
        UsageError, D2TRTError, OSError: there is none.
    """
    from engine_config import UsageError

    from d2_trt.cache import EngineCache
    from d2_trt.options import default_cache_dir

    if args.config_file is not None:
        return of_config(args)
    path = Path(args.engine)
    if path.is_file():
        return read(path)
    if path.suffix or len(path.parts) > 1:
        raise UsageError(f"there is no file {path}")
    cache = EngineCache(args.dir or default_cache_dir(), mode="read")
    keys = [entry.key for entry in cache.list() if entry.key.startswith(args.engine.lower())]
    if len(keys) != 1:
        what = f"{len(keys)} engines' keys begin" if keys else "no engine's key begins"
        raise UsageError(
            f"{what} with {args.engine!r} in {cache.directory}, and there is no such file. `tools/cache.py list` shows "
            "what is there"
        )
    return read(cache.directory / f"{keys[0]}.engine")


def read(path: Path) -> Found:
    """An engine's file, checked with the sidecar beside it, if there is one. The sidecar may be named in its place.

    Raises:
        UsageError: it is neither.
    """
    from engine_config import UsageError

    from d2_trt.cache_entry import Damaged, parse_sidecar

    if path.suffix == ".json" and _is_sidecar(path):
        path = path.with_suffix(".engine")
    found = Found(str(path), b"")
    try:
        found.data = path.read_bytes()
    except FileNotFoundError:  # a sidecar alone, which the cache lists
        found.problem = "the engine's file is missing"
    beside = path.with_suffix(".json")
    if not found.problem and not _is_sidecar(beside) and (what := _other_than_engine(found.data)):
        raise UsageError(
            f"{path} is {what}, and no engine: name a file of engines, how a key of the cache begins, or --config-file"
        )
    if not beside.is_file():
        return found
    content = beside.read_bytes()
    try:
        found.sidecar = parse_sidecar(content, _key(content))
    except Damaged as error:
        found.problem = found.problem or str(error)
        return found
    if not found.problem and hashlib.sha256(found.data).hexdigest() != found.sidecar["engine"]["sha256"]:
        found.problem = "the engine's file is damaged, or another's: it does not match the sidecar's sha256"
    return found


def _is_sidecar(path: Path) -> bool:
    """Whether a file is a sidecar, or was one before it was damaged."""
    return path.is_file() and bool(_key(path.read_bytes()))


def _other_than_engine(data: bytes) -> str:
    """What a file is that is no engine; "" where it may be one. TensorRT's format is its own affair, but it is binary."""
    if not data:
        return "empty"
    return "" if b"\0" in data[:65536] else "text"


def _key(sidecar: bytes) -> str:
    """The key that a sidecar says it has; parse_sidecar checks that it fits the rest."""
    try:
        return str(json.loads(sidecar)["key"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def of_config(args: argparse.Namespace) -> Found:
    """The engine that the backend would run for a config."""
    from engine_config import UsageError, load_model, read_cfg

    from d2_trt.backend import TensorRTBackend

    words = [] if args.precision is None else ["MODEL.TENSORRT.PRECISION", args.precision]
    cfg = read_cfg(args, words, CACHE__MODE="require", ON_ERROR="raise")
    backend = TensorRTBackend(load_model(cfg), cfg)
    shapes = backend.options.shapes
    if backend.options.static:
        if args.profile is None and not shapes.is_static:
            raise UsageError(
                "MODEL.TENSORRT.STATIC has an engine for each batch and size: name one by --profile HxW"
            )
        shapes = backend.options.engine_range(args.batch, *(args.profile or shapes.opt[1:]))
    entry = backend.entry(shapes)
    return Found(str(entry.path), bytes(entry.data), dict(entry.sidecar))


def find_device():
    """The GPU to open engines on.

    Raises:
        MissingDependencyError: there is no GPU, or no TensorRT; it names all that is missing.
    """
    import torch

    from d2_trt import requirements

    requirements.require("cuda", builds=False, optional=False)
    return torch.device("cuda")


def look_inside(found: Found, device, args: argparse.Namespace) -> dict[str, Any]:
    """Open the engine, print its tensors and layers and, with --profile, times; what was printed, for --json.

    Raises:
        UsageError: it does not load, and nothing else says that it is an engine.
        BuildError: the engine does not load, or TensorRT does not tell what is in it.
        EngineShapeError: it does not take what --profile and --batch ask for.
    """
    from engine_config import UsageError

    from d2_trt.errors import BuildError
    from d2_trt.profiler import EngineProbe
    from d2_trt.report import group as group_times
    from d2_trt.report import module_group, parse, summarize, time_layers
    from d2_trt.sample_images import SampleImages

    try:
        probe = EngineProbe(found.data, device)
    except BuildError as error:
        if found.sidecar is None:
            raise UsageError(
                f"{found.name} is no engine, or one of another TensorRT or GPU, and no sidecar beside it tells: {error}"
            ) from error
        raise
    tensors = probe.tensors()
    shape = (args.batch, 3, *args.profile) if args.profile else None
    if shape is None and probe.is_ours:
        shape = probe.usual_shape
    inspected = probe.inspect(shape)
    try:
        layers = parse(inspected)
    except ValueError as error:
        raise BuildError(str(error)) from error
    document = {"tensors": tensors, "summary": summarize(inspected), "layers": [asdict(x) for x in layers]}
    show_layers(tensors, layers, document["summary"], shape, args)
    times = {}
    if args.profile:
        images = SampleImages(device).take((args.batch, *args.profile))
        milliseconds, runs = probe.profile(images, args.runs)
        timings = time_layers(runs, layers)
        groups = {
            "module": group_times(timings, module_group(args.depth)),
            "kind": group_times(timings, lambda layer: layer.kind),
            "precision": group_times(timings, lambda layer: layer.precision),
        }
        show_times(milliseconds, timings, groups, args)
        times = {timing.layer.name: timing for timing in timings}
        document["profile"] = {
            "images": list(shape),
            "runs": args.runs,
            "run_ms": milliseconds,
            "layers": [{"name": t.layer.name, "ms": t.ms, "share": t.share} for t in timings],
            "groups": {name: [asdict(g) for g in rows] for name, rows in groups.items()},
        }
    if args.csv:
        write_csv(args.csv, layers, times)
    return document


def run(args: argparse.Namespace) -> int:
    from engine_config import UsageError

    from d2_trt.errors import BuildError, MissingDependencyError

    found = find(args)
    show_sidecar(found.name, len(found.data), found.sidecar, found.problem)
    document: dict[str, Any] = {"engine": found.name, "problem": found.problem, "sidecar": found.sidecar}
    status = 0
    if found.problem:
        # Engines hold code for the GPU: one that is not what was built is not opened.
        print("\nIts layers are not shown: an engine that is not what was built is not opened.")
        status = 1
    else:
        try:
            document |= look_inside(found, find_device(), args)
        except MissingDependencyError as error:
            if args.profile or args.csv or args.layers:
                raise UsageError(f"layers and times cannot be shown: {error}") from error
            if found.sidecar is None:
                raise UsageError(
                    f"nothing is known of {found.name}, not even whether it is an engine: no sidecar is beside it, and its "
                    f"layers cannot be shown ({error})"
                ) from error
            print(f"\nIts layers are not shown: {error}")
        except BuildError as error:
            print(f"inspect_engine.py: {error}", file=sys.stderr)
            document["problem"], status = str(error), 1
    if args.json:
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n")
    return status


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        # Here, so that --help and wrong arguments are answered at once.
        import torch
        from engine_config import UsageError

        from d2_trt.errors import D2TRTError
        from d2_trt.logging import setup_logger
    except ModuleNotFoundError as error:
        print(
            f"inspect_engine.py: {error}. `make setup` makes an environment with all it needs.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    setup_logger()
    try:
        return run(args)
    except (UsageError, D2TRTError, OSError) as error:
        sys.stdout.flush()
        print(f"inspect_engine.py: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"inspect_engine.py: the GPU's memory does not suffice: {str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
