"""What a build that failed leaves for those that wait for it, so that they do not spend the same minutes after it."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cache_files import dump, readable, timestamp
from .errors import BuildError, ConversionError, D2TRTError, GPUMemoryError, ParityError

# What the same model meets in every process. Anything else may be of one process alone, or of a moment.
_SHARED = {kind.__name__: kind for kind in (BuildError, ConversionError, ParityError)}


@dataclass(frozen=True)
class BuildFailure:
    """A failed build: the error, and what beside the engine's ingredients decided it."""

    kind: str
    message: str
    terms: Any
    by: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(cls, error: BaseException, terms: Mapping[str, Any]) -> BuildFailure | None:
        """None where another process may fare better: its GPU may have the memory, say."""
        kind = next((name for name, kind in _SHARED.items() if isinstance(error, kind)), None)
        if kind is None or isinstance(error, GPUMemoryError):
            return None
        by = f"process {os.getpid()} on {socket.gethostname()}, {timestamp()}"
        return cls(kind, str(error), readable(terms), by)

    def error(self) -> D2TRTError:
        """The error, for a process that waited."""
        return _SHARED[self.kind](
            f"{self.message}\nSo it went for {self.by}, while this process waited for the engine: it is not built again."
        )

    def is_for(self, terms: Mapping[str, Any]) -> bool:
        return self.terms == readable(terms)


def read_failure(path: Path) -> BuildFailure | None:
    """The failure in a file; None where there is none, or where it is damaged."""
    try:
        failure = BuildFailure(**json.loads(path.read_bytes()))
        return failure if failure.kind in _SHARED else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write_failure(path: Path, failure: BuildFailure) -> None:
    """Under the lock of the engine, which those that the failure is for have when they read it."""
    path.write_bytes(dump(asdict(failure)))
