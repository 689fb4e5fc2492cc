"""Checkpoints that are whole, whenever the job that writes them ends, and named where they are not."""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

# What torch.load and pickle raise of a file that is cut off, empty, or of another kind.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    pickle.UnpicklingError,
)


class CheckpointError(Exception):
    """A checkpoint cannot be read; the message says which one, and what to do."""


def first_sentence(error: BaseException) -> str:
    """How an error begins. torch.load goes on with paragraphs of advice that do not fit a damaged file."""
    lines = str(error).splitlines()
    return re.split(r"\. ", lines[0])[0].rstrip(".,:") if lines else type(error).__name__


def explain_failure(weights: str) -> None:
    """Raise CheckpointError where a checkpoint is missing or cannot be read.

    For after detectron2's DefaultPredictor has failed, which does not say which file it was. Reads the whole file.
    """
    if not weights or "://" in weights:
        return
    if not os.path.isfile(weights):
        raise CheckpointError(f"MODEL.WEIGHTS {weights}: there is no such file")
    NamingCheckpointer(torch.nn.Module())._load_file(weights)


class NamingCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which names a checkpoint that it cannot read."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except _UNREADABLE as error:
            instead = "name another one in MODEL.WEIGHTS, or fetch or export it again"
            last = os.path.join(self.save_dir or "", "last_checkpoint")
            if self.has_checkpoint() and os.path.abspath(filename) == os.path.abspath(
                self.get_checkpoint_file()
            ):
                others = ", ".join(self._others(filename)) or "there is none"
                instead = f"write the name of another checkpoint ({others}) into {last}, or remove that file to start anew"
            what = f"{type(error).__name__}: {first_sentence(error)}"
            raise CheckpointError(
                f"the checkpoint {filename} cannot be read ({what}): is it complete? To go on, {instead}"
            ) from error

    def _load_model(self, checkpoint: dict[str, Any]):
        """As detectron2's, and a line that says how much of the model the checkpoint had."""
        incompatible = super()._load_model(checkpoint)
        lacking = {*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)}
        # The losses' weights say nothing of a model's training.
        wanted = {key for key in self.model.state_dict() if not key.startswith("criterion.")}
        if lacking & wanted:
            self.logger.warning(
                "%d of the model's %d tensors were in the checkpoint; the others keep their initial values. A trained "
                "model of this config has all of them.",
                len(wanted - lacking),
                len(wanted),
            )
        return incompatible

    def _others(self, filename: str) -> list[str]:
        """Names of the other checkpoints beside one, the newest first."""
        folder = os.path.dirname(filename)
        found = [os.path.join(folder, n) for n in os.listdir(folder or ".") if n.endswith(".pth")]
        found = [path for path in found if os.path.abspath(path) != os.path.abspath(filename)]
        return [os.path.basename(path) for path in sorted(found, key=os.path.getmtime, reverse=True)]


class WholeFileCheckpointer(NamingCheckpointer):
    """detectron2's checkpointer, whose files appear in one piece.

    A job that is killed while it writes leaves the checkpoint before it in place, and `last_checkpoint` naming a whole
    file: `--resume` goes on from there. detectron2's own leaves half a file.
    """

    def save(self, name: str, **kwargs) -> None:
        """Write SAVE_DIR/{name}.pth with the model, what else was given to be saved, and `kwargs`."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        self._replace(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Have `last_checkpoint` name a file of SAVE_DIR."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        self._replace(path, lambda file: file.write(last_filename_basename.encode()))

    def tag_evaluation(self, iterations: int) -> None:
        """Have `last_evaluation` tell that the model of so many iterations has been evaluated."""
        if self.save_dir and self.save_to_disk:
            self._replace(self._evaluation_file, lambda file: file.write(str(iterations).encode()))

    def last_evaluation(self) -> int:
        """The iterations of the last `tag_evaluation`; 0 where there was none, or what it wrote cannot be read."""
        try:
            with self.path_manager.open(self._evaluation_file, "r") as file:
                return int(file.read())
        except (OSError, ValueError):
            return 0

    @property
    def _evaluation_file(self) -> str:
        return os.path.join(self.save_dir, "last_evaluation")

    def _replace(self, path: str, write) -> None:
        if "://" in path:
            # A store of iopath's: it knows no rename.
            with self.path_manager.open(path, "wb") as file:
                write(file)
            return
        temporary = f"{path}.part"
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
