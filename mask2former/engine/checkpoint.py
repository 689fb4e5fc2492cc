"""Checkpoints that are whole, whenever the job that writes them ends."""

from __future__ import annotations

import os

import torch
from detectron2.checkpoint import DetectionCheckpointer


class WholeFileCheckpointer(DetectionCheckpointer):
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

    def forget_evaluation(self) -> None:
        """Undo `tag_evaluation`."""
        if self.path_manager.exists(self._evaluation_file):
            self.path_manager.rm(self._evaluation_file)

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
