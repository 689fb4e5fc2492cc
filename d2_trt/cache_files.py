"""Files that processes share: locks that end with their holder, and writes that are all there or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_CHUNK = 16 * 2**20
TEMPORARY = ".tmp"
# What flock answers on a file system that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

# Descriptors of held locks. A forked child shares them, and would keep a lock that its dead parent held.
_held: set[int] = set()
_held_guard = threading.Lock()


def _drop_inherited() -> None:
    for fd in list(_held):
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(
    before=_held_guard.acquire,
    after_in_parent=_held_guard.release,
    after_in_child=lambda: (_held_guard.release(), _drop_inherited()),
)


class FileLock:
    """An exclusive lock between threads and processes: a file, locked by flock.

    Freed when its holder releases it or dies, in whatever way. Not for use by two threads at once: each makes its
    own.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd: int | None = None
        self._pid = 0

    def acquire(self, *, blocking: bool = True, on_wait: Callable[[str], None] | None = None) -> bool:
        """Take the lock.

        Args:
            blocking: wait while another holds it, else return False.
            on_wait: called once, before the wait, with who holds it.

        Raises:
            OSError: the file cannot be made, or the file system has no locks (NO_LOCKS).
        """
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            taken = False
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not blocking:
                        return False
                    if on_wait is not None:
                        on_wait(_holder(fd))
                        on_wait = None
                    fcntl.flock(fd, fcntl.LOCK_EX)
                # The one before may have removed the file; then this is a lock on a file that nobody else finds.
                taken = _is_file(fd, self.path)
            finally:
                if not taken:
                    os.close(fd)
            if taken:
                break
        with _held_guard:
            _held.add(fd)
        self._fd, self._pid = fd, os.getpid()
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {timestamp()}"
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its label
            os.ftruncate(fd, 0)
            os.pwrite(fd, holder.encode(), 0)
        return True

    def release(self, *, remove: bool = False) -> None:
        """Free the lock.

        Args:
            remove: take the file away too; whoever waits for it makes a new one.
        """
        fd, self._fd = self._fd, None
        if fd is None or self._pid != os.getpid():  # in a forked child, which never held it
            return
        with contextlib.suppress(OSError):
            if remove:
                os.unlink(self.path)
            else:
                os.ftruncate(fd, 0)
        with _held_guard:
            _held.discard(fd)
        # Said outright: closing alone frees nothing while a forked child has the descriptor too.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *exception) -> None:
        self.release()


def _holder(fd: int) -> str:
    for _ in range(400):  # it writes its name once it has the lock
        name = os.pread(fd, 200, 0).decode(errors="replace").strip()
        if name:
            return name
        time.sleep(0.005)
    return "another process"


def _is_file(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def timestamp() -> str:
    """Now, in UTC, such as "2030-01-31T12:00:00Z"."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_files(contents: Mapping[Path, bytes | memoryview]) -> None:
    """Write files of one folder; each appears whole, under its name, after all of them are on the disk.

    They appear in the order given. An error leaves no temporary file, nor does it touch a file that is there,
    unless it comes between two of the last steps, the renames.

    Raises:
        OSError: a full or read-only disk, say; its filename is the file that was not written.
    """
    written: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex}{TEMPORARY}")
            written[temporary] = path
            with _naming(path):
                _write(temporary, memoryview(data).cast("B"))
        for temporary, path in list(written.items()):
            with _naming(path):
                os.replace(temporary, path)
            del written[temporary]
        with _naming(path):
            sync_folder(path.parent)
    finally:
        for temporary in written:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, data: memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        while data:
            data = data[os.write(fd, data[:_CHUNK]) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Have renames and removals in a folder survive a power cut, where the file system can."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


def readable(value: Any) -> Any:
    """The nearest that JSON has for a value: a report must not be lost, nor an engine with it, for an odd number.

    NaN and infinities become strings, NumPy's and torch's scalars numbers, other objects their str().
    """
    if isinstance(value, Mapping):
        return {str(k): readable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [readable(v) for v in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) in (int, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return readable(value.item())
    return str(value)


def dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter; one that is there stays as it is."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def lock_folder(folder: Path) -> Path:
    locks = folder / "locks"
    make_private(locks)
    return locks
