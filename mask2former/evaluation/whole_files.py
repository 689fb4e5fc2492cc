"""Results of an evaluation appear in one piece, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

_PREFIX = ".part-"


@contextlib.contextmanager
def whole_files(folder: str) -> Iterator[str]:
    """A folder to write to, whose content moves to `folder` at the end.

    A process that fails or is killed in between leaves what was in `folder` before. Files and directories of the same name
    are replaced. A folder of a remote store is written to as it is.
    """
    if "://" in folder:
        yield folder
        return
    os.makedirs(folder, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=_PREFIX, dir=folder)
    try:
        yield temporary
        for name in sorted(os.listdir(temporary)):
            source, target = os.path.join(temporary, name), os.path.join(folder, name)
            if os.path.isdir(target) and not os.path.islink(target):
                # No rename replaces a directory that holds something.
                os.rename(target, os.path.join(temporary, f"{name}.old"))
            os.replace(source, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: str) -> None:
    """Remove what killed processes left half written in a folder; no other evaluation may be running there."""
    if "://" in folder or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.startswith(_PREFIX):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


class WholeFilesMixin:
    """Before an evaluator of detectron2, which writes its files in evaluate(), below its `_output_dir`."""

    def evaluate(self, *args, **kwargs):
        folder = self._output_dir
        if not folder:
            return super().evaluate(*args, **kwargs)
        with whole_files(folder) as self._output_dir:
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self._output_dir = folder
