"""What tools/build_engine.py and tools/inspect_engine.py share: their config, and the model that it describes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

import d2_trt  # noqa: F401 - the backend "tensorrt" and its keys
from d2_trt import requirements
from d2_trt.options import TensorRTOptions
from mask2former import get_mask2former_cfg
from mask2former.backend import BackendError
from mask2former.engine import torch_training_cfg
from mask2former.engine.checkpoint import first_sentence

# Checkpoints of backbones alone, which training starts from.
_BACKBONE_ONLY = re.compile(r"ImageNetPretrained|swin_\w+_patch\d+_window\d+")


class UsageError(Exception):
    """The command or the config asks for what cannot be done; the message says what to change."""


def read_cfg(args: argparse.Namespace, words: Sequence = (), *, engines: bool = True, **tensorrt) -> CfgNode:
    """The config of a command line with the backend "tensorrt", checked against this machine.

    Args:
        args: config_file, weights, random_weights, opts.
        words: KEY, VALUE, ... that other arguments stand for; one that is in args.opts too is refused.
        engines: whether the tool builds or runs engines, which takes more than the device.
        tensorrt: keys of MODEL.TENSORRT that the tool sets whatever the config says; "__" stands for a dot.

    Raises:
        UsageError
        MissingDependencyError: what engines need is missing; it names all of it, and what installs it.
    """
    weights = "" if args.random_weights else args.weights
    twice = {*words[::2], *([] if weights is None else ["MODEL.WEIGHTS"])} & set(args.opts[::2])
    if twice:
        raise UsageError(
            f"{min(twice)} is given twice, by an argument of its own and after --opts: leave one out"
        )
    forced = [w for k, v in tensorrt.items() for w in ("MODEL.TENSORRT." + k.replace("__", "."), v)]
    cfg = read_file(args.config_file, args.opts)
    try:
        cfg.merge_from_list([*words, "MODEL.BACKEND", "tensorrt", *forced])
        if weights is not None:
            cfg.MODEL.WEIGHTS = weights
        TensorRTOptions.from_cfg(cfg)
    except (KeyError, ValueError, BackendError) as error:
        raise UsageError(_text(error)) from error
    _check_weights(cfg, args)
    _check_device(cfg, engines)
    return cfg


def read_file(config_file: str, opts: Sequence[str]) -> CfgNode:
    """A config file with overrides.

    Raises:
        UsageError
    """
    try:
        return get_mask2former_cfg(config_file, opts)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise UsageError(_text(error)) from error


def _text(error: Exception) -> str:
    # str() of a KeyError is in quotes.
    return str(error.args[0] if isinstance(error, KeyError) else error)


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    weights = cfg.MODEL.WEIGHTS
    asked = args.weights is not None or "MODEL.WEIGHTS" in args.opts[::2]
    if not args.random_weights and (not weights or (not asked and _BACKBONE_ONLY.search(weights))):
        which = (
            f"the config's own, {weights}, is a backbone to start training from"
            if weights
            else "none is given"
        )
        raise UsageError(
            f"an engine holds its model's weights, so it needs a checkpoint ({which}): add --weights FILE, or "
            "--random-weights for those that demo.py and benchmark.py run without a checkpoint"
        )
    # What has a scheme (https://, detectron2://) is fetched by detectron2.
    if weights and "://" not in weights and not PathManager.isfile(weights):
        raise UsageError(f"MODEL.WEIGHTS {weights}: there is no such file")


def _check_device(cfg: CfgNode, engines: bool) -> None:
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise UsageError(f"MODEL.DEVICE {cfg.MODEL.DEVICE}: {str(error).splitlines()[0]}") from error
    if engines:
        builds = cfg.MODEL.TENSORRT.CACHE.MODE != "require"
        requirements.require(device, builds=builds, optional=False)
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but PyTorch {torch.__version__} sees {count or 'no'} GPU"
            f"{'' if count <= 1 else 's'}. Check nvidia-smi, and that PyTorch is a build with CUDA"
        )


def load_model(cfg: CfgNode):
    """The model with its weights in evaluation mode, as DefaultPredictor makes it.

    Raises:
        UsageError: the checkpoint cannot be loaded.
    """
    if not cfg.MODEL.WEIGHTS:
        torch.manual_seed(0)  # demo.py's and benchmark.py's random weights
    in_pytorch = cfg.clone()
    in_pytorch.defrost()
    torch_training_cfg(in_pytorch)  # the tools make backends of their own
    model = build_model(in_pytorch).eval()
    if cfg.MODEL.WEIGHTS:
        try:
            DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        except Exception as error:  # whatever unpickling a file that is no checkpoint leads to
            what = f"{type(error).__name__}: {first_sentence(error)}"
            raise UsageError(f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} cannot be loaded ({what})") from error
    return model
