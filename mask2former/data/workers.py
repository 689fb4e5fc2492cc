"""How the worker processes of data loaders are started."""

from __future__ import annotations

import sys

from detectron2.utils import comm


def worker_context(num_workers: int) -> str | None:
    """DataLoader's `multiprocessing_context`: "fork" in the processes of a job on Linux, else None, Python's default.

    detectron2's launch spawns a job's processes, and Python would spawn what these start, too: each worker would import
    PyTorch by itself, one after the other, before the first batch.
    """
    in_job = num_workers > 0 and comm.get_world_size() > 1
    return "fork" if in_job and sys.platform == "linux" else None
