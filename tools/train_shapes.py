#!/usr/bin/env python
"""Train a model on the drawn shapes, from nothing: draw the data where it is missing, train, evaluate.

    python tools/train_shapes.py --model small                   # the demo's model
    python tools/train_shapes.py --model r50 --time-limit 480    # ResNet-50 in full size, for 8 minutes
    python tools/train_shapes.py --model r50 --resume            # the rest
    python tools/train_shapes.py --model swin_t --num-gpus 2     # Swin-T in full size, 16 images of a batch on each GPU

Everything else is tools/train_net.py with the model's config of configs/shapes: its logs, checkpoints and results are in the
output folder, and KEY VALUE pairs at the end override the config.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import train_net

from mask2former.data.datasets.shapes import shapes_root
from mask2former.data.datasets.shapes_files import (
    MANIFEST,
    ShapesOptions,
    make_shapes_dataset,
)

REPO = Path(__file__).resolve().parent.parent
CONFIGS = {
    "r50": REPO / "configs/shapes/maskformer2_R50_shapes_scratch.yaml",
    "small": REPO / "configs/shapes/maskformer2_small_shapes.yaml",
    "swin_t": REPO / "configs/shapes/maskformer2_swin_tiny_shapes_scratch.yaml",
}
# A mapped image takes 13 ms of a core: so many keep a GPU busy. Each GPU has its own.
MOST_WORKERS = 12


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=sorted(CONFIGS), help="which recipe")
    parser.add_argument("--output", metavar="DIR", help="default: output/shapes_MODEL")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the output folder's last checkpoint"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="of drawing and training, not of the evaluation at the end; when they are over it writes a checkpoint and ends "
        "with status 0",
    )
    parser.add_argument(
        "--max-iter", type=int, metavar="N", help="iterations, along which the learning rate falls to zero"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=3000,
        help="training images to draw (%(default)s); with --resume, as many as the training began with",
    )
    parser.add_argument(
        "--val",
        type=int,
        metavar="N",
        help=f"validation images to draw; default: those that are there already, else {ShapesOptions.val}",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of this machine that share each batch (%(default)s)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    return parser.parse_args(argv)


def drawn_images(root: str) -> tuple[int, int] | None:
    """How many training and validation images a data set has; None where there is none, or its manifest is damaged."""
    try:
        manifest = json.loads((Path(root) / MANIFEST).read_text())
        return manifest["train"], manifest["val"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def draw(images: int, val: int | None, resume: bool) -> None:
    """Have the data set where train_net.py looks for it.

    Args:
        images: for training.
        val: for validation; None for as many as there are beside these training images.
        resume: the training images that are there stay, since the training began with them.

    Raises:
        ValueError, OSError: it cannot be drawn, or with `resume` another one is there.
    """
    root = shapes_root()
    found = drawn_images(root)
    if resume and found is not None and found[0] != images:
        raise ValueError(
            f"--resume with --images {images}, but {root} has {found[0]} training images: a training goes on with the "
            f"images it began with. Add --images {found[0]}, or leave --resume out to start anew"
        )
    if val is None:
        val = found[1] if found is not None and found[0] == images else ShapesOptions.val
    options = ShapesOptions(train=images, val=val)
    start = time.perf_counter()
    drawn = make_shapes_dataset(root, options)
    what = f"{options.train} training and {options.val} validation images in {root}"
    print(f"drew {what} in {time.perf_counter() - start:.0f} s" if drawn else f"found {what}", flush=True)


def command(args: argparse.Namespace, seconds: float | None) -> list[str]:
    """The arguments of train_net.py, with `seconds` left of the time."""
    words = ["--config-file", str(CONFIGS[args.model])]
    if args.resume:
        words.append("--resume")
    if seconds is not None:
        words += ["--time-limit", f"{max(seconds, 1):.0f}"]
    if args.num_gpus > 1:
        words += ["--num-gpus", str(args.num_gpus)]
    words += ["OUTPUT_DIR", args.output or f"output/shapes_{args.model}"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words += ["DATALOADER.NUM_WORKERS", str(max(1, min(cores // args.num_gpus, MOST_WORKERS)))]
    if not torch.cuda.is_available():
        print("no GPU: training on the CPU, which takes days", flush=True)
        words += ["MODEL.DEVICE", "cpu"]
    if args.max_iter is not None:
        words += ["SOLVER.MAX_ITER", str(args.max_iter)]
    return [*words, *args.opts]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start = time.monotonic()
    try:
        if args.time_limit is not None and not args.time_limit > 0:
            raise ValueError(f"--time-limit {args.time_limit:g}: must be a positive number of seconds")
        train_net.check_gpus(args.num_gpus)
        draw(args.images, args.val, args.resume)
    except (train_net.UsageError, ValueError, OSError) as error:
        print(f"train_shapes.py: {error}", file=sys.stderr)
        return 2
    used = time.monotonic() - start
    return train_net.run(command(args, None if args.time_limit is None else args.time_limit - used))


if __name__ == "__main__":
    sys.exit(main())
