"""MODEL.TENSORRT.* of a config, checked once and frozen."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from mask2former.config import add_missing
from mask2former.config_merge import plain

from .cache import MODES as CACHE_MODES
from .config import _DEFAULTS
from .errors import OptionsError
from .shape_range import LARGEST_DERIVED_SIDE, ShapeRange, derive_sizes, is_int, round_up

PREFIX = "MODEL.TENSORRT"
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
MSDA = ("auto", "plugin", "stock", "native")
NORMALIZATION = ATTENTION = ("auto", "plugin", "native")

# What 0.0 stands for in MODEL.TENSORRT.VERIFY.*; None is not checked. What rounds products to 10 bits or
# fewer is judged by its decisions: PyTorch's own TF32 misses the errors asked of float32.
_EXACT = {
    "min_sign_agreement": 0.999,
    "min_class_agreement": 0.99,
    "max_logit_error": 2e-3,
    "max_mask_error": 2e-3,
}
_HALF = {
    "min_sign_agreement": 0.995,
    "min_class_agreement": 0.99,
    "max_logit_error": None,
    "max_mask_error": None,
}
VERIFY_DEFAULTS = {"fp32": _EXACT, "tf32": _HALF, "fp16": _HALF, "bf16": _HALF}


@dataclass(frozen=True)
class CacheOptions:
    """Where engines are kept (an absolute path), how, and up to how many GB (10^9 bytes)."""

    dir: str
    mode: str = "readwrite"
    max_gb: float = 20.0

    @property
    def max_bytes(self) -> float:
        """Infinite where max_gb is."""
        return self.max_gb * 1e9

    @property
    def writable(self) -> bool:
        """Whether the mode lets anything be written."""
        return self.mode in ("readwrite", "rebuild")


@dataclass(frozen=True)
class VerifyOptions:
    """What a new engine must reach against PyTorch float32. A threshold of None is not checked."""

    enabled: bool = True
    sizes: int = 3
    images: int = 1
    min_sign_agreement: float | None = None
    min_class_agreement: float | None = None
    max_logit_error: float | None = None
    max_mask_error: float | None = None


@dataclass(frozen=True)
class TensorRTOptions:
    """MODEL.TENSORRT.*, documented in d2_trt/config.py. Made by from_cfg, which checks every value."""

    shapes: ShapeRange
    cache: CacheOptions
    verify: VerifyOptions = field(default_factory=VerifyOptions)
    precision: str = "fp16"
    fp32_modules: tuple[str, ...] = ("default",)
    static: bool = False
    msda: str = "auto"
    normalization: str = "auto"
    attention: str = "auto"
    workspace: float = 0.0
    opt_level: int = 3
    timing_cache: bool = True
    on_out_of_range: str = "torch"
    on_error: str = "raise"
    cuda_graphs: bool = True
    max_cuda_graphs: int = 8
    cuda_graph_memory: float = 0.0

    @classmethod
    def from_cfg(cls, cfg, *, size_divisibility: int | None = None) -> TensorRTOptions:
        """Read and check a config.

        Args:
            cfg: after add_tensorrt_config.
            size_divisibility: what images are padded to a multiple of; None reads MODEL.MASK_FORMER. A model knows
                it also where the config leaves it to the backbone.

        Raises:
            OptionsError: a key is missing, unknown, or has a value that is not allowed; the message names the
                key, the value and what is allowed.
        """
        reader = _Reader.of(cfg)
        cache, verify = reader.group("CACHE"), reader.group("VERIFY")
        precision = reader.choice("PRECISION", PRECISIONS)
        return cls(
            shapes=_shapes(cfg, reader, size_divisibility),
            cache=CacheOptions(
                dir=_cache_dir(cache.text("DIR")),
                mode=cache.choice("MODE", CACHE_MODES),
                max_gb=cache.number("MAX_GB", above=0.0, infinite=True),
            ),
            verify=VerifyOptions(
                enabled=verify.flag("ENABLED"),
                sizes=verify.integer("SIZES", 1),
                images=verify.integer("IMAGES", 1),
                **{name: verify.threshold(name.upper(), d) for name, d in VERIFY_DEFAULTS[precision].items()},
            ),
            precision=precision,
            fp32_modules=reader.names("FP32_MODULES"),
            static=reader.flag("STATIC"),
            msda=reader.choice("MSDA", MSDA),
            normalization=reader.choice("NORMALIZATION", NORMALIZATION),
            attention=reader.choice("ATTENTION", ATTENTION),
            workspace=reader.number("WORKSPACE", least=0.0),
            opt_level=reader.integer("OPT_LEVEL", 0, 5),
            timing_cache=reader.flag("TIMING_CACHE"),
            on_out_of_range=reader.choice("ON_OUT_OF_RANGE", ("torch", "raise")),
            on_error=reader.choice("ON_ERROR", ("raise", "torch")),
            cuda_graphs=reader.flag("CUDA_GRAPHS"),
            max_cuda_graphs=reader.integer("MAX_CUDA_GRAPHS", 1),
            cuda_graph_memory=reader.number("CUDA_GRAPH_MEMORY", least=0.0),
        )

    @property
    def workspace_bytes(self) -> int:
        """0 is TensorRT's default."""
        return int(self.workspace * 2**30)

    @property
    def cuda_graph_bytes(self) -> int:
        """0 is a share of the GPU's memory."""
        return math.ceil(self.cuda_graph_memory * 2**30)

    def engine_range(self, batch: int, height: int, width: int) -> ShapeRange:
        """The range of the engine that serves a batch of this padded size: `shapes`, or with STATIC this size alone.

        Raises:
            EngineShapeError: no engine may serve it.
        """
        self.shapes.check(batch, height, width)
        return ShapeRange.fixed(batch, height, width) if self.static else self.shapes

    def resolve_fp32_modules(self, default: Sequence[str]) -> tuple[str, ...]:
        """The patterns, with the built-in ones in the place of "default" and none twice."""
        names = [name for n in self.fp32_modules for name in (default if n == "default" else (n,))]
        return tuple(dict.fromkeys(names))

    def graph_key(self, default_fp32_modules: Sequence[str] = ("default",)) -> dict[str, Any]:
        """What decides an engine's content, beside the shapes that it is built for. JSON-serialisable.

        Args:
            default_fp32_modules: the built-in patterns, so that an engine built with other ones is another engine.
        """
        pinned = self.resolve_fp32_modules(default_fp32_modules)
        return {
            "precision": self.precision,
            # An engine that is float32 throughout has nothing to pin, and the order of patterns means nothing.
            "fp32_modules": [] if self.precision == "fp32" else sorted(pinned),
            "static": self.static,
            "msda": self.msda,
            "normalization": self.normalization,
            "attention": self.attention,
            "workspace_bytes": self.workspace_bytes,
            "opt_level": self.opt_level,
        }

    def to_json(self) -> dict[str, Any]:
        """All options as JSON has them; an infinite cache.max_gb is the string "inf"."""
        value = dataclasses.asdict(self)
        value["shapes"] = self.shapes.to_json()
        value["fp32_modules"] = list(self.fp32_modules)
        if math.isinf(self.cache.max_gb):
            value["cache"]["max_gb"] = "inf"
        return value


