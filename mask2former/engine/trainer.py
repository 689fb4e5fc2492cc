"""The training loop: detectron2's, with the release's parts, mixed precision on any device, and exact resuming."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import weakref
from collections import OrderedDict

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.train_loader import TrainLoader, build_train_loader, derived_seed, training_seed
from ..evaluation import evaluate_model
from ..solver import build_lr_scheduler, build_optimizer
from .checkpoint import WholeFileCheckpointer
from .evaluation_hook import EvalHook
from .resumed_keys import changed_keys, training_keys
from .time_limit import TimeIsUp, TimeLimit

logger = logging.getLogger(__name__)


def torch_training_cfg(cfg: CfgNode) -> str:
    """Have a config train in PyTorch, in place, and say what was changed; empty where nothing was.

    An engine has no gradients, and one for the evaluations during training would be built anew for each of them: they run in
    PyTorch too.
    """
    if cfg.MODEL.BACKEND == "torch" and cfg.MODEL.META_ARCHITECTURE != "TensorRTMaskFormer":
        return ""
    told = (
        f"MODEL.BACKEND {cfg.MODEL.BACKEND}"
        if cfg.MODEL.META_ARCHITECTURE != "TensorRTMaskFormer"
        else "MODEL.META_ARCHITECTURE TensorRTMaskFormer"
    )
    if cfg.MODEL.META_ARCHITECTURE == "TensorRTMaskFormer":
        cfg.MODEL.META_ARCHITECTURE = "MaskFormer"
    cfg.MODEL.BACKEND = "torch"
    return f"training, and the evaluations in it, run in PyTorch; {told} takes effect with --eval-only"


class TrainStep(SimpleTrainer):
    """One iteration: losses, gradients, update.

    Under AMP the network runs in float16 with scaled losses on a GPU, as the release does, and in bfloat16 on a CPU.
    """

    def __init__(self, model: nn.Module, data_loader: TrainLoader, optimizer, *, amp: bool, max_iter: int):
        """
        Args:
            max_iter: iterations of the whole training; no batch is loaded ahead in the last of them.
        """
        super().__init__(model, data_loader, optimizer)
        self.max_iter = max_iter
        self._device_type = next(model.parameters()).device.type
        self._amp = amp
        self._next_batch: list[dict] | None = None
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=amp and self._device_type == "cuda")

    def run_step(self) -> None:
        if not self.model.training:
            raise RuntimeError(
                "the model is in evaluation mode: a hook called model.eval() and not model.train()"
            )
        batch, self._next_batch = self._next_batch, None
        data_time = 0.0
        if batch is None:
            batch, data_time = self._load()
        dtype = torch.float16 if self._device_type == "cuda" else torch.bfloat16
        with torch.autocast(self._device_type, dtype=dtype, enabled=self._amp):
            losses = self.model(batch)
            total = sum(losses.values())
        self.optimizer.zero_grad(set_to_none=True)
        self.grad_scaler.scale(total).backward()
        if self._device_type == "cuda" and self.iter + 1 < self.max_iter:
            # While the GPU works: the next line waits for it.
            self._next_batch, seconds = self._load()
            data_time += seconds
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        # Last, and in one piece: this waits for the GPU.
        values = torch.stack(list(losses.values())).detach().cpu()
        try:
            self._write_metrics(dict(zip(losses, values)), data_time)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"losses are NaN or infinite ({' '.join(str(error).split())}): training has diverged. Lower "
                "SOLVER.BASE_LR, or set SOLVER.AMP.ENABLED False, and resume from an earlier checkpoint"
            ) from error

    def _load(self) -> tuple[list[dict], float]:
        """The next batch, and the seconds it took."""
        start = time.perf_counter()
        return next(self._data_loader_iter), time.perf_counter() - start

    def state_dict(self) -> dict:
        return {
            "iteration": self.iter,
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.iter = state_dict["iteration"]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        # Empty where the job before this one ran without AMP.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer for this model.

    Order, augmentation and the points of the losses follow from the seed and the iteration. A job that was stopped and
    resumed from a checkpoint goes on as if it had not been: exactly so on a CPU, and on a GPU but for what its kernels sum
    in no fixed order. detectron2's own trainer starts the data anew, and before 2022 the optimizer too.
    """

    def __init__(self, cfg: CfgNode, deadline: float | None = None):
        """
        Args:
            cfg: frozen or not; MODEL.BACKEND is torch, see `torch_training_cfg`.
            deadline: on the clock of time.monotonic(); see `TimeLimit`. None: train to the end.
        """
        # Not DefaultTrainer's, which builds a step of its own; its versions differ in what that is.
        TrainerBase.__init__(self)
        if cfg.MODEL.BACKEND != "torch":
            raise ValueError(
                f"MODEL.BACKEND is {cfg.MODEL.BACKEND!r}: training runs in PyTorch, set it to torch "
                "(mask2former.engine.torch_training_cfg does)"
            )
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.seed = training_seed(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = build_train_loader(cfg, seed=self.seed)
        model = create_ddp_model(model, broadcast_buffers=False)
        self._trainer = TrainStep(
            model, data_loader, optimizer, amp=cfg.SOLVER.AMP.ENABLED, max_iter=cfg.SOLVER.MAX_ITER
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = WholeFileCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())
        if deadline is not None:
            # Last: what the others do after an iteration belongs to it.
            self.register_hooks([TimeLimit(deadline)])

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def test(cls, cfg, model, evaluators=None) -> OrderedDict:
        """Evaluate on DATASETS.TEST; see `evaluate_model`."""
        if evaluators is not None:
            raise ValueError("evaluators follow from the config: pass none")
        if isinstance(model, DistributedDataParallel):
            model = model.module
            # BatchNorm's statistics are of a process's own images: all evaluate the first one's, as checkpoints hold them.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        # Test images differ in size: cuDNN would search its kernels anew for most of them.
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=False,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=torch.backends.cudnn.allow_tf32,
        ):
            return evaluate_model(cfg, model)

    def build_hooks(self) -> list:
        made = super().build_hooks()
        if self.cfg.DATASETS.TEST:
            return [
                EvalHook(self.cfg.TEST.EVAL_PERIOD, hook._func) if isinstance(hook, hooks.EvalHook) else hook
                for hook in made
            ]
        logger.warning("DATASETS.TEST is empty: there is no evaluation during this training")
        return [hook for hook in made if not isinstance(hook, hooks.EvalHook)]

    def build_writers(self) -> list:
        writers = [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")),
        ]
        if importlib.util.find_spec("tensorboard") is None:
            logger.warning("no curves for TensorBoard, which is not installed: pip install tensorboard")
        else:
            writers.append(TensorboardXWriter(self.cfg.OUTPUT_DIR))
        return writers

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from OUTPUT_DIR's last checkpoint, or where there is none or `resume` is False start from MODEL.WEIGHTS."""
        if resume and not self.checkpointer.has_checkpoint():
            logger.warning(
                "--resume: there is no checkpoint in %s, training starts anew", self.cfg.OUTPUT_DIR
            )
        super().resume_or_load(resume=resume)
        self.data_loader.start_batch = self.start_iter

    def train(self) -> dict | None:
        """Train to SOLVER.MAX_ITER, or up to the deadline.

        Returns:
            the results of the evaluation at the end, where the config has TEST.EXPECTED_RESULTS; else None.
        """
        try:
            return super().train()
        except TimeIsUp:
            return None

    @property
    def finished(self) -> bool:
        """Whether all iterations are done."""
        return self.iter >= self.max_iter

    def run_step(self) -> None:
        # The points of the losses, and what else the model draws.
        torch.manual_seed(derived_seed(self.seed, comm.get_rank(), self.iter))
        super().run_step()

    def state_dict(self) -> dict:
        return {
            **TrainerBase.state_dict(self),
            "_trainer": self._trainer.state_dict(),
            "seed": self.seed,
            "keys": training_keys(self.cfg),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        schedule = self.scheduler
        if getattr(schedule, "max_iters", self.max_iter) != self.max_iter:
            # WarmupPolyLR takes the end from the checkpoint. Past it the rate would be the power of a negative number.
            logger.warning(
                "SOLVER.MAX_ITER is %d, but the job began with %d: the learning rate goes on along the new schedule",
                self.max_iter,
                schedule.max_iters,
            )
            schedule.max_iters = self.max_iter
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("the checkpoint has no state of the optimizer, which starts anew")
        if changed := changed_keys(state_dict.get("keys"), training_keys(self.cfg)):
            logger.warning(
                "--resume with other values than the job began with: %s. Learning rates and weight decay go on as the "
                "checkpoint has them, the rest takes effect: images of the current pass over the data can come twice or not "
                "at all, and the result is not the one of a job that did not stop",
                ", ".join(changed),
            )
        if "seed" in state_dict and state_dict["seed"] != self.seed:
            if self.cfg.SEED >= 0:
                logger.warning(
                    "SEED is %d, but the job began with %d, which is kept", self.cfg.SEED, state_dict["seed"]
                )
            self.seed = self.data_loader.seed = state_dict["seed"]
