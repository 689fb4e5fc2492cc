"""What tools/benchmark.py times: a model of this project, or of an official checkout, stage by stage."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from benchmark_timing import Stage
from benchmark_weights import PICTURE, keep_queries
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import ImageList
from PIL import Image

from mask2former import add_maskformer2_config

# Of the files that a stream reads: about four bits a pixel.
_NOISE, _JPEG_QUALITY = 8.0, 95

# Keys that an official checkout does not know.
OURS = (
    "MODEL.BACKEND",
    "MODEL.TENSORRT.",
    "MODEL.MASK_FORMER.TEST.BOXES_FROM_MASKS",
    "MODEL.MASK_FORMER.TEST.INSTANCE_FORMAT",
    "MODEL.MASK_FORMER.TEST.SEMANTIC_FORMAT",
    "TEST.BATCH_SIZE",
    "TEST.GROUP_BY_SIZE",
    "TEST.EVALUATION_THREADS",
)


def build_cfg(args: argparse.Namespace, device: str) -> CfgNode:
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    opts = list(args.opts)
    if args.implementation != "release":
        from d2_trt import add_tensorrt_config

        add_tensorrt_config(cfg)
        # What PyTorch ran instead would be timed as TensorRT.
        opts = ["MODEL.TENSORRT.ON_OUT_OF_RANGE", "raise", *opts]
        opts = ["MODEL.TENSORRT.MAX_BATCH_SIZE", str(max(args.batch)), *opts]
    else:
        # The project's own configs have keys that the release does not know, which are without meaning there.
        cfg.MODEL.MASK_FORMER.TEST.BOXES_FROM_MASKS = False
        pairs = zip(opts[::2], opts[1::2])
        opts = [word for key, value in pairs if not key.startswith(OURS) for word in (key, value)]
    cfg.merge_from_file(args.config_file)
    if args.all_tasks:
        for task in ("SEMANTIC", "INSTANCE", "PANOPTIC"):
            opts += [f"MODEL.MASK_FORMER.TEST.{task}_ON", "True"]
    cfg.merge_from_list(["MODEL.WEIGHTS", "", *opts, "MODEL.DEVICE", device])
    return cfg


class Case:
    """An image to time: resized by the config as DefaultPredictor does it, or fed as it is."""

    def __init__(self, predictor: DefaultPredictor, size: tuple[int, int], resize: bool):
        """
        Args:
            size: (height, width) in pixels.
        """
        self.size = size
        self.resized = resize
        self.image = draw_image(size)
        self._predictor = predictor
        picture = self.resize() if resize else self.image
        self.input = {"image": as_float(picture), "height": size[0], "width": size[1]}

    @property
    def name(self) -> str:
        return "x".join(map(str, self.size))

    def resize(self) -> np.ndarray:
        """The image as DefaultPredictor resizes it, (H, W, 3) uint8, in the config's channel order."""
        predictor = self._predictor
        image = self.image[:, :, ::-1] if predictor.input_format == "RGB" else self.image
        transform = predictor.aug if hasattr(predictor, "aug") else predictor.transform_gen
        return transform.get_transform(image).apply_image(image)