def check_value(key: str, value) -> None:
    """Check one value by itself, with all others at their defaults.

    Args:
        key: "MODEL.TENSORRT." and the rest.

    Raises:
        OptionsError: as TensorRTOptions.from_cfg.
    """
    cfg = get_cfg()
    add_missing(cfg, _DEFAULTS)
    cfg.MODEL.TENSORRT.CACHE.DIR = os.curdir  # the default needs a home folder
    *groups, name = key.split(".")
    node = cfg
    for group in groups:
        node = node.setdefault(group, CfgNode())
        if not isinstance(node, Mapping):
            return
    node[name] = value
    TensorRTOptions.from_cfg(cfg, size_divisibility=1)


def _shapes(cfg, reader: _Reader, divisibility: int | None) -> ShapeRange:
    most = reader.integer("MAX_BATCH_SIZE", 0, note="0 stands for TEST.BATCH_SIZE") or _test_batch_size(cfg)
    usual = reader.integer(
        "OPT_BATCH_SIZE", 0, most, note="at most MAX_BATCH_SIZE; 0 stands for MAX_BATCH_SIZE"
    )
    if divisibility is None:
        if "MASK_FORMER" not in cfg.MODEL:
            raise OptionsError("MODEL.MASK_FORMER is missing: call mask2former.add_maskformer2_config(cfg).")
        divisibility = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    divisibility = max(divisibility, 1)
    given = reader.value("SHAPES")
    sizes = (
        _given_sizes(given, divisibility)
        if given != [] and given != ()
        else _derived_sizes(cfg, divisibility)
    )
    batches = (1, usual or most, most)
    return ShapeRange(*((batch, *size) for batch, size in zip(batches, sizes)))


