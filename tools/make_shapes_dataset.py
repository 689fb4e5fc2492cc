#!/usr/bin/env python
"""Draw the synthetic "shapes" data set: things and stuff in COCO panoptic, COCO instance and semantic
form.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tqdm import tqdm

from mask2former.data.datasets.shapes import shapes_root
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    defaults = ShapesOptions()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="The same options give the same images everywhere. What is there already and whole is kept.",
    )
    parser.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="default: $DETECTRON2_DATASETS/shapes, else datasets/shapes",
    )
    parser.add_argument("--train", type=int, default=defaults.train, help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=defaults.val, help="validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    parser.add_argument(
        "--min-size", type=int, default=defaults.min_size, help="shortest side in pixels (%(default)s)"
    )
    parser.add_argument(
        "--max-size", type=int, default=defaults.max_size, help="longest side in pixels (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (one per CPU)")
    parser.add_argument("--force", action="store_true", help="draw again even if it is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    root = args.output or shapes_root()
    start = time.perf_counter()
    try:
        options = ShapesOptions(args.train, args.val, args.seed, args.min_size, args.max_size)
        with tqdm(total=options.train + options.val, unit="image", disable=None, leave=False) as bar:
            drawn = make_shapes_dataset(
                root,
                options,
                force=args.force,
                workers=args.workers,
                progress=lambda done, total: bar.update(done - bar.n),
            )
    except (ValueError, FileExistsError) as error:
        print(f"make_shapes_dataset: {error}", file=sys.stderr)
        return 2
    what = f"{options.train} training and {options.val} validation images in {root}"
    if drawn:
        print(f"Drew {what} in {time.perf_counter() - start:.1f} s.")
    else:
        print(f"Already there: {what}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
