"""What is wrong with a data set's files, said with the name of the file and the image."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.utils.file_io import PathManager

# What reading and decoding raise: numbers that are null or text (TypeError) or too large (OverflowError), lists that are too
# short (IndexError). PIL tells of some broken PNGs by a SyntaxError.
UNREADABLE = (ValueError, TypeError, OverflowError, KeyError, IndexError, OSError, SyntaxError)


class AnnotationError(ValueError):
    """A file or record of a data set cannot be used; the message says which one, and why."""


@contextlib.contextmanager
def naming(record: Mapping[str, Any], doing: str) -> Iterator[None]:
    """Have errors inside name the record's file and image.

    Args:
        record: in detectron2's format; only "file_name" and "image_id" are looked at.
        doing: such as "trained on".

    Raises:
        AnnotationError: in place of what reading and decoding raise.
    """
    try:
        yield
    except AnnotationError:
        raise
    except UNREADABLE as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        image = f" (image_id {record['image_id']!r})" if "image_id" in record else ""
        raise AnnotationError(
            f"{record.get('file_name', 'a record')}{image} cannot be {doing}: {reason}"
        ) from error


def read_json(path: str) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        AnnotationError: it is not JSON, such as half a file.
    """
    with PathManager.open(path) as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise AnnotationError(
                f"{path} is no valid JSON ({error}): is the download, or the tool that writes it, complete?"
            ) from error
