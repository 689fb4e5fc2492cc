"""A stand-in for detectron2's sources, for the tests of the set-up."""

from __future__ import annotations

import detectron2_wheel
import pytest

MODEL_ZOO_SOURCE = """import os
import pkg_resources


def get_config_file(config_path):
    cfg_file = pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
    return cfg_file
"""


@pytest.fixture
def checkout(tmp_path):
    """A tiny tree with detectron2's layout."""
    files = {
        "setup.py": "",
        "LICENSE": "Apache",
        "configs/Base.yaml": "A: 1\n",
        "detectron2/__init__.py": '__version__ = "0.6"\n',
        "detectron2/model_zoo/__init__.py": "from .model_zoo import get_config_file\n",
        "detectron2/model_zoo/model_zoo.py": MODEL_ZOO_SOURCE,
        "detectron2/evaluation/__init__.py": "",
        "detectron2/evaluation/fast_eval_api.py": "from detectron2 import _C\n",
        "detectron2/export/__init__.py": "from .api import *\nfrom .flatten import adapter\n",
        "detectron2/export/api.py": "from caffe2.proto import caffe2_pb2\n",
        "detectron2/export/flatten.py": "adapter = 1\n",
        "detectron2/layers/__init__.py": "from detectron2 import _C\n\n\ndef op(x):\n    return _C.op(x)\n",
        "detectron2/layers/csrc/vision.cpp": "int main() {}\n",
        "detectron2/data.py": (
            "import numpy as np\nfrom PIL import Image\n"
            "a = np.zeros(2, dtype=np.bool)\nb = np.array([1.5]).astype(np.int)\n"
            "kept = np.bool_(1), np.int64(3)\nmode = Image.LINEAR\n"
        ),
    }
    for folder in detectron2_wheel.PROJECTS.values():
        files[f"{folder}/__init__.py"] = f"source = {folder!r}\n"
    root = tmp_path / "checkout"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
