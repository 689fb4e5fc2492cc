"""The MaskFormer meta-architecture: preprocessing, a backend that runs the network, post-processing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from torch import Tensor, nn

from .backend import build_backend, check_backend, settle_backend
from .modeling import fused_ops
from .modeling.criterion import build_criterion
from .modeling.targets import prepare_targets
from .postprocess_options import PostprocessOptions
from .postprocessing import postprocess

if TYPE_CHECKING:
    from .evaluation.ahead import ImagesAhead

# Images of at least so many bytes go to the GPU through pinned memory, which PyTorch keeps for the next ones.
STAGED_BYTES = 1 << 20
_making_backends = threading.RLock()


@META_ARCH_REGISTRY.register()
class MaskFormer(nn.Module):
    """Mask classification for semantic, instance and panoptic segmentation.

    Source: Mask2Former (Cheng et al. 2022) and its release, whose state-dict keys and outputs it keeps. Unlike the
    release, `pred_masks` of the instances are bool, not float, which detectron2's evaluators and visualizer take alike.
    """

    # Attributes that core() does not read, by which a backend may tell that the network is the same still. They hold for
    # this class: a subclass, whose core() may read others, says so itself, or all of its attributes count.
    around_network = frozenset(
        {
            "criterion",
            "metadata",
            "size_divisibility",
            "postprocess_options",
            "backend_name",
            "_backend_cfg",
            "_backend",
        }
    )

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        criterion: nn.Module,
        metadata,
        size_divisibility: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        postprocess_options: PostprocessOptions,
        backend: str = "torch",
        backend_cfg=None,
    ):
        """
        Args:
            metadata: of the training data set; its thing_dataset_id_to_contiguous_id says which classes are things.
            size_divisibility: images are padded to a multiple of it; negative for the backbone's own.
            pixel_mean, pixel_std: one number per channel, in the range of the input.
            backend: a name in BACKEND_REGISTRY.
            backend_cfg: the config that the backend reads its own keys from.
        """
        super().__init__()
        check_backend(backend, backend_cfg)
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.metadata = metadata
        self.size_divisibility = size_divisibility if size_divisibility >= 0 else backbone.size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.postprocess_options = postprocess_options
        self.backend_name = backend
        self._backend_cfg = backend_cfg
        self._backend = None

    @classmethod
    def from_config(cls, cfg):
        settle_backend(cfg.MODEL.BACKEND, cfg)
        backbone = build_backbone(cfg)
        sem_seg_head = build_sem_seg_head(cfg, backbone.output_shape())
        datasets = tuple(cfg.DATASETS.TRAIN) or tuple(cfg.DATASETS.TEST)
        return {
            "backbone": backbone,
            "sem_seg_head": sem_seg_head,
            "criterion": build_criterion(cfg, sem_seg_head.num_classes),
            "metadata": MetadataCatalog.get(datasets[0]) if datasets else None,
            "size_divisibility": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "postprocess_options": PostprocessOptions.from_config(cfg),
            "backend": cfg.MODEL.BACKEND,
            "backend_cfg": cfg.clone(),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def backend(self):
        """What runs the network; made on first use, since detectron2 loads the weights after building the model."""
        if self._backend is None:
            with _making_backends:  # threads that ask at once get the same
                if self._backend is None:
                    self._backend = build_backend(self.backend_name, self, self._backend_cfg)
        return self._backend

    @backend.setter
    def backend(self, backend) -> None:
        self._backend = backend

    def prepare(self, ahead: ImagesAhead | None = None) -> None:
        """Do ahead of the first image what the backend would do with it.

        Args:
            ahead: the images that are to come, where they are known.
        """
        if ahead is None:
            self.backend.prepare()
        else:
            self.backend.prepare(ahead)

    def core(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The network itself, in PyTorch: what a backend must compute.

        Args:
            images: (B, 3, H, W) float32, padded with the pixel mean, not normalised.

        Returns:
            pred_logits (B, Q, K + 1; the last class is "no object") and pred_masks (B, Q, H/4, W/4), logits.
        """
        outputs = self._outputs(images)
        return outputs["pred_logits"], outputs["pred_masks"]

    def _outputs(self, images: Tensor) -> dict:
        """The transformer decoder's outputs; in training with those of its earlier layers."""
        images = fused_ops.normalize_images(images, self.pixel_mean, self.pixel_std)
        return self.sem_seg_head(self.backbone(images))

    def forward(self, batched_inputs: list[dict]) -> list[dict] | dict[str, Tensor]:
        """Segment images, or in training mode compute the losses.

        Args:
            batched_inputs: for each image a dict with "image", (C, H, W) of any integer or floating dtype in the
                config's channel order and range, and optionally "height" and "width", the output size in pixels (the
                image's own where absent). The images may differ in size. Training needs "instances" too: an Instances
                with gt_classes (N,) int64 and gt_masks (N, H, W), bool or BitMasks; N may be 0.

        Returns:
            in training the weighted losses of the criterion by name, scalars. Training always runs in PyTorch, whatever
            the backend. In evaluation for each image a dict with what the config asks for, at its output size:
            "sem_seg" (K, height, width) float32 class scores; "panoptic_seg", a pair of segment ids (height, width) int32
            with 0 for none, and a list of {"id", "isthing", "category_id"}; "instances", an Instances with pred_masks
            (N, height, width) bool, pred_boxes, scores and pred_classes. With MODEL.MASK_FORMER.TEST.INSTANCE_FORMAT "rle"
            and SEMANTIC_FORMAT "labels", pred_masks_rle and "sem_seg_labels" instead; see `postprocess`.

        Raises:
            ValueError: an empty batch, or an image that is missing, of a wrong shape, size, dtype or channel number, or
                not finite; in training also segments that do not fit the image or the classes.
            FloatingPointError: training has diverged to NaN or infinite predictions.
        """
        images, image_sizes, output_sizes = self.preprocess(batched_inputs)
        if self.training:
            return self._losses(images, batched_inputs)
        pred_logits, pred_masks = self.backend(images)
        return postprocess(
            pred_logits,
            pred_masks,
            padded_size=tuple(images.shape[-2:]),
            image_sizes=image_sizes,
            output_sizes=output_sizes,
            options=self.postprocess_options,
            thing_classes=self.thing_classes,
        )

    def _losses(self, images: Tensor, batched_inputs: list[dict]) -> dict[str, Tensor]:
        # Before the network: what is wrong with the annotations should not show after it.
        targets = prepare_targets(
            batched_inputs, self.sem_seg_head.num_classes, tuple(images.shape[-2:]), self.device
        )
        losses = self.criterion(self._outputs(images), targets)
        return {name: loss * self.criterion.weight_dict[name] for name, loss in losses.items()}

    @property
    def thing_classes(self) -> frozenset[int]:
        """Contiguous ids of the classes that are things; read only where the panoptic task is on."""
        if not self.postprocess_options.panoptic_on:
            return frozenset()
        mapping = None if self.metadata is None else self.metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:
            name = None if self.metadata is None else self.metadata.get("name")
            raise ValueError(
                f"the panoptic task needs to know which classes are things, but the metadata of the data set {name!r} has "
                "no thing_dataset_id_to_contiguous_id. Register it with MetadataCatalog, name another data set in "
                "DATASETS.TRAIN, or set MODEL.MASK_FORMER.TEST.PANOPTIC_ON False"
            )
        return frozenset(mapping.values())

    def preprocess(
        self, batched_inputs: list[dict]
    ) -> tuple[Tensor, list[tuple[int, int]], list[tuple[int, int]]]:
        """Check the images, move them to the model's device and pad them to one size.

        They are padded at the right and the bottom with the pixel mean, which normalisation turns into the zeros that the
        release pads with.

        Returns:
            images (B, 3, H, W) float32, image sizes before padding, and output sizes, both (height, width).
        """
        if not isinstance(batched_inputs, (list, tuple)) or len(batched_inputs) == 0:
            raise ValueError(f"expected a list of at least one dict with an 'image', got {batched_inputs!r}")
        tensors = [self._checked_image(i, inputs) for i, inputs in enumerate(batched_inputs)]
        uploaded = [self._upload(tensor) for tensor in tensors]
        _check_finite(tensors)  # reads them while they are on their way
        image_sizes = [(int(t.shape[-2]), int(t.shape[-1])) for t in tensors]
        output_sizes = [
            self._output_size(i, x, s) for i, (x, s) in enumerate(zip(batched_inputs, image_sizes))
        ]
        multiple = max(self.size_divisibility, 1)
        height = -(-max(s[0] for s in image_sizes) // multiple) * multiple
        width = -(-max(s[1] for s in image_sizes) // multiple) * multiple
        if len(uploaded) == 1 and image_sizes[0] == (height, width):
            return uploaded[0].to(torch.float32)[None], image_sizes, output_sizes
        images = self.pixel_mean.expand(len(uploaded), -1, height, width).contiguous()
        for padded, tensor, (h, w) in zip(images, uploaded, image_sizes):
            padded[:, :h, :w].copy_(tensor)
        return images, image_sizes, output_sizes

    def _upload(self, image: Tensor) -> Tensor:
        """The image on the model's device; to a GPU without waiting for it."""
        staged = (
            self.device.type == "cuda"
            and image.device.type == "cpu"
            and image.numel() * image.element_size() >= STAGED_BYTES
            and not image.is_pinned()
        )
        if staged:
            # What is not pinned, the driver would copy in small pieces, one after the other, with this thread waiting.
            image = torch.empty_like(image, pin_memory=True).copy_(image)
        return image.to(self.device, non_blocking=True)

    def _checked_image(self, index: int, inputs: dict) -> Tensor:
        if not isinstance(inputs, dict) or "image" not in inputs:
            got = f"keys {sorted(inputs)}" if isinstance(inputs, dict) else type(inputs).__name__
            raise ValueError(f"input {index} of the batch has {got}; expected a dict with the key 'image'")
        image = inputs["image"]
        channels = self.pixel_mean.shape[0]
        if not isinstance(image, Tensor):
            raise ValueError(
                f"image {index} of the batch is a {type(image).__name__}; expected a torch.Tensor"
            )
        if image.dim() != 3 or image.shape[0] != channels:
            raise ValueError(
                f"image {index} of the batch has shape {tuple(image.shape)}; expected ({channels}, height, width), channels "
                f"first, as many as MODEL.PIXEL_MEAN has numbers"
            )
        if 0 in image.shape:
            raise ValueError(
                f"image {index} of the batch is empty: {tuple(image.shape)} (channels, height, width)"
            )
        if image.dtype == torch.bool or image.is_complex():
            raise ValueError(
                f"image {index} of the batch has dtype {image.dtype}; expected an integer or floating one"
            )
        return image

    @staticmethod
    def _output_size(index: int, inputs: dict, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = int(inputs.get("height", image_size[0])), int(inputs.get("width", image_size[1]))
        if height <= 0 or width <= 0:
            raise ValueError(
                f"input {index} of the batch asks for an output of {height}x{width} (height x width); both must be positive"
            )
        return height, width


def _check_finite(images: list[Tensor]) -> None:
    """Raise ValueError where an image of the batch has a number that is not."""
    for index, image in enumerate(images):
        # One pass: a sum is finite only where every number is.
        if image.is_floating_point() and not torch.isfinite(image.sum(dtype=torch.float32)):
            raise ValueError(f"image {index} of the batch holds NaN or infinite values")
