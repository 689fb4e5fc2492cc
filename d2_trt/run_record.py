"""What ran how many images, and why PyTorch ran any, as the results of an evaluation tell it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable
from typing import Any

from .logging import get_logger

logger = get_logger(__name__)


class RunRecord:
    """Counts of a backend's images and its warnings. Safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._images: Counter[str] = Counter()
        self._reasons: dict[Hashable, str] = {}

    def count(self, runner: str, images: int) -> None:
        """Images that "tensorrt" or "torch" has run."""
        with self._lock:
            self._images[runner] += images

    def warn_once(self, about: Hashable, message: str) -> None:
        """Warn, and keep the message for describe(), unless something was said about this before."""
        with self._lock:
            if about in self._reasons:
                return
            self._reasons[about] = message
        logger.warning(message)

    def describe(self) -> dict[str, Any]:
        """ "images", how many each of the two ran, and "reasons" for PyTorch running any."""
        with self._lock:
            images = {runner: self._images[runner] for runner in ("tensorrt", "torch")}
            return {"images": images, "reasons": list(self._reasons.values())}
