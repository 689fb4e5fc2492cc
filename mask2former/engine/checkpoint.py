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
