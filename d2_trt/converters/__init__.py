"""Converters from PyTorch to TensorRT layers; importing this fills the table."""

from . import attention, deformable, layers, mlp, norms, shape_ops, structure
from .graph import Graph
from .registry import CONVERTERS, Guard, converter_table, converts

__all__ = [
    "CONVERTERS",
    "Graph",
    "Guard",
    "attention",
    "converter_table",
    "converts",
    "deformable",
    "layers",
    "mlp",
    "norms",
    "shape_ops",
    "structure",
]
