#!/usr/bin/env python3
"""Evaluate one checkpoint on one data set under every backend and precision, and keep what each costs in accuracy.

    python tools/accuracy_ledger.py --config-file FILE --weights model_final.pkl --size 800/1333 --batch 1 4 \\
        --backend torch tensorrt --precision fp32 tf32 fp16 --limits --markdown MODEL_ZOO.md --section coco-r50

For every --size, --batch, --backend and --precision one row: PQ, AP and mIoU of the tasks that the config turns on and their
difference, in points, to PyTorch in float32 at the same size and batch; over --compare images the errors of class and mask
logits and the shares of equal mask signs and classes; median time of the network; engine size. PyTorch in float32 without
TF32 is the reference and always comes first. What fails (a build that the parity gate refuses, TensorRT that is missing)
becomes a row that says why and an exit status of 1; the others are still measured.

Beside the differences stand their standard errors for the choice of the images: 200 resamples of them, the same for both.

Rows go to a CSV file, each as soon as it is there: --resume FILE continues one, and measures what it lacks or what failed.
--from-csv joins such files to one table and measures nothing. So several processes, with --no-reference all but one, can
share the rows out, on a GPU each:

    CUDA_VISIBLE_DEVICES=0 python tools/accuracy_ledger.py ... --backend torch --precision fp32 --resume ledger/torch.csv &
    CUDA_VISIBLE_DEVICES=1 python tools/accuracy_ledger.py ... --backend tensorrt --precision fp16 --no-reference \\
        --resume ledger/fp16.csv & wait
    python tools/accuracy_ledger.py --from-csv ledger/*.csv --csv results/accuracy.csv --markdown MODEL_ZOO.md --section NAME
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from ledger_evaluation import (
    AGREEMENT,
    Images,
    agreement_columns,
    engine_cfg,
    evaluate,
    images_outside,
    latency_columns,
    sized,
    use_backend,
)
from ledger_images import ImageTables
from ledger_join import (
    COLUMNS,
    IDENTITY,
    LATER,
    LIMITED,
    LIMITS,
    PRECISIONS,
    REFERENCE,
    TABLES,
    beyond_limits,
    compared_metrics,
    differences,
    joined,
    named,
    place,
    references,
    row_folder,
    standard_error_columns,
    without_reference,
)
from ledger_markdown import MarkerError, check_section, table, write_section
from measurements import (
    REPO,
    MeasurementFile,
    checkpoint_digest,
    command_line,
    config_name,
    failure_reason,
    machine,
    positive,
    size_pair,
    today,
)
from train_net import UsageError, load_config

from mask2former.backend import BackendError, check_backend
from mask2former.engine.checkpoint import CheckpointError, NamingCheckpointer
from mask2former.evaluation import with_evaluation_formats

FIELDS = (
    *("date", *IDENTITY, "status", *COLUMNS, *("d_" + column for column in COLUMNS)),
    *LATER,
    *(*AGREEMENT, "core_ms", "padded", "build_s", "engine_mib", "weights", "command"),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="with one data set in DATASETS.TEST")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (.pkl or .pth)")
    parser.add_argument("--backend", nargs="+", default=["torch", "tensorrt"], metavar="NAME")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "tf32", "fp16"])
    parser.add_argument(
        "--size",
        nargs="+",
        type=size_pair,
        default=[],
        metavar="MIN/MAX",
        help="INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST, such as 800/1333; default: the config's",
    )
    parser.add_argument(
        "--no-reference",
        action="store_true",
        help="without the reference, where it is not asked for; --from-csv with its file fills in the differences",
    )
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], metavar="N", help="TEST.BATCH_SIZE")
    parser.add_argument(
        "--compare",
        type=positive,
        default=16,
        metavar="N",
        help="images to compare tensors on (%(default)s)",
    )
    parser.add_argument("--iterations", type=positive, default=50, help="timed calls (%(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="calls before them (%(default)s)")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--output", default="results", metavar="DIR", help="for the CSV file (%(default)s)")
    parser.add_argument(
        "--work",
        default="output/accuracy_ledger",
        metavar="DIR",
        help="for predictions and results.json of each row (%(default)s)",
    )
    parser.add_argument("--resume", metavar="CSV", help="continue this file")
    parser.add_argument(
        "--from-csv",
        nargs="+",
        default=[],
        metavar="CSV",
        help="measure nothing: take the rows of these files",
    )
    parser.add_argument("--csv", metavar="FILE", help="with --from-csv: a new file for the joined rows")
    parser.add_argument("--markdown", metavar="FILE", help="put the table between the section's markers")
    parser.add_argument(
        "--section", metavar="NAME", help="of the markers in --markdown; default: the config file's name"
    )
    parser.add_argument(
        "--limits",
        nargs="*",
        choices=COLUMNS,
        metavar="METRIC",
        help=f"exit status 1 where an engine differs from the reference by more than {LIMITS['fp32']} points (fp32, tf32) "
        f"or {LIMITS['fp16']} (fp16, bf16) in one of these metrics or lacks it, and where there is no engine; without "
        f"names in those of {', '.join(LIMITED)} that the config evaluates",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config, after --")
    args = parser.parse_args(argv)
    if args.from_csv:
        if not args.markdown and not args.csv and args.limits is None:
            parser.error("--from-csv only joins files: add --markdown FILE, --csv FILE or --limits")
        if args.csv and os.path.exists(args.csv):
            parser.error(f"--csv {args.csv}: is there already, name a new file")
        if args.markdown and not args.section and not args.config_file:
            parser.error(
                "--from-csv with --markdown needs --section NAME (or --config-file, whose name it takes)"
            )
    elif not args.config_file or not args.weights:
        parser.error("--config-file and --weights are needed: accuracy is that of a checkpoint")
    elif args.csv:
        parser.error(
            "--csv goes with --from-csv: rows that are measured go to --output, or to the file of --resume"
        )
    if args.warmup < 0:
        parser.error("--warmup must be at least 0")
    if args.markdown and not args.section:
        args.section = Path(args.config_file).stem
    return args


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config, checked as tools/train_net.py --eval-only does.

    Raises:
        UsageError
    """
    if "MODEL.WEIGHTS" in args.opts:
        raise UsageError("MODEL.WEIGHTS is given by --weights: leave it out of the overrides")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    words = [*args.opts, "MODEL.WEIGHTS", args.weights, "MODEL.DEVICE", device, "MODEL.BACKEND", "torch"]
    path = args.config_file if os.path.exists(args.config_file) else str(REPO / args.config_file)
    job = argparse.Namespace(config_file=path, opts=words, eval_only=True, resume=False, num_gpus=1)
    cfg = load_config(job)
    if len(cfg.DATASETS.TEST) != 1:
        raise UsageError(
            f"DATASETS.TEST is {tuple(cfg.DATASETS.TEST)}: a ledger is of one data set, name one of them"
        )
    try:
        for backend in args.backend:
            check_backend(backend, cfg)
    except (KeyError, ValueError, BackendError) as error:
        raise UsageError(error.args[0]) from error
    return with_evaluation_formats(cfg)


