"""What engines are traced with and compared on: real content at the sizes of a range."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .shape_range import Shape, ShapeRange


class SampleImages:
    """Images of any shape: those that were given first, then scenes that the project draws, each taken once."""

    def __init__(self, device: torch.device, given: Tensor | None = None):
        """
        Args:
            device: where the images are wanted.
            given: (B, 3, H, W) float32, 0 to 255.
        """
        self._device = device
        self._given = [] if given is None else [image[None].detach() for image in given]
        self._scenes = 0

    def take(self, shape: Shape) -> Tensor:
        """Images (batch, 3, height, width) float32, stretched to that size."""
        batch, height, width = shape
        return torch.cat([self._resized(self._next(), height, width) for _ in range(batch)])

    def _next(self) -> Tensor:
        if self._given:
            return self._given.pop(0)
        from mask2former.data.datasets.shapes_scene import draw_scene

        scene = torch.from_numpy(draw_scene(self._scenes, 480, 640).image.copy())
        self._scenes += 1
        return scene.permute(2, 0, 1)[None]

    def _resized(self, image: Tensor, height: int, width: int) -> Tensor:
        image = image.to(self._device, torch.float32)
        if tuple(image.shape[2:]) != (height, width):
            image = F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)
        return image.contiguous()


def verified_batches(shapes: ShapeRange, multiple: int, sizes: int, images: int) -> list[Shape]:
    """Batches of a range to compare an engine at: at least `images` images at each of `sizes` padded sizes.

    The sizes are the fastest one, the largest, the smallest, then landscape and portrait ones between them; fewer where the
    range has no more. The fastest size is compared at the fastest batch, the smallest size at the largest batch.

    Args:
        multiple: heights and widths are multiples of it.
    """
    (low_batch, *low), (opt_batch, *opt), (high_batch, *high) = shapes.min, shapes.opt, shapes.max
    wanted = [(opt_batch, tuple(opt)), (low_batch, tuple(high)), (high_batch, tuple(low))][:sizes]
    between = max(sizes - 3, 0)
    for i in range(1, between + 1):
        share = i / (between + 1)
        size = []
        for smallest, largest, part in zip(low, high, (share, 1 - share if between > 1 else share / 2)):
            value = round((smallest + part * (largest - smallest)) / multiple) * multiple
            size.append(min(max(value, smallest), largest))
        wanted.append((low_batch, tuple(size)))
    batches: list[Shape] = []
    seen = set()
    for batch, size in wanted:
        if size in seen:
            continue
        seen.add(size)
        batch = max(batch, min(images, high_batch))
        batches += [(batch, *size)] * -(-images // batch)
    return batches
