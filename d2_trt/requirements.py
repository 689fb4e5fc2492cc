"""What the TensorRT backend needs of a machine, and how to get what is missing."""

from __future__ import annotations

import importlib.util

import torch

from . import compat
from .errors import MissingDependencyError, first_line


def require(device: torch.device | str, *, builds: bool = True, optional: bool = True) -> None:
    """See that everything is there.

    Args:
        device: of the model.
        builds: whether engines may have to be built, which takes torch2trt.
        optional: whether PyTorch could run the network as well, which the error then says how to get.

    Raises:
        MissingDependencyError: it names all that is missing, each with what installs it.
    """
    found = {"a GPU": _gpu(torch.device(device)), "TensorRT": _tensorrt()}
    if builds:
        found["torch2trt"] = _torch2trt()
    missing = {name: text for name, text in found.items() if text}
    if not missing:
        return
    what = "MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU, by TensorRT and torch2trt"
    if not optional:
        *first, last = found
        what = f"{'Building' if builds else 'Running'} engines takes {', '.join(first)} and {last}"
    message = f"{what}. Missing: {', '.join(missing)}."
    message += "".join(f"\n  {name}: {text}" for name, text in missing.items())
    if optional:
        instead = "MODEL.BACKEND torch"
        if not torch.cuda.is_available():
            instead += " with MODEL.DEVICE cpu"
        message += (
            f"\nTo do without: {instead}, or MODEL.TENSORRT.ON_ERROR torch, which has PyTorch run the network wherever "
            "something is missing."
        )
    raise MissingDependencyError(message)


def _gpu(device: torch.device) -> str:
    """What is wrong with the device, and what to do; empty where it is a GPU that is there."""
    if not torch.cuda.is_available():
        then = "" if device.type == "cuda" else f", and set MODEL.DEVICE cuda (it is {device})"
        if torch.version.cuda is None:
            version = torch.__version__.split("+")[0]
            return (
                f"PyTorch {torch.__version__} is built without CUDA. PyPI's for Linux is built with it: `pip install "
                f"--force-reinstall torch=={version}`{then}"
            )
        return f"PyTorch {torch.__version__} sees none. `nvidia-smi` tells whether the driver does{then}"
    if device.type != "cuda":
        return f"there is one, but MODEL.DEVICE is {device}. Set MODEL.DEVICE cuda"
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        last = f" to cuda:{count - 1}" if count > 1 else ""
        return f"MODEL.DEVICE is {device}, but PyTorch sees {count}. Set MODEL.DEVICE cuda:0{last}"
    return ""


def _tensorrt() -> str:
    try:
        compat.tensorrt()
    except compat.OutdatedTensorRT as error:
        return f"8.6 or newer; {error.found} is installed. `{compat.UPGRADE_TENSORRT}`"
    except MissingDependencyError as error:
        why = error.__cause__ or error
        return f"8.6 or newer; it cannot be imported ({first_line(why)}). `{compat.INSTALL['tensorrt']}`"
    return ""


def _torch2trt() -> str:
    # Only looked for: it is imported when an engine is built, which a cached one's start does not wait for.
    try:
        found = importlib.util.find_spec("torch2trt") is not None
    except ValueError:  # a module that something else put in its place
        found = True
    return "" if found else f"it is not installed. `{compat.INSTALL['torch2trt']}`"
