#!/usr/bin/env python3
"""Run every CUDA kernel of this project once or more on small inputs, for NVIDIA's compute-sanitizer.

    python setup.py build_ext --inplace
    compute-sanitizer --tool memcheck python tools/sanitize_kernels.py
    compute-sanitizer --tool racecheck python tools/sanitize_kernels.py
    python tools/sanitize_kernels.py --list

Neither PyTorch nor detectron2 is imported: starting them under the checker takes minutes, and PyTorch's allocator hides
reads beyond a tensor in its pools. Here every array is an allocation of its own, of the array's size. What the kernels
compute is for the tests to check; this only sees that they wrote their outputs.

Exit status: 0, all ran; 1, a kernel failed or left an output unwritten; 2, the kernels are not built or there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sanitizer_gpu import Gpu, Missing
from sanitizer_images import postprocess, resize
from sanitizer_network import (
    attention,
    mask_features,
    mlp,
    ms_deform_attn,
    ms_deform_attn_backward,
    normalization,
    normalize_images,
    window_attention,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mask2former"


def load_kernels() -> ModuleType:
    """mask2former._kernels, without the package around it."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = PACKAGE / f"_kernels{suffix}"
    if not path.exists():
        raise Missing(f"{path} is not built: `python setup.py build_ext --inplace`, with nvcc on the PATH")
    spec = importlib.util.spec_from_file_location("_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES: dict[str, Callable[[ModuleType, Gpu], None]] = {
    "ms_deform_attn": ms_deform_attn,
    "ms_deform_attn_backward": ms_deform_attn_backward,
    "postprocess": postprocess,
    "resize": resize,
    "normalization": normalization,
    "normalize_images": normalize_images,
    "attention": attention,
    "mask_features": mask_features,
    "window_attention": window_attention,
    "mlp": mlp,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all where none is named"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(CASES))
        return 0
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; expected some of {', '.join(CASES)}")
    try:
        kernels, gpu = load_kernels(), Gpu()
    except Missing as error:
        print(f"sanitize_kernels: {error}", file=sys.stderr)
        return 2
    failed = False
    for name in args.cases or CASES:
        try:
            CASES[name](kernels, gpu)
            print(f"{name}: ran")
        except (RuntimeError, ValueError) as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
