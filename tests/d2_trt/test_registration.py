"""What importing d2_trt adds to mask2former, and what it leaves alone."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.modeling import build_model

import d2_trt
from d2_trt.errors import D2TRTError, OptionsError
from mask2former import BACKEND_REGISTRY, get_mask2former_cfg
from mask2former.backend import BackendError, check_backend
from mask2former.config import EXTENSIONS
from tests.golden import mini_cfg

REPO = Path(__file__).resolve().parents[2]


def test_keys_are_known_wherever_the_package_is_imported():
    cfg = get_mask2former_cfg(None, ["MODEL.TENSORRT.PRECISION", "tf32", "MODEL.BACKEND", "tensorrt"])
    assert cfg.MODEL.TENSORRT.PRECISION == "tf32"
    importlib.reload(d2_trt)
    assert EXTENSIONS.count(d2_trt.add_tensorrt_config) == 1 and "tensorrt" in BACKEND_REGISTRY


def test_wrong_key_is_refused_before_the_model_is_there():
    cfg = mini_cfg("resnet50-mini", ("MODEL.BACKEND", "tensorrt", "MODEL.TENSORRT.STATIC", True))
    cfg.MODEL.TENSORRT.OPT_LEVEL = 7
    with pytest.raises(OptionsError, match=r"MODEL\.TENSORRT\.OPT_LEVEL is 7"):
        build_model(cfg)
    with pytest.raises(OptionsError, match=r"MODEL\.TENSORRT\.OPT_LEVEL is 7"):
        check_backend("tensorrt", cfg)
    check_backend("tensorrt")  # the name alone
    cfg.MODEL.BACKEND = "torch"
    build_model(cfg)  # which does not read the key


def test_errors_are_those_that_tools_of_mask2former_know():
    assert issubclass(D2TRTError, BackendError)


@pytest.mark.parametrize("backend", ["torch", "tensorrt"])
def test_meta_architecture_runs_tensorrt_whatever_the_backend_says(backend, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    opts = ("MODEL.META_ARCHITECTURE", "TensorRTMaskFormer", "MODEL.BACKEND", backend)
    cfg = mini_cfg("resnet50-mini", (*opts, "MODEL.TENSORRT.ON_ERROR", "torch"))
    model = build_model(cfg)
    assert model.backend_name == "tensorrt" and isinstance(model, d2_trt.TensorRTMaskFormer)
    plain = build_model(mini_cfg("resnet50-mini"))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert "is not used" not in caplog.text


def test_meta_architecture_says_which_backend_it_does_not_use(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("d2_trt"), "propagate", True)
    opts = ("MODEL.META_ARCHITECTURE", "TensorRTMaskFormer", "MODEL.BACKEND", "onnx")
    opts += ("MODEL.TENSORRT.ON_ERROR", "torch")
    assert build_model(mini_cfg("resnet50-mini", opts)).backend_name == "tensorrt"
    assert caplog.text.count("MODEL.BACKEND onnx is not used") == 1


def test_plain_pytorch_runs_import_no_tensorrt():
    program = """
import json, sys
sys.path.insert(0, ".")
import torch
import d2_trt
from detectron2.modeling import build_model
from tests.golden import mini_cfg
model = build_model(mini_cfg("resnet50-mini")).eval()
model.prepare()
with torch.no_grad():
    model([{"image": torch.zeros(3, 64, 64)}])
print(json.dumps([name for name in ("tensorrt", "torch2trt", "d2_trt.backend") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
