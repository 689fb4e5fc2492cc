"""Everything that d2_trt raises on purpose."""

from mask2former.backend import BackendError


class D2TRTError(BackendError):
    """Base class of d2_trt's errors."""


class MissingDependencyError(D2TRTError):
    """A package, library or device that the TensorRT backend needs is not there."""


class OptionsError(D2TRTError, ValueError):
    """A key of the config has a value that is not allowed."""


class EngineShapeError(D2TRTError, ValueError):
    """Images have a padded size or a number that the engine was not built for."""


class ConversionError(D2TRTError):
    """An operation of the model cannot be expressed in a TensorRT network."""


class BuildError(D2TRTError):
    """TensorRT refused the network, or ran out of something while it built the engine."""


class GPUMemoryError(BuildError):
    """The GPU's memory does not suffice to build, load or run an engine. The engine is as good as it was."""


class ParityError(D2TRTError):
    """An engine's outputs differ from PyTorch's by more than the config allows."""


class CacheError(D2TRTError):
    """The engine cache was asked for what it cannot do, or lacks an engine that it must have."""


class ImageError(D2TRTError):
    """An image of a stream could not be read or segmented; `index` is its place, `__cause__` the reason."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


def first_line(error: BaseException | str) -> str:
    """What an error says first: those of CUDA go on for a page."""
    return next(iter(str(error).splitlines()), type(error).__name__)