def as_float(picture: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32, as DefaultPredictor does it."""
    return torch.as_tensor(picture.astype("float32").transpose(2, 0, 1))


class Subject:
    """One implementation's model, behind the stages that are timed."""

    def __init__(self, cfg, implementation: str, stream_images: int = 100, kept_queries: int = 0):
        """
        Args:
            stream_images: images of one TensorRTPredictor.stream, at least.
            kept_queries: of random weights, see keep_queries. The release has the weights that it is given.
        """
        torch.manual_seed(0)
        self.release = implementation == "release"
        self.stream_images = stream_images
        self._folder: tempfile.TemporaryDirectory | None = None
        if self.release:
            self.predictor = DefaultPredictor(cfg)
        else:
            from d2_trt import TensorRTPredictor

            cfg = cfg.clone()
            cfg.MODEL.BACKEND = "torch"  # use() puts others in its place
            # A DefaultPredictor too, whose call is timed as well: one model serves both.
            self.predictor = TensorRTPredictor(cfg)
        self.model = self.predictor.model
        self.weights = Path(cfg.MODEL.WEIGHTS).name or "random"
        if kept_queries and not self.release and not cfg.MODEL.WEIGHTS:
            kept = keep_queries(self.model, kept_queries, as_float(draw_image(PICTURE)))
            self.weights = f"random, {kept} of {cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES} queries kept"
        tests = cfg.MODEL.MASK_FORMER.TEST
        tasks = ("semantic", "instance", "panoptic")
        self.tasks = "+".join(task for task in tasks if getattr(tests, f"{task.upper()}_ON"))

    def use(self, backend) -> None:
        """Run the network by another backend."""
        self.model.backend = backend

    def padded(self, case: Case, batch: int) -> torch.Tensor:
        """(B, 3, H, W): what the network sees."""
        if not self.release:
            return self.model.preprocess([case.input] * batch)[0]
        image = (case.input["image"].to(self.model.device) - self.model.pixel_mean) / self.model.pixel_std
        return ImageList.from_tensors([image] * batch, self.model.size_divisibility).tensor

    def core(self, images: torch.Tensor):
        if not self.release:
            return self.model.backend(images)
        return self.model.sem_seg_head(self.model.backbone(images))

    def stages(self, case: Case, batch: int, images: torch.Tensor, outputs) -> dict[str, Stage]:
        """All that can be timed of a case: name -> stage.

        Args:
            images: (B, 3, H, W) of padded().
            outputs: of core(images).
        """
        inputs = [case.input] * batch
        stages = {
            "core": Stage(lambda: self.core(images), batch),
            "throughput": Stage(lambda: self.core(images), batch, back_to_back=True),
            "postprocess": Stage(self._postprocess_call(case, images, outputs), batch),
            "forward": Stage(lambda: self.model(inputs), batch),
        }
        if not case.resized:  # predictors resize
            return stages
        if batch == 1:  # they take one image
            stages["predictor"] = Stage(
                lambda: DefaultPredictor.__call__(self.predictor, case.image), 1, wall_clock=True
            )
            stages.update(self._host_stages(case))
            if not self.release:
                stages["trt_predictor"] = Stage(lambda: self.predictor(case.image), 1, wall_clock=True)
        if not self.release:
            # Whole batches: the size of a smaller last one would be another engine's.
            count = -(-self.stream_images // batch) * batch
            for name, source in (("stream", case.image), ("stream_files", self._file(case))):
                stages[name] = Stage(
                    lambda source=source: self._stream(source, batch, count),
                    count,
                    wall_clock=True,
                    slow=True,
                )
        return stages

    def _file(self, case: Case) -> str:
        """A JPEG file of the case's picture, with noise as cameras have it: smooth pictures are decoded faster."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="benchmark")
        path = Path(self._folder.name) / f"{case.name}.jpg"
        if not path.exists():
            noise = np.random.default_rng(0).normal(0, _NOISE, case.image.shape)
            picture = np.clip(case.image + noise, 0, 255).astype(np.uint8)
            Image.fromarray(picture[:, :, ::-1]).save(path, quality=_JPEG_QUALITY)
        return str(path)

    def _stream(self, source: np.ndarray | str, batch: int, count: int) -> None:
        images = (source for _ in range(count))
        for _ in self.predictor.stream(images, batch_size=batch, prefetch=max(8, 2 * batch)):
            pass

    def _host_stages(self, case: Case) -> dict[str, Stage]:
        """What a predictor does around the network, mostly on the CPU, in its parts."""
        picture = case.resize()
        stages = {
            "host_resize": Stage(case.resize, 1, wall_clock=True),
            "host_float": Stage(lambda: as_float(picture), 1, wall_clock=True),
            "host_upload": Stage(lambda: case.input["image"].to(self.model.device), 1, wall_clock=True),
        }
        if not self.release:
            stages["host_preprocess"] = Stage(lambda: self.model.preprocess([case.input]), 1, wall_clock=True)
            load = self.predictor.load
            stages["host_trt_load"] = Stage(
                lambda: load(case.image, self.predictor._ring), 1, wall_clock=True
            )
        return stages

    def _postprocess_call(self, case: Case, images: torch.Tensor, outputs):
        """A call that does all that follows the network."""
        if not self.release:
            from mask2former.postprocessing import postprocess

            sizes = [tuple(case.input["image"].shape[-2:])] * len(images)
            return lambda: postprocess(
                *outputs,
                padded_size=tuple(images.shape[-2:]),
                image_sizes=sizes,
                output_sizes=[case.size] * len(images),
                options=self.model.postprocess_options,
                thing_classes=self.model.thing_classes,
            )
        # The release has no function for it: its forward with the network's outputs at hand is the nearest, and holds
        # the upload and normalisation of the image besides.
        model, inputs = self.model, [case.input] * len(images)

        def call():
            head, backbone = model.sem_seg_head.forward, model.backbone.forward
            model.sem_seg_head.forward = lambda features: dict(outputs)
            model.backbone.forward = lambda x: None
            try:
                return model(inputs)
            finally:
                model.sem_seg_head.forward, model.backbone.forward = head, backbone

        return call


def draw_image(size: tuple[int, int]) -> np.ndarray:
    """A smooth random BGR image (H, W, 3) uint8: noise alone would be unlike anything a camera sees."""
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize(size[::-1], Image.BICUBIC))


class Footprint:
    """GPU memory that a part of the program took and kept, in this process, summed over the times it was at work.

    Not only PyTorch's: an engine's weights and the driver's copies of kernels count. Other processes must be idle meanwhile.
    """

    def __init__(self, cuda: bool):
        self._cuda = cuda
        self._taken = 0

    def __enter__(self) -> Footprint:
        self._before = self._now()
        return self

    def __exit__(self, *exc) -> None:
        self._taken += self._now() - self._before

    def leave_out(self, nbytes: int) -> None:
        """Not this part's after all: bytes on the GPU that it made for somebody else."""
        if self._cuda:
            self._taken -= nbytes

    @property
    def mib(self) -> float:
        return self._taken / 2**20

    def _now(self) -> int:
        if not self._cuda:
            return 0
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        # Of PyTorch's memory what is in use, not what it keeps for later.
        return total - free - torch.cuda.memory_reserved() + torch.cuda.memory_allocated()


def weights_mib(model: torch.nn.Module) -> float:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
