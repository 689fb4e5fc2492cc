#!/usr/bin/env python3
"""Build TensorRT engines ahead of time, so that no first image waits for minutes.

    python tools/build_engine.py --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml \\
        --weights model_final.pkl                                   # one engine for the config's range of sizes
    ... --precision fp32 fp16 --batch 4                             # two engines, each for batches of 1 to 4
    ... --shapes 320x320 800x1088 1344x1344                         # smallest, fastest and largest padded size
    ... --static --shapes 800x1088 1088x800                         # an engine for each of these sizes alone
    ... --opts MODEL.TENSORRT.CACHE.DIR engines/                    # kept somewhere else

    ... --images photos/ 'more/*.jpg'                               # traced and compared with these

Each engine is compared with PyTorch on images that --images names, else of DATASETS.TEST where that is there, else on drawn
scenes, and kept in the cache, where DefaultPredictor, train_net.py and demo.py with the same
config find it; the overrides that they need are printed last. An engine that is there already is not built again, unless
--rebuild says so. Engines are kept whatever MODEL.TENSORRT.CACHE.MODE says, and an error is an error whatever
MODEL.TENSORRT.ON_ERROR says. They serve the GPU, TensorRT and version of this project that they were built with.

Exit status: 0, all engines are there; 1, some could not be built, are not as accurate as the config asks, or could not be
kept; 2, the command could not be carried out; 130, stopped by Ctrl-C, with the engines that were finished kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The package beside this tool, installed or not, and the modules that the tools share.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_tables import PRECISIONS, compared_on, count, megabytes, parity_table, size
from tabulate import tabulate


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="FILE", help="checkpoint (.pkl, .pth), short for MODEL.WEIGHTS")
    weights.add_argument(
        "--random-weights", action="store_true", help="no checkpoint: try out how long a build takes"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        metavar="P",
        help=f"one engine for each of {', '.join(PRECISIONS)}; default: MODEL.TENSORRT.PRECISION",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=size,
        metavar="HxW",
        help="padded sizes. Three: smallest, fastest, largest of one engine. One: that size alone. With --static: an "
        "engine for each. Default: MODEL.TENSORRT.SHAPES",
    )
    parser.add_argument(
        "--static",
        action="store_true",
        help="engines for one batch and size each (MODEL.TENSORRT.STATIC), within the sizes that the config allows",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=count,
        metavar="N",
        help="the largest batch (MODEL.TENSORRT.MAX_BATCH_SIZE) and, if wanted, the one to be fastest at "
        "(OPT_BATCH_SIZE). With --static: an engine for each",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="FILE",
        help="pictures, folders or quoted patterns to trace and compare new engines with; default: of DATASETS.TEST",
    )
    parser.add_argument("--rebuild", action="store_true", help="build engines that are there already, too")
    parser.add_argument("--json", metavar="FILE", help="also write what happened as JSON")
    # Last, since it takes the rest of the line.
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides; last on the line",
    )
    args = parser.parse_args(argv)
    if args.precision and len(set(args.precision)) < len(args.precision):
        parser.error("--precision names one twice")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {Path(args.json).parent}")
    return args


@dataclass
class Outcome:
    """What became of one engine: state is "built", "cached" or "failed"."""

    precision: str
    shapes: Any
    state: str
    seconds: float
    error: str = ""
    key: str = ""
    engine: str | None = None
    sidecar: str | None = None
    bytes: int = 0
    build_seconds: float | None = None
    parity: dict = field(default_factory=dict)
    report: dict = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shapes": self.shapes.to_json()}


def settle_static(args: argparse.Namespace) -> None:
    """Make args.static what the config says, where --static is absent, and check what depends on it.

    Raises:
        UsageError
    """
    from engine_config import UsageError, read_file

    in_config = read_file(args.config_file, args.opts).MODEL.TENSORRT.STATIC
    if args.static and "MODEL.TENSORRT.STATIC" in args.opts[::2] and not in_config:
        raise UsageError("--static and MODEL.TENSORRT.STATIC False after --opts: leave one out")
    args.static = args.static or bool(in_config)
    if args.static:
        for name in ("shapes", "batch"):
            values = getattr(args, name) or []
            if len(set(values)) < len(values):
                raise UsageError(f"--{name} names one twice")
    elif args.shapes and len(args.shapes) not in (1, 3):
        raise UsageError(
            f"--shapes has {len(args.shapes)} sizes; allowed: one, or three (smallest, fastest, largest); with --static "
            "as many as you want"
        )
    elif args.batch and len(args.batch) > 2:
        raise UsageError(
            f"--batch has {len(args.batch)} numbers; allowed: the largest and the one to be fastest at; with --static as "
            "many as you want"
        )


def words_for(args: argparse.Namespace, precision: str | None) -> list:
    """KEY, VALUE, ... that the arguments stand for, beside MODEL.WEIGHTS."""
    words: list = []
    if precision is not None:
        words += ["MODEL.TENSORRT.PRECISION", precision]
    if args.static:
        if "MODEL.TENSORRT.STATIC" not in args.opts[::2]:
            words += ["MODEL.TENSORRT.STATIC", True]
    elif args.shapes:
        words += ["MODEL.TENSORRT.SHAPES", [f"{h}x{w}" for h, w in args.shapes]]
    if args.batch:
        words += ["MODEL.TENSORRT.MAX_BATCH_SIZE", max(args.batch) if args.static else args.batch[0]]
        if len(args.batch) > 1 and not args.static:
            words += ["MODEL.TENSORRT.OPT_BATCH_SIZE", args.batch[1]]
    return words


def ranges(args: argparse.Namespace, options, divisibility: int) -> list:
    """What each of the engines of a config is to serve.

    Raises:
        UsageError: sizes are missing, or are no padded ones.
        EngineShapeError: sizes are outside of what the config allows.
    """
    from engine_config import UsageError

    if not options.static:
        return [options.shapes]
    sizes = args.shapes
    if not sizes:
        if options.shapes.min[1:] != options.shapes.max[1:]:
            raise UsageError(
                "static engines are for one size each: name the padded sizes, --shapes HxW HxW ..."
            )
        sizes = [options.shapes.opt[1:]]
    for height, width in sizes:
        if height % divisibility or width % divisibility:
            raise UsageError(
                f"--shapes {height}x{width}: images are padded to multiples of {divisibility} "
                "(MODEL.MASK_FORMER.SIZE_DIVISIBILITY), so none has this size"
            )
    batches = args.batch or [options.shapes.max[0]]
    return [options.engine_range(batch, *size) for batch in batches for size in sizes]


def make(backend, shapes, images) -> Outcome:
    """Build an engine, or find that it is there; `images` gives what to build it with."""
    from d2_trt.errors import BuildError, CacheError, ConversionError, ParityError

    started = time.perf_counter()
    precision = backend.options.precision
    try:
        entry = backend.entry(shapes, images)
    except (BuildError, CacheError, ConversionError, ParityError) as error:
        return Outcome(precision, shapes, "failed", time.perf_counter() - started, str(error))
    sidecar = entry.sidecar
    outcome = Outcome(
        precision,
        shapes,
        "built" if entry.built else "cached",
        time.perf_counter() - started,
        key=entry.key,
        bytes=sidecar["engine"]["size"],
        build_seconds=sidecar["built_by"]["seconds"],
        parity=dict(entry.parity),
        report=dict(entry.report),
    )
    if entry.path is None:
        outcome.state = "failed"
        outcome.error = f"built in {outcome.build_seconds:.1f} s, but not kept: see the warning above"
    else:
        outcome.engine = str(entry.path)
        outcome.sidecar = str(entry.path.with_suffix(".json"))
    return outcome


def show(outcome: Outcome) -> None:
    what = f"{outcome.precision}, {outcome.shapes.describe()}"
    if outcome.state == "failed":
        print(f"{what}: FAILED\n  {outcome.error}\n", file=sys.stderr, flush=True)
        return
    how = f"built in {outcome.build_seconds:.1f} s"
    if outcome.state == "cached":
        how = f"cached ({how})"
    print(f"{what}: {how}, {megabytes(outcome.bytes)}")
    print(f"  engine   {outcome.engine}")
    print(f"  sidecar  {outcome.sidecar}")
    rows = parity_table(outcome.parity)
    table = tabulate(rows, headers="keys", disable_numparse=True, tablefmt="plain").splitlines()
    print(
        "  parity   "
        + ("\n           ".join(table) or "not compared with PyTorch (MODEL.TENSORRT.VERIFY.ENABLED)")
    )
    if on := compared_on(outcome.parity):
        again = outcome.state == "cached" and not outcome.parity["given_images"]
        print(f"           {on}{' (or with --images FILE --rebuild now)' if again else ''}")
    print(flush=True)


def recipe(args: argparse.Namespace, precision: str | None) -> str:
    """The overrides that make other tools use the engine."""
    words = ["MODEL.BACKEND", "tensorrt", *words_for(args, precision), *args.opts]
    if args.weights is not None or args.random_weights:
        words += ["MODEL.WEIGHTS", args.weights or ""]
    return " ".join(shlex.quote(str(word)) for word in words)


def run(args: argparse.Namespace) -> int:
    from engine_config import load_model, read_cfg
    from engine_images import images_of

    from d2_trt.backend import TensorRTBackend

    settle_static(args)
    forced = {"CACHE__MODE": "rebuild" if args.rebuild else "readwrite", "ON_ERROR": "raise"}
    precisions = args.precision or [None]
    cfgs = [read_cfg(args, words_for(args, precision), **forced) for precision in precisions]
    images = images_of(cfgs[0], args.images)
    model = load_model(cfgs[0])
    work = []
    for cfg in cfgs:
        backend = TensorRTBackend(model, cfg)
        divisibility = max(model.size_divisibility, 1)
        # All of them before the first build, which takes minutes.
        work += [(backend, shapes) for shapes in ranges(args, backend.options, divisibility)]

    outcomes: list[Outcome] = []
    try:
        for number, (backend, shapes) in enumerate(work, 1):
            print(f"[{number}/{len(work)}] {backend.options.precision}, {shapes.describe()}", flush=True)
            outcomes.append(make(backend, shapes, images))
            show(outcomes[-1])
    finally:
        if args.json:
            document = {
                "config_file": args.config_file,
                "weights": cfgs[0].MODEL.WEIGHTS,
                "wanted": len(work),
                "engines": [outcome.to_json() for outcome in outcomes],
            }
            Path(args.json).write_text(json.dumps(document, indent=2) + "\n")

    states = [outcome.state for outcome in outcomes]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("built", "cached", "failed") if s in states)
    print(f"{len(states)} engine{'s'[: len(states) != 1]}: {counts}, in {work[0][0].options.cache.dir}")
    for precision in precisions:
        if any(o.state != "failed" and precision in (None, o.precision) for o in outcomes):
            print(f"To run {'it' if len(precisions) == 1 else precision}: {recipe(args, precision)}")
    return 1 if "failed" in states else 0


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
            f"build_engine.py: {error}. `make setup` makes an environment with all it needs.", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        return 130
    setup_logger()
    try:
        return run(args)
    except (UsageError, D2TRTError, OSError) as error:
        print(f"build_engine.py: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(
            f"build_engine.py: the GPU's memory does not suffice: {str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("build_engine.py: stopped; engines that were finished are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
