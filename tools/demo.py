#!/usr/bin/env python3
"""Segment images, videos, a camera or drawn scenes, and write pictures with what was found.

    python tools/demo.py --draw 4                        # the project's own drawings; needs no data
    python tools/demo.py photo.jpg folder/ 'more/**/*.png' --weights model_final.pkl --output results/
    python tools/demo.py clip.mp4 --weights model_final.pkl --output clip_segmented.mp4
    python tools/demo.py --camera 0 --window --weights model_final.pkl --opts MODEL.BACKEND tensorrt

Prints what each image holds and how long each stage took, and the medians at the end. Results of earlier runs
are replaced, inputs never. An image that cannot be read is reported, and the run goes on.

Exit status: 0, all went well; 1, some inputs failed; 2, the run could not start; 130, stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# Quick on a CPU, and trained on what --draw draws: configs/shapes/README.md says how.
DRAW_CONFIG = REPO / "configs" / "shapes" / "maskformer2_small_shapes.yaml"
DRAW_WEIGHTS = DRAW_CONFIG.with_suffix(".pth")
DEFAULT_CONFIG = REPO / "configs" / "coco" / "panoptic-segmentation" / "maskformer2_R50_bs16_50ep.yaml"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("inputs")
    what.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="image or video files, folders, or quoted patterns"
    )
    what.add_argument(
        "--input",
        nargs="+",
        default=[],
        dest="more_inputs",
        metavar="INPUT",
        help="as INPUT (detectron2's name)",
    )
    what.add_argument(
        "--draw", type=_count, default=0, metavar="N", help="N synthetic scenes, always the same ones"
    )
    what.add_argument(
        "--camera", type=_index, nargs="?", const=0, metavar="INDEX", help="a camera, by OpenCV's number (0)"
    )
    what.add_argument("--max-frames", type=_count, metavar="N", help="stop a video or camera after N frames")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--config-file",
        metavar="FILE",
        help="default: COCO panoptic R50; for --draw alone the small model of configs/shapes",
    )
    model.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint (.pkl, .pth), short for MODEL.WEIGHTS; the small model of configs/shapes has its own",
    )
    model.add_argument(
        "--device", help="such as cuda, cuda:1 or cpu; default: the config's, cpu where CUDA is absent"
    )

    result = parser.add_argument_group("results")
    result.add_argument(
        "--output",
        metavar="PATH",
        help="file, or folder (made where missing); default: output/demo, or none with --window",
    )
    result.add_argument(
        "--task", choices=("auto", "panoptic", "instance", "semantic"), default="auto", help="what to draw"
    )
    result.add_argument(
        "--confidence-threshold",
        type=_share,
        default=0.5,
        metavar="X",
        help="lowest score of instances (0.5)",
    )
    result.add_argument("--json", metavar="FILE", help="also write results, times and failures as JSON")
    result.add_argument(
        "--window", action="store_true", help="show results in a window; q or Escape ends the run"
    )
    # Last, since it takes the rest of the line.
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides; last on the line",
    )
    args = parser.parse_args(argv)
    args.inputs += args.more_inputs
    if not args.inputs and not args.draw and args.camera is None:
        parser.error("no inputs: name images, videos or folders, or use --draw N or --camera")
    if args.config_file is None:
        args.config_file = str(DEFAULT_CONFIG if args.inputs or args.camera is not None else DRAW_CONFIG)
    own = Path(args.config_file).resolve() == DRAW_CONFIG and DRAW_WEIGHTS.is_file()
    if own and args.weights is None and "MODEL.WEIGHTS" not in args.opts[::2]:
        args.weights = str(DRAW_WEIGHTS)
    if args.output is None and not args.window:
        args.output = "output/demo"
    return args


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _index(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a camera's number, such as 0; name files without --camera"
        )
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        # Here, so that --help and wrong arguments are answered at once.
        from d2_trt.logging import setup_logger  # and with it the backend "tensorrt" and its keys
        from mask2former.utils.demo import DemoError, run_demo
    except ModuleNotFoundError as error:
        print(
            f"demo.py: error: {error}. `make demo` sets up an environment with all it needs.", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        return 130
    setup_logger()
    try:
        return run_demo(args)
    except DemoError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo.py: stopped before the first image", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # The package beside this tool, installed or not.
    sys.path.insert(0, str(REPO))
    sys.exit(main())
