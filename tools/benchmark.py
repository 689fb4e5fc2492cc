#!/usr/bin/env python3
"""Time a model stage by stage: network, post-processing, whole forward pass, DefaultPredictor.

    python tools/benchmark.py --image-size 480x640 --precision fp32 tf32 fp16
    python tools/benchmark.py --backend torch tensorrt --precision fp32 fp16 --size 800x1088 448x640 --batch 1 2
    python tools/benchmark.py --release ../Mask2Former      # an official checkout, timed beside this project

Each stage is warmed up, then timed call by call; the table shows medians. On CUDA, calls are timed with events on an idle
device, so that a figure is the latency of one call; `predictor` is wall-clock time, since most of it is spent on the CPU.
Beside each time stands how far the network's outputs agree with PyTorch's in float32 on the same images: relative error of
class logits and of mask logits, shares of mask pixels with the same sign and of queries with the same class. TensorRT's
engine is built, or taken from the cache, before anything is timed. Every row goes to a CSV file with the GPU and the
versions.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
STAGES = ("core", "postprocess", "forward", "predictor")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
AGREEMENT = ("logit_error", "mask_error", "sign_agreement", "class_agreement")
FIELDS = (
    *("date", "implementation", "gpu", "torch", "cuda", "tensorrt", "detectron2", "python", "config"),
    *("backend", "precision", "batch", "image", "padded", "output", "stage"),
    *("median_ms", "p10_ms", "p90_ms", "iterations", "peak_mib", "segments", "instances"),
    *AGREEMENT,
    *("build_s", "cached_start_s", "engine_mib"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        default="configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
        help="under this project's root unless the path exists as given",
    )
    parser.add_argument(
        "--image-size",
        nargs="+",
        default=[],
        type=_size,
        metavar="HxW",
        help="sizes of images in pixels, before the config resizes them (480x640 where --size is absent)",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        default=[],
        type=_size,
        metavar="HxW",
        help="sizes of images that the network takes as they are, padded but not resized; no `predictor` stage",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="default: MODEL.BACKEND, which is torch")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--all-tasks", action="store_true", help="semantic, instance and panoptic on together"
    )
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--device", default=None, help="cuda or cpu; cuda where there is one")
    parser.add_argument("--output", default="results", help="folder of the CSV files")
    parser.add_argument(
        "--release", metavar="DIR", help="also time the official checkout in DIR, in its own process"
    )
    parser.add_argument("--implementation", default="d2_trt", help=argparse.SUPPRESS)
    parser.add_argument("--package-root", default=str(REPO), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config, after --")
    args = parser.parse_args(argv)
    if not os.path.exists(args.config_file):
        args.config_file = str(REPO / args.config_file)
    if not os.path.exists(args.config_file):
        parser.error(f"no config file {args.config_file}")
    if args.iterations < 1 or args.warmup < 0 or min(args.batch) < 1:
        parser.error("--iterations and --batch must be at least 1, --warmup at least 0")
    if len(args.opts) % 2:
        parser.error(f"overrides are KEY VALUE pairs, but {len(args.opts)} words were given")
    if not args.image_size and not args.size:
        args.image_size = [(480, 640)]
    return args


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(v) for v in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 480x640") from None
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a side below 1")
    return height, width


def run(args: argparse.Namespace, save_weights: str | None = None) -> tuple[list[dict], list[str]]:
    """Time one implementation.

    Args:
        save_weights: file for the model's weights, so that another implementation can be timed with the same.

    Returns:
        the table's rows, and what went wrong: a backend that fails at one precision is still timed at the others.
    """
    import detectron2
    import torch
    from benchmark_model import Case, Subject, build_cfg
    from benchmark_timing import Timer

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg = build_cfg(args, device)
    subject = Subject(cfg, args.implementation)
    if save_weights:
        torch.save({"model": subject.model.state_dict()}, save_weights)
    cases = [Case(subject.predictor, size, resize=True) for size in args.image_size]
    cases += [Case(subject.predictor, size, resize=False) for size in args.size]
    timer = Timer(device, args.warmup, args.iterations)
    common = {
        "date": datetime.date.today().isoformat(),
        "implementation": args.implementation,
        "gpu": torch.cuda.get_device_name() if timer.cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "detectron2": detectron2.__version__,
        "python": platform.python_version(),
        "config": os.path.relpath(args.config_file, REPO / "configs"),
    }
    rows, failures = [], []
    if args.implementation == "release":
        for precision in args.precision:
            row = {**common, "backend": "torch", "precision": precision}
            _time_cases(args, subject, cases, timer, row, rows)
        return rows, failures
    from benchmark_backends import install

    from mask2former.backend import BackendError, check_backend

    backends = args.backend or [cfg.MODEL.BACKEND]
    for backend in backends:
        check_backend(backend, cfg)
    for backend in backends:
        for precision in args.precision:
            row = {**common, "backend": backend, "precision": precision}
            try:
                row.update(install(subject, cfg, backend, precision))
                _time_cases(args, subject, cases, timer, row, rows)
            except BackendError as error:
                failures.append(f"{backend} {precision}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
    return rows, failures


def _time_cases(args: argparse.Namespace, subject, cases, timer, common: dict, rows: list[dict]) -> None:
    """Add the rows of one backend at one precision: every size, batch and stage."""
    import torch
    from benchmark_timing import set_precision

    # Of TensorRT, the engine has the precision; PyTorch keeps what is left to it in float32.
    precision = "fp32" if common["backend"] == "tensorrt" else common["precision"]
    for case in cases:
        for batch in args.batch:
            with torch.inference_mode():
                images = subject.padded(case, batch)
                with set_precision(precision, timer.device):
                    outputs = subject.core(images)
                    results = subject.postprocess_call(case, images, outputs)()
                row = {
                    **common,
                    "batch": batch,
                    "image": "x".join(map(str, case.size)),
                    "padded": "x".join(map(str, images.shape[-2:])),
                    "output": "x".join(map(str, case.size)),
                    # What there was to post-process: few segments make it easy.
                    "segments": len(results[0]["panoptic_seg"][1]) if "panoptic_seg" in results[0] else "",
                    "instances": len(results[0]["instances"]) if "instances" in results[0] else "",
                }
                if not subject.release:
                    from benchmark_backends import agreement, reference_outputs

                    row.update(agreement(outputs, reference_outputs(subject, images)))
                inputs = [case.input] * batch
                calls = {
                    "core": lambda images=images: subject.core(images),
                    "postprocess": subject.postprocess_call(case, images, outputs),
                    "forward": lambda inputs=inputs: subject.model(inputs),
                }
                if batch == 1 and case.resized:  # DefaultPredictor takes one image, and resizes it
                    calls["predictor"] = lambda case=case: subject.predictor(case.image)
                stages = [stage for stage in args.stages if stage in calls]
                with set_precision(precision, timer.device):
                    for stage in stages:
                        times = timer.measure(calls[stage], wall_clock=stage == "predictor")
                        rows.append({**row, "stage": stage, **times})
                done = ", ".join(f"{r['stage']} {r['median_ms']} ms" for r in rows[len(rows) - len(stages) :])
                print(
                    f"{row['backend']} {row['precision']} batch {batch} at {row['padded']}: {done}",
                    file=sys.stderr,
                    flush=True,
                )


def run_release(args: argparse.Namespace, argv: list[str], weights: str) -> list[dict]:
    """Rows of the official checkout, from a process in which `mask2former` is the release's package."""
    command = [
        sys.executable,
        __file__,
        "--implementation",
        "release",
        "--package-root",
        args.release,
        "--json",
    ]
    command += [*argv, *([] if "--" in argv else ["--"]), "MODEL.WEIGHTS", weights]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"timing the release in {args.release} failed, see above: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def write_csv(folder: str, rows: list[dict]) -> Path:
    first = rows[0]
    name = f"{first['gpu']}_torch{first['torch']}_{time.strftime('%Y%m%d-%H%M%S')}.csv"
    path = Path(folder) / "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def print_table(rows: list[dict]) -> None:
    columns = ["implementation", "backend", "precision", "batch", "padded", "stage"]
    columns += ["median_ms", "p10_ms", "p90_ms", "peak_mib", "segments", "instances", *AGREEMENT]
    columns += ["build_s", "cached_start_s", "engine_mib"]
    columns = [c for c in columns if any(row.get(c, "") != "" for row in rows)]
    table = [columns] + [[_cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    first = rows[0]
    tensorrt = {f", TensorRT {row['tensorrt']}" for row in rows if row.get("tensorrt")}
    print(
        f"{first['config']}, {first['gpu']}, torch {first['torch']}{''.join(sorted(tensorrt))}, "
        f"detectron2 {first['detectron2']}, {first['date']}"
    )
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1 else str(value)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    # The modules beside this one, and the package: the release's where that is to be timed.
    sys.path[:0] = [args.package_root, str(REPO / "tools")]
    if args.json:
        # Everything printed on the way belongs on stderr: the last line of stdout is the result.
        stdout, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(run(args)[0]), file=stdout)
        return 0
    from d2_trt.logging import setup_logger
    from mask2former.backend import BackendError

    setup_logger()
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = os.path.join(folder, "weights.pth") if args.release else None
            rows, failures = run(args, weights)
            if args.release:
                rows += run_release(args, _without_ours(argv), weights)
    except (BackendError, KeyError) as error:
        print(f"benchmark.py: error: {error.args[0]}", file=sys.stderr)
        return 2
    if rows:
        print_table(rows)
        print(f"written to {write_csv(args.output, rows)}")
    elif not failures:
        failures = ["none of --stages applies to these sizes and batches"]
    for failure in failures:
        print(f"benchmark.py: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _without_ours(argv: list[str]) -> list[str]:
    """A command line without the options that have no meaning for the release."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("-"):
            dropping = word in ("--release", "--backend")
        if not dropping:
            kept.append(word)
    return kept


if __name__ == "__main__":
    sys.exit(main())
