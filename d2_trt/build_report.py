"""What a build tells of itself: in the engine's sidecar, and in the log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import compat
from .report import summarize


@dataclass
class BuildReport:
    """What was built, and in what time. JSON-serialisable through dataclasses.asdict.

    `layers` and `precisions` count the network's layers, by kind and by the type of what they compute; `plugin_layers` are
    the names of those that plugins compute. `engine` is of the engine, whose layers TensorRT fused:
    d2_trt.report.summarize. `device_memory` is what an execution context takes of the GPU, in bytes. `kernels_timed`
    counts the messages that tell of a kernel's timing. `new_timings`, of kernels that the timing cache lacked, is None
    where TensorRT does not tell (before 10.13).
    """

    engine_bytes: int = 0
    trace_seconds: float = 0.0
    build_seconds: float = 0.0
    layers: dict[str, int] = field(default_factory=dict)
    precisions: dict[str, int] = field(default_factory=dict)
    plugin_layers: list[str] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)
    device_memory: int = 0
    timing_cache_used: bool = False
    kernels_timed: int = 0
    new_timings: int | None = None

    def inspect(self, plan: bytes, log) -> None:
        """Put in what TensorRT tells of the engine. One that does not load here says so when it is to run.

        Args:
            plan: the serialized engine.
            log: a trt.ILogger.
        """
        trt = compat.tensorrt()
        compat.register_plugins()
        engine = trt.Runtime(log).deserialize_cuda_engine(plan)
        if engine is None:
            self.engine = {"problem": "the engine does not load"}
            return
        self.device_memory = compat.device_memory(engine)
        inspector = engine.create_engine_inspector()
        self.engine = summarize(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def lines(self) -> list[str]:
        """The report in a few lines, for a log."""
        lines = [
            f"Built an engine of {self.engine_bytes / 2**20:.1f} MiB in {self.build_seconds:.0f} s, traced in "
            f"{self.trace_seconds:.1f} s; to run, it takes {self.device_memory / 2**20:.1f} MiB more of the GPU's memory"
        ]
        if "problem" in self.engine:
            lines.append(f"What is in the engine is not known: {self.engine['problem']}")
        else:
            for name in ("kinds", "precisions", "plugins"):
                counts = list(self.engine[name].items())
                text = ", ".join(f"{count} {kind}" for kind, count in counts[:8]) or "none"
                lines.append(
                    f"Its {self.engine['count']} layers by {name}: {text}{', ...' if counts[8:] else ''}"
                )
        timed = self.kernels_timed if self.new_timings is None else self.new_timings
        if timed or self.new_timings is not None:
            found = "with" if self.timing_cache_used else "without"
            lines.append(f"{timed} kernels were timed anew, {found} an earlier build's timings")
        return lines
