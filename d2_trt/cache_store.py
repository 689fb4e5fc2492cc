"""The engine cache's folder: reading, writing and removing entries beside other processes that do the same."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .cache_entry import CacheEntry, Damaged, EntryInfo, parse_sidecar
from .cache_failure import BuildFailure, read_failure, write_failure
from .cache_files import (
    NO_LOCKS,
    TEMPORARY,
    FileLock,
    dump,
    lock_folder,
    make_private,
    sync_folder,
    write_files,
)
from .cache_timing import LOCK as TIMING_LOCK
from .logging import get_logger

logger = get_logger("d2_trt.cache")

_FILE = re.compile(r"([0-9a-f]{64})\.(?:engine|json)")
_TEMPORARY_FILE = re.compile(r"\.(?:([0-9a-f]{64})\.(?:engine|json)|timing-.+)\.[^.]+" + re.escape(TEMPORARY))
_LOCK_FILE = re.compile(r"([0-9a-f]{64})\.(?:lock|failed)")


class EngineStore:
    """A folder with KEY.engine and KEY.json for each entry, and locks/ for what processes agree on.

    Of one key only the holder of locks/KEY.lock writes or removes files; nobody needs a lock to read. A process keeps
    a shared lock on every engine file that it loaded, which is how others know that it is in use.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory).expanduser()
        self._in_use: dict[str, int] = {}
        self._guard = threading.Lock()
        weakref.finalize(self, _close_all, self._in_use)

    def engine_path(self, key: str) -> Path:
        return self.directory / f"{key}.engine"

    def sidecar_path(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    def close(self) -> None:
        """Engines that were loaded are in use no more."""
        with self._guard:
            _close_all(self._in_use)

    @contextlib.contextmanager
    def key_lock(
        self, key: str, *, on_wait: Callable[[str], None] | None = None, remove: bool = False
    ) -> Iterator[bool | None]:
        """Hold an entry's lock: True; None where another holds it and there is no on_wait; False without locks.

        Args:
            on_wait: wait, and call this first with who holds the lock.
            remove: the lock's file goes with it.

        Raises:
            OSError: the folder or the lock cannot be made.
        """
        make_private(self.directory)
        lock = FileLock(lock_folder(self.directory) / f"{key}.lock")
        try:
            held: bool | None = lock.acquire(blocking=on_wait is not None, on_wait=on_wait) or None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                "%s has no file locks (%s): several processes may build the same engine",
                self.directory,
                error,
            )
            held = False
        try:
            yield held
        finally:
            lock.release(remove=remove)

    # What waiting processes are told.

    def _failure_path(self, key: str) -> Path:
        return self.directory / "locks" / f"{key}.failed"

    def failure(self, key: str) -> BuildFailure | None:
        """The last build's failure, whenever that was; None where it did not fail."""
        return read_failure(self._failure_path(key))

    def leave_failure(self, key: str, failure: BuildFailure) -> None:
        """Tell those that wait for an entry's lock, which the caller holds."""
        try:
            write_failure(self._failure_path(key), failure)
        except OSError as error:  # they build
            logger.debug("The failure of %s was not left for others: %s", key, error)

    def forget_failure(self, key: str) -> None:
        """The caller holds the entry's lock."""
        with contextlib.suppress(OSError):
            self._failure_path(key).unlink(missing_ok=True)

    # Reading.

    def read(self, key: str, *, hold: bool = True) -> tuple[CacheEntry | None, str]:
        """An entry; or None and what is wrong with it, "" where it is just missing.

        Args:
            hold: the engine is in use from now on.
        """
        for _ in range(3):
            before = self._stamp(key)
            try:
                return self._read_once(key, self.sidecar_path(key), hold), ""
            except FileNotFoundError:
                # An engine alone is an entry that is being written, or one that never was.
                problem = "the engine's file is missing" if before[1] is not None else ""
            except (Damaged, OSError) as error:
                problem = str(error)
            for sidecar in self._waiting_sidecars(key) if before[0] is not None else ():
                with contextlib.suppress(Damaged, OSError):
                    return self._read_once(key, sidecar, hold), ""
            if before == self._stamp(key):  # else it was replaced or removed meanwhile: look again
                break
        return None, problem

    def _waiting_sidecars(self, key: str) -> list[Path]:
        """Sidecars under temporary names: of an entry whose engine is in its place already, or of one half written."""
        return sorted(self.directory.glob(f".{key}.json.*{TEMPORARY}"))

    def _read_once(self, key: str, sidecar_path: Path, hold: bool) -> CacheEntry:
        sidecar = parse_sidecar(sidecar_path.read_bytes(), key)
        with open(self.engine_path(key), "rb") as file:
            _share(file)
            expected, size = sidecar["engine"]["size"], os.fstat(file.fileno()).st_size
            if size != expected:
                raise Damaged(f"the engine's file has {size:,} bytes instead of {expected:,}")
            data = file.read()
            if hashlib.sha256(data).hexdigest() != sidecar["engine"]["sha256"]:
                raise Damaged("the engine's file is damaged: its sha256 does not match")
            if hold:
                self._hold(key, os.dup(file.fileno()))
        return CacheEntry(key, data, sidecar, self.engine_path(key), built=False)

    def _stamp(self, key: str) -> tuple:
        def one(path: Path):
            try:
                stat = path.stat()
            except OSError:
                return None
            return stat.st_ino, stat.st_size, stat.st_ctime_ns

        return one(self.engine_path(key)), one(self.sidecar_path(key))

    def _hold(self, key: str, fd: int) -> None:
        with self._guard:
            old = self._in_use.pop(key, None)
            self._in_use[key] = fd
        if old is not None:
            os.close(old)

    def is_in_use(self, key: str) -> bool:
        """Whether a living process, this one too, has loaded the engine and keeps it."""
        try:
            with open(self.engine_path(key), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no engine, or no locks
            return False
        return False

    def list(self) -> list[EntryInfo]:
        """Every entry, the most recently used first. Sidecars are checked, of engines only the size."""
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return []
        keys = dict.fromkeys(match[1] for name in names if (match := _FILE.fullmatch(name)))
        entries = [info for key in keys if (info := self._info(key)) is not None]
        return sorted(entries, key=lambda e: e.last_used, reverse=True)

    def _info(self, key: str) -> EntryInfo | None:
        engine, sidecar = self.engine_path(key), self.sidecar_path(key)
        stats = {}
        for path in (engine, sidecar):
            with contextlib.suppress(FileNotFoundError):
                stats[path] = path.stat()
        if not stats:
            return None
        engine_size = stats[engine].st_size if engine in stats else None
        content, problem = _check_sidecar(sidecar, key, engine_size)
        if problem and engine_size is not None:
            for waiting in self._waiting_sidecars(key):  # as read() takes them
                other, wrong = _check_sidecar(waiting, key, engine_size)
                if not wrong:
                    content, problem = other, ""
        last_used = (stats.get(sidecar) or stats[engine]).st_mtime_ns / 1e9
        size = sum(stat.st_size for stat in stats.values())
        return EntryInfo(key, size, last_used, content, problem, self.is_in_use(key))

    # Writing.

    def write(self, entry: CacheEntry) -> CacheEntry:
        """Put an entry on the disk. The caller holds its lock.

        Of two names only one can change at a time. Who dies between the renames leaves the new engine in its place and
        the new sidecar under a temporary name, both whole: read() takes them, and finish() does what is left.

        Raises:
            OSError: nothing was written; its filename says where it failed.
        """
        engine, sidecar = self.engine_path(entry.key), self.sidecar_path(entry.key)
        # The sidecar last: it makes the entry.
        try:
            write_files({engine: entry.data, sidecar: dump(entry.sidecar)})
        except OSError:
            if self.read(entry.key, hold=False)[0] is None:  # one of two files may be in its place
                with contextlib.suppress(OSError):
                    self.unlink(entry.key)
            raise
        with open(engine, "rb") as file:
            _share(file)
            self._hold(entry.key, os.dup(file.fileno()))
        self.touch(entry.key)
        return CacheEntry(entry.key, entry.data, entry.sidecar, engine, entry.built)

    def write_sidecar(self, entry: CacheEntry) -> None:
        """Put another sidecar beside an engine, unless that has become another or is being built.

        Raises:
            OSError: nothing was written.
        """
        with self.key_lock(entry.key) as held:
            now, _ = self.read(entry.key, hold=False)
            if held is not None and now is not None and now.sidecar["engine"] == entry.sidecar["engine"]:
                write_files({self.sidecar_path(entry.key): dump(entry.sidecar)})
                self.touch(entry.key)

    def touch(self, key: str) -> None:
        """Note that an entry is used now.

        The time is the sidecar's mtime. It is later than every other entry's even when the clock was put back, so
        that the order of use stays true. On a disk that refuses, the order is what suffers.
        """
        try:
            with self._folder_lock():
                others = [p.stat().st_mtime_ns for p in self.directory.glob("*.json") if p.stem != key]
                used = max([time.time_ns(), *(t + 1000 for t in others)])
                os.utime(self.sidecar_path(key), ns=(used, used))
        except OSError as error:
            logger.debug("The last use of %s was not noted (%s)", self.engine_path(key), error)

    def unlink(self, key: str) -> None:
        """Remove an entry's files. The caller holds its lock."""
        for path in (self.sidecar_path(key), self.engine_path(key)):
            path.unlink(missing_ok=True)
        sync_folder(self.directory)

    def finish(self, key: str) -> None:
        """Rename what an interrupted write() left to rename. The caller holds the entry's lock.

        Raises:
            OSError: it cannot be renamed.
        """
        waiting = self._waiting_sidecars(key)
        if not waiting or not self.engine_path(key).exists() or self._fits(key, self.sidecar_path(key)):
            return
        for sidecar in waiting:
            if self._fits(key, sidecar):
                os.replace(sidecar, self.sidecar_path(key))
                sync_folder(self.directory)
                return

    def _fits(self, key: str, sidecar: Path) -> bool:
        try:
            self._read_once(key, sidecar, hold=False)
        except (Damaged, OSError):
            return False
        return True

    def remove_temporary(self, key: str | None) -> int:
        """Remove what interrupted writes left of an entry, or of timing caches (None); the caller holds the lock.

        What makes an entry whole is kept: see finish().
        """
        if key is not None:
            self.finish(key)
        found = 0
        for name in os.listdir(self.directory):
            match = _TEMPORARY_FILE.fullmatch(name)
            if match and match[1] == key:
                (self.directory / name).unlink(missing_ok=True)
                found += 1
        return found

    def remove(self, key: str) -> bool:
        """Remove an entry, unless a process uses or builds it; says whether it is gone."""
        try:
            with self.key_lock(key, remove=True) as held:
                if held is None or self.is_in_use(key):
                    return False
                self.unlink(key)
                self.remove_temporary(key)
                self.forget_failure(key)
        except OSError as error:
            logger.warning("The cached engine %s cannot be removed (%s)", self.engine_path(key), error)
            return False
        return True

    def prune(
        self,
        max_bytes: float,
        *,
        older_than: float | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> list[EntryInfo]:
        """See EngineCache.prune."""
        if not self.directory.is_dir():
            return []
        gone = []
        with contextlib.nullcontext() if dry_run else self._folder_lock():
            entries = self.list()
            total = sum(info.size for info in entries)
            now = time.time()
            # Useless ones first, then the least recently used.
            for info in sorted(entries, key=lambda e: (not e.problem, e.last_used)):
                reason = info.problem
                if everything:
                    reason = "all were to go"
                elif older_than is not None and now - info.last_used > older_than:
                    reason = f"not used for {(now - info.last_used) / 86400:.1f} days"
                elif not reason and total > max_bytes:
                    reason = "over the size limit, and the least recently used"
                if not reason or info.in_use or not (dry_run or self.remove(info.key)):
                    continue
                total -= info.size
                gone.append(EntryInfo(info.key, info.size, info.last_used, info.sidecar, reason))
            if not dry_run:
                self._sweep()
        return gone

    def _sweep(self) -> None:
        """Remove temporary files and locks that belong to no entry and that nobody holds."""
        there = {info.key for info in self.list()}
        names = os.listdir(self.directory)
        locks = lock_folder(self.directory)
        keys = {m[1] for name in os.listdir(locks) if (m := _LOCK_FILE.fullmatch(name))} - there
        unfinished = {m[1] for name in names if (m := _TEMPORARY_FILE.fullmatch(name))}
        for key in keys | (unfinished - {None}):
            with self.key_lock(key, remove=key not in there) as held:
                if held:
                    self.remove_temporary(key)
                    self.forget_failure(key)
        if None in unfinished:
            lock = FileLock(locks / TIMING_LOCK)
            if lock.acquire(blocking=False):
                try:
                    self.remove_temporary(None)
                finally:
                    lock.release()

    @contextlib.contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """Held for the moments that it takes to compare entries with each other."""
        lock = FileLock(lock_folder(self.directory) / "folder.lock")
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        try:
            yield
        finally:
            lock.release()


def _check_sidecar(path: Path, key: str, engine_size: int | None) -> tuple[Mapping[str, Any] | None, str]:
    """A sidecar's content, and what is wrong with it beside an engine's file of this size (None: there is none)."""
    try:
        content = parse_sidecar(path.read_bytes(), key)
    except FileNotFoundError:
        return None, "the sidecar is missing"
    except (Damaged, OSError) as error:
        return None, str(error)
    expected = content["engine"]["size"]
    if engine_size is None:
        return content, "the engine's file is missing"
    if engine_size != expected:
        return content, f"the engine's file has {engine_size:,} bytes instead of {expected:,}"
    return content, ""


def _share(file: BinaryIO) -> None:
    """Lock an engine's file as in use. Where there are no locks it can be read all the same."""
    for _ in range(100):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # another asks just now whether it is in use: see is_in_use()
            time.sleep(0.002)
        except OSError:
            return
        else:
            return


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
