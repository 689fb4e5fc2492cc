"""TensorRT backend for Mask2Former on detectron2.

Importing this registers the backend "tensorrt" for MODEL.BACKEND, the meta-architecture TensorRTMaskFormer, and the keys of
MODEL.TENSORRT for mask2former.get_mask2former_cfg. It needs no GPU, TensorRT or torch2trt; using the backend does.
"""

from mask2former.backend import BACKEND_REGISTRY
from mask2former.config import EXTENSIONS

from .config import add_tensorrt_config
from .meta_arch import TensorRTMaskFormer

__all__ = ["TensorRTMaskFormer", "TensorRTPredictor", "add_tensorrt_config"]


class _TensorRT:
    """The registry's entry; the backend itself is imported when a model asks for it."""

    def __call__(self, model, cfg):
        from .backend import TensorRTBackend

        return TensorRTBackend(model, cfg)

    @staticmethod
    def settle(cfg) -> None:
        """See that a GPU, TensorRT and torch2trt are there; with ON_ERROR torch, move the model to the CPU without a GPU."""
        import torch

        from . import requirements
        from .options import TensorRTOptions

        options = TensorRTOptions.from_cfg(cfg)
        if options.on_error != "torch":
            requirements.require(cfg.MODEL.DEVICE, builds=options.cache.mode != "require")
        elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            frozen = cfg.is_frozen()
            cfg.defrost()
            cfg.MODEL.DEVICE = "cpu"
            if frozen:
                cfg.freeze()

    @staticmethod
    def check(cfg) -> None:
        from .options import TensorRTOptions

        TensorRTOptions.from_cfg(cfg)


def __getattr__(name: str):
    if (
        name == "TensorRTPredictor"
    ):  # imported when asked for: it needs detectron2.engine, which is slow to import
        from .predictor import TensorRTPredictor

        return TensorRTPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "tensorrt" not in BACKEND_REGISTRY:
    BACKEND_REGISTRY._do_register("tensorrt", _TensorRT())
if add_tensorrt_config not in EXTENSIONS:
    EXTENSIONS.append(add_tensorrt_config)
