from .trainer import Trainer, TrainStep, torch_training_cfg

__all__ = ["TrainStep", "Trainer", "torch_training_cfg"]
