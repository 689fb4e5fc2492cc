"""DefaultPredictor with its pre-processing on the GPU, and a pipeline for many images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import ResizeTransform
from detectron2.engine import DefaultPredictor
from fvcore.transforms.transform import NoOpTransform, Transform
from PIL import Image

from mask2former.data import gpu_resize
from mask2former.maskformer_model import MaskFormer

from .errors import ImageError, OptionsError
from .logging import follow_detectron2, get_logger
from .options import PREFIX
from .streaming import DEFAULT_PREFETCH, stream_results
from .upload import PinnedRing

logger = get_logger(__name__)


class TensorRTPredictor(DefaultPredictor):
    """A DefaultPredictor with the same call and the same results, faster.

    8-bit images are uploaded as they are and resized on the GPU, with the bytes that Pillow's resize gives; other images,
    and all where MODEL.DEVICE is cpu, take DefaultPredictor's way. The network runs on the config's own MODEL.BACKEND. Safe
    to call from several threads.

        predictor = TensorRTPredictor(cfg)          # cfg as for DefaultPredictor
        outputs = predictor(cv2.imread("a.jpg"))
        for outputs in predictor.stream(paths):     # faster still
            ...
    """

    def __init__(self, cfg):
        """Build the model and load cfg.MODEL.WEIGHTS.

        Raises:
            OptionsError: the config lacks d2_trt's keys, or is not one of a MaskFormer.
        """
        if "TENSORRT" not in cfg.MODEL:
            raise OptionsError(
                f"{PREFIX} is missing: call d2_trt.add_tensorrt_config(cfg) on the config first."
            )
        follow_detectron2()
        super().__init__(cfg)
        if not isinstance(self.model, MaskFormer):
            raise OptionsError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}; TensorRTPredictor runs 'MaskFormer' and "
                "'TensorRTMaskFormer'. Other models run in detectron2's DefaultPredictor."
            )
        self._resizes_on = "cpu"
        self._ring: PinnedRing | None = None
        if self.model.device.type == "cuda":
            reason = gpu_resize.why_not()
            self._resizes_on = f"cpu ({reason})" if reason else "gpu"
            if reason:
                logger.warning("Images are resized on the CPU, which is slower: %s", reason)
            self._ring = PinnedRing(self.model.device, slots=2)

    def prepare(self) -> None:
        """Do ahead of the first image what the backend would do with it: build or load engines."""
        self.model.prepare()

    def describe(self) -> dict[str, Any]:
        """What runs where, JSON-serialisable: the backend's describe(), and under "resize" "gpu", or "cpu" and why."""
        return {**self.model.backend.describe(), "resize": self._resizes_on}

    def __call__(self, original_image: np.ndarray) -> dict:
        """Segment an image.

        Args:
            original_image: (H, W, C) in BGR order, in the range 0 to 255, as for DefaultPredictor.

        Returns:
            what MaskFormer.forward returns for one image, at the size (H, W).
        """
        with torch.no_grad():
            return self.model([self.load(original_image, self._ring)])[0]

    def stream(
        self,
        images: Iterable[np.ndarray | str | PathLike],
        *,
        batch_size: int = 1,
        prefetch: int = DEFAULT_PREFETCH,
        workers: int = 4,
        on_error: str = "raise",
    ) -> Iterator[dict | ImageError]:
        """Segment many images: decoding, upload, network and post-processing of several images at a time.

        Nothing starts before the first result is asked for. The post-processing runs when a result is asked for, in the
        caller's thread and on its current CUDA stream. Close the iterator (`close()`, or by dropping it) to stop early: that
        waits up to 5 s for what is at work and cannot be interrupted, and a warning says what did not end by then. The
        end of the process closes it too, and waits for a network at work.

        Args:
            images: arrays as for a call, and paths of images, which are read as detectron2 reads them. An array must not
                change before its result is there. `next` of it runs in a thread of its own.
            batch_size: run up to so many consecutive images together, where they have equal padded sizes. A batch waits
                for its images, which a live source may not want.
            prefetch: images that may be read ahead of the results that were taken, at least batch_size. Each that is
                ready holds its network outputs on the GPU, 21 MiB at 800x1088 with 100 queries.
            workers: threads that read files.
            on_error: what an image does that cannot be read or segmented: "raise" raises ImageError in its place, which ends
                the stream; "return" yields the ImageError in its place.

        Yields:
            a result for each image, in order.

        Raises:
            ValueError: an argument that is not allowed.
            ImageError: see on_error; also where `images` itself raises.
        """
        return stream_results(
            self,
            iter(images),
            batch_size=batch_size,
            prefetch=prefetch,
            workers=workers,
            on_error=on_error,
        )

    def load(self, original_image: np.ndarray, ring: PinnedRing | None = None) -> dict[str, Any]:
        """An image as the model takes it: resized, channels first, in the model's channel order.

        Args:
            original_image: as for a call.
            ring: what uploads it, on the current stream; None leaves it on the CPU.

        Returns:
            {"image": (C, height, width), uint8 for uint8 and else float32; "height", "width"}.

        Raises:
            TypeError: it is no array.
        """
        if not isinstance(original_image, np.ndarray):
            got = type(original_image).__name__
            if original_image is None:
                got = "None, which cv2.imread gives for a file that is absent or no image"
            raise TypeError(
                f"an image is a numpy array (H, W, C) in BGR order, in the range 0 to 255; got {got}"
            )
        height, width = original_image.shape[:2]
        transform = self.aug.get_transform(original_image)
        size = self._size_on_gpu(original_image, transform) if ring is not None else None
        flip = self.input_format == "RGB"
        if size is not None:
            image = gpu_resize.resize_bilinear(ring.upload(original_image), size, reverse_channels=flip)
        else:
            resized = transform.apply_image(original_image[:, :, ::-1] if flip else original_image)
            resized = np.array(resized.transpose(2, 0, 1), order="C")  # a copy: Pillow's own is read-only
            if resized.dtype != np.uint8:
                image = torch.as_tensor(resized.astype("float32"))
            elif ring is not None:
                image = ring.upload(resized)
            else:
                image = torch.as_tensor(resized)
        return {"image": image, "height": height, "width": width}

    def _size_on_gpu(self, image: np.ndarray, transform: Transform) -> tuple[int, int] | None:
        """(height, width) to resize to on the GPU; None where that is not known to give the transform's result."""
        plain = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
        if self._resizes_on != "gpu" or not plain or image.shape[2] not in (1, 3) or 0 in image.shape:
            return None
        if type(transform) is NoOpTransform:
            return image.shape[:2]
        if type(transform) is not ResizeTransform or transform.interp not in (None, Image.BILINEAR):
            return None
        size = (transform.new_h, transform.new_w)
        return size if min(size) >= 1 else None
