"""Evaluators for AP, PQ and mIoU, and the loop that runs them."""

from .build import build_evaluator, check_evaluators, check_test_sets
from .formats import with_evaluation_formats
from .inference import describe_backend, evaluate_model, save_results
from .instance_evaluation import InstanceSegEvaluator
from .overlapped import OverlappedEvaluators
from .panoptic_evaluation import PanopticEvaluator
from .panoptic_quality import pq_compute
from .test_loader import build_test_loader

__all__ = [
    "InstanceSegEvaluator",
    "OverlappedEvaluators",
    "PanopticEvaluator",
    "build_evaluator",
    "build_test_loader",
    "check_evaluators",
    "check_test_sets",
    "describe_backend",
    "evaluate_model",
    "pq_compute",
    "save_results",
    "with_evaluation_formats",
]
