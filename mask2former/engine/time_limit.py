"""Stops training when its time is up, so that it can go on later."""

from __future__ import annotations

import logging
import os
import time

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

# Processes of one job ask each other whether to stop only now and then.
_ASK_EVERY = 10


class TimeIsUp(BaseException):
    """Ends detectron2's loop, which reports other exceptions as failures."""


class TimeLimit(HookBase):
    """Writes a checkpoint and ends training after the iteration in which the time is up.

    The learning rate follows the iterations, not the clock: training that was stopped and resumed is the training that was
    not stopped. Evaluation after the last iteration is not part of the time.
    """

    def __init__(self, deadline: float):
        """
        Args:
            deadline: on the clock of time.monotonic().
        """
        self.deadline = deadline
        self._paced_from: tuple[float, int] | None = None

    def after_step(self):
        done = self.trainer.iter + 1
        if self._paced_from is None:
            # The first iteration waits for the data and for the choice of kernels.
            self._paced_from = (time.monotonic(), done)
        if done >= self.trainer.max_iter or not self._is_over(done):
            return
        self._save(f"model_{self.trainer.iter:07d}")
        left = self.trainer.max_iter - done
        start, first = self._paced_from
        pace = (time.monotonic() - start) / (done - first) if done > first else None
        logger.warning(
            "the time limit is reached after %d of %d iterations%s. The same command with --resume goes on from here",
            done,
            self.trainer.max_iter,
            "" if pace is None else f", {pace:.3f} s each: the {left} left take about {left * pace:.0f} s",
        )
        raise TimeIsUp

    def _save(self, name: str) -> None:
        checkpointer = self.trainer.checkpointer
        # Unless the iteration was one of SOLVER.CHECKPOINT_PERIOD.
        if os.path.basename(checkpointer.get_checkpoint_file()) != f"{name}.pth":
            checkpointer.save(name, iteration=self.trainer.iter)

    def _is_over(self, done: int) -> bool:
        over = time.monotonic() >= self.deadline
        if comm.get_world_size() == 1:
            return over
        # All stop after the same iteration, or those that go on would wait for the others for ever.
        return done % _ASK_EVERY == 0 and comm.all_gather(over)[0]
