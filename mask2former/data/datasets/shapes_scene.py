"""Draws the images of the synthetic "shapes" data set: flat figures (things) over textured ground (stuff).

Every pixel follows from a seed alone. Random numbers are the raw output of PCG64, the one stream that numpy
promises never to change, and arrays see only operations that IEEE 754 rounds in one way (+ - * / floor,
comparisons); sines are taken of single numbers and rounded. So the same seed draws the same image with any
numpy on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

VOID_LABEL = 255
# Ids of one image's segments are multiples of this, so that they fill all three bytes of the PNG.
SEGMENT_ID_STEP = 70_001
# A figure that others cover down to fewer pixels than this becomes void.
MIN_VISIBLE_PIXELS = 16


@dataclass(frozen=True)
class Category:
    """One class: `dataset_id` is written to the files, `contiguous_id` is what a model predicts."""

    name: str
    dataset_id: int
    contiguous_id: int
    isthing: bool
    color: tuple[int, int, int]


# Dataset ids differ from contiguous ids everywhere, so that a forgotten mapping shows up in the metrics.
CATEGORIES: tuple[Category, ...] = (
    Category("circle", 11, 0, True, (220, 20, 60)),
    Category("square", 12, 1, True, (0, 0, 230)),
    Category("triangle", 14, 2, True, (106, 0, 228)),
    Category("star", 17, 3, True, (250, 170, 30)),
    Category("ring", 18, 4, True, (0, 226, 252)),
    Category("cross", 21, 5, True, (165, 42, 42)),
    Category("crescent", 24, 6, True, (255, 179, 240)),
    Category("bar", 25, 7, True, (0, 82, 0)),
    Category("sky", 101, 8, False, (70, 130, 180)),
    Category("grass", 103, 9, False, (107, 142, 35)),
    Category("sand", 104, 10, False, (230, 200, 140)),
    Category("water", 107, 11, False, (58, 41, 149)),
    Category("tiles", 110, 12, False, (119, 119, 119)),
)
THINGS = tuple(c for c in CATEGORIES if c.isthing)
STUFF = tuple(c for c in CATEGORIES if not c.isthing)


class Scene(NamedTuple):
    """An image with its ground truth.

    image (H, W, 3) uint8 RGB; panoptic (H, W) int32 segment ids, 0 for void; segments as in COCO's panoptic
    JSON: "id", "category_id" (dataset id), "isthing", "iscrowd", "area" in pixels, "bbox" [x, y, w, h].
    """

    image: np.ndarray
    panoptic: np.ndarray
    segments: list[dict[str, Any]]


class SceneRandom:
    """Random numbers that depend on the seed alone, not on numpy's version or the platform."""

    def __init__(self, *entropy: int):
        self._bits = np.random.PCG64(list(entropy))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """An integer of low..high, both included."""
        return low + int(self.uniform(0.0, 1.0) * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.uniform(0.0, 1.0) < probability

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        rest = list(items)
        return [rest.pop(self.integer(0, len(rest) - 1)) for _ in range(count)]

    def bytes(self, *shape: int) -> np.ndarray:
        """Uniform 0..255, as float64."""
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)
        return raw[:count].reshape(shape).astype(np.float64)


