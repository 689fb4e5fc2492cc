"""The backend with the project's own builder: a mini model converted, checked, cached and run on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch

import d2_trt  # noqa: F401
from d2_trt import builder, compat, engine_source
from d2_trt.backend import TensorRTBackend
from d2_trt.errors import BuildError, ParityError
from tests.doubles import conversion
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import mini_cfg, mini_model

SHAPES = ["64x64", "64x96", "96x128"]
EXAMPLES = [(1, 3, 64, 64), (2, 3, 64, 96), (1, 3, 96, 128)]


class InterpretedEngine:
    """In the place of Engine: the network that a plan of the double holds, on CPU tensors."""

    graphs = None

    def __init__(self, plan, device, max_graphs=0, max_graph_bytes=0):
        self._engine = compat.tensorrt().Runtime(builder.trt_logger()).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BuildError("the engine does not load")

    def __call__(self, images):
        outputs = self._engine._network.evaluate({"images": images})
        return outputs["pred_logits"], outputs["pred_masks"]


@pytest.fixture
def interpreter(trt, monkeypatch, tmp_path):  # noqa: F811
    """The double of TensorRT under the backend."""

    def create_network(self, flags=0):
        network = type(self).__mro__[1].create_network(self, flags)
        network.examples = {"images": EXAMPLES}
        return network

    monkeypatch.setattr(trt.Builder, "create_network", create_network, raising=False)
    conversion.use_conversion(monkeypatch)
    monkeypatch.setattr(TensorRTBackend, "_require", lambda self: compat.tensorrt())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Double GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(engine_source, "Engine", InterpretedEngine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return trt


def make_backend(*more) -> TensorRTBackend:
    model = mini_model("resnet50-mini").cpu()
    keys = ("MODEL.BACKEND", "tensorrt", "MODEL.TENSORRT.SHAPES", SHAPES, "MODEL.TENSORRT.MAX_BATCH_SIZE", 2)
    return TensorRTBackend(model, mini_cfg("resnet50-mini", (*keys, *more)))


def images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255


def test_network_is_built_checked_kept_and_loaded(interpreter):
    first = make_backend("MODEL.TENSORRT.PRECISION", "fp32")
    second = make_backend("MODEL.TENSORRT.PRECISION", "fp32")
    for backend in (first, second):
        for shape in ((2, 64, 96), (1, 96, 128)):
            with torch.no_grad():
                expected = backend._model.core(images(*shape))
            for actual, wanted in zip(backend(images(*shape)), expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
    (built,), (loaded,) = first.describe()["engines"], second.describe()["engines"]
    assert built["built"] and not loaded["built"] and built["key"] == loaded["key"]
    rows = loaded["parity"]["sizes"]
    assert [row["images"] for row in rows] == ["2x3x64x96", "1x3x96x128", "2x3x64x64", "2x3x64x96"]
    assert all(row["mask_error"] < 1e-4 and row["sign_agreement"] > 0.999 for row in rows)


def test_conversion_that_computes_something_else_is_refused(interpreter, monkeypatch, tmp_path):
    """The engine has other weights than the model, as if a converter had baked in wrong ones."""
    build = builder.build_engine

    def build_other(model, spec, images, timing_cache=None):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.sem_seg_head.predictor.mask_embed.layers[-1].bias.add_(1.0)
        return build(other, spec, images, timing_cache)

    monkeypatch.setattr(builder, "build_engine", build_other)
    backend = make_backend("MODEL.TENSORRT.PRECISION", "fp32")
    with pytest.raises(ParityError, match=r"at 2x3x64x96: pred_masks: mask error"):
        backend.prepare()
    assert not list((tmp_path / "d2_trt").glob("*.engine"))
