"""What engines are traced with and compared on: real content at the sizes of a range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .shape_range import Shape, ShapeRange


class SampleImages:
    """Images of any shape: those that were given, in turn, each once at a size, then scenes that the project draws.

    `given` and `drawn` count the images that were taken of each kind since the last restart().
    """

    def __init__(self, device: torch.device, given: Iterable[Tensor] | None = None):
        """
        Args:
            device: where the images are wanted.
            given: (3, H, W) each, of any size and number type, 0 to 255; (B, 3, H, W) is B of them.
        """
        self._device = device
        self._given = [] if given is None else [image[None].detach() for image in given]
        self._next = 0
        self._scenes = 0
        self.restart()

    def __len__(self) -> int:
        """How many were given."""
        return len(self._given)

    def restart(self) -> None:
        """From here on those that were given may be taken again; the others' turn is first."""
        self._taken: set[tuple[int, int, int]] = set()
        self.given = self.drawn = 0

    def take(self, shape: Shape) -> Tensor:
        """Images (batch, 3, height, width) float32, stretched to that size."""
        batch, height, width = shape
        turn = [(self._next + i) % len(self) for i in range(len(self))]
        fresh = [i for i in turn if (i, height, width) not in self._taken][:batch]
        if fresh:
            self._next = fresh[-1] + 1
        self.given += len({*fresh} - {i for i, *_ in self._taken})
        self._taken.update((i, height, width) for i in fresh)
        images = [self._resized(self._given[i], height, width) for i in fresh]
        if len(images) < batch:
            images.append(self.draw((batch - len(images), height, width)))
        return torch.cat(images)

    def draw(self, shape: Shape) -> Tensor:
        """Drawn scenes alone, each new."""
        batch, height, width = shape
        self.drawn += batch
        return torch.cat([self._resized(self._scene(), height, width) for _ in range(batch)])

    def describe(self) -> str:
        """What was taken, such as "1 given image and 2 drawn scenes"."""
        counts = {"given image": self.given, "drawn scene": self.drawn}
        told = [f"{n} {name}{'s'[: n != 1]}" for name, n in counts.items() if n]
        return " and ".join(told) + (" alone: no real image was at hand" if not self.given else "")

    def _scene(self) -> Tensor:
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


def images_to_compare(
    samples: SampleImages, shapes: ShapeRange, multiple: int, sizes: int, images: int
) -> Iterator[Tensor]:
    """Images for verified_batches, after a batch of the fastest shape was taken to trace with.

    Where they would be at the fastest shape what was traced, and no others, drawn ones follow: what an engine has wrongly
    kept of the images that it was traced with is right for those.
    """
    samples.restart()
    for batch in verified_batches(shapes, multiple, sizes, images):
        yield samples.take(batch)
    if len(samples) == shapes.opt[0]:
        yield samples.draw(shapes.opt)
