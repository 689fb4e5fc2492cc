"""TensorRT's timing caches, one for each TensorRT version and GPU, merged by whoever builds."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .cache_files import NO_LOCKS, FileLock, lock_folder, make_private, write_files
from .logging import get_logger

logger = get_logger(__name__)

# Before the payload, with its sha256: TensorRT takes whatever bytes it is given.
_MAGIC = b"d2_trt timing cache 1\n"
_HEADER = len(_MAGIC) + 64 + 1
LOCK = "timing.lock"


class TimingCache:
    """Kernel timings of earlier builds for one TensorRT version and GPU.

    What is on the disk only saves time: nothing about it raises. A damaged file is ignored, with a warning, and
    replaced by the next merge.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        tensorrt: str,
        gpu: str,
        compute_capability: Sequence[int],
        writable: bool = True,
    ):
        parts = (tensorrt, gpu, "sm" + "".join(map(str, compute_capability)))
        slugs = [re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts]
        self.path = Path(directory).expanduser() / f"timing-{'-'.join(slugs)}.cache"
        self._writable = writable

    def load(self) -> bytes:
        """The timings, as TensorRT serialized them; empty where there are none."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            logger.warning(
                "The timing cache %s cannot be read (%s): the build starts without it", self.path, error
            )
            return b""
        payload = content[_HEADER:]
        if content[:_HEADER] != _header(payload):
            logger.warning("The timing cache %s is damaged: the build starts without it", self.path)
            return b""
        return payload

    def merge(self, new: bytes, combine: Callable[[bytes, bytes], bytes]) -> bool:
        """Add a build's timings to those on the disk, which other processes may have added to since load().

        Args:
            new: serialized timings.
            combine: (on the disk, new) -> both, serialized; by ITimingCache.combine. Where it raises, the new ones
                replace the old.

        Returns:
            whether they are on the disk; where not, a warning said why.
        """
        if not self._writable or not new:
            return False
        try:
            make_private(self.path.parent)
            lock = FileLock(lock_folder(self.path.parent) / LOCK)
            try:
                lock.acquire()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            try:
                merged = self._combined(new, combine)
                write_files({self.path: _header(merged) + merged})
            finally:
                lock.release()
        except OSError as error:
            logger.warning(
                "The timing cache %s was not written (%s): later builds take longer", self.path, error
            )
            return False
        return True

    def _combined(self, new: bytes, combine: Callable[[bytes, bytes], bytes]) -> bytes:
        old = self.load()
        if not old or old == new:
            return new
        try:
            return bytes(combine(old, new))
        except Exception as error:
            logger.warning(
                "The timing cache %s does not combine with this build's: replaced (%s)", self.path, error
            )
            return new


def timing_caches(directory: str | os.PathLike) -> list[Path]:
    """The files of all TensorRT versions and GPUs in a cache folder."""
    return sorted(Path(directory).expanduser().glob("timing-*.cache"))


def _header(payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
