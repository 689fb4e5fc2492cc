"""Converters from PyTorch to TensorRT layers; importing this fills the table."""

from . import attention, deformable, layers, mlp, norms, shape_ops, structure
from .graph import Graph
from .guard import Guard
from .location import MODEL
from .memory import TracedMemory
from .registry import CONVERTERS, converter_table, converts

__all__ = [
    "CONVERTERS",
    "MODEL",
    "Graph",
    "Guard",
    "TracedMemory",
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
