#!/usr/bin/env python3
"""Time a model stage by stage, by several backends, beside the official release and the hardware's limits.

    python tools/benchmark.py --image-size 480x640 --precision fp32 tf32 fp16
    python tools/benchmark.py --backend torch tensorrt --precision fp32 fp16 --size 800x1088 448x640 --batch 1 2
    python tools/benchmark.py --backend compile --compile-mode reduce-overhead max-autotune --stages core
    python tools/benchmark.py --release ../Mask2Former      # an official checkout, timed beside this project
    python tools/benchmark.py --config-file configs/shapes/maskformer2_R50_shapes.yaml --stages evaluation

Stages:
    core            the network: backbone, pixel decoder, transformer decoder; one call on an idle GPU
    throughput      the network, many calls back to back
    postprocess     from the network's outputs to the results
    forward         model(inputs): upload, network, post-processing
    predictor       DefaultPredictor(cfg)(img), which resizes on the CPU (batch 1, --image-size)
    trt_predictor   d2_trt.TensorRTPredictor(cfg)(img), which resizes on the GPU (batch 1, --image-size)
    stream          TensorRTPredictor(cfg).stream(images, batch_size=batch), from the first image's start to the last's end:
                    of images in memory, and (`stream_files`) of JPEG files of about four bits a pixel, decoding included
    host            the predictors' parts before the network: PIL's resize, the conversion to float32, its upload, the
                    model's preprocess, TensorRTPredictor's upload and resize
    evaluation      model and evaluators over the first data set of DATASETS.TEST: images in memory, and from the data
                    loader, whose processes start anew each time (DATALOADER.NUM_WORKERS)

All configurations that fit into the GPU's memory take turns: --iterations calls of a stage are spread over --rounds
rounds, so that a drift of the clock hits all alike. On CUDA, calls are timed with events; `predictor`, `trt_predictor`,
`stream`, `host` and `evaluation` are wall-clock time, since the CPU has a part in them. A row has the median and the 10th
and 90th percentile of its calls in ms, and images a second by the median; `stream` and `evaluation` run once a round over
all their images, and an image's share is what their rows give.

Random weights, which is what there is without MODEL.WEIGHTS, keep no query or all of them, with one mask. So that
post-processing has the work that trained models make it, the tool changes them: --kept-queries of an image are sure of a
class and have a region of it each, for all implementations and backends (tools/benchmark_weights.py). A row's `weights` says
so, and `segments` and `instances` what came of it; --kept-queries 0 leaves the weights as they are.

Beside the times stand: how far the network's outputs agree with PyTorch's in float32 on the same images (relative error of
class logits and of mask logits, shares of mask pixels with the same sign and of queries with the same class); GPU memory;
what the engine took to build; and the distance to two floors that follow from the work and from what this GPU reached in a
large copy and a large matrix product just before (tools/benchmark_work.py says what is counted). `resident_mib` is what a
configuration keeps for a case: PyTorch's weights (`weights_mib`, which are there beside an engine too), engine, scratch
memory, the graph of that case; `peak_mib` has with it the most that a call takes. There is none where memory was seen to be
freed by others. Every row goes to a CSV file as soon as it is there; what cannot be measured has its reason in it, and ends
the run with status 1 after the others. tools/benchmark_plots.py draws the file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
STAGES = (
    *("core", "throughput", "postprocess", "forward", "predictor", "trt_predictor", "stream"),
    *("host", "evaluation"),
)
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


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
        help="sizes of images that the network takes as they are, padded but not resized; no predictors",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--backend",
        nargs="+",
        metavar="NAME",
        help="torch, tensorrt, or compile for torch.compile; default: MODEL.BACKEND, which is torch",
    )
    parser.add_argument("--compile-mode", nargs="+", choices=COMPILE_MODES, default=["reduce-overhead"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=[stage for stage in STAGES if stage not in ("host", "evaluation")],
        help="default: all but host and evaluation",
    )
    parser.add_argument(
        "--all-tasks", action="store_true", help="semantic, instance and panoptic on together"
    )
    parser.add_argument(
        "--kept-queries",
        type=int,
        default=30,
        help="queries that random weights are to keep, at most half of them; 0 leaves the weights as they are (30)",
    )
    parser.add_argument("--warmup", type=int, default=10, help="calls before those that count (10)")
    parser.add_argument("--iterations", type=int, default=50, help="calls of a stage that count (50)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each configuration (5)")
    parser.add_argument(
        "--stream-images", type=int, default=100, help="images of a stream, rounded up to whole batches (100)"
    )
    parser.add_argument(
        "--eval-images", type=int, default=0, help="images of the data set, from its start (all)"
    )
    parser.add_argument(
        "--no-interleave", action="store_true", help="one configuration after the other, alone on the GPU"
    )
    parser.add_argument("--no-limits", action="store_true", help="no floors, no large copies and products")
    parser.add_argument(
        "--skip-cached-start", action="store_true", help="do not load the engine once more to time it"
    )
    parser.add_argument("--device", default=None, help="cuda or cpu; cuda where there is one")
    parser.add_argument("--output", default="results", help="folder of the CSV files")
    parser.add_argument(
        "--release", metavar="DIR", help="also time the official checkout in DIR, in its own process"
    )
    parser.add_argument("--implementation", default="d2_trt", help=argparse.SUPPRESS)
    parser.add_argument("--package-root", default=str(REPO), help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config, after --")
    args = parser.parse_args(argv)
    if not os.path.exists(args.config_file):
        args.config_file = str(REPO / args.config_file)
    if not os.path.exists(args.config_file):
        parser.error(f"no config file {args.config_file}")
    if min(args.iterations, args.rounds, args.stream_images, *args.batch) < 1:
        parser.error("--iterations, --rounds, --stream-images and --batch must be at least 1")
    if min(args.warmup, args.eval_images, args.kept_queries) < 0:
        parser.error("--warmup, --eval-images and --kept-queries must be at least 0")
    if len(args.opts) % 2:
        parser.error(f"overrides are KEY VALUE pairs, but {len(args.opts)} words were given")
    if args.release and not Path(args.release, "mask2former", "__init__.py").is_file():
        # Python would go on to this project's own package, and its times would stand as the release's.
        parser.error(f"--release {args.release}: there is no mask2former/ in it; name an official checkout")
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


class Limits:
    """The columns that set a row against the hardware: floors, and how many times as long it took."""

    def __init__(self, bench, precisions: list[str], device: str, report):
        """Measure the ceilings; they go into the report."""
        from benchmark_limits import Ceilings

        self._bench, self._workloads, self._report = bench, {}, report
        self._ceilings = Ceilings.measure(device, precisions)
        report.ceiling({"stage": "ceiling_copy", "gb_per_s": round(self._ceilings.bandwidth / 1e9, 1)})
        for precision, rate in self._ceilings.flops.items():
            report.ceiling(
                {
                    "stage": f"ceiling_matmul_{precision}",
                    "precision": precision,
                    "tflop_per_s": round(rate / 1e12, 3),
                }
            )

    def __call__(self, case: int, batch: int, stage: str, row: dict) -> dict:
        """Columns of a row: of the network for `core` and `throughput`, of bytes alone for `postprocess`."""
        if stage == "postprocess":
            moved = 1e6 * row["postprocess_mb"]
            floor = float(f"{1e3 * moved / self._ceilings.bandwidth:.4g}")
            columns = {"moved_mb": row["postprocess_mb"], "limit_ms": floor}
        elif stage in ("core", "throughput"):
            workload = self._workload(case, row["image"])
            if workload is None:
                return {}
            columns = workload.columns(self._ceilings, row["precision"], batch)
            columns["times_layers"] = float(f"{row['median_ms'] / columns['layers_ms']:.4g}")
            columns["tflop_per_s"] = float(f"{columns['gflop'] / row['median_ms']:.4g}")
        else:
            return {}
        columns["gb_per_s"] = float(f"{columns['moved_mb'] / row['median_ms']:.4g}")
        return {**columns, "times_limit": float(f"{row['median_ms'] / max(columns['limit_ms'], 1e-9):.4g}")}

    def _workload(self, case: int, name: str):
        """Counted once a case; None where that fails, which is said once."""
        from benchmark_bench import MeasureError

        if case not in self._workloads:
            try:
                self._workloads[case] = self._bench.workload(case)
            except MeasureError as error:
                self._workloads[case] = None
                self._report.failure(f"limits at {name}", {"image": name, "stage": "limits"}, str(error))
        return self._workloads[case]


def run(args: argparse.Namespace, argv: list[str]):
    """Time everything that was asked for; returns the Report."""
    from benchmark_bench import LocalBench
    from benchmark_rounds import run_all, start_release
    from benchmark_table import Report, options_column
    from benchmark_timing import check_device
    from measurements import command_line, config_name, machine, today

    from mask2former.engine.checkpoint import explain_failure

    device = _device(args)
    check_device(device, "--device")
    try:
        bench = LocalBench(args, device)
    except Exception:
        explain_failure(dict(zip(args.opts[::2], args.opts[1::2], strict=True)).get("MODEL.WEIGHTS", ""))
        raise
    common = {
        "date": today(),
        **machine(device),
        "config": config_name(args.config_file),
        "weights": bench.subject.weights,
        "tasks": bench.subject.tasks,
        "options": options_column(args.opts),
        "command": command_line(argv),
    }
    report = Report(args.output, common)
    benches = [bench]
    with tempfile.TemporaryDirectory() as folder:
        if args.release and (release := start_release(__file__, args, argv, bench, folder, report)):
            benches.append(release)
        try:
            limits = Limits(bench, args.precision, device, report) if not args.no_limits else lambda *_: {}
            run_all(benches, args, report, limits)
        finally:
            for one in benches:
                one.close()
    return report


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def serve(args: argparse.Namespace) -> int:
    """The release's process."""
    from benchmark_bench import LocalBench
    from benchmark_evaluation import register_shapes
    from benchmark_release import serve as answer

    # Everything printed on the way belongs on stderr: stdout is the parent's.
    stdout, sys.stdout = sys.stdout, sys.stderr
    if args.package_root != str(REPO):
        register_shapes()
    answer(LocalBench(args, _device(args)), sys.stdin, stdout)
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    # The modules beside this one, and the package: the release's where that is to be timed.
    sys.path[:0] = [args.package_root, str(REPO / "tools")]
    if args.serve:
        return serve(args)
    from d2_trt.logging import setup_logger
    from mask2former.backend import BackendError
    from mask2former.engine.checkpoint import CheckpointError

    setup_logger()
    try:
        report = run(args, argv)
    except (BackendError, CheckpointError, KeyError, ValueError) as error:
        print(f"benchmark.py: error: {error.args[0]}", file=sys.stderr)
        return 2
    failures = list(report.failures)
    if report.rows:
        report.print_table()
        print(f"written to {report.path}")
    elif not failures:
        failures = ["none of --stages applies to these sizes and batches"]
    for failure in failures:
        print(f"benchmark.py: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
