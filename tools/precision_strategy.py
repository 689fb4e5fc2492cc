"""Which blocks of a model stay in float32: the blocks, what has to be reached, and the order in which blocks are pinned."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from precision_emulation import OperationTimes

from d2_trt.build_spec import pattern_covers
from d2_trt.options import VerifyOptions

# Modules that are taken apart: each of their children is a block, and so are the operations of their own.
CONTAINERS = (
    "",
    "backbone",
    "backbone.layers",
    "sem_seg_head",
    "sem_seg_head.pixel_decoder",
    "sem_seg_head.pixel_decoder.transformer",
    "sem_seg_head.pixel_decoder.transformer.encoder",
    "sem_seg_head.pixel_decoder.transformer.encoder.layers",
    "sem_seg_head.predictor",
)
# A block that gains less than this share of the whole gain is as cheap to pin as one that gains nothing.
_NO_COST = 0.02
_SHARES = ("sign_agreement", "class_agreement")  # of Comparison.numbers; the others are errors
# Blocks that make less than this share of the damage are pinned last.
_NO_DAMAGE = 0.01


@dataclass
class Block:
    """A part of the model that is in one precision.

    Attributes:
        pattern: of FP32_MODULES. "=name" stands for a module's own operations.
        times: of its operations, one by one in PyTorch.
        damage: of this block alone in half precision, as Wanted.damage tells it.
    """

    pattern: str
    times: OperationTimes = field(default_factory=OperationTimes)
    damage: float = 0.0

    @property
    def gain_ms(self) -> float:
        """Milliseconds that half precision saves in PyTorch, operation by operation."""
        return max(self.times.float32_ms - self.times.half_ms, 0.0)


def find_blocks(times: Mapping[str, OperationTimes], split: Collection[str] = ()) -> list[Block]:
    """The blocks of a model, which share out its modules, in the order in which they run.

    Args:
        times: of precision_emulation.operation_times.
        split: patterns of modules to take apart beside CONTAINERS.
    """
    blocks: dict[str, Block] = {}
    for name, own in times.items():
        block = blocks.setdefault(pattern := _block_of(name, split), Block(pattern))
        block.times.count += own.count
        block.times.float32_ms += own.float32_ms
        block.times.half_ms += own.half_ms
    return list(blocks.values())


def _block_of(name: str, split: Collection[str]) -> str:
    parts = name.split(".") if name else []
    for length in range(len(parts) + 1):
        path = ".".join(parts[:length])
        if path not in CONTAINERS and not any(fnmatch.fnmatchcase(path, pattern) for pattern in split):
            return path
    return "=" + name


def shortened(pins: Collection[str], blocks: Sequence[Block]) -> list[str]:
    """The same pins with the name of a module in the place of all of its blocks, in the order of the blocks."""
    pins = set(pins)
    wholes = {prefix for b in blocks for prefix in _parents(b.pattern)}
    for whole in sorted(wholes, key=len):
        inside = {b.pattern for b in blocks if pattern_covers(whole, b.pattern.removeprefix("="))}
        if len(inside) > 1 and inside <= pins:
            pins = (pins - inside) | {whole}
    order = [b.pattern.removeprefix("=") for b in blocks]
    return sorted(pins, key=lambda pin: next(i for i, name in enumerate(order) if _within(name, pin)))


def _parents(pattern: str) -> list[str]:
    """Paths of the modules that hold a block, and of the one whose own operations it is; not the model itself."""
    name = pattern.removeprefix("=")
    parts = name.split(".")
    paths = [".".join(parts[:n]) for n in range(1, len(parts))]
    return [*paths, name] if pattern.startswith("=") and name else paths


def _within(name: str, pin: str) -> bool:
    return pattern_covers(pin.removeprefix("="), name)


class Wanted:
    """The agreement with PyTorch in float32 that is to be reached."""

    def __init__(self, verify: VerifyOptions, margin: float = 1.0):
        """
        Args:
            verify: the parity gate's thresholds.
            margin: what may disagree is so many times less than the gate allows.

        Raises:
            ValueError: the gate checks nothing.
        """
        self.margin = margin
        self.allowed = {
            name: value / margin
            for name, value in (
                ("sign_agreement", _opposite(verify.min_sign_agreement)),
                ("class_agreement", _opposite(verify.min_class_agreement)),
                ("logit_error", verify.max_logit_error),
                ("mask_error", verify.max_mask_error),
            )
            if value is not None
        }
        if not self.allowed:
            raise ValueError("MODEL.TENSORRT.VERIFY checks nothing: set MIN_SIGN_AGREEMENT or another of it")

    def _shares(self, numbers: Mapping[str, float]) -> list[float]:
        """What disagrees, in parts of what may."""
        shares = []
        for name, allowed in self.allowed.items():
            value = numbers[name]
            wrong = 1 - value if name in _SHARES else value
            if not math.isfinite(value):
                shares.append(math.inf)
            else:
                shares.append(wrong / allowed if allowed else (math.inf if wrong else 0.0))
        return shares

    def reached(self, numbers: Mapping[str, float]) -> bool:
        """Whether these numbers, as Comparison.numbers gives them, are good enough."""
        finite = all(math.isfinite(value) for value in numbers.values())
        return finite and max(self._shares(numbers)) <= 1

    def damage(self, numbers: Mapping[str, float]) -> float:
        """How bad they are: the sum of what disagrees, each in parts of what may."""
        return sum(self._shares(numbers))

    def __str__(self) -> str:
        words = {"sign_agreement": "mask signs", "class_agreement": "classes"}
        words.update(logit_error="class logits' error", mask_error="mask logits' error")
        return ", ".join(
            f"{words[name]} {f'at least {100 * (1 - allowed):.4g} %' if name in _SHARES else f'at most {allowed:.3g}'}"
            for name, allowed in self.allowed.items()
        )


def _opposite(share: float | None) -> float | None:
    return None if share is None else 1 - share


def ranked(blocks: Iterable[Block]) -> list[Block]:
    """Blocks in the order in which to pin them: much damage for little time first, those without damage last."""
    blocks = list(blocks)
    # An overflow is infinitely bad, and a ratio must still tell its cost.
    damage = {b.pattern: min(b.damage, 1e9) for b in blocks}
    total, gain = sum(damage.values()), sum(b.gain_ms for b in blocks)

    def key(block: Block):
        cost = block.gain_ms / gain if gain else 0.0
        worth = damage[block.pattern] / max(cost, _NO_COST)
        return damage[block.pattern] >= _NO_DAMAGE * total, worth

    return sorted(blocks, key=key, reverse=True)


def search(
    blocks: Sequence[Block], evaluate: Callable[[list[Block]], Mapping[str, float]], wanted: Wanted
) -> list[Block] | None:
    """Blocks to pin, few and cheap, so that the model reaches what is wanted.

    From everything in half precision on, blocks are pinned in the order of `ranked` until it is reached; then each is let go
    again, the one that costs most first, where it is reached without.

    Args:
        evaluate: pinned blocks -> numbers of the agreement, all others being in half precision.

    Returns:
        the blocks, in the order of `ranked`; None where it is not reached with all of them.
    """
    order = ranked(blocks)
    for count in range(len(order) + 1):
        pinned = order[:count]
        if wanted.reached(evaluate(pinned)):
            break
    else:
        return None
    for block in sorted(pinned[:-1], key=lambda b: b.gain_ms, reverse=True):  # the last one was needed
        without = [b for b in pinned if b is not block]
        if wanted.reached(evaluate(without)):
            pinned = without
    return pinned
