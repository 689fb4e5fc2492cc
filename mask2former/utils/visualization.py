"""From a model's outputs to named regions, and from regions to a picture.

Masks are painted as pixels. detectron2's Visualizer makes polygons of them, a matplotlib patch for each one,
which fills holes and takes minutes where masks are in many pieces. Here it draws the labels and boxes.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

TASKS = ("panoptic", "instance", "semantic")
# What a model gives for a task; for the last one of two, see MODEL.MASK_FORMER.TEST.SEMANTIC_FORMAT.
_OUTPUTS_OF = {
    "panoptic": ("panoptic_seg",),
    "instance": ("instances",),
    "semantic": ("sem_seg", "sem_seg_labels"),
}
_SWITCH_OF = {task: f"MODEL.MASK_FORMER.TEST.{task.upper()}_ON" for task in TASKS}

# Regions of two frames are the same one where their overlap over their union is at least this.
_SAME_REGION_IOU = 0.5
# Overlaps are counted on every n-th pixel of both axes.
_OVERLAP_STEP = 4
# A semantic class below this share of the pixels is counted but not labelled.
_MIN_LABELLED_SHARE = 0.002


class ClassTable:
    """Names and colours by contiguous class id, complete whatever the metadata lack.

    A list of the metadata is used only where its length is the number of classes: in ADE20K's panoptic set
    `thing_classes` has 100 names for ids that go to 149, and indexing it would name them wrongly. A class
    without a name is "class 7".
    """

    def __init__(self, metadata, num_classes: int):
        self.num_classes = num_classes
        self._things = self._named(metadata, ("thing", "stuff"))
        self._stuff = self._named(metadata, ("stuff", "thing"))

    def _named(self, metadata, kinds: Sequence[str]) -> tuple[list[str], list[tuple[float, float, float]]]:
        names = [f"class {i}" for i in range(self.num_classes)]
        palette = colormap(rgb=True, maximum=1)
        colors = [tuple(palette[i % len(palette)].tolist()) for i in range(self.num_classes)]
        for kind in kinds:
            found = None if metadata is None else metadata.get(f"{kind}_classes")
            if found is None or len(found) != self.num_classes:
                continue
            names = list(found)
            found = metadata.get(f"{kind}_colors")
            if found is not None and len(found) == self.num_classes:
                colors = [tuple(channel / 255 for channel in color) for color in found]
            break
        return names, colors

    def name(self, class_id: int, isthing: bool) -> str:
        return (self._things if isthing else self._stuff)[0][class_id]

    def color(self, class_id: int, isthing: bool) -> tuple[float, float, float]:
        """RGB, each 0..1."""
        return (self._things if isthing else self._stuff)[1][class_id]


@dataclass
class Region:
    """A segment, an instance or all pixels of a semantic class."""

    class_id: int
    name: str
    isthing: bool
    mask: np.ndarray  # (H, W) bool
    score: float | None = None

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.mask))

    def box(self) -> tuple[int, int, int, int] | None:
        """x0, y0, x1, y1 around the mask, ends excluded; None where it is empty."""
        rows, cols = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        if rows.size == 0:
            return None
        return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


@dataclass
class Findings:
    """What a model found in one image: counts for reports, and the regions of the task that is drawn."""

    task: str
    height: int
    width: int
    regions: list[Region]
    threshold: float
    # Number of instances at or above the threshold by name; None where the instance task is off.
    instances: Counter | None = None
    areas: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.areas = [region.area for region in self.regions]

    def describe(self) -> str:
        """Such as: 5 things (3 car, 2 person), 2 stuff (sky, road), 12 instances >= 0.5"""
        parts = []
        if self.task == "panoptic":
            things = Counter(r.name for r in self.regions if r.isthing)
            stuff = list(dict.fromkeys(r.name for r, _ in self._by_area() if not r.isthing))
            parts.append(_number(sum(things.values()), "thing") + _counts(things))
            parts.append(f"{len(stuff)} stuff" + (f" ({', '.join(stuff)})" if stuff else ""))
        elif self.task == "semantic":
            pixels = self.height * self.width
            shares = [f"{r.name} {100 * area / pixels:.0f} %" for r, area in self._by_area()]
            more = f", and {len(shares) - 8} more" if len(shares) > 8 else ""
            parts.append(f"{len(shares)} classes ({', '.join(shares[:8])}{more})")
        if self.instances is not None:
            names = _counts(self.instances) if self.task == "instance" else ""
            number = _number(sum(self.instances.values()), "instance")
            parts.append(f"{number} >= {self.threshold:g}{names}")
        return ", ".join(parts)

    def to_dict(self) -> dict:
        """For JSON: the drawn task's regions without masks. Boxes are [x0, y0, x1, y1], ends excluded."""
        regions = []
        for region, area in zip(self.regions, self.areas, strict=True):
            entry = {
                "class_id": region.class_id,
                "name": region.name,
                "isthing": region.isthing,
                "area": area,
            }
            if region.score is not None:
                entry["score"] = round(region.score, 4)
            box = region.box()
            entry["box"] = None if box is None else list(box)
            regions.append(entry)
        return {
            "task": self.task,
            "text": self.describe(),
            "regions": regions,
            "instances": None if self.instances is None else dict(self.instances),
        }

    def _by_area(self) -> list[tuple[Region, int]]:
        return sorted(zip(self.regions, self.areas, strict=True), key=lambda pair: -pair[1])


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _counts(counter: Counter) -> str:
    return f" ({', '.join(f'{n} {name}' for name, n in counter.most_common())})" if counter else ""