class Ledger:
    """Measures rows into a file."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str], cfg: CfgNode, file: MeasurementFile):
        """
        Raises:
            UsageError: the data set has images of sizes that the engines would not take.
        """
        self._args = args
        self._cfg = cfg
        self._file = file
        self._model = build_model(cfg).eval()
        NamingCheckpointer(self._model).load(cfg.MODEL.WEIGHTS)
        self._sizes = args.size or [(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
        records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
        images = len(records)
        if "tensorrt" in args.backend:
            widest = engine_cfg(cfg, self._sizes, args.batch)
            if wrong := images_outside(widest, self._sizes, records, self._model.size_divisibility):
                raise UsageError(wrong)
        self._common = {
            "config": config_name(args.config_file),
            "overrides": " ".join(args.opts),
            "checkpoint": checkpoint_digest(cfg.MODEL.WEIGHTS),
            "dataset": cfg.DATASETS.TEST[0],
            "images": images,
            "compared": min(args.compare, images),
            **machine(cfg.MODEL.DEVICE),
            "date": today(),
            "weights": os.path.basename(cfg.MODEL.WEIGHTS),
            "command": command_line(argv),
        }

    def run(self) -> list[dict[str, str]]:
        """The rows that were asked for, in order, measured or found in the file."""
        kinds = [] if self._args.no_reference else [REFERENCE]
        kinds += [
            kind for b in self._args.backend for p in self._args.precision if (kind := (b, p)) not in kinds
        ]
        return [row for backend, precision in kinds for row in self._kind(backend, precision)]

    def _kind(self, backend: str, precision: str) -> list[dict[str, str]]:
        """The rows of one backend at one precision, from one engine."""
        wanted = [
            {
                **self._common,
                "backend": backend,
                "precision": precision,
                "batch": batch,
                "min_size": size[0],
                "max_size": size[1],
            }
            for size in self._sizes
            for batch in self._args.batch
        ]
        rows = [self._file.find(columns) for columns in wanted]
        if all(row is not None and row["status"] == "ok" for row in rows):
            _say(f"{backend} {precision}: measured before, in {self._file.path}")
            return rows
        built, refused = {}, ""
        try:
            cfg = engine_cfg(self._cfg, self._sizes, self._args.batch) if backend == "tensorrt" else self._cfg
            built = use_backend(self._model, cfg, backend, precision)
        except RuntimeError as error:  # BackendError, and what CUDA and TensorRT raise
            refused = failure_reason(error)
        done = []
        for columns, row in zip(wanted, rows):
            if row is None or row["status"] != "ok":
                row = self._file.add(
                    {**columns, **built, **(self._measure(columns) if not refused else {"status": refused})}
                )
                _say(_told(row))
            done.append(row)
        return done

    def _measure(self, columns: Mapping) -> dict:
        """What one row says, but for what it is about."""
        size, batch = (columns["min_size"], columns["max_size"]), columns["batch"]
        # Of TensorRT, the engine has the precision; PyTorch keeps what is left to it in float32.
        precision = columns["precision"] if columns["backend"] == "torch" else "fp32"
        folder = row_folder(self._args.work, columns)
        cfg = sized(self._cfg, size, batch, folder)
        try:
            images = Images(cfg, self._model, self._args.compare)
            device, times = cfg.MODEL.DEVICE, (self._args.warmup, self._args.iterations)
            values = latency_columns(self._model, images, precision, device, *times)
            values.update(agreement_columns(self._model, images, precision, device))
            metrics = evaluate(cfg, self._model, precision)
        except RuntimeError as error:
            return {"status": failure_reason(error)}
        values.update(metrics, status="ok")
        reference = references(self._file.rows).get(place(columns))
        values.update(differences({**columns, **values}, reference))
        try:
            tables = ImageTables.of_predictions(
                columns["dataset"], os.path.join(folder, "inference"), cfg.TEST.EVALUATION_THREADS
            )
            tables.save(os.path.join(folder, TABLES))
            values.update(standard_error_columns({**columns, **values}, reference, self._args.work))
        except Exception as error:  # whatever it is, the metrics are measured
            _say(
                f"accuracy_ledger.py: warning: {named(columns)}: no standard errors, {failure_reason(error)}"
            )
        return values


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _told(row: Mapping[str, str]) -> str:
    if row["status"] != "ok":
        return f"{named(row)}: {row['status']}"
    metrics = ", ".join(f"{name} {row[name]}" for name in LIMITED if row[name])
    return f"{named(row)}: {metrics}; {row['core_ms']} ms"


def _measured(args: argparse.Namespace, argv: Sequence[str]) -> list[dict[str, str]]:
    """Rows of this run; with --resume those that the file has of the same checkpoint beside them."""
    from detectron2.utils.logger import setup_logger

    from d2_trt.logging import setup_logger as setup_tensorrt_logger

    cfg = read_config(args)
    # Processes that share the rows out start in the same second.
    part = ["accuracy", *args.backend, *args.precision] if args.no_reference else ["accuracy"]
    path = args.resume or MeasurementFile.new_path(args.output, "_".join(part), machine(cfg.MODEL.DEVICE))
    file = MeasurementFile(path, FIELDS, IDENTITY, LATER, exclusive=not args.resume)
    setup_logger(name="detectron2")
    setup_logger(name="fvcore")
    setup_logger(name="mask2former")
    setup_tensorrt_logger()
    rows = Ledger(args, argv, cfg, file).run()
    print(f"written to {file.path}")
    mine = [
        row for row in file.rows if all(row[k] == rows[0][k] for k in ("config", "checkpoint", "dataset"))
    ]
    return mine if args.resume else rows


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        if args.markdown:
            check_section(args.markdown, args.section)  # before hours of measuring
        if args.from_csv:
            rows = joined(args.from_csv, FIELDS, args.work)
            if not rows:
                raise UsageError(f"no rows in {', '.join(args.from_csv)}")
            for text in without_reference(rows):
                _say(f"accuracy_ledger.py: {text}")
            if args.csv:
                file = MeasurementFile(args.csv, FIELDS, IDENTITY)
                for row in rows:
                    file.add(row)
        else:
            rows = _measured(args, argv)
        if args.markdown:
            write_section(args.markdown, args.section, table(rows))
            print(f"table written to {args.markdown}")
    except (UsageError, CheckpointError, MarkerError, ValueError, OSError) as error:
        print(f"accuracy_ledger.py: error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    wrong = [f"{_told(row)}" for row in rows if row["status"] != "ok"]
    if args.limits is not None:
        wrong += beyond_limits(rows, args.limits)
        if not wrong:
            print(f"within the limits: {', '.join(compared_metrics(rows, args.limits))}")
    for text in wrong:
        print(f"accuracy_ledger.py: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