def scene_size(random: SceneRandom, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) of an image, both in min_size..max_size: portrait, landscape, square or long."""
    long_side = random.integer(min_size, max_size)
    aspect = random.choice((1.0, 4 / 3, 4 / 3, 3 / 2, 16 / 9, random.uniform(1.0, 2.4)))
    short_side = max(min_size, int(long_side / aspect))
    return (short_side, long_side) if random.chance(0.6) else (long_side, short_side)


def draw_scene(seed: int | SceneRandom, height: int | None = None, width: int | None = None) -> Scene:
    """Draw one image with its ground truth.

    Args:
        seed: a non-negative integer, or a SceneRandom to go on with.
        height, width: in pixels, at least 16 each; without both, the seed chooses them from 96..512.

    Raises:
        ValueError: only one of height and width is given, or one is too small.
    """
    random = seed if isinstance(seed, SceneRandom) else SceneRandom(seed)
    if (height is None) != (width is None):
        raise ValueError(f"give both height and width or neither, got height={height}, width={width}")
    if height is None or width is None:
        height, width = scene_size(random, 96, 512)
    if min(height, width) < 16:
        raise ValueError(
            f"a scene of {height}x{width} (height x width) is too small; both must be at least 16"
        )

    canvas = _Canvas(random, height, width)
    canvas.draw_ground()
    if random.chance(0.3):
        canvas.draw_smudge()
    if random.chance(0.2):
        canvas.draw_crowd()
    # One image in eight or so holds no figure at all.
    for _ in range(0 if random.chance(0.12) else random.integer(1, 10)):
        canvas.draw_figure()
    return canvas.finish()


class _Canvas:
    """An image under way. `labels` holds 0 for void and k + 1 for the k-th segment."""

    def __init__(self, random: SceneRandom, height: int, width: int):
        self.random, self.height, self.width = random, height, width
        self.image = np.zeros((height, width, 3))
        self.labels = np.zeros((height, width), dtype=np.int32)
        self.kinds: list[tuple[Category, bool]] = []  # category and iscrowd of each segment

    def draw_ground(self) -> None:
        random, h, w = self.random, self.height, self.width
        stuff = random.sample(STUFF, random.choice((1, 2, 2, 2, 3, 3)))
        y = np.arange(h)[:, None] / h - 0.5
        x = np.arange(w)[None, :] / w - 0.5
        self._fill(np.ones((h, w), dtype=bool), stuff[0], _TEXTURES[stuff[0].name](random, h, w))
        for category in stuff[1:]:
            wave = (_smooth_noise(random, h, w, max(h, w) / 4) - 0.5) * random.uniform(0.05, 0.4)
            if random.chance(0.6):
                # A horizon: straight or wavy, and tilted.
                tilt = random.uniform(-0.5, 0.5) if random.chance(0.7) else random.uniform(-3.0, 3.0)
                where = y + tilt * x + wave > random.uniform(-0.25, 0.25)
            else:
                # A pond: an uneven ellipse.
                cy, cx = random.uniform(-0.5, 0.5), random.uniform(-0.5, 0.5)
                ry, rx = random.uniform(0.15, 0.4), random.uniform(0.15, 0.4)
                where = ((y - cy) / ry) * ((y - cy) / ry) + ((x - cx) / rx) * ((x - cx) / rx) + 4 * wave < 1
            self._fill(where, category, _TEXTURES[category.name](random, h, w))

    def draw_smudge(self) -> None:
        """A patch of noise that belongs to no segment: void in the ground truth."""
        random = self.random
        radius = random.uniform(0.05, 0.15) * min(self.height, self.width)
        cy, cx = random.uniform(0, self.height), random.uniform(0, self.width)
        rows, cols, u, v = self._window(cy, cx, radius, 0.0)
        inside = u * u + v * v < 1
        grey = 60 + self.random.bytes(*inside.shape)[..., None] * 0.5
        np.copyto(self.image[rows, cols], grey, where=inside[..., None])
        np.copyto(self.labels[rows, cols], 0, where=inside)

    def draw_figure(self) -> None:
        random = self.random
        category = random.choice(THINGS)
        side = min(self.height, self.width)
        # Squaring makes small figures the more frequent ones, as in photographs.
        size = random.uniform(0.0, 1.0)
        radius = max(6.0, side * (0.06 + 0.26 * size * size))
        self.kinds.append((category, False))
        self._draw(
            category, len(self.kinds), radius, random.uniform(0, self.height), random.uniform(0, self.width)
        )

    def draw_crowd(self) -> None:
        """Many small figures of one class, annotated as one crowd region."""
        random = self.random
        category = random.choice(THINGS)
        side = min(self.height, self.width)
        radius = max(4.0, 0.04 * side)
        cy, cx = random.uniform(0.2, 0.8) * self.height, random.uniform(0.2, 0.8) * self.width
        spread_y, spread_x = random.uniform(0.1, 0.2) * side, random.uniform(0.15, 0.3) * side
        self.kinds.append((category, True))
        for _ in range(random.integer(8, 20)):
            y, x = cy + random.uniform(-spread_y, spread_y), cx + random.uniform(-spread_x, spread_x)
            self._draw(category, len(self.kinds), radius, y, x)

    def finish(self) -> Scene:
        random, h, w = self.random, self.height, self.width
        # Light falls off across the image, and the sensor adds noise.
        gain_y, gain_x = random.uniform(-0.25, 0.25), random.uniform(-0.25, 0.25)
        light = 1 + gain_y * (np.arange(h)[:, None] / h - 0.5) + gain_x * (np.arange(w)[None, :] / w - 0.5)
        noise = (random.bytes(h, w, 3) - 127.5) * (random.uniform(2, 14) / 127.5)
        noise += self.image * light[..., None]
        noise += 0.5
        # Casting cuts the fraction off, which rounds, since the numbers are not negative by then.
        image = np.clip(noise, 0, 255, out=noise).astype(np.uint8)

        panoptic = np.zeros((h, w), dtype=np.int32)
        segments: list[dict[str, Any]] = []
        for label, (category, crowd) in enumerate(self.kinds, start=1):
            mask = self.labels == label
            area = int(mask.sum())
            if area < MIN_VISIBLE_PIXELS:
                continue
            rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            top, left = int(rows[0]), int(cols[0])
            segment_id = SEGMENT_ID_STEP * label
            panoptic[mask] = segment_id
            segments.append(
                {
                    "id": segment_id,
                    "category_id": category.dataset_id,
                    "isthing": int(category.isthing),
                    "iscrowd": int(crowd),
                    "area": area,
                    "bbox": [left, top, int(cols[-1]) - left + 1, int(rows[-1]) - top + 1],
                }
            )
        return Scene(image, panoptic, segments)

    def _fill(self, where: np.ndarray, category: Category, texture: np.ndarray) -> None:
        self.kinds.append((category, False))
        np.copyto(self.image, texture, where=where[..., None])
        np.copyto(self.labels, len(self.kinds), where=where)

    def _window(self, cy: float, cx: float, radius: float, angle: float):
        """Slices around a point, and its coordinates (u, v), turned by `angle`, in units of the radius."""
        y0, y1 = max(0, int(cy - 1.5 * radius)), min(self.height, int(cy + 1.5 * radius) + 2)
        x0, x1 = max(0, int(cx - 1.5 * radius)), min(self.width, int(cx + 1.5 * radius) + 2)
        sin, cos = round(math.sin(angle), 6), round(math.cos(angle), 6)
        y = (np.arange(y0, y1)[:, None] + 0.5 - cy) / radius
        x = (np.arange(x0, x1)[None, :] + 0.5 - cx) / radius
        return slice(y0, y1), slice(x0, x1), cos * x + sin * y, cos * y - sin * x

    def _draw(self, category: Category, label: int, radius: float, cy: float, cx: float) -> None:
        random = self.random
        rows, cols, u, v = self._window(cy, cx, radius, random.uniform(0, 2 * math.pi))
        inside = _FIGURES[category.name](u, v)
        color = np.array([random.uniform(20, 235) for _ in range(3)])
        # Lit from one side, and one figure in four is striped.
        shade = 1 + random.uniform(-0.3, 0.3) * u + random.uniform(-0.3, 0.3) * v
        if random.chance(0.25):
            shade = shade * np.where(_triangle_wave(u * random.uniform(1.5, 3.0)) > 0.5, 1.0, 0.7)
        np.copyto(self.image[rows, cols], color * shade[..., None], where=inside[..., None])
        np.copyto(self.labels[rows, cols], label, where=inside)


def _triangle_wave(t: np.ndarray) -> np.ndarray:
    """Period 1, between 0 and 1."""
    phase = t - np.floor(t)
    return np.where(phase < 0.5, 2 * phase, 2 - 2 * phase)


def _smooth_noise(random: SceneRandom, height: int, width: int, cell_y: float, cell_x: float | None = None):
    """(height, width) of 0..1: random numbers on a grid of cells in pixels, smoothly interpolated."""
    cell_x = cell_y if cell_x is None else cell_x
    y, x = np.arange(height) / cell_y, np.arange(width) / cell_x
    iy, ix = np.floor(y).astype(int), np.floor(x).astype(int)
    grid = random.bytes(int(iy[-1]) + 2, int(ix[-1]) + 2) / 255.0
    fy, fx = (y - iy)[:, None], (x - ix)[None, :]
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    rows = grid[iy] * (1 - fy) + grid[iy + 1] * fy  # (height, grid columns)
    return rows[:, ix] * (1 - fx) + rows[:, ix + 1] * fx


def _color(random: SceneRandom, *ranges: tuple[int, int]) -> np.ndarray:
    return np.array([random.uniform(low, high) for low, high in ranges])


def _sky(random: SceneRandom, h: int, w: int) -> np.ndarray:
    base = _color(random, (90, 150), (150, 200), (215, 255))
    clouds = np.clip((_smooth_noise(random, h, w, h / 5, w / 3) - 0.5) * 3, 0, 1)[..., None]
    fade = (np.arange(h) / h)[:, None, None] * 40
    return (base + fade) * (1 - clouds) + 245 * clouds


def _grass(random: SceneRandom, h: int, w: int) -> np.ndarray:
    base = _color(random, (50, 110), (110, 165), (30, 80))
    blades = _smooth_noise(random, h, w, 7, 1.5) - 0.5
    patches = _smooth_noise(random, h, w, 40) - 0.5
    return base + (blades * 90 + patches * 40)[..., None]


def _sand(random: SceneRandom, h: int, w: int) -> np.ndarray:
    base = _color(random, (175, 225), (150, 195), (95, 145))
    grain = random.bytes(h, w) / 255.0 - 0.5
    dunes = _smooth_noise(random, h, w, 50, 90) - 0.5
    return base + (grain * 45 + dunes * 40)[..., None]


def _water(random: SceneRandom, h: int, w: int) -> np.ndarray:
    base = _color(random, (30, 110), (100, 160), (150, 225))
    warp = _smooth_noise(random, h, w, 12, 30) * 1.5
    ripples = _triangle_wave(np.arange(h)[:, None] / random.uniform(6, 12) + warp) - 0.5
    return base + (ripples * 60)[..., None]


def _tiles(random: SceneRandom, h: int, w: int) -> np.ndarray:
    cell = random.integer(7, 22)
    y, x = np.arange(h) + random.integer(0, cell), np.arange(w) + random.integer(0, cell)
    odd = ((y // cell)[:, None] + (x // cell)[None, :]) % 2
    first = _color(random, (60, 220), (60, 220), (60, 220))
    second = first + random.choice((-1, 1)) * random.uniform(40, 80)
    return np.where(odd[..., None] == 1, first, second)


def _polygon(points: Sequence[tuple[float, float]]):
    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        odd = np.zeros(u.shape, dtype=bool)
        for (u0, v0), (u1, v1) in zip(points, (*points[1:], points[0]), strict=True):
            crosses = (v0 > v) != (v1 > v)
            if v0 != v1:
                odd ^= crosses & (u < u0 + (v - v0) * (u1 - u0) / (v1 - v0))
        return odd

    return inside


def _spikes(count: int, inner: float | None) -> list[tuple[float, float]]:
    radii = [1.0] if inner is None else [1.0, inner]
    total = count * len(radii)
    angles = [2 * math.pi * k / total for k in range(total)]
    return [
        (round(radii[k % len(radii)] * math.cos(a), 6), round(radii[k % len(radii)] * math.sin(a), 6))
        for k, a in enumerate(angles)
    ]


# Membership of (u, v), in units of the figure's radius.
_FIGURES = {
    "circle": lambda u, v: u * u + v * v < 0.81,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.75,
    "triangle": _polygon(_spikes(3, None)),
    "star": _polygon(_spikes(5, 0.42)),
    "ring": lambda u, v: (u * u + v * v < 1) & (u * u + v * v > 0.3),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.28) & (np.maximum(np.abs(u), np.abs(v)) < 1),
    "crescent": lambda u, v: (u * u + v * v < 1) & ((u - 0.45) * (u - 0.45) + v * v > 0.6),
    "bar": lambda u, v: (np.abs(u) < 1.2) & (np.abs(v) < 0.28),
}
_TEXTURES = {"sky": _sky, "grass": _grass, "sand": _sand, "water": _water, "tiles": _tiles}
