"""An engine opened to be looked into: its tensors, its layers, and the time that each layer takes."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from . import compat
from .builder import INPUT, OUTPUTS, trt_logger
from .errors import BuildError, EngineShapeError


class EngineProbe:
    """A serialized engine with an execution context of its own, apart from those that serve images."""

    def __init__(self, plan: bytes | memoryview, device: torch.device | str):
        """
        Args:
            plan: the serialized engine, of this project or any other.
            device: the GPU that runs it.

        Raises:
            MissingDependencyError: TensorRT is missing.
            BuildError: the plan does not load: damaged, or of another TensorRT or GPU.
        """
        trt = compat.tensorrt()
        compat.register_plugins()  # a plan may refer to them
        self.device = torch.device(device)
        self._log = trt_logger()
        with self._on_device():
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(bytes(plan))
            if self._engine is None:
                raise BuildError("the engine does not load:\n  " + "\n  ".join(self._log.errors[-3:]))

    def tensors(self) -> list[dict[str, Any]]:
        """Inputs and outputs: "name", "mode" (input or output), "dtype", "shape" (-1 where dynamic), and for inputs
        "min", "opt", "max" of the first optimisation profile."""
        trt = compat.tensorrt()
        engine = self._engine
        found = []
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            about = {
                "name": name,
                "mode": "input" if is_input else "output",
                "dtype": engine.get_tensor_dtype(name).name,
                "shape": list(engine.get_tensor_shape(name)),
            }
            if is_input:
                low, opt, high = engine.get_tensor_profile_shape(name, 0)
                about.update(min=list(low), opt=list(opt), max=list(high))
            found.append(about)
        return found

    @property
    def is_ours(self) -> bool:
        """Whether its inputs and outputs are those of this project's engines."""
        return self._names() == {INPUT, *OUTPUTS}

    @property
    def usual_shape(self) -> tuple[int, ...]:
        """The shape of the images (B, 3, H, W) that an engine of this project is fastest at."""
        return tuple(self._engine.get_tensor_profile_shape(INPUT, 0)[1])

    def inspect(self, shape: tuple[int, ...] | None = None) -> str:
        """What TensorRT's inspector tells of the layers, as JSON, for d2_trt.report.

        Args:
            shape: (B, 3, H, W) of the images that sizes and types of a dynamic engine are told for; None tells none.

        Raises:
            EngineShapeError: the shape lies outside the engine's range, or the engine is none of this project.
        """
        trt = compat.tensorrt()
        inspector = self._engine.create_engine_inspector()
        context = None if shape is None else self._context(shape)
        if context is not None:
            # The inspector of 8.6 does not keep it alive: without a name here it would read freed memory.
            inspector.execution_context = context
        return inspector.get_engine_information(trt.LayerInformationFormat.JSON)

    def profile(
        self, images: torch.Tensor, runs: int = 20, warmup: int = 5
    ) -> tuple[float, list[dict[str, float]]]:
        """Run the engine and take the times of its layers.

        Args:
            images: (B, 3, H, W) float32 on the engine's device.
            runs: how many are timed.
            warmup: how many go before them.

        Returns:
            the mean time of a run in milliseconds, without the profiler, which makes layers wait for each other; and for
            each of as many further runs the milliseconds of each layer, by its name.

        Raises:
            EngineShapeError: the images lie outside the engine's range, or the engine is none of this project.
            BuildError: the engine did not run.
        """
        trt = compat.tensorrt()
        context = self._context(tuple(images.shape))
        images = images.contiguous()
        names = {trt.float32: torch.float32, trt.float16: torch.float16}
        with self._on_stream() as stream:
            context.set_tensor_address(INPUT, images.data_ptr())
            outputs = []  # kept alive while the engine writes to them
            for name in OUTPUTS:
                dtype = names[self._engine.get_tensor_dtype(name)]
                outputs.append(
                    torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device)
                )
                context.set_tensor_address(name, outputs[-1].data_ptr())

            def run(times: int) -> None:
                for _ in range(times):
                    if not context.execute_async_v3(stream):
                        raise BuildError("the engine did not run:\n  " + "\n  ".join(self._log.errors[-3:]))
                self._synchronize()

            run(warmup)
            started = time.perf_counter()
            run(runs)
            milliseconds = (time.perf_counter() - started) / runs * 1e3

            profiler = _profiler()
            context.profiler = profiler
            run(1)  # the first one with a profiler prepares it
            profiled = []
            for _ in range(runs):
                profiler.times.clear()
                run(1)
                profiled.append(dict(profiler.times))
        return milliseconds, profiled

    def _names(self) -> set[str]:
        return {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}

    def _context(self, shape: tuple[int, ...]):
        """An execution context for images of this shape."""
        if not self.is_ours:
            raise EngineShapeError(
                f"the engine's tensors are {', '.join(sorted(self._names()))}; an engine of this project has {INPUT}, "
                f"{', '.join(OUTPUTS)}."
            )
        low, _, high = (tuple(s) for s in self._engine.get_tensor_profile_shape(INPUT, 0))
        if len(shape) != 4 or any(not a <= n <= b for a, n, b in zip(low, shape, high)):
            raise EngineShapeError(
                f"images of {tuple(shape)} (B, 3, H, W) are outside this engine's range {low[0]}..{high[0]} (B), "
                f"{low[2]}..{high[2]} (H), {low[3]}..{high[3]} (W)."
            )
        with self._on_device():
            context = self._engine.create_execution_context()
        if context is None:
            raise BuildError("the engine has no room to run:\n  " + "\n  ".join(self._log.errors[-3:]))
        context.set_input_shape(INPUT, shape)
        return context

    # A CPU has neither devices nor streams: there the tests' double of TensorRT runs.

    def _on_device(self):
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    @contextlib.contextmanager
    def _on_stream(self):
        """A stream's handle. Not the default one, which TensorRT synchronises more than it needs."""
        if self.device.type != "cuda":
            yield 0
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                yield stream.cuda_stream

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _profiler():
    """A profiler that adds up the milliseconds of each layer, by its name, in `times`."""
    trt = compat.tensorrt()

    class LayerTimes(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name, ms):
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    return LayerTimes()
