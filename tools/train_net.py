#!/usr/bin/env python
"""Train a Mask2Former model on the data sets of its config, or evaluate one: PQ, AP and mIoU."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from d2_trt.logging import (
    setup_logger as setup_tensorrt_logger,  # d2_trt: the backend "tensorrt" and its keys
)
from d2_trt.options import TensorRTOptions
from mask2former import get_mask2former_cfg
from mask2former.backend import BackendError, check_backend, settle_backend
from mask2former.data import build_train_mapper, check_train_sets
from mask2former.data.errors import AnnotationError
from mask2former.engine import Trainer, torch_training_cfg
from mask2former.engine.checkpoint import CheckpointError, NamingCheckpointer
from mask2former.evaluation import (
    check_evaluators,
    check_test_sets,
    evaluate_model,
    with_evaluation_formats,
)

EPILOG = """
Examples:
  on the data set that everyone can draw (python tools/make_shapes_dataset.py), without a GPU:
    python tools/train_net.py --eval-only --config-file configs/shapes/maskformer2_mini_shapes.yaml \\
        MODEL.DEVICE cpu
  an official checkpoint on COCO, two GPUs, four images a batch:
    python tools/train_net.py --eval-only --num-gpus 2 \\
        --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml \\
        MODEL.WEIGHTS model_final.pkl TEST.BATCH_SIZE 4
  the same after a crash, from where it was: add --resume (weights of OUTPUT_DIR's last checkpoint, if it has one)
  train on COCO as the release does, and go on after an interruption:
    python tools/train_net.py --num-gpus 8 [--resume] \\
        --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml OUTPUT_DIR output/r50
  train on the drawn data set, from drawing it to the results (see tools/train_shapes.py):
    python tools/train_shapes.py --model small

KEY VALUE pairs at the end override the config. Often wanted:
  MODEL.WEIGHTS FILE           checkpoint (.pkl or .pth)
  MODEL.DEVICE cpu             run without a GPU
  MODEL.BACKEND tensorrt       run the network in TensorRT; its engine is built before the first image
  MODEL.TENSORRT.PRECISION P   fp32, tf32, fp16 or bf16; all keys are in d2_trt/config.py
  TEST.BATCH_SIZE N            images per batch and GPU (1)
  DATASETS.TEST "('name',)"    data sets to evaluate on
  SOLVER.IMS_PER_BATCH N       training images of an iteration, over all GPUs
  SOLVER.BASE_LR X             learning rate; in proportion to IMS_PER_BATCH
  SOLVER.MAX_ITER N            iterations; a checkpoint every SOLVER.CHECKPOINT_PERIOD, an evaluation every TEST.EVAL_PERIOD
  SOLVER.AMP.ENABLED False     train in float32 instead of mixed precision
  SEED N                       the same run again
  OUTPUT_DIR DIR               logs and checkpoints; predictions and results.json go to DIR/inference
"""


class UsageError(Exception):
    """The command or the config asks for what cannot be done; the message says what to change."""


def build_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser(epilog=EPILOG)
    parser.description = __doc__
    # detectron2's own default is one port for all jobs of a user: a second job beside the first could not start.
    parser.set_defaults(dist_url="auto")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="of training: when they are over it writes a checkpoint and ends with status 0, before the last evaluation; "
        "--resume goes on as if it had not stopped",
    )
    return parser


def check_args(args: argparse.Namespace) -> None:
    """What can be told before any process starts."""
    if not args.config_file:
        raise UsageError("--config-file is missing: name a file of configs/")
    if args.time_limit is not None and not args.time_limit > 0:
        raise UsageError(f"--time-limit {args.time_limit:g}: must be a positive number of seconds")
    if args.time_limit is not None and args.eval_only:
        raise UsageError("--time-limit is of training: leave it out with --eval-only")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UsageError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, the same on all of them: an address of "
            "the machine with --machine-rank 0 and a free port there"
        )
    check_gpus(args.num_gpus)


def check_gpus(count: int) -> None:
    """
    Raises:
        UsageError: this machine does not have so many.
    """
    if count < 1:
        raise UsageError(
            f"--num-gpus {count}: must be at least 1. To run without a GPU, leave --num-gpus out and add MODEL.DEVICE cpu"
        )
    available = torch.cuda.device_count()
    if count > max(available, 1):
        raise UsageError(
            f"--num-gpus {count}, but PyTorch {torch.__version__} sees {available} GPUs. "
            + ("Use at most as many" if available else "Leave --num-gpus out and add MODEL.DEVICE cpu")
        )


def load_config(args: argparse.Namespace) -> CfgNode:
    """The config of the command line, checked against this machine, not frozen."""
    try:
        cfg = get_mask2former_cfg(args.config_file, args.opts)
        if args.eval_only:
            check_test_sets(cfg)
        else:
            check_training(cfg, args)
        check_evaluators(cfg)
        backend = "tensorrt" if runs_tensorrt(cfg) else cfg.MODEL.BACKEND
        settle_backend(backend, cfg)
        check_backend(backend, cfg)
    except (FileNotFoundError, KeyError, ValueError, ImportError, BackendError) as error:
        # str() of a KeyError is in quotes.
        raise UsageError(error.args[0] if isinstance(error, KeyError) else error) from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but PyTorch {torch.__version__} sees no GPU. Add "
            "MODEL.DEVICE cpu at the end of the command, or install a PyTorch with CUDA and check nvidia-smi"
        )
    if cfg.MODEL.DEVICE == "cpu" and args.num_gpus > 1:
        raise UsageError(f"--num-gpus {args.num_gpus} with MODEL.DEVICE cpu: leave one of them out")
    if cfg.TEST.AUG.ENABLED:
        raise UsageError("test-time augmentation is not there: set TEST.AUG.ENABLED False")
    if cfg.TEST.BATCH_SIZE < 1:
        raise UsageError(f"TEST.BATCH_SIZE is {cfg.TEST.BATCH_SIZE}: must be at least 1")
    small = engine_too_small(cfg)
    if small and cfg.MODEL.TENSORRT.ON_OUT_OF_RANGE == "raise":
        raise UsageError(small)
    if file := next((p for p in (Path(cfg.OUTPUT_DIR), *Path(cfg.OUTPUT_DIR).parents) if p.is_file()), None):
        raise UsageError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR}, but {file} is a file: name a folder")
    weights = cfg.MODEL.WEIGHTS
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if args.resume and PathManager.isfile(last):
        with PathManager.open(last) as file:
            name = file.read().strip()
        if not name or not PathManager.isfile(os.path.join(cfg.OUTPUT_DIR, name)):
            raise UsageError(
                f"--resume: {last} names {name!r}, which is not in {cfg.OUTPUT_DIR}. Write the name of a checkpoint that "
                "is there into it, or remove it to start anew"
            )
        return cfg  # its own weights
    # What has a scheme (https://, detectron2://) is fetched by detectron2.
    if weights and "://" not in weights and not PathManager.isfile(weights):
        raise UsageError(f"MODEL.WEIGHTS {weights}: there is no such file")
    return cfg


def check_training(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Have the config train in PyTorch, and check what training reads of it.

    Raises:
        UsageError, ValueError, KeyError, FileNotFoundError: it cannot be trained.
    """
    torch_training_cfg(cfg)
    check_train_sets(cfg)
    if cfg.DATASETS.TEST:
        check_test_sets(cfg)
    build_train_mapper(cfg)
    if cfg.SOLVER.MAX_ITER < 1:
        raise UsageError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: must be at least 1")
    processes = args.num_gpus * args.num_machines
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % processes:
        raise UsageError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, for all {processes} GPUs together: must be a multiple of "
            "their number"
        )
    if cfg.MODEL.DEVICE == "cpu" and cfg.MODEL.RESNETS.NORM == "SyncBN":
        raise UsageError("MODEL.RESNETS.NORM SyncBN trains on GPUs only: with MODEL.DEVICE cpu set it to BN")


