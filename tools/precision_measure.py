"""Measures sets of modules in float32, emulated or by an engine, for tools/precision_search.py."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from engine_config import load_model
from ledger_evaluation import AGREEMENT, call_times, engine_cfg, pytorch_precision, use_backend
from measurements import (
    MACHINE,
    MeasurementFile,
    checkpoint_digest,
    command_line,
    config_name,
    failure_reason,
    machine,
    number,
    today,
)
from precision_emulation import emulated, operation_times
from precision_images import search_batches, source_name
from precision_strategy import Block, find_blocks, shortened

from d2_trt import plugin
from d2_trt.build_spec import default_fp32_modules, pattern_covers
from d2_trt.errors import MissingDependencyError
from d2_trt.options import TensorRTOptions
from d2_trt.parity import Comparison, exact_float32

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
IDENTITY = (
    *("config", "overrides", "checkpoint", "source", "images", "sizes", "batch", "plugins"),
    *("how", "precision", "opt_level", "fp32_modules", *MACHINE),
)
FIELDS = (
    *("date", *IDENTITY, "status", *AGREEMENT, "block_float32_ms", "block_half_ms"),
    *("core_ms", "build_s", "engine_mib", "weights", "command"),
)
# In the column fp32_modules, of a row that is of no set of patterns.
EVERYTHING = "(everything)"
ALL_BUT = "(all but, exact) "


class PrecisionSearch:
    """Measures sets of pins, emulated or by an engine, into a file."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str], cfg: CfgNode, file: MeasurementFile):
        """
        Raises:
            UsageError: there are no images, or the checkpoint cannot be loaded.
        """
        self._args, self._cfg, self._file = args, cfg, file
        self._device = cfg.MODEL.DEVICE
        self._sizes = args.size or [(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]
        self._plugins = plugins_of(TensorRTOptions.from_cfg(cfg))
        self.built_in = default_fp32_modules("plugin" if "attention" in self._plugins else "native")
        self._model = load_model(cfg)
        self._batches = search_batches(
            cfg, self._model, self._sizes, max(args.batch), args.images, args.input
        )
        with exact_float32():
            self._expected = [self._model.core(images) for images in self._batches]
        self.common = {
            "config": config_name(args.config_file),
            "overrides": " ".join(args.opts),
            "checkpoint": checkpoint_digest(cfg.MODEL.WEIGHTS),
            "source": source_name(cfg, args.input),
            "images": sum(len(images) for images in self._batches) // len(self._sizes),
            "sizes": " ".join(f"{low}/{high}" for low, high in self._sizes),
            "batch": " ".join(map(str, args.batch)),
            "plugins": " ".join(self._plugins),
            **machine(self._device),
            "date": today(),
            "weights": os.path.basename(cfg.MODEL.WEIGHTS),
            "command": command_line(argv),
        }
        with torch.no_grad(), pytorch_precision("tf32", self._device):
            repeats = 10 if self._device.startswith("cuda") else 1
            dtype = DTYPES[args.precision]
            times = operation_times(self._model, self._batches[0][:1], dtype, repeats)
        self.blocks = find_blocks(times, args.split)

    def alone(self, block: Block) -> Mapping[str, float]:
        """Agreement with one block in half precision and the rest in exact float32: beside products in TF32, which change
        the outputs of trained weights as much as half precision does, no block would be told from another. The block's
        times become those of the file: what continues it takes the same steps."""
        times = {
            "block_float32_ms": round(block.times.float32_ms, 4),
            "block_half_ms": round(block.times.half_ms, 4),
        }
        pins = ALL_BUT + block.pattern
        row = self._emulate(pins, lambda name: pattern_covers(block.pattern, name), times, rest="fp32")
        block.times.float32_ms, block.times.half_ms = (float(row[name]) for name in times)
        return agreement(row)

    def emulate(self, patterns: Sequence[str]) -> Mapping[str, float]:
        """Agreement with everything but these modules in half precision."""
        row = self._emulate(
            " ".join(patterns), lambda name: not any(pattern_covers(p, name) for p in patterns)
        )
        return agreement(row)

    def emulate_blocks(self, pinned: Sequence[Block]) -> Mapping[str, float]:
        """Agreement with everything but these blocks in half precision."""
        return self.emulate(self.patterns(pinned))

    def float32(self) -> Mapping[str, float]:
        """Agreement with nothing in half precision: what products in TF32, which the engine's pins have too, leave."""
        return agreement(self._emulate(EVERYTHING, lambda name: False))

    def is_ours(self, row: Mapping[str, str]) -> bool:
        """Whether a row of the file is of this search."""
        return all(row[name] == str(self.common[name]) for name in IDENTITY if name in self.common)

    def patterns(self, pinned: Sequence[Block]) -> list[str]:
        return shortened([block.pattern for block in pinned], self.blocks)

    def _emulate(
        self, pins: str, is_low: Callable[[str], bool], times: Mapping | None = None, rest: str = "tf32"
    ) -> dict[str, str]:
        """The row of a set of pins; `rest` is the precision of what is not in half, by default an engine's pins'."""
        columns = {**self.common, "how": "emulated", "precision": self._args.precision, "fp32_modules": pins}
        row = self._file.find(columns)
        if row is None:
            with (
                torch.no_grad(),
                pytorch_precision(rest, self._device),
                emulated(self._model, is_low, DTYPES[self._args.precision], self._plugins),
            ):
                numbers = self._compare(self._model.core)
            row = self._file.add({**columns, **(times or {}), **numbers, "status": "ok"})
            say(f"emulated, float32: {_shown(pins)}: {_told(row)}")
        return row

    def engine(self, patterns: Sequence[str] | None) -> dict[str, str]:
        """Build (or load) an engine with these modules in float32, None for all of them in TF32, and measure it.

        Returns:
            the row of the file; its status says why there is no engine.

        Raises:
            MissingDependencyError: no engine can be built here.
        """
        precision = "tf32" if patterns is None else self._args.precision
        columns = {
            **self.common,
            "how": "engine",
            "precision": precision,
            "opt_level": self._cfg.MODEL.TENSORRT.OPT_LEVEL,
            "fp32_modules": EVERYTHING if patterns is None else " ".join(patterns),
        }
        row = self._file.find(columns)
        if row is not None and row["status"] == "ok":
            return row
        cfg = engine_cfg(self._cfg, self._sizes, self._args.batch).clone()
        cfg.defrost()
        cfg.MODEL.TENSORRT.FP32_MODULES = list(patterns or ())
        say(f"engine, float32: {_shown(columns['fp32_modules'])}: builds")
        try:
            built = use_backend(self._model, cfg, "tensorrt", precision)
            with torch.no_grad(), pytorch_precision("fp32", self._device):
                numbers = self._compare(self._model.backend)
                one = self._batches[0][:1].contiguous()
                times = call_times(
                    lambda: self._model.backend(one),
                    self._device,
                    min(10, self._args.iterations),
                    self._args.iterations,
                )
            result = {**built, **numbers, "core_ms": round(statistics.median(times), 3), "status": "ok"}
        except MissingDependencyError:
            raise
        except RuntimeError as error:
            result = {"status": failure_reason(error)}
        row = self._file.add({**columns, **result})
        say(f"engine, float32: {_shown(columns['fp32_modules'])}: {_told(row)}")
        return row

    def _compare(self, network: Callable) -> dict[str, float | str]:
        comparison = Comparison()
        for images, expected in zip(self._batches, self._expected):
            comparison.add(network(images), expected)
        return {name: number(value) for name, value in comparison.numbers().items()}


def plugins_of(options: TensorRTOptions) -> list[str]:
    """What our plugins compute in engines of these options, in words of plugin.OPTIONS, in lower case."""
    ours = []
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for option in plugin.OPTIONS:
        choice = getattr(options, option.lower())
        try:
            used = plugin.resolve(option, choice, capability)
        except MissingDependencyError:
            used = choice  # asked for, and here is no TensorRT to have it
        if used == "plugin":
            ours.append(option.lower())
    return ours


def agreement(row: Mapping[str, str]) -> dict[str, float]:
    """The numbers of a row; what is empty is NaN."""
    return {name: float(row[name] or "nan") for name in AGREEMENT}


def _shown(pins: str) -> str:
    return pins or "(nothing)"


def _told(row: Mapping[str, str]) -> str:
    if row["status"] != "ok":
        return row["status"]
    numbers = agreement(row)
    text = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in numbers.items())
    return f"{text}; {row['core_ms']} ms" if row["core_ms"] else text


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
