"""tools/sanitize_kernels.py without a GPU: that it runs all kernels there are, and what it says where it cannot."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sanitize_kernels
import sanitizer_network

ROOT = Path(__file__).resolve().parents[2]


def kernel_doors() -> set[str]:
    """The functions of mask2former._kernels that take a stream."""
    names = set()
    for path in (ROOT / "csrc").rglob("bind_*.cpp"):
        for definition in re.split(r"\.def\(", path.read_text())[1:]:
            name = re.match(r'\s*"(\w+)"', definition)
            if name and ("stream)" in definition or 'arg("stream")' in definition):
                names.add(name.group(1))
    return names


def test_every_kernel_with_a_door_to_python_is_run():
    doors = kernel_doors()
    assert {"ms_deform_attn", "select", "semantic", "resize_bilinear"} <= doors
    files = {inspect.getsourcefile(case) for case in sanitize_kernels.CASES.values()}
    source = "".join(Path(file).read_text() for file in files)
    missing = sorted(name for name in doors if f".{name}(" not in source)
    assert not missing, f"add calls of {missing} to the cases of tools/sanitize_kernels.py"


def test_cases_are_listed(capsys):
    assert sanitize_kernels.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(sanitize_kernels.CASES)


def test_unknown_case_names_the_choices(capsys):
    with pytest.raises(SystemExit) as stopped:
        sanitize_kernels.main(["attrition"])
    assert stopped.value.code == 2
    assert "no case attrition; expected some of ms_deform_attn, " in capsys.readouterr().err


def test_kernels_that_are_not_built_are_said_to_be_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sanitize_kernels, "PACKAGE", tmp_path)
    assert sanitize_kernels.main([]) == 2
    assert "is not built: `python setup.py build_ext --inplace`" in capsys.readouterr().err


def test_pytorch_and_detectron2_stay_out():
    code = "import sanitize_kernels, sys; print([m for m in sys.modules if m in ('torch', 'detectron2', 'mask2former')])"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True)
    assert told.stdout.strip() == "[]", told.stderr


class ArrayGpu:
    """Hands out arrays for addresses."""

    def put(self, array):
        return array

    def out(self, name, size):
        return np.empty(size, np.uint8)

    scratch = staticmethod(lambda size: np.empty(size, np.uint8))

    def finish(self):
        pass


def test_attention_runs_with_and_without_positions():
    calls = []
    kernels = types.SimpleNamespace(
        attention_workspace=lambda **sizes: 16,
        attention=lambda q, k, v, out, **more: calls.append({"q": q, "k": k, **more}),
    )
    sanitizer_network.attention(kernels, ArrayGpu())
    seen = set()
    for call in calls:
        masked, names = call["mask_dim"] > 0, tuple(n for n in ("q_pos", "k_pos") if n in call)
        assert masked == ("mask_embed" in call)
        seen.add((masked, names))
        assert ("pos_stride" in call) == bool(names)
        for name in names:
            # (rows, channels), of all images.
            assert call[name].shape == call[name[0]].shape[1:] and call[name].dtype == call["q"].dtype
            assert call["pos_stride"] == call[name].shape[1]
    assert seen == {(False, ()), (True, ()), (False, ("q_pos", "k_pos")), (True, ("q_pos",))}


class FakeGpu:
    """Stands where no GPU is needed: the cases of this test do not use it."""


@pytest.mark.parametrize("error", [RuntimeError("misaligned address"), ValueError("65 levels")])
def test_a_failing_kernel_is_named_and_the_others_run(monkeypatch, capsys, error):
    def fails(kernels, gpu):
        raise error

    monkeypatch.setattr(sanitize_kernels, "load_kernels", lambda: None)
    monkeypatch.setattr(sanitize_kernels, "Gpu", FakeGpu)
    monkeypatch.setattr(sanitize_kernels, "CASES", {"broken": fails, "sound": lambda kernels, gpu: None})
    assert sanitize_kernels.main([]) == 1
    told = capsys.readouterr()
    assert f"broken: {error}" in told.err and "sound: ran" in told.out
