"""TensorRT's timing caches: merged for each TensorRT version and GPU, or where that cannot be, one file for each build."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache_files import NO_LOCKS, FileLock, lock_folder, make_private, write_files
from .cache_key import digest, graph_config
from .logging import get_logger

if TYPE_CHECKING:
    from .build_spec import BuildSpec

logger = get_logger(__name__)

# Before the payload, with its sha256: TensorRT takes whatever bytes it is given.
_MAGIC = b"d2_trt timing cache 1\n"
_HEADER = len(_MAGIC) + 64 + 1
LOCK = "timing.lock"
# Of all timing caches in a folder; the oldest go first.
MAX_FILES = 64
MAX_BYTES = 256 * 2**20


class TimingCache:
    """Kernel timings of earlier builds for one TensorRT version and GPU.

    Where two of them combine, there is one file of them all. Where they do not, every build has a file of its own, so that
    builds at the same time lose nothing; a build starts from the one that has most in common with it, then the newest.

    What is on the disk only saves time: nothing about it raises. A damaged file is ignored, with a warning, and
    replaced by the next merge into it.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        tensorrt: str,
        gpu: str,
        compute_capability: Sequence[int],
        build: Sequence[Any] = (),
        writable: bool = True,
    ):
        """
        Args:
            build: of what_is_timed: what is built, first what tells most.
        """
        parts = (tensorrt, gpu, "sm" + "".join(map(str, compute_capability)))
        slugs = [re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts]
        self._folder = Path(directory).expanduser()
        self._name = f"timing-{'-'.join(slugs)}"
        self._build = [digest(part)[:12] for part in build]
        self.path = self._folder / f"{self._name}.cache"
        self.own_path = self._folder / f"{'-'.join([self._name, *self._build])}.cache"
        self._writable = writable

    def load(self) -> bytes:
        """The timings that fit best, as TensorRT serialized them; empty where there are none."""
        for path in self._best_first():
            timings = self._read(path)
            if timings:
                logger.debug("The build starts from the timings in %s", path)
                return timings
        return b""

    def merge(self, new: bytes, combine: Callable[[bytes, bytes], bytes] | None) -> bool:
        """Add a build's timings to those on the disk, which other processes may have added to since load().

        Args:
            new: serialized timings.
            combine: (on the disk, new) -> both, serialized; by ITimingCache.combine. Where it raises, the new ones
                replace the old. None where timings do not combine: they get a file for this build.

        Returns:
            whether they are on the disk; where not, a warning said why.
        """
        if not self._writable or not new:
            return False
        path = self.own_path if combine is None else self.path
        try:
            make_private(self._folder)
            lock = FileLock(lock_folder(self._folder) / LOCK)
            try:
                lock.acquire()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            try:
                merged = new if combine is None else self._combined(new, combine)
                write_files({path: _header(merged) + merged})
                self._drop_oldest(path)
            finally:
                lock.release()
        except OSError as error:
            logger.warning("The timing cache %s was not written (%s): later builds take longer", path, error)
            return False
        return True

    def _best_first(self) -> list[Path]:
        """Files of this TensorRT and GPU: those that share most of what is built, from its beginning on, then the newest."""
        ranked = []
        with contextlib.suppress(OSError):  # load() tells what cannot be read of what was found
            for path in (self.path, *self._folder.glob(f"{self._name}-*.cache")):
                with contextlib.suppress(FileNotFoundError):
                    written = path.stat().st_mtime_ns
                    theirs = path.name.removeprefix(self._name).removesuffix(".cache").split("-")[1:]
                    common = takewhile(lambda pair: pair[0] == pair[1], zip(self._build, theirs))
                    ranked.append((len(list(common)), written, path))
        return [path for *_, path in sorted(ranked, reverse=True)]

    def _read(self, path: Path) -> bytes:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            logger.warning(
                "The timing cache %s cannot be read (%s): the build starts without it", path, error
            )
            return b""
        payload = content[_HEADER:]
        if content[:_HEADER] != _header(payload):
            logger.warning("The timing cache %s is damaged: the build starts without it", path)
            return b""
        return payload

    def _combined(self, new: bytes, combine: Callable[[bytes, bytes], bytes]) -> bytes:
        old = self._read(self.path)
        if not old or old == new:
            return new
        try:
            return bytes(combine(old, new))
        except Exception as error:
            logger.warning(
                "The timing cache %s does not combine with this build's: replaced (%s)", self.path, error
            )
            return new

    def _drop_oldest(self, kept: Path) -> None:
        """Keep the folder's timing caches within their bounds; the one that was written now stays."""
        others = []
        for path in timing_caches(self._folder):
            with contextlib.suppress(OSError):
                stat = path.stat()
                if path != kept:
                    others.append((stat.st_mtime_ns, stat.st_size, path))
        size = kept.stat().st_size
        for count, (_, more, path) in enumerate(sorted(others, reverse=True), start=2):
            size += more
            if count > MAX_FILES or size > MAX_BYTES:
                path.unlink(missing_ok=True)


def what_is_timed(cfg, spec: BuildSpec) -> list[Any]:
    """What decides which kernels a build times: the network, then types and plugins, then sizes."""
    network = graph_config(cfg)
    del network["META_ARCHITECTURE"]  # of the same network there are two
    sizes = {name: value for name, value in vars(spec).items() if name.endswith("_shape")}
    kinds = {name: value for name, value in vars(spec).items() if name not in sizes}
    return [network, kinds, sizes]


def timing_caches(directory: str | os.PathLike) -> list[Path]:
    """The files of all TensorRT versions, GPUs and builds in a cache folder."""
    return sorted(Path(directory).expanduser().glob("timing-*.cache"))


def _header(payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
