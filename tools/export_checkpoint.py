#!/usr/bin/env python
"""Write a checkpoint's weights alone, in half precision: a sixth of the size of what training saves.

    python tools/export_checkpoint.py output/shapes_small small.pth              # the last checkpoint of that training
    python tools/export_checkpoint.py model_final.pth r50.pth --split-mib 15     # also r50.pth.00, r50.pth.01, ...
    cat r50.pth.* > r50.pth                                                      # and back

The result loads wherever the checkpoint did (MODEL.WEIGHTS, DefaultPredictor, tools/demo.py --weights): the model keeps
float32, into which the values are copied. Norms keep float32 in the file too, since running variances may be too small for
half precision. Any other value that half precision does not hold is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

MOST_PARTS = 100  # two digits, so that the shell sorts them


class ExportError(Exception):
    """What was asked for cannot be exported; the message says why."""


def checkpoint_file(path: Path) -> Path:
    """The file itself, or the last one that training wrote to a folder."""
    if path.is_dir():
        last = path / "last_checkpoint"
        if not last.is_file():
            raise ExportError(f"{path} has no last_checkpoint: training has not written a checkpoint there")
        path = path / last.read_text().strip()
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    return path


def read(path: Path):
    """What a .pth holds.

    Raises:
        ExportError: PyTorch cannot read it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:  # of half a file any of them
        # The first sentence: PyTorch goes on about unsafe ways to load it all the same.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].split(". ")[0]
        raise ExportError(
            f"{path} cannot be read ({reason}): must be a whole .pth of weights that training or this tool wrote, not a "
            ".pkl of a model zoo"
        ) from error


def weights_of(checkpoint, path: Path) -> dict[str, Tensor]:
    """The model's weights in a checkpoint of training or of this tool."""
    weights = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    if (
        not weights
        or not isinstance(weights, dict)
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ExportError(f"{path} holds no weights of a model; name a .pth that training wrote")
    return weights


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float16; vectors, which are norms and biases and of no size, and integers as they are.

    Raises:
        ExportError: a value is not finite, or becomes infinite in float16.
    """
    result = {}
    for name, value in weights.items():
        value = value.detach().cpu()
        if value.is_floating_point():
            if not torch.isfinite(value).all():
                raise ExportError(f"{name} holds NaN or infinite values: this training has failed")
            if value.dim() > 1:
                half = value.half()
                if not torch.isfinite(half).all():
                    raise ExportError(
                        f"{name} goes to {value.abs().max():.3g}, more than the 65504 of half precision"
                    )
                value = half
        # A copy: views would drag all that they view into the file.
        result[name] = value.clone()
    return result


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end; after an error `path` is what it was."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_parts(total: int, size: int) -> None:
    """Raises ExportError where a file of `total` bytes would make more parts of `size` than their names number."""
    count = -(-total // size)
    if count > MOST_PARTS:
        enough = -(-total // (MOST_PARTS * 2**20))
        raise ExportError(
            f"--split-mib {size // 2**20}: makes {count} parts, more than {MOST_PARTS}. Take at least {enough}"
        )


def split(path: Path, size: int) -> list[Path]:
    """Parts of a file of at most `size` bytes, beside it; parts of an earlier split are removed."""
    for old in path.parent.glob(f"{path.name}.[0-9][0-9]"):
        old.unlink()
    parts = []
    with open(path, "rb") as file:
        while data := file.read(size):
            parts.append(path.with_name(f"{path.name}.{len(parts):02d}"))
            parts[-1].write_bytes(data)
    return parts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a .pth that training wrote, or its folder")
    parser.add_argument("output", type=Path, help="the .pth to write")
    parser.add_argument("--split-mib", type=int, metavar="N", help="also write it in parts of N MiB")
    args = parser.parse_args(argv)
    try:
        if args.split_mib is not None and args.split_mib < 1:
            raise ExportError(f"--split-mib {args.split_mib}: must be at least 1")
        path = checkpoint_file(args.checkpoint)
        if args.output.is_dir():
            raise ExportError(f"{args.output} is a folder: name the .pth to write")
        if args.output.exists() and args.output.samefile(path):
            raise ExportError(f"{args.output} is the checkpoint itself: name another file to write")
        weights = weights_of(read(path), path)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(args.output) as temporary:
            torch.save({"model": halved(weights)}, temporary)
            if args.split_mib is not None:
                check_parts(temporary.stat().st_size, args.split_mib * 2**20)
        parts = [] if args.split_mib is None else split(args.output, args.split_mib * 2**20)
    except (ExportError, OSError) as error:
        print(f"export_checkpoint.py: {error}", file=sys.stderr)
        return 2
    count = sum(value.numel() for value in weights.values())
    print(
        f"{path} -> {args.output}: {count / 1e6:.1f} million values, {args.output.stat().st_size / 2**20:.1f} MiB"
    )
    if parts:
        print(f"in {len(parts)} parts: {parts[0]} to {parts[-1].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
