"""The engine cache: an engine for what it is made from, from the disk or built."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .cache_entry import BuiltEngine, CacheEntry, EntryInfo, make_sidecar, with_parity
from .cache_failure import BuildFailure
from .cache_key import canonical, digest
from .cache_store import EngineStore
from .errors import CacheError
from .logging import get_logger, shown_on_stderr

__all__ = ["MODES", "BuiltEngine", "CacheEntry", "EngineCache", "EntryInfo"]

logger = get_logger(__name__)

# Documented at MODEL.TENSORRT.CACHE.MODE in d2_trt/config.py.
MODES = ("readwrite", "read", "require", "rebuild", "off")


class EngineCache:
    """A folder of engines that any number of threads and processes share.

    An entry is KEY.engine and KEY.json: what the key was made from, sha256 and size of the engine, when and where it
    was built, build report, parity numbers, and a checksum of all this. Both are written under temporary names, synced
    and renamed, under the key's lock: a process that is killed on the way leaves the entry that was there or the new
    one, whole. Whatever is damaged, or made from something else than its name says, is a miss and is built again. Over
    the size limit, entries go least recently used first, but none that a living process has loaded: keep the EngineCache
    as long as its engines.

    What fails on the disk costs the caching, never the engine: a warning says so, and get_or_build returns an entry
    without a path.
    """

    def __init__(self, directory: str | os.PathLike, mode: str = "readwrite", max_bytes: float = math.inf):
        """
        Args:
            directory: made when there is something to write, for its owner only.
            mode: one of MODES.
            max_bytes: of all entries.

        Raises:
            CacheError: no such mode.
        """
        if mode not in MODES:
            raise CacheError(f"the engine cache's mode is {mode!r}; allowed: {', '.join(map(repr, MODES))}.")
        self.mode = mode
        self.max_bytes = max_bytes
        self._store = EngineStore(directory)
        self._rebuilt: set[str] = set()
        self._warned = False

    @classmethod
    def from_options(cls, options) -> EngineCache:
        """For TensorRTOptions.cache."""
        return cls(options.dir, options.mode, options.max_bytes)

    @property
    def directory(self):
        return self._store.directory

    def get_or_build(
        self,
        ingredients: Mapping[str, Any],
        build: Callable[[], BuiltEngine],
        terms: Mapping[str, Any] | None = None,
    ) -> CacheEntry:
        """The engine made from these ingredients: from the disk, or built and put there.

        Of the threads and processes that ask for the same one, one builds and the others wait for it. Should TensorRT or
        the comparison with PyTorch refuse it, those that wait on the same terms get that error too, and whoever asks later
        builds. Should the build fail otherwise, or die, the next in line builds. Different engines are built at the same
        time.

        Args:
            ingredients: JSON-serialisable; see cache_key.key_ingredients.
            build: called at most once. Its exceptions pass through, and no engine is written.
            terms: what decides beside the ingredients whether the build succeeds.

        Raises:
            CacheError: mode is "require" and there is no such engine; or ingredients that are not JSON's.
            BuildError, ConversionError, ParityError: the build that this one waited for failed so.
        """
        ingredients = json.loads(canonical(ingredients))
        key = digest(ingredients)
        if self.mode == "off":
            return self._build(key, ingredients, build)
        self._warn_of_strangers()
        anew = self.mode == "rebuild" and key not in self._rebuilt
        found, problem = self._store.read(key)
        if found is not None and not anew:
            return self._used(found)
        if self.mode in ("read", "require"):
            if problem:
                logger.warning("The cached engine %s is not used: %s", self._store.engine_path(key), problem)
            if self.mode == "require":
                raise CacheError(self._missing(key, ingredients))
            return self._build(key, ingredients, build)

        terms = terms or {}
        waited_for: list[str] = []

        def on_wait(holder: str) -> None:
            waited_for.append(holder)
            logger.info("Waiting for %s, which builds this engine", holder)

        earlier = self._store.failure(key)  # before asking for the lock: nobody can fail unseen in between
        with contextlib.ExitStack() as stack:
            stack.enter_context(shown_on_stderr())
            try:
                held = stack.enter_context(self._store.key_lock(key, on_wait=on_wait))
            except OSError as error:
                self._warn_uncached(error)
                return self._build(key, ingredients, build)
            if held:
                with contextlib.suppress(OSError):  # it can be read as it is
                    self._store.finish(key)
            # While this one waited, another may have built it; with "rebuild", built it again.
            now, problem = self._store.read(key)
            if now is not None and not (anew and found is not None and now.sidecar == found.sidecar):
                self._rebuilt.add(key)
                return self._used(now)
            failure = self._store.failure(key) if waited_for else None
            if failure is not None and failure != earlier and failure.is_for(terms):
                raise failure.error()
            self._clear(key, problem, held)
            try:
                entry = self._build(key, ingredients, build)
            except Exception as error:
                failure = BuildFailure.of(error, terms)
                if held and failure is not None:
                    self._store.leave_failure(key, failure)
                raise
            self._store.forget_failure(key)
            self._rebuilt.add(key)
            return self._keep(entry)

    def load(self, key: str) -> CacheEntry | None:
        """An entry by its key, checked; None where it is missing or, with a warning, damaged."""
        if self.mode == "off":
            return None
        entry, problem = self._store.read(key)
        if problem:
            logger.warning("The cached engine %s is not used: %s", self._store.engine_path(key), problem)
        return None if entry is None else self._used(entry)

    def note_parity(self, entry: CacheEntry, parity: Mapping[str, Any]) -> CacheEntry:
        """The entry with the numbers of another comparison, in its sidecar too where the cache may be written to."""
        entry = replace(entry, sidecar=with_parity(entry.sidecar, parity))
        if entry.path is not None and self.mode in ("readwrite", "rebuild"):
            try:
                self._store.write_sidecar(entry)
            except OSError as error:
                logger.warning("The comparison of %s cannot be kept: %s", entry.path, error)
        return entry

    def list(self) -> list[EntryInfo]:
        """Every entry, the most recently used first. Sidecars are checked, of engines only the size."""
        return self._store.list()

    def verify(self) -> list[EntryInfo]:
        """As list(), with every engine read and compared with its sidecar's sha256."""
        checked = []
        for info in self._store.list():
            entry, problem = self._store.read(info.key, hold=False)
            if entry is None and not problem:
                # An engine alone; else it was removed since it was listed.
                problem = info.problem if self._store.engine_path(info.key).exists() else ""
                if not problem:
                    continue
            checked.append(replace(info, problem=problem))
        return checked

    def remove(self, key: str) -> bool:
        """Remove an entry, unless a process uses or builds it; says whether it is gone."""
        return self._store.remove(key)

    def prune(
        self,
        *,
        max_bytes: float | None = None,
        older_than: float | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> list[EntryInfo]:
        """Remove entries that are damaged, old or over the size limit, and what dead processes left.

        Args:
            max_bytes: of all entries; None is this cache's own limit. The least recently used go first.
            older_than: seconds since the last use. One from the future, by a clock put back, has age 0.
            everything: all entries.
            dry_run: remove nothing.

        Returns:
            what went, or with dry_run would go; `problem` says why. What is in use or being built stays.

        Raises:
            OSError: the folder cannot be read or written.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        return self._store.prune(limit, older_than=older_than, everything=everything, dry_run=dry_run)

    def close(self) -> None:
        """Engines that were loaded are in use no more, and may be dropped."""
        self._store.close()

    def _used(self, entry: CacheEntry) -> CacheEntry:
        if self.mode in ("readwrite", "rebuild"):
            self._store.touch(entry.key)
        logger.info("Using the cached engine %s", entry.path)
        return entry

    def _build(
        self, key: str, ingredients: Mapping[str, Any], build: Callable[[], BuiltEngine]
    ) -> CacheEntry:
        with shown_on_stderr():
            if self.mode != "off":
                nearest = self._nearest(ingredients)
                logger.info(
                    "No cached engine fits%s", f": the nearest differs in {nearest}" if nearest else ""
                )
            started = time.monotonic()
            built = build()
        sidecar = make_sidecar(key, ingredients, built, time.monotonic() - started)
        return CacheEntry(key, built.data, sidecar, path=None, built=True)

    def _clear(self, key: str, problem: str, held: bool | None) -> None:
        """Make way for a build, with at most one warning: what is wrong goes, and what an interrupted write left."""
        path = self._store.engine_path(key)
        left = 0
        try:
            if problem:
                self._store.unlink(key)
            # Without locks they may be another's, who is writing them now.
            left = self._store.remove_temporary(key) if held else 0
        except OSError as error:
            logger.debug("Not cleared for %s: %s", key, error)  # the write that follows will say so
        if problem:
            logger.warning("The cached engine %s is built again: %s", path, problem)
        elif left:
            logger.warning(
                "Removed %d unfinished file%s of an interrupted write of %s", left, "s"[: left - 1], path
            )

    def _keep(self, entry: CacheEntry) -> CacheEntry:
        """Write what was built; the entry as it is where that fails."""
        size = entry.sidecar["engine"]["size"]
        if size > self.max_bytes:
            logger.warning(
                "The engine has %.2f GB, more than all engines in %s may have (%.2f GB): it serves this run only, and is "
                "built again next time. Raise MODEL.TENSORRT.CACHE.MAX_GB.",
                size / 1e9,
                self.directory,
                self.max_bytes / 1e9,
            )
            return entry
        try:
            entry = self._store.write(entry)
        except OSError as error:
            self._warn_uncached(error, size)
            return entry
        logger.info("Kept the engine as %s (%.1f MB)", entry.path, size / 1e6)
        try:
            for gone in self.prune():
                logger.info("Removed the cached engine %s: %s", gone.key, gone.problem)
        except OSError as error:
            logger.warning("The engine cache %s was not cleaned up (%s)", self.directory, error)
        return entry

    def _warn_uncached(self, error: OSError, size: int | None = None) -> None:
        what = "" if size is None else f" ({size / 1e6:.1f} MB)"
        logger.warning(
            "The engine%s cannot be kept in %s: %s. It serves this run only, and is built again next time. Make room or "
            "grant access there, set MODEL.TENSORRT.CACHE.DIR to another folder, or MODEL.TENSORRT.CACHE.MODE read.",
            what,
            self.directory,
            error,
        )

    def _missing(self, key: str, ingredients: Mapping[str, Any]) -> str:
        nearest = self._nearest(ingredients)
        return (
            f"MODEL.TENSORRT.CACHE.MODE is 'require', but {self.directory} has no engine {key}"
            + (f" (the nearest differs in {nearest})" if nearest else "")
            + ". Build it ahead with tools/build_engine.py, or set MODEL.TENSORRT.CACHE.MODE readwrite."
        )

    def _nearest(self, ingredients: Mapping[str, Any]) -> str:
        """In what the entry that has most in common with these ingredients differs from them; "" without entries."""
        differences = []
        try:
            for info in self._store.list():
                if info.sidecar is not None and not info.problem:
                    other = info.sidecar["ingredients"]
                    differs = [n for n in {**ingredients, **other} if ingredients.get(n) != other.get(n)]
                    differences.append((len(differs), ", ".join(differs)))
        except OSError as error:
            logger.debug("%s cannot be listed: %s", self.directory, error)
        return min(differences)[1] if differences else ""

    def _warn_of_strangers(self) -> None:
        with contextlib.suppress(OSError):
            if not self._warned and os.stat(self.directory).st_mode & stat.S_IWOTH:
                self._warned = True
                logger.warning(
                    "Everyone may write to the engine cache %s, and engines hold code for the GPU: chmod o-w it, or set "
                    "MODEL.TENSORRT.CACHE.DIR to another folder",
                    self.directory,
                )
