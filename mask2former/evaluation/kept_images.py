"""What evaluators keep of each image, in files while an evaluation runs, so that after a crash it can go on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

FOLDER = ".unfinished"
_PART = ".part-"
# What a crash costs at most, and what is written in one piece: the model waits meanwhile.
_SECONDS = 5.0
_MOST_BYTES = 8_000_000
_DIGEST_SIZE = 32
# Results do not depend on these.
_FREE = ("DATALOADER.NUM_WORKERS", "OUTPUT_DIR", "TEST.EVALUATION_THREADS")
# Fields of metadata that name what predictions are compared with. Images are named by the records.
_TRUTH = ("gt_dir", "json_file", "panoptic_json", "panoptic_root", "sem_seg_root")


class KeptImages:
    """The images that this process has evaluated of a data set: those of an evaluation that ended early, then its own.

    Files hold some images each and appear in one piece. One that is damaged all the same, as after a power failure, ends
    what is taken over.
    """

    def __init__(self, folder: str, name: str, runner: Callable[[], dict], *, total: int, batch_size: int):
        """
        Args:
            folder: of this evaluation alone, see `fingerprint`.
            name: of the data set.
            runner: what runs the network, as a backend's `describe`.
            total: images of this process.
            batch_size: images are taken over in whole batches, so that the rest comes in the batches that it would have.
        """
        self._folder = os.path.join(folder, quote(name, safe=""), str(comm.get_rank()))
        os.makedirs(self._folder, exist_ok=True)
        self._files = sorted(n for n in os.listdir(self._folder) if n.isdigit())
        self._total = total
        self._runner = runner
        self._images_before = Counter(runner().get("images", {}))
        self.earlier, self.earlier_runners = self._read(batch_size)
        self._done = len(self.earlier)
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._written_at = time.monotonic()
        self._usable = True

    def batch_runner(self) -> dict:
        """What ran the network since the last call; to be called after each batch."""
        told = {
            key: value for key, value in self._runner().items() if key in ("backend", "images", "reasons")
        }
        if "images" in told:
            now = Counter(told["images"])
            told["images"], self._images_before = dict(now - self._images_before), now
        return told

    def add(self, examined: list, runner: dict | None) -> None:
        """Keep an image.

        Args:
            examined: what each evaluator keeps of it.
            runner: `batch_runner` of its batch, for the first image of one; else None.
        """
        if not self._usable:
            return
        # Here, and not of many at once: the GPU is busy with the next images.
        self._waiting.append(pickle.dumps((examined, runner), protocol=pickle.HIGHEST_PROTOCOL))
        self._waiting_bytes += len(self._waiting[-1])
        if time.monotonic() - self._written_at >= _SECONDS or self._waiting_bytes >= _MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not in a file yet."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._written_at = time.monotonic()
        if not waiting:
            return
        content = pickle.dumps((self._done, waiting), protocol=pickle.HIGHEST_PROTOCOL)
        try:
            handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=_PART)
            with os.fdopen(handle, "wb") as file:
                file.write(_digest(content))
                file.write(content)
            self._files.append(f"{int(self._files[-1]) + 1 if self._files else 0:08d}")
            os.replace(temporary, os.path.join(self._folder, self._files[-1]))
        except OSError as error:
            logger.warning("a crash from here on loses this evaluation (%s)", error)
            self._usable = False
            # A disk that is full needs the room for the results.
            shutil.rmtree(self._folder, ignore_errors=True)
        self._done += len(waiting)

    def _read(self, batch_size: int) -> tuple[list[list], list[dict]]:
        kept: list[tuple[list, dict | None]] = []
        for name in self._files:
            with open(os.path.join(self._folder, name), "rb") as file:
                data = file.read()
            digest, content = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
            if digest != _digest(content):
                logger.warning("%s is damaged and left out", os.path.join(self._folder, name))
                continue
            start, images = pickle.loads(content)
            if start <= len(kept):
                # An evaluation that went on took whole batches over, and did the rest of one again.
                kept[start:] = map(pickle.loads, images)
        if len(kept) < self._total:
            del kept[len(kept) - len(kept) % batch_size :]
        return [examined for examined, _ in kept], [runner for _, runner in kept if runner is not None]


def keep_images(
    cfg: CfgNode, model: nn.Module, records: dict[str, Sequence[dict]], folder: str, *, resume: bool
) -> str | None:
    """The folder of an evaluation's images in `folder`; those of others are removed. All processes must call it.

    Args:
        records: of each data set of the evaluation.
        resume: whether images that are there already, of the same evaluation, stay.

    Returns:
        None where files cannot be kept or told apart: those of remote stores.
    """
    names = [*_truth(records), *_images(records)]
    if any("://" in name for name in (folder, *names)):
        logger.info("data or results are remote: after a crash this evaluation begins anew")
        return None
    # Processes may differ, in their GPUs for one; all of them begin anew then.
    everyone = comm.all_gather(fingerprint(cfg, model, records))
    own = os.path.join(folder, FOLDER, hashlib.sha256("".join(everyone).encode()).hexdigest()[:32])
    if comm.get_local_rank() == 0:  # of each machine: they need not share the folder
        others = _others(own)
        if comm.is_main_process() and resume and others and not os.path.isdir(own):
            logger.warning(
                "--resume: the evaluation that did not come to its end here was of other weights, data, keys or code, or "
                "had another number of processes: this one begins anew"
            )
        for path in others if resume else [*others, own]:
            shutil.rmtree(path, ignore_errors=True)
    comm.synchronize()
    os.makedirs(own, exist_ok=True)
    return own


def forget_images(own: str | None) -> None:
    """Remove a folder of `keep_images`, with those beside it, when the main process is here and has saved the results.

    All processes must call it.
    """
    if own is None:
        return
    comm.synchronize()
    if comm.get_local_rank() == 0:
        shutil.rmtree(os.path.dirname(own), ignore_errors=True)


def fingerprint(cfg: CfgNode, model: nn.Module, records: dict[str, Sequence[dict]]) -> str:
    """Of all that an evaluation's results depend on: weights, keys, records, images, truth, this code, versions, GPU.

    Images and truth count by the sizes and times of their files, not their contents.
    """
    found = hashlib.sha256()

    def add(value: Any) -> None:
        found.update(json.dumps(value, default=repr).encode() + b"\0")

    cfg = cfg.clone()
    cfg.defrost()
    for key in _FREE:
        *parents, name = key.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        del node[name]
    add([cfg.dump(), type(model).__qualname__, torch.__version__, detectron2.__version__])
    for package in dict.fromkeys((Path(__file__).parents[1], _package_of(getattr(model, "backend", None)))):
        for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".so")) if package else ():
            add(str(path.relative_to(package)))
            found.update(path.read_bytes())
    devices = set()
    for name, tensor in model.state_dict().items():
        devices.add(torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else "cpu")
        add([name, str(tensor.dtype), list(tensor.shape)])
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    add(sorted(devices))
    for name, some in records.items():
        add(name)
        for record in some:
            add(record)
    for path in _images(records):
        add(_stat(path))
    for path in _truth(records):
        add(_stat(path))
        for parent, folders, files in os.walk(path):
            folders.sort()
            add([_stat(os.path.join(parent, file)) for file in sorted(files)])
    return found.hexdigest()


def _package_of(runner: Any) -> Path | None:
    """The folder of the package that the class of what runs the network is from; None where that is in none."""
    package = sys.modules.get(type(runner).__module__.partition(".")[0])
    paths = getattr(package, "__path__", ())
    return Path(next(iter(paths))) if paths else None


def _images(records: dict[str, Sequence[dict]]) -> Iterable[str]:
    return (record["file_name"] for some in records.values() for record in some)


def _truth(records: dict[str, Sequence[dict]]) -> list[str]:
    found = (MetadataCatalog.get(name).get(field) for name in records for field in _TRUTH)
    return [path for path in found if path]


def _stat(path: str) -> list | None:
    try:
        found = os.stat(path)
    except OSError:
        return None  # the evaluation will say so
    return [path, found.st_size, found.st_mtime_ns]


def _others(own: str) -> list[str]:
    parent = os.path.dirname(own)
    if not os.path.isdir(parent):
        return []
    return [os.path.join(parent, n) for n in os.listdir(parent) if n != os.path.basename(own)]


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
