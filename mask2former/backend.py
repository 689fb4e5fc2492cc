"""Who runs the network: a registry of backends, and the PyTorch one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from detectron2.utils.registry import Registry
from torch import Tensor

if TYPE_CHECKING:
    from .evaluation.ahead import ImagesAhead
    from .maskformer_model import MaskFormer


class BackendError(RuntimeError):
    """A backend cannot do what the config asks; the message says what to change."""


BACKEND_REGISTRY = Registry("BACKEND")
BACKEND_REGISTRY.__doc__ = """
Backends by the name that MODEL.BACKEND gives. An entry is called as `entry(model, cfg)`; what it returns has

    __call__(images: (B, 3, H, W) float32) -> (pred_logits (B, Q, K + 1), pred_masks (B, Q, H/4, W/4))

with images padded but not normalised, on the model's device; `prepare(ahead=None)`, which does ahead of time whatever the
first call would have to do, where an evaluation tells by an ImagesAhead which images it is going to run; and `describe()`,
a JSON-serialisable dict of what has run the network so far, under "backend" in a word or two, and under "images", where
several may run them, how many each did.

An entry with an attribute `check` has it called as `check(cfg)` to see whether the config asks for what cannot be: it raises
BackendError or ValueError. One with an attribute `settle` has it called as `settle(cfg)` before a model is built from a
config: it raises BackendError where the machine lacks what the backend needs, or changes the config, MODEL.DEVICE above
all, to what the backend falls back to.
"""

# What makes a name known that is not registered yet.
_INSTALL_HINTS = {
    "tensorrt": "`import d2_trt` registers 'tensorrt', this project's TensorRT plugin, which says what it needs",
}


def check_backend(name: str, cfg=None) -> None:
    """Check MODEL.BACKEND, and where there is a config the keys that the backend reads from it.

    Raises:
        KeyError: it names no backend; says what is registered and how to get the rest.
        BackendError, ValueError: the backend refuses the config.
    """
    if name in BACKEND_REGISTRY:
        check = getattr(BACKEND_REGISTRY.get(name), "check", None)
        if cfg is not None and check is not None:
            check(cfg)
        return
    known = ", ".join(repr(n) for n, _ in BACKEND_REGISTRY)
    hints = [_INSTALL_HINTS[name]] if name in _INSTALL_HINTS else list(_INSTALL_HINTS.values())
    raise KeyError(
        f"MODEL.BACKEND is {name!r}, which is not registered. Registered: {known}. {'; '.join(hints)}."
    )


def settle_backend(name: str, cfg) -> None:
    """What a backend wants done before a model is built from a config, which may change in place, frozen or not.

    Raises:
        BackendError, ValueError: the backend cannot run here, or refuses the config.
    """
    settle = getattr(BACKEND_REGISTRY.get(name), "settle", None) if name in BACKEND_REGISTRY else None
    if settle is not None:
        settle(cfg)


def build_backend(name: str, model: MaskFormer, cfg=None):
    """The backend of that name for a model.

    Raises:
        KeyError: no such backend; see check_backend.
    """
    check_backend(name)
    return BACKEND_REGISTRY.get(name)(model, cfg)


def name_runners(images: Mapping[str, int]) -> str:
    """What ran the network, by how many images each ran; such as "tensorrt (8 images) and torch (1 image)"."""
    ran = {name: count for name, count in images.items() if count}
    if len(ran) <= 1:
        return "".join(ran)
    return " and ".join(f"{name} ({count} image{'s'[: count != 1]})" for name, count in ran.items())


class TorchBackend:
    """Runs the model's own PyTorch modules."""

    def __init__(self, model: MaskFormer, cfg=None):
        self._model = model

    def prepare(self, ahead: ImagesAhead | None = None) -> None:
        """Nothing is left to do."""

    def describe(self) -> dict:
        return {"backend": "torch"}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.core(images)


BACKEND_REGISTRY._do_register("torch", TorchBackend)