def _test_batch_size(cfg) -> int:
    size = cfg.TEST.get("BATCH_SIZE", 1)  # mask2former's key
    if not is_int(size) or size < 1:
        raise OptionsError(f"TEST.BATCH_SIZE is {size!r}; allowed: a whole number of at least 1.")
    return size


def _given_sizes(given, divisibility: int) -> list[tuple[int, int]]:
    allowed = "allowed: [], one 'HxW', or three: smallest, fastest, largest, such as ['256x256', '800x1088', '1344x1344']"
    problem = OptionsError(f"{PREFIX}.SHAPES is {given!r}; {allowed}.")
    if not isinstance(given, (list, tuple)) or len(given) not in (1, 3):
        raise problem
    sizes = []
    for text in given:
        match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text) if isinstance(text, str) else None
        if match is None:
            raise problem
        sizes.append((int(match[1]), int(match[2])))
        rounded = tuple(max(round_up(n, divisibility), divisibility) for n in sizes[-1])
        if rounded != sizes[-1]:
            raise OptionsError(
                f"{PREFIX}.SHAPES has {text!r}; allowed: heights and widths above 0 that are multiples of {divisibility}, "
                f"which images are padded to (MODEL.MASK_FORMER.SIZE_DIVISIBILITY), such as "
                f"'{rounded[0]}x{rounded[1]}'."
            )
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    if not all(low <= opt <= high for low, opt, high in zip(*sizes)):
        raise OptionsError(
            f"{PREFIX}.SHAPES is {given!r}; allowed: no height and no width smaller than the one before it, in the order "
            "smallest, fastest, largest."
        )
    return sizes


def _derived_sizes(cfg, divisibility: int):
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    lengths = list(shortest) if isinstance(shortest, (list, tuple)) else [shortest]
    otherwise = f"or give {PREFIX}.SHAPES, such as ['256x256', '800x1088', '1344x1344']"
    if not lengths or not all(is_int(n) and n >= 0 for n in lengths):
        raise OptionsError(
            f"INPUT.MIN_SIZE_TEST is {shortest!r}; allowed: a whole number of pixels of at least 1, or several, "
            f"{otherwise}."
        )
    if 0 in lengths:
        raise OptionsError(
            f"INPUT.MIN_SIZE_TEST is {shortest!r}: 0 leaves images at their own sizes, so the engine's range cannot be "
            f"derived from it; allowed: at least 1, {otherwise}."
        )
    if not is_int(longest) or not 1 <= longest <= LARGEST_DERIVED_SIDE:
        raise OptionsError(
            f"INPUT.MAX_SIZE_TEST is {longest!r}; allowed for a derived range: a whole number of pixels from 1 to "
            f"{LARGEST_DERIVED_SIDE}, {otherwise}."
        )
    return derive_sizes(lengths, longest, divisibility)


def _cache_dir(text: str) -> str:
    if text:
        try:
            return os.path.abspath(Path(text).expanduser())
        except RuntimeError as error:
            raise OptionsError(f"{PREFIX}.CACHE.DIR is {text!r}; allowed: a folder, but {error}") from error
    return default_cache_dir()


