"""A serialized engine as a function on CUDA tensors."""

from __future__ import annotations

import threading

import torch

from . import compat
from .builder import INPUT, OUTPUTS, trt_logger
from .errors import BuildError, EngineShapeError


class Engine:
    """Runs an engine on the caller's stream, without waiting for the device. Safe to call from several threads."""

    def __init__(self, plan: bytes, device: torch.device):
        """
        Args:
            plan: the serialized engine.
            device: the GPU that runs it.

        Raises:
            BuildError: the plan does not load: damaged, or of another TensorRT or GPU.
        """
        trt = compat.tensorrt()
        compat.register_plugins()  # a plan may refer to them
        self.device = torch.device(device)
        self._log = trt_logger()
        with torch.cuda.device(self.device):
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise BuildError("the engine does not load:\n  " + "\n  ".join(self._log.errors[-3:]))
            self._context = self._engine.create_execution_context()
        self._lock = threading.Lock()
        # A context's memory serves one call at a time: a call on another stream waits for the one before.
        self._last: torch.cuda.Event | None = None
        low, _, high = self._engine.get_tensor_profile_shape(INPUT, 0)
        self.min_shape, self.max_shape = tuple(low), tuple(high)
        names = {trt.float32: torch.float32, trt.float16: torch.float16}
        self._dtypes = [names[self._engine.get_tensor_dtype(name)] for name in OUTPUTS]

    def __del__(self):
        last = getattr(self, "_last", None)
        if last is not None:
            last.synchronize()  # the last caller may let go of the engine while the GPU still runs it

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether images of shape (B, 3, H, W) lie in the engine's range."""
        return len(shape) == 4 and all(a <= s <= b for a, s, b in zip(self.min_shape, shape, self.max_shape))

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the engine.

        Args:
            images: (B, 3, H, W) float32 on the engine's device.

        Returns:
            pred_logits (B, Q, K + 1) and pred_masks (B, Q, H/4, W/4), float32.

        Raises:
            EngineShapeError: the images lie outside the range.
        """
        shape = tuple(images.shape)
        if not self.accepts(shape):
            (b0, _, h0, w0), (b1, _, h1, w1) = self.min_shape, self.max_shape
            raise EngineShapeError(
                f"images of {shape} (B, 3, H, W) are outside this engine's range {b0}..{b1} (B), {h0}..{h1} (H), "
                f"{w0}..{w1} (W). Change the images, or widen MODEL.TENSORRT.SHAPES or MODEL.TENSORRT.MAX_BATCH_SIZE "
                "and rebuild."
            )
        images = images.to(self.device, torch.float32).contiguous()
        with torch.cuda.device(self.device), self._lock:
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            context = self._context
            context.set_input_shape(INPUT, shape)
            context.set_tensor_address(INPUT, images.data_ptr())
            outputs = []
            for name, dtype in zip(OUTPUTS, self._dtypes):
                out = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device)
                context.set_tensor_address(name, out.data_ptr())
                outputs.append(out)
            if not context.execute_async_v3(stream.cuda_stream):
                raise BuildError("the engine did not run:\n  " + "\n  ".join(self._log.errors[-3:]))
            self._last = stream.record_event()
            images.record_stream(stream)
        return outputs[0], outputs[1]
