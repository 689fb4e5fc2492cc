"""What tools/benchmark.py times: a model of this project, or of an official checkout, stage by stage."""

from __future__ import annotations

import argparse

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import ImageList

from mask2former import add_maskformer2_config

# Keys that an official checkout does not know.
OURS = (
    "MODEL.BACKEND",
    "MODEL.TENSORRT.",
    "MODEL.MASK_FORMER.TEST.BOXES_FROM_MASKS",
    "MODEL.MASK_FORMER.TEST.INSTANCE_FORMAT",
    "MODEL.MASK_FORMER.TEST.SEMANTIC_FORMAT",
    "TEST.BATCH_SIZE",
)


def build_cfg(args: argparse.Namespace, device: str) -> CfgNode:
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    opts = list(args.opts)
    if args.implementation == "release":
        pairs = zip(opts[::2], opts[1::2])
        opts = [word for key, value in pairs if not key.startswith(OURS) for word in (key, value)]
    else:
        from d2_trt import add_tensorrt_config

        add_tensorrt_config(cfg)
        # What PyTorch ran instead would be timed as TensorRT.
        opts = ["MODEL.TENSORRT.ON_OUT_OF_RANGE", "raise", *opts]
        opts = ["MODEL.TENSORRT.MAX_BATCH_SIZE", str(max(args.batch)), *opts]
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
        picture = self.image
        if resize:
            transform = predictor.aug if hasattr(predictor, "aug") else predictor.transform_gen
            picture = transform.get_transform(picture).apply_image(picture)
        tensor = torch.as_tensor(picture.astype("float32").transpose(2, 0, 1))
        self.input = {"image": tensor, "height": size[0], "width": size[1]}


class Subject:
    """One implementation's model, behind the stages that are timed."""

    def __init__(self, cfg, implementation: str):
        torch.manual_seed(0)
        if implementation != "release":
            cfg = cfg.clone()
            cfg.MODEL.BACKEND = "torch"  # use() puts others in its place
        self.predictor = DefaultPredictor(cfg)
        self.model = self.predictor.model
        self.release = implementation == "release"

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

    def postprocess_call(self, case: Case, images: torch.Tensor, outputs):
        """A call that does all that follows the network."""
        inputs = [case.input] * len(images)
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
        model = self.model

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
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)
