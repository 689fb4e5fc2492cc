"""The functions of test_conversion.py in real engines, and deformable attention from TensorRT's own layers."""

from __future__ import annotations

import pytest
import torch

from d2_trt import builder
from d2_trt.build_spec import BuildSpec
from tests.d2_trt.test_conversion import DYNAMIC, FUNCTIONS, OTHERS, STATIC, TRACED, Wrapped, random_images
from tests.golden import MINI_MODELS, mini_model, relative_error

pytestmark = [pytest.mark.tensorrt, pytest.mark.gpu, pytest.mark.slow]


class Function(Wrapped):
    """A function as what a build takes for a model."""

    core = Wrapped.forward


def run(model, spec: BuildSpec, shapes):
    """Images and outputs, for each shape."""
    from d2_trt.engine import Engine

    plan, _, _ = builder.build_engine(model, spec, random_images(TRACED).cuda())
    engine = Engine(plan, torch.device("cuda"))
    for shape in shapes:
        images = random_images(shape).cuda()
        yield images, engine(images)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shapes", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_function_equals_pytorch(name, shapes):
    with torch.device("cuda"):  # constants of the functions
        spec = BuildSpec(**shapes, opt_level=0)
        for images, outputs in run(
            Function(FUNCTIONS[name]), spec, (TRACED, *OTHERS) if shapes is DYNAMIC else (TRACED,)
        ):
            expected = FUNCTIONS[name](images)
            for actual in outputs:
                assert actual.shape == expected.shape
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MINI_MODELS)
def test_deformable_attention_of_tensorrts_own_layers(name):
    model = mini_model(name)
    spec = BuildSpec(**DYNAMIC, msda="native", opt_level=0)
    for images, outputs in run(model, spec, (TRACED, *OTHERS)):
        with torch.no_grad():
            expected = model.core(images)
        assert all(relative_error(actual, wanted) < 2e-3 for actual, wanted in zip(outputs, expected))
