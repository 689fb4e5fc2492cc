"""From a model and its options to what an engine is built as, and to what its key is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import cache_key, compat, plugin
from .build_spec import BuildSpec, check_fp32_modules, check_precision, default_fp32_modules
from .network_digest import NetworkDigest
from .options import TensorRTOptions
from .shape_range import ShapeRange


def identity_of(device: torch.device) -> dict[str, Any]:
    """The TensorRT and the GPU that engines are for."""
    return {
        "tensorrt": compat.tensorrt().__version__,
        "gpu": torch.cuda.get_device_name(device),
        "compute_capability": torch.cuda.get_device_capability(device),
    }


def build_spec(
    options: TensorRTOptions, shapes: ShapeRange, device: torch.device, capability: tuple[int, int]
) -> BuildSpec:
    """What to build for a range, with "auto" made a choice.

    Raises:
        MissingDependencyError: the GPU, TensorRT or a plugin lacks what an option asks for.
    """
    check_precision(options.precision, device)
    choices = {n.lower(): plugin.resolve(n, getattr(options, n.lower()), capability) for n in plugin.OPTIONS}
    return BuildSpec(
        min_shape=shapes.min,
        opt_shape=shapes.opt,
        max_shape=shapes.max,
        precision=options.precision,
        fp32_modules=options.resolve_fp32_modules(default_fp32_modules(choices["attention"])),
        **choices,
        workspace_bytes=options.workspace_bytes,
        opt_level=options.opt_level,
    )


def ingredients_of(
    model: nn.Module,
    cfg,
    options: TensorRTOptions,
    digest: NetworkDigest,
    spec: BuildSpec,
    shapes: ShapeRange,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """What the key of a model's engine is made from; see cache_key.key_ingredients.

    Args:
        digest: of the model.
        identity: of identity_of.

    Raises:
        OptionsError: MODEL.TENSORRT.FP32_MODULES names no module of the model.
    """
    import detectron2

    check_fp32_modules(options.fp32_modules, model)
    here = Path(__file__).parent
    config = cache_key.graph_config(cfg)
    if config["META_ARCHITECTURE"] == "TensorRTMaskFormer":
        config["META_ARCHITECTURE"] = "MaskFormer"  # the same network
    return cache_key.key_ingredients(
        weights=digest.weights,
        modules=digest.modules_digest(),
        config=config,
        options=options.graph_key(default_fp32_modules(spec.attention)),
        shapes=shapes,
        versions={
            "d2_trt": cache_key.source_digest(here),
            "mask2former": cache_key.source_digest(here.parent / "mask2former", cache_key.NETWORK_SOURCES),
            "model": cache_key.model_sources(model),
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
        },
        plugins=plugin.identities({n: getattr(spec, n.lower()) for n in plugin.OPTIONS}),
        **identity,
    )
