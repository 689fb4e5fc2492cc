"""Our plugins (csrc/trt_plugin) as the network's double has them: what they refuse, and what they compute, with torch."""

from __future__ import annotations

from typing import ClassVar

import torch

from mask2former.modeling.pixel_decoder.ms_deform_attn_reference import ms_deform_attn_reference

from .trt_api import Refused

NAMESPACE = "d2_trt"
TYPE_NAMES = ("FLOAT", "HALF", "BF16")


class OurPlugin:
    """One plugin with its fields; subclasses mirror the cores of csrc/trt_plugin."""

    NAME = ""
    VERSION = "1"
    FIELDS: ClassVar[dict[str, type]] = {}

    def __init__(self, fields: dict[str, int | float], numbers: tuple[int, int]):
        """numbers: major and minor version of TensorRT."""
        self.fields = fields
        self._types = range(3) if numbers >= (10, 0) else range(2)

    def _is_type(self, *names: str) -> bool:
        return all(self.fields[name] in self._types for name in names)

    def possible(self) -> bool:
        """Whether the creator makes it: as a core's `check`."""
        raise NotImplementedError

    def input_types(self) -> list[str]:
        """Types that the inputs must have, by their names in DataType."""
        raise NotImplementedError

    def output_types(self) -> list[str]:
        raise NotImplementedError

    def compute(self, *inputs: torch.Tensor):
        """The output, or a tuple of them, in float32. Raises Refused where shapes do not fit."""
        raise NotImplementedError


class MsDeformAttn(OurPlugin):
    NAME = "D2TRTMSDeformAttn"
    FIELDS: ClassVar = {"value_type": int, "sampling_type": int}

    def possible(self):
        value, sampling = self.fields["value_type"], self.fields["sampling_type"]
        return self._is_type("value_type", "sampling_type") and sampling in (0, value)

    def input_types(self):
        sampling = TYPE_NAMES[self.fields["sampling_type"]]
        return [TYPE_NAMES[self.fields["value_type"]], sampling, sampling, "INT32"]

    def output_types(self):
        return [TYPE_NAMES[self.fields["value_type"]]]

    def compute(self, value, offsets, logits, sizes):
        if [x.dim() for x in (value, offsets, logits, sizes)] != [4, 6, 4, 2]:
            raise Refused("ranks must be 4, 6, 4, 2")
        levels, points = offsets.shape[3:5]
        same = value.shape[:3]
        if offsets.shape != (*same, levels, points, 2) or logits.shape != (*same, levels * points):
            raise Refused(f"offsets and logits for a value of {tuple(value.shape)}")
        shapes = [tuple(size) for size in sizes.tolist()]
        if len(shapes) != levels or sum(h * w for h, w in shapes) != value.shape[1]:
            raise Refused(f"levels {shapes} in {value.shape[1]} rows")
        return ms_deform_attn_reference(value, offsets, logits, shapes)


OUR_PLUGINS = {cls.NAME: cls for cls in (MsDeformAttn,)}
