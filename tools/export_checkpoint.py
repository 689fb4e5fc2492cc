#!/usr/bin/env python
"""Write a checkpoint's weights alone, in half precision: a twelfth of the size of what training saves.

    python tools/export_checkpoint.py output/shapes_small small.pth              # the last checkpoint of that training
    python tools/export_checkpoint.py model_final.pth r50.pth --split-mib 15     # also r50.pth.00, r50.pth.01, ...
    cat r50.pth.* > r50.pth                                                      # and back

The result loads wherever the checkpoint did (MODEL.WEIGHTS, DefaultPredictor, tools/demo.py --weights): the model keeps
float32, into which the values are copied. Norms keep float32 in the file too, since running variances may be too small for
half precision. Any other value that half precision does not hold is an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor


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


def weights_of(checkpoint: dict, path: Path) -> dict[str, Tensor]:
    """The model's weights in a checkpoint of training or of this tool."""
    weights = checkpoint.get("model", checkpoint)
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
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
        weights = weights_of(torch.load(path, map_location="cpu", weights_only=True), path)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": halved(weights)}, args.output)
    except (ExportError, OSError) as error:
        print(f"export_checkpoint.py: {error}", file=sys.stderr)
        return 2
    count = sum(value.numel() for value in weights.values())
    print(
        f"{path} -> {args.output}: {count / 1e6:.1f} million values, {args.output.stat().st_size / 2**20:.1f} MiB"
    )
    if args.split_mib is not None:
        parts = split(args.output, args.split_mib * 2**20)
        print(f"in {len(parts)} parts: {parts[0]} to {parts[-1].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
