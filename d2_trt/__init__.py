"""TensorRT backend for Mask2Former on detectron2.

Importing this registers the backend "tensorrt" for MODEL.BACKEND. It needs no GPU, TensorRT or torch2trt; using the
backend does.
"""

from mask2former.backend import BACKEND_REGISTRY

from .config import add_tensorrt_config

__all__ = ["add_tensorrt_config"]


def _tensorrt_backend(model, cfg):
    from .backend import TensorRTBackend

    return TensorRTBackend(model, cfg)


if "tensorrt" not in BACKEND_REGISTRY:
    BACKEND_REGISTRY._do_register("tensorrt", _tensorrt_backend)