def interpret(outputs: dict, classes: ClassTable, task: str = "auto", threshold: float = 0.5) -> Findings:
    """Name what a MaskFormer returned for one image.

    Args:
        outputs: one of the dicts that MaskFormer.forward returns, on any device, in any of the formats of
            MODEL.MASK_FORMER.TEST.INSTANCE_FORMAT and SEMANTIC_FORMAT.
        task: whose regions to take, one of TASKS, or "auto" for the first of them that is there.
        threshold: instances with a lower score are left out; segments and classes have none.

    Raises:
        ValueError: no output for the task, with the config key that turns it on.
    """
    there = [name for name in TASKS if any(key in outputs for key in _OUTPUTS_OF[name])]
    if task == "auto" and there:
        task = there[0]
    if task not in there:
        wanted = task if task in TASKS else "any task"
        switch = _SWITCH_OF.get(task, " or ".join(_SWITCH_OF.values()))
        raise ValueError(
            f"the model gives nothing for {wanted}; it gives {', '.join(there) or 'no result at all'}. "
            f"Set {switch} True"
        )
    counter = instances = None
    if "instances" in outputs:
        instances = outputs["instances"]
        instances = instances[instances.scores >= threshold]
        counter = Counter(classes.name(c, True) for c in instances.pred_classes.tolist())
    if task == "panoptic":
        segments, info = outputs["panoptic_seg"]
        regions = _panoptic_regions(segments.cpu().numpy(), info, classes)
        height, width = segments.shape
    elif task == "instance":
        height, width = instances.image_size
        if instances.has("pred_masks_rle"):
            masks = instances.pred_masks_rle.decode((height, width)).numpy()
        else:
            masks = instances.pred_masks.to("cpu").numpy().astype(bool)
        regions = [
            Region(c, classes.name(c, True), True, mask, score)
            for c, mask, score in zip(
                instances.pred_classes.tolist(), masks, instances.scores.tolist(), strict=True
            )
        ]
        # Ties keep the model's order.
        regions.sort(key=lambda region: -region.score)
    else:
        # (K, H, W) -> (H, W)
        labels = outputs["sem_seg"].argmax(0) if "sem_seg" in outputs else outputs["sem_seg_labels"]
        labels = labels.cpu().numpy()
        height, width = labels.shape
        regions = [Region(c, classes.name(c, False), False, labels == c) for c in np.unique(labels).tolist()]
    return Findings(task, int(height), int(width), regions, threshold, counter)


def _panoptic_regions(segments: np.ndarray, info: list[dict], classes: ClassTable) -> list[Region]:
    regions = []
    for segment in info:
        class_id, isthing = int(segment["category_id"]), bool(segment["isthing"])
        name = classes.name(class_id, isthing)
        regions.append(Region(class_id, name, isthing, segments == segment["id"], segment.get("score")))
    return regions


