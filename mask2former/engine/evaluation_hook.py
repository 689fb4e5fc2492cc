"""Evaluation during training, of which none is lost when the job ends in the middle of it."""

from __future__ import annotations

import logging

from detectron2.engine import hooks
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class EvalHook(hooks.EvalHook):
    """detectron2's, which after a crash makes up for the evaluation that it cut off.

    The checkpoint of an iteration is written before its evaluation: a resumed job would go on behind both. `last_evaluation`
    beside the checkpoints tells after which iteration the last one came to its end.
    """

    def before_train(self):
        trainer, start = self.trainer, self.trainer.start_iter
        if comm.is_main_process() and trainer.checkpointer.last_evaluation() > start:
            # Of another training in this folder, or behind the checkpoint that this one went back to.
            trainer.checkpointer.tag_evaluation(start)
        # That after the last iteration runs without this, whether or not it was resumed there.
        if not 0 < start < trainer.max_iter or self._period <= 0 or start % self._period:
            return
        # The first process decides: only it wrote the file, which the others may not see.
        if not comm.all_gather(trainer.checkpointer.last_evaluation() < start)[0]:
            return
        logger.info("The evaluation after iteration %d did not come to its end: it runs now", start)
        # Its results are those of the iteration before, as without the interruption.
        trainer.iter = trainer.storage.iter = start - 1
        self._do_eval()
        trainer.iter = trainer.storage.iter = start

    def after_train(self):
        # detectron2 counts one iteration too many where a job is resumed behind the last.
        self.trainer.storage.iter = min(self.trainer.iter, self.trainer.max_iter)
        super().after_train()

    def _do_eval(self):
        super()._do_eval()
        if comm.is_main_process():
            done = min(self.trainer.iter + 1, self.trainer.max_iter)
            self.trainer.checkpointer.tag_evaluation(done)