def default_cache_dir() -> str:
    """$XDG_CACHE_HOME/d2_trt, else ~/.cache/d2_trt.

    Raises:
        OptionsError: there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative ones ignored
        return os.path.join(base, "d2_trt")
    try:
        return str(Path.home() / ".cache" / "d2_trt")
    except RuntimeError as error:
        raise OptionsError(
            f"{PREFIX}.CACHE.DIR is '', which stands for ~/.cache/d2_trt, but {error} Allowed: the path of a folder "
            "for engines."
        ) from error


class _Reader:
    """Typed access to a group of keys; every error names the key, the value and what is allowed."""

    def __init__(self, node: Mapping, defaults: Mapping, prefix: str):
        self._node, self._defaults, self._prefix = node, defaults, prefix
        for key in node:
            if key not in defaults:
                near = difflib.get_close_matches(str(key), defaults, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise OptionsError(
                    f"{prefix}.{key} is no option of the TensorRT backend (its value is {plain(node[key])!r}); {hint}"
                    f"allowed: {', '.join(sorted(defaults))}."
                )

    @classmethod
    def of(cls, cfg) -> _Reader:
        if "TENSORRT" not in cfg.MODEL:
            raise OptionsError(
                f"{PREFIX} is missing: call d2_trt.add_tensorrt_config(cfg) on the config first."
            )
        return cls(cfg.MODEL.TENSORRT, _DEFAULTS["MODEL"]["TENSORRT"], PREFIX)

    def value(self, key: str):
        if key not in self._node:
            raise OptionsError(
                f"{self._prefix}.{key} is missing: call d2_trt.add_tensorrt_config(cfg) on the config first."
            )
        return self._node[key]

    def group(self, key: str) -> _Reader:
        node = self.value(key)
        if not isinstance(node, Mapping):
            self._fail(key, f"a group of the keys {', '.join(self._defaults[key])}")
        return _Reader(node, self._defaults[key], f"{self._prefix}.{key}")

    def _fail(self, key: str, allowed: str):
        raise OptionsError(f"{self._prefix}.{key} is {plain(self._node[key])!r}; allowed: {allowed}.")

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.value(key)
        if not isinstance(value, str) or value not in choices:
            self._fail(key, ", ".join(map(repr, choices)))
        return value

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            self._fail(key, "True or False")
        return value

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, (str, os.PathLike)):
            self._fail(key, "a path, or '' for the default")
        return os.fspath(value)

    def integer(self, key: str, least: int, most: int | None = None, note: str = "") -> int:
        value = self.value(key)
        if not is_int(value) or value < least or (most is not None and value > most):
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            self._fail(key, f"a whole number {limits}" + (f" ({note})" if note else ""))
        return value

    def number(
        self, key: str, least: float = -math.inf, above: float | None = None, infinite: bool = False
    ) -> float:
        value = self.value(key)
        good = isinstance(value, float) or is_int(value)
        good = good and (math.isfinite(value) or (infinite and value == math.inf))
        if not good or value < least or (above is not None and value <= above):
            limits = f"above {above:g}" if above is not None else f"of at least {least:g}"
            self._fail(key, f"a number {limits}" + (", .inf for no limit" if infinite else ""))
        return float(value)

    def threshold(self, key: str, default: float | None) -> float | None:
        value = self.value(key)
        most = 1.0 if key.startswith("MIN_") else math.inf
        if not (isinstance(value, float) or is_int(value)) or not math.isfinite(value) or value > most:
            limits = "up to 1.0" if most == 1.0 else "above 0.0"
            self._fail(
                key,
                f"a number {limits}, 0.0 for the precision's own limit, or a negative one to not check it",
            )
        if value == 0:
            return default
        return float(value) if value > 0 else None

    def names(self, key: str) -> tuple[str, ...]:
        value = self.value(key)
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v.strip() for v in value):
            self._fail(key, "a list of module names or patterns, such as ['default', 'backbone.res5']")
        return tuple(value)
