"""A serialized engine as a function on CUDA tensors."""

from __future__ import annotations

import math
import threading

import torch

from . import compat
from .build_failure import NO_CONTEXT
from .builder import INPUT, OUTPUTS, starting, trt_logger
from .cuda_graphs import CapturedRun, GraphCache, memory_beside_pytorch
from .errors import BuildError, EngineShapeError
from .streams import PrivateStreams

# The part of the GPU's memory that an engine's graphs may take where nothing else is said.
GRAPHS_SHARE = 20


class Engine:
    """Runs an engine on the caller's stream, without waiting for the device. Safe to call from several threads.

    With graphs, every shape's context works in one block of scratch memory, which is that of an engine without graphs:
    calls never overlap. A graph adds its images and outputs, B * (12 * H * W + 4 * Q * (H * W / 16 + K + 1)) bytes, 31 MiB
    at 800x1088 with 100 queries, and what the driver keeps for it. Where that would be more than graphs may take, or more
    than there is, graphs of other shapes go first.

    In a capture of the caller's own the kernels become part of that. Its replays work in the engine's memory: the caller
    keeps the engine alive, and replays and calls apart. Before it, an engine without graphs must have run at this shape.
    """

    def __init__(self, plan: bytes, device: torch.device, max_graphs: int = 0, max_graph_bytes: int = 0):
        """
        Args:
            plan: the serialized engine.
            device: the GPU that runs it.
            max_graphs: shapes that are kept as CUDA graphs; 0 for no graphs.
            max_graph_bytes: GPU memory that these may take together; 0 for 1 / GRAPHS_SHARE of the GPU's.

        Raises:
            BuildError: the plan does not load: damaged, or of another TensorRT or GPU.
            MissingDependencyError, GPUMemoryError: see builder.starting.
        """
        trt = compat.tensorrt()
        compat.register_plugins()  # a plan may refer to them
        self.device = torch.device(device)
        self._log = trt_logger()
        self.graphs: GraphCache | None = None
        with torch.cuda.device(self.device):
            with starting(self._log):
                self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise BuildError("the engine does not load:\n  " + "\n  ".join(self._log.errors[-3:]))
            self._auxiliary = PrivateStreams(self.device, self._engine.num_aux_streams)
            if max_graphs:
                self.graphs = GraphCache(
                    max_graphs, max_graph_bytes or torch.cuda.mem_get_info()[1] // GRAPHS_SHARE
                )
                # What another owner of the stream does meanwhile would become part of the recording, or break it.
                self._recorder = PrivateStreams(self.device, 1)
                self._recording = torch.cuda.ExternalStream(self._recorder.handles[0])
                size = max(compat.device_memory(self._engine), 1)
                self._scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
                self._context = self._new_context()
            else:
                self._context = self._checked(self._engine.create_execution_context())
        self._lock = threading.Lock()
        # A context's memory serves one call at a time: a call on another stream waits for the one before.
        self._last: torch.cuda.Event | None = None
        low, _, high = self._engine.get_tensor_profile_shape(INPUT, 0)
        self.min_shape, self.max_shape = tuple(low), tuple(high)
        names = {trt.float32: torch.float32, trt.float16: torch.float16}
        self._dtypes = [names[self._engine.get_tensor_dtype(name)] for name in OUTPUTS]

    def __del__(self):
        if getattr(self, "_last", None) is not None:
            self._wait()  # the last caller may let go of the engine while the GPU still runs it
        self.graphs = self._context = None  # before the streams that they work on

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
            # Inside a caller's own capture: nothing in it may wait for what is outside, nor the other way round.
            capturing = torch.cuda.is_current_stream_capturing()
            if self._last is not None and not capturing:
                stream.wait_event(self._last)
            try:
                graph = None if capturing else self._graph_of(images, stream)
                if graph is not None:
                    outputs = graph(images)
                else:
                    outputs = self._prepare(self._context, shape)
                    self._enqueue(self._context, images, outputs, stream.cuda_stream)
            finally:  # also what failed half-way may be at work
                if not capturing:
                    self._last = stream.record_event()
                images.record_stream(stream)
        return outputs[0], outputs[1]

    def _graph_of(self, images: torch.Tensor, stream: torch.cuda.Stream) -> CapturedRun | None:
        """The graph to run these images with, captured now where their shape has come often enough."""
        if self.graphs is None:
            return None
        shape = tuple(images.shape)
        graph = self.graphs.find(shape)
        if graph is None:
            nbytes = images.numel() * images.element_size() + self._output_bytes(shape)
            if self.graphs.wants(shape, nbytes):
                graph = self.graphs.add(
                    shape, nbytes, lambda: self._capture(images, stream), retire=self._wait
                )
        return graph

    def _capture(self, images: torch.Tensor, stream: torch.cuda.Stream) -> CapturedRun:
        before = memory_beside_pytorch()
        context = self._new_context()
        with torch.inference_mode(False), torch.no_grad():  # tensors that any later call may write to
            fixed = torch.empty_like(images).copy_(images)
            outputs = self._prepare(context, tuple(images.shape))
        # After the calls before, whose scratch memory it uses, and after what fills the buffers.
        self._recording.wait_stream(stream)
        try:
            run = CapturedRun(
                lambda handle: self._enqueue(context, fixed, outputs, handle), fixed, outputs, self._recording
            )
        except BaseException:
            self._recording.synchronize()  # the context goes with the error, and may be at work
            raise
        finally:
            stream.wait_stream(self._recording)
        run.driver_bytes = max(0, memory_beside_pytorch() - before)
        return run

    def _output_bytes(self, shape: tuple[int, ...]) -> int:
        """Memory of the outputs for a shape of images."""
        self._context.set_input_shape(INPUT, shape)
        sizes = [tuple(self._context.get_tensor_shape(name)) for name in OUTPUTS]
        return sum(math.prod(size) * torch.finfo(dtype).bits // 8 for size, dtype in zip(sizes, self._dtypes))

    def _prepare(self, context, shape: tuple[int, ...]) -> list[torch.Tensor]:
        """Set a context to a shape of images, and make tensors for its outputs."""
        context.set_input_shape(INPUT, shape)
        return [
            torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device)
            for name, dtype in zip(OUTPUTS, self._dtypes)
        ]

    def _enqueue(self, context, images: torch.Tensor, outputs: list[torch.Tensor], stream: int) -> None:
        context.set_tensor_address(INPUT, images.data_ptr())
        for name, output in zip(OUTPUTS, outputs):
            context.set_tensor_address(name, output.data_ptr())
        if not context.execute_async_v3(stream):
            raise BuildError("the engine did not run:\n  " + "\n  ".join(self._log.errors[-3:]))

    def _new_context(self):
        """An execution context that works in the scratch memory that all of them share."""
        return self._checked(compat.context_in(self._engine, self._scratch.data_ptr(), self._scratch.numel()))

    def _checked(self, context):
        if context is None:  # how TensorRT says that its memory does not suffice
            raise BuildError(NO_CONTEXT + "\n  " + "\n  ".join(self._log.errors[-3:]))
        if self._auxiliary.handles:  # one run at a time: all contexts have the same
            context.set_aux_streams(self._auxiliary.handles)
        return context

    def _wait(self) -> None:
        """Until the GPU has done what was asked of it so far."""
        if self._last is not None:
            self._last.synchronize()
