#!/usr/bin/env python3
"""Find the modules that an fp16 or bf16 engine has to keep in float32: MODEL.TENSORRT.FP32_MODULES.

    python tools/precision_search.py --config-file FILE --weights model_final.pkl --size 800/1333 --images 8
    python tools/precision_search.py --config-file FILE --weights model_final.pkl --input photos/*.jpg --engines 0

On real images (of DATASETS.TEST, or --input) and trained weights each block of the model is put in half precision alone, and
its outputs are compared with PyTorch's in float32. Then, from everything in half precision on, the most damaging and
cheapest blocks are pinned to float32 until the parity gate's thresholds (MODEL.TENSORRT.VERIFY.*) are met with a margin,
and those that turn out not to be needed are let go. All this is emulated in PyTorch, by rounding to half before and after
each operation: minutes for all blocks. At last at most --engines real engines are built: the set that was found, widened
where the engine misses what the emulation met; and if builds are left the built-in set, nothing pinned, and everything in
TF32, to compare with. Given the same --size, --batch and overrides, accuracy_ledger.py uses the same cached engines.

What is printed says of every figure whether it is emulated or an engine's. All are in a CSV file too, each as soon as it is
there: --resume FILE continues one.

Exit status: 0, a set was found (and confirmed, with --engines); 1, none was; 2, the command could not be carried out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from detectron2.config import CfgNode
from engine_config import UsageError, read_cfg
from measurements import REPO, MeasurementFile, machine, positive, size_pair
from precision_measure import DTYPES, EVERYTHING, FIELDS, IDENTITY, PrecisionSearch, agreement, say
from precision_report import blocks_table, config_text, sets_table
from precision_strategy import Block, Wanted, ranked, search

from d2_trt.errors import MissingDependencyError
from d2_trt.options import TensorRTOptions


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", required=True, metavar="FILE", help="trained checkpoint (.pkl or .pth)")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp16", help="(%(default)s)")
    parser.add_argument(
        "--input", nargs="+", metavar="FILE", help="images; default: of the one data set in DATASETS.TEST"
    )
    parser.add_argument(
        "--images", type=positive, default=8, metavar="N", help="images to compare on (%(default)s)"
    )
    parser.add_argument(
        "--size",
        nargs="+",
        type=size_pair,
        default=[],
        metavar="MIN/MAX",
        help="INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST; each image is compared at each; default: the config's",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=positive,
        default=[1],
        metavar="N",
        help="batches that the engine serves; images are compared in the largest (%(default)s)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=2.0,
        metavar="X",
        help="outputs may disagree so many times less than the gate allows (%(default)s)",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="modules to take apart further, such as backbone.res5",
    )
    parser.add_argument(
        "--engines", type=int, default=1, metavar="N", help="engines to build at most (%(default)s)"
    )
    parser.add_argument(
        "--opt-level", type=int, choices=range(6), metavar="0-5", help="MODEL.TENSORRT.OPT_LEVEL"
    )
    parser.add_argument("--iterations", type=positive, default=50, help="timed calls (%(default)s)")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--output", default="results", metavar="DIR", help="for the CSV file (%(default)s)")
    parser.add_argument("--resume", metavar="CSV", help="continue this file")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config, after --")
    args = parser.parse_args(argv)
    if args.engines < 0:
        parser.error(f"--engines {args.engines}: must be at least 0, which builds none")
    if not args.margin > 0:
        parser.error(f"--margin {args.margin}: must be above 0")
    return args


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config, with the engine's options as every build has them.

    Raises:
        UsageError
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    file = args.config_file if os.path.exists(args.config_file) else str(REPO / args.config_file)
    words = ["MODEL.DEVICE", device, "MODEL.TENSORRT.PRECISION", args.precision]
    if args.opt_level is not None:
        words += ["MODEL.TENSORRT.OPT_LEVEL", args.opt_level]
    asked = argparse.Namespace(config_file=file, weights=args.weights, random_weights=False, opts=args.opts)
    cfg = read_cfg(asked, words, engines=False)
    cfg.freeze()
    return cfg


def confirm(
    searcher: PrecisionSearch, chosen: Sequence[Block], wanted: Wanted, engines: int
) -> list[Block] | None:
    """Build engines until one reaches what is wanted, from the set that the emulation found on; the rest to compare with.

    Where an engine misses it, or TensorRT does not build it, further blocks are pinned, in their order: as many as the
    emulation needs to halve its damage.

    Returns:
        the blocks that the engine has pinned; None where none reached it.
    """
    pinned, confirmed, built = list(chosen), None, []
    while len(built) < engines and confirmed is None:
        built.append(searcher.patterns(pinned))
        row = searcher.engine(built[-1])
        if row["status"] == "ok" and wanted.reached(agreement(row)):
            confirmed = pinned
            break
        rest = [block for block in ranked(searcher.blocks) if block not in pinned]
        if not rest:
            break
        target = wanted.damage(searcher.emulate_blocks(pinned)) / 2
        while rest:
            pinned = [*pinned, rest.pop(0)]
            if wanted.damage(searcher.emulate_blocks(pinned)) <= target:
                break
    others = [patterns for patterns in (list(searcher.built_in), [], None) if patterns not in built]
    for patterns in others[: engines - len(built)]:
        searcher.engine(patterns)
    return confirmed


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    cfg = read_config(args)
    try:
        verify = TensorRTOptions.from_cfg(cfg).verify
        wanted = Wanted(verify, args.margin)
    except ValueError as error:
        raise UsageError(error) from error
    path = args.resume or MeasurementFile.new_path(
        args.output, f"precision_{args.precision}", machine(cfg.MODEL.DEVICE)
    )
    file = MeasurementFile(path, FIELDS, IDENTITY, exclusive=not args.resume)
    from d2_trt.logging import setup_logger

    setup_logger()
    searcher = PrecisionSearch(args, argv, cfg, file)
    blocks = searcher.blocks
    for block in blocks:
        block.damage = wanted.damage(searcher.alone(block))
    float32 = searcher.float32()
    if not wanted.reached(float32):
        say(f"not reached with everything in float32, products in TF32: {wanted}. Trying without a margin")
        wanted = Wanted(verify)
    searcher.emulate([])
    searcher.emulate(searcher.built_in)
    chosen = search(blocks, searcher.emulate_blocks, wanted) if wanted.reached(float32) else None
    found, how = chosen, "emulated"
    problem = ""
    if chosen is not None and args.engines:
        how = "engine"
        try:
            found = confirm(searcher, chosen, wanted, args.engines)
        except MissingDependencyError as error:
            found, problem = None, str(error)
    final = found if found is not None else chosen or []
    print(blocks_table([(block, searcher.alone(block)) for block in blocks], final, args.precision))
    named = [
        ("everything", EVERYTHING),
        ("nothing", ""),
        ("built-in", " ".join(searcher.built_in)),
        ("found", " ".join(searcher.patterns(final))),
    ]
    print(sets_table([row for row in file.rows if searcher.is_ours(row)], named))
    print(f"wanted: {wanted}")
    print(f"written to {file.path}")
    if chosen is None:
        print(
            "precision_search.py: not reached with all blocks in float32, whose products are TF32: use "
            "MODEL.TENSORRT.PRECISION fp32, or lower MODEL.TENSORRT.VERIFY.*",
            file=sys.stderr,
        )
        return 1
    print(config_text(args.precision, searcher.patterns(final), how if found is not None else "emulated"))
    if found is None:
        why = (
            problem
            or "no engine that was built reaches it; give more --engines, or look at the statuses above"
        )
        print(f"precision_search.py: emulated only, not confirmed: {why}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        return run(args, argv)
    except (UsageError, ValueError, OSError) as error:
        print(f"precision_search.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