class Painter:
    """Draws findings over their images. One painter for all frames of a video keeps each thing's colour.

    Args:
        boxes: draw the instances' boxes too, taken from their masks.
    """

    def __init__(self, classes: ClassTable, boxes: bool = True):
        self._classes = classes
        self._boxes = boxes
        self._seen: list[
            tuple[int, np.ndarray, tuple]
        ] = []  # class, coarse mask, colour of the last frame's things
        self._drawn_of_class: Counter = Counter()

    def paint(self, image_rgb: np.ndarray, findings: Findings) -> np.ndarray:
        """A copy of the image (H, W, 3) uint8 RGB with masks, outlines and labels drawn over it."""
        picture = np.ascontiguousarray(image_rgb).copy()
        colors = self._colors(findings.regions)
        # Stuff lies below things, and large regions below small ones.
        areas = findings.areas
        order = sorted(range(len(areas)), key=lambda i: (findings.regions[i].isthing, -areas[i]))
        order = [i for i in order if areas[i]]
        thickness = max(1, round(np.sqrt(picture.shape[0] * picture.shape[1]) / 500))
        for i in order:
            region = findings.regions[i]
            _fill(picture, region, colors[i], alpha=0.5 if region.isthing else 0.6, thickness=thickness)
        # Small fonts cannot be read: not below 9 points.
        font_size = max(np.sqrt(picture.shape[0] * picture.shape[1]) / 75, 9)
        visualizer = Visualizer(picture, Metadata())
        for i in order:
            region = findings.regions[i]
            if findings.task == "semantic" and areas[i] < _MIN_LABELLED_SHARE * region.mask.size:
                continue
            text = region.name if region.score is None else f"{region.name} {100 * region.score:.0f}%"
            light = _lighter(colors[i])
            if self._boxes and findings.task == "instance":
                visualizer.draw_box(region.box(), edge_color=colors[i])
            point, side = _label_place(region, font_size * 100 / 72)
            visualizer.draw_text(text, point, color=light, font_size=font_size, horizontal_alignment=side)
        drawn = visualizer.get_output().get_image()
        if drawn.shape != picture.shape:
            # matplotlib rounds the figure's size in inches.
            drawn = cv2.resize(drawn, picture.shape[1::-1], interpolation=cv2.INTER_AREA)
        return drawn

    def _colors(self, regions: list[Region]) -> list[tuple[float, float, float]]:
        colors = [self._classes.color(r.class_id, r.isthing) for r in regions]
        things = [i for i, region in enumerate(regions) if region.isthing]
        coarse = [regions[i].mask[::_OVERLAP_STEP, ::_OVERLAP_STEP] for i in things]
        free = list(self._seen)
        for i, mask in zip(things, coarse, strict=True):
            best = max(
                free, key=lambda seen: _iou(mask, seen[1], regions[i].class_id == seen[0]), default=None
            )
            if best is not None and _iou(mask, best[1], regions[i].class_id == best[0]) >= _SAME_REGION_IOU:
                colors[i] = best[2]
                free = [seen for seen in free if seen is not best]
            else:
                nth = self._drawn_of_class[regions[i].class_id]
                self._drawn_of_class[regions[i].class_id] += 1
                colors[i] = _variant(colors[i], nth)
        self._seen = [(regions[i].class_id, mask, colors[i]) for i, mask in zip(things, coarse, strict=True)]
        return colors


def _iou(a: np.ndarray, b: np.ndarray, same_class: bool) -> float:
    if not same_class or a.shape != b.shape:
        return 0.0
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def _variant(color: tuple, nth: int) -> tuple:
    """The n-th colour of a class: near its own, and apart from the others'."""
    if nth == 0:
        return tuple(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(*color)
    # Steps of the golden ratio spread evenly, however many there are.
    step = (nth * 0.618034) % 1.0 - 0.5
    other = (nth * 0.381966) % 1.0 - 0.5
    return colorsys.hls_to_rgb(
        (hue + 0.16 * step) % 1.0, min(max(lightness + 0.4 * other, 0.2), 0.8), max(saturation, 0.5)
    )


def _lighter(color: tuple) -> tuple:
    hue, lightness, saturation = colorsys.rgb_to_hls(*color)
    return colorsys.hls_to_rgb(hue, max(lightness, 0.8), saturation)


def _fill(picture: np.ndarray, region: Region, color: tuple, alpha: float, thickness: int) -> None:
    """Blend a colour into the picture where the mask is, and draw the mask's outline, in place."""
    x0, y0, x1, y1 = region.box()
    mask = region.mask[y0:y1, x0:x1]
    part = picture[y0:y1, x0:x1]
    rgb = np.array(color) * 255
    part[mask] = (part[mask] * (1 - alpha) + rgb * alpha + 0.5).astype(np.uint8)
    contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[-2]
    # On the whole picture: lines may be wider than what lies beyond the box's edge.
    outline = rgb * 0.6 if region.isthing else np.array([255.0, 255.0, 240.0])
    cv2.drawContours(picture, contours, -1, outline.tolist(), thickness, cv2.LINE_AA, offset=(x0, y0))


def _label_place(region: Region, text_height: float) -> tuple[tuple[float, float], str]:
    """(x, y) of a label's top, and its horizontal alignment: centred on the pixel deepest inside the mask."""
    x0, y0, x1, y1 = region.box()
    # A border of zeros, so that the picture's edge counts as the mask's.
    mask = np.pad(region.mask[y0:y1, x0:x1].astype(np.uint8), 1)
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    x, y = float(x0 + x - 1), float(y0 + y - 1)
    height, width = region.mask.shape
    # Kept off the picture's edges, which would cut it.
    side = "left" if x < 0.1 * width else "right" if x > 0.9 * width else "center"
    return (x, min(max(y - text_height / 2, 2.0), max(height - 1.5 * text_height, 2.0))), side
