"""What tests of CUDA graphs share: an engine of doubles, and a call of it whose results are known."""

from __future__ import annotations

import torch

from d2_trt import builder

CPU = torch.device("cpu")
SHAPES = [(1, 3, 8, 8), (2, 3, 8, 16), (1, 3, 16, 8), (2, 3, 32, 32)]
MIB = 1 << 20


def make_plan(trt) -> bytes:
    """An engine of two outputs, (B, 3, H, W) -> images + images and images * images."""
    made = trt.Builder(trt.Logger())
    strong = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED if strong else None
    flag = trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH if flag is None else flag
    network = made.create_network(1 << int(flag))
    images = network.add_input(builder.INPUT, trt.float32, (-1, 3, -1, -1))
    other = [images, images]
    operations = (trt.ElementWiseOperation.SUM, trt.ElementWiseOperation.PROD)
    for name, operation in zip(builder.OUTPUTS, operations):
        out = network.add_elementwise(*other, operation).get_output(0)
        out.name = name
        network.mark_output(out)
    config = made.create_builder_config()
    profile = made.create_optimization_profile()
    profile.set_shape(builder.INPUT, SHAPES[0], SHAPES[1], SHAPES[3])
    config.add_optimization_profile(profile)
    return bytes(made.build_serialized_network(network, config))


def run(engine, shape, seed=0) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    first, second = engine(images)
    assert torch.equal(first, images + images) and torch.equal(second, images * images)