def runs_tensorrt(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKEND == "tensorrt" or cfg.MODEL.META_ARCHITECTURE == "TensorRTMaskFormer"


def engine_too_small(cfg: CfgNode) -> str:
    """Why TensorRT would not run whole batches of the evaluation; empty where it would, or is not asked to."""
    if not runs_tensorrt(cfg):
        return ""
    most = TensorRTOptions.from_cfg(cfg).shapes.max[0]
    if cfg.TEST.BATCH_SIZE <= most:
        return ""
    return (
        f"TEST.BATCH_SIZE is {cfg.TEST.BATCH_SIZE}, but MODEL.TENSORRT.MAX_BATCH_SIZE {most} is the largest batch of the "
        "engine. Raise MODEL.TENSORRT.MAX_BATCH_SIZE, or set it to 0 for TEST.BATCH_SIZE"
    )


def setup(args: argparse.Namespace) -> CfgNode:
    """detectron2's usual start of a job: config, logs, seeds."""
    cfg = load_config(args)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mask2former")
    setup_tensorrt_logger(cfg.OUTPUT_DIR)
    if not args.eval_only:
        # As it was asked for; load_config has changed it.
        asked = get_mask2former_cfg(args.config_file, args.opts)
        if changed := torch_training_cfg(asked):
            logging.getLogger("mask2former.train_net").info("%s", changed)
    return cfg


def evaluate(args: argparse.Namespace) -> dict:
    cfg = setup(args)
    logger = logging.getLogger("mask2former.train_net")
    model = build_model(with_evaluation_formats(cfg))
    checkpointer = NamingCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (args.resume and checkpointer.has_checkpoint()):
        logger.warning("MODEL.WEIGHTS is empty: the weights are random, and so are the results")
    else:
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    if small := engine_too_small(cfg):
        logger.warning("%s. Until then PyTorch runs the full batches", small)
    results = evaluate_model(cfg, model, resume=args.resume)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def train(args: argparse.Namespace) -> dict | None:
    cfg = setup(args)
    trainer = Trainer(cfg, args.deadline)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(args: argparse.Namespace) -> dict | None:
    """What every process of the job runs."""
    try:
        return evaluate(args) if args.eval_only else train(args)
    # A FloatingPointError tells that training has diverged.
    except (BackendError, AnnotationError, CheckpointError, FloatingPointError) as error:
        if comm.get_world_size() == 1:
            raise UsageError(error) from error
        # An exception would end in the tracebacks of all processes.
        print(f"train_net.py: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def run(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # Counted from here, so that the start is part of it.
    args.deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    try:
        check_args(args)
        # Read here too: a mistake in the config should not end in the tracebacks of several processes.
        load_config(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except UsageError as error:
        print(f"train_net.py: {error}", file=sys.stderr)
        return 2
    except ProcessExitedException as error:
        if error.exit_code != 2:
            raise
        return 2  # it said why
    return 0


if __name__ == "__main__":
    sys.exit(run())
