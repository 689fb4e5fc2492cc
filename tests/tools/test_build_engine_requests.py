"""tools/build_engine.py: what it cannot do anything about ends with status 2, and says what."""

from __future__ import annotations

import sys

import engine_config
import pytest
import torch

from d2_trt import compat, requirements
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.tools.build_engine_helpers import CONFIG, TOOL
from tests.tools.build_engine_helpers import checkpoint as checkpoint
from tests.tools.build_engine_helpers import run as run
from tests.tools.build_engine_helpers import shop as shop


@pytest.mark.parametrize(
    ("words", "opts", "message"),
    [
        (["--shapes", "64x64", "64x96"], [], "2 sizes; allowed: one, or three"),
        (
            ["--shapes", "60x64"],
            [],
            r"has '60x64'; allowed: heights and widths above 0 that are multiples of 32",
        ),
        (["--shapes", "96x96", "64x64", "128x128"], [], "allowed: no height and no width smaller"),
        (["--batch", "1", "2", "4"], [], "--batch has 3 numbers"),
        (["--batch", "2", "4"], [], "OPT_BATCH_SIZE is 4; allowed: a whole number from 0 to 2"),
        (["--static"], [], "name the padded sizes, --shapes HxW"),
        (["--static", "--shapes", "64x60"], [], "padded to multiples of 32"),
        (["--static", "--shapes", "64x64", "64x64"], [], "--shapes names one twice"),
        (["--static", "--shapes", "64x2048"], [], "outside this engine's range"),
        (["--static", "--shapes", "64x64"], ["MODEL.TENSORRT.STATIC", "False"], "leave one out"),
        (["--precision", "fp16"], ["MODEL.TENSORRT.PRECISION", "fp32"], "PRECISION is given twice"),
        ([], ["MODEL.WEIGHTS", "x"], "MODEL.WEIGHTS is given twice"),
        ([], ["MODEL.TENSORRT.PRECISION", "fp7"], "PRECISION is 'fp7'; allowed: 'fp32'"),
        ([], ["MODEL.TENSORRT.PRECISON", "fp32"], "did you mean PRECISION?"),
        ([], ["MODEL.TENSORRT.STATIC", "1"], "MODEL.TENSORRT.STATIC is 1; allowed: True or False"),
        ([], ["MODEL.TENSORRT.OPT_LEVEL"], "KEY VALUE pairs"),
    ],
)
def test_wrong_requests_end_with_status_2(shop, run, capsys, words, opts, message):
    status, engines = run(*words, opts=opts)
    assert (status, engines, shop.built) == (2, [], [])
    err = capsys.readouterr().err
    assert err.startswith("build_engine.py: ") and message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config-file"),
        (["--config-file", "a", "--shapes", "64"], "'64' is not a padded size"),
        (["--config-file", "a", "--shapes", "0x64"], "'0x64' is not a padded size"),
        (["--config-file", "a", "--batch", "0"], "'0' is not a whole number"),
        (["--config-file", "a", "--precision", "int4"], "invalid choice: 'int4'"),
        (["--config-file", "a", "--precision", "fp16", "fp16"], "--precision names one twice"),
        (["--config-file", "a", "--weights", "b", "--random-weights"], "not allowed with"),
        (["--config-file", "a", "--json", "no/such/folder/file"], "there is no folder"),
    ],
)
def test_wrong_words_end_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        TOOL.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(workshop, run, capsys, tmp_path, checkpoint, monkeypatch):
    status, _ = run("--weights", str(tmp_path / "none.pth"), weights=False)
    assert status == 2 and "none.pth: there is no such file" in capsys.readouterr().err
    status, _ = run(weights=False)
    assert status == 2 and "is a backbone to start training from" in capsys.readouterr().err
    assert TOOL.main(["--config-file", "none.yaml"]) == 2
    assert "'none.yaml' does not exist" in capsys.readouterr().err
    monkeypatch.setattr(requirements, "require", lambda *_, **__: None)
    checkpoint.write_bytes(b"no checkpoint")
    status, _ = run()
    err = capsys.readouterr().err
    assert status == 2 and f"MODEL.WEIGHTS {checkpoint} cannot be loaded (" in err and "Traceback" not in err


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_machine_without_gpu_tensorrt_and_torch2trt_is_one_error(
    checkpoint, capsys, monkeypatch, tmp_path, device
):
    """Before the model is built, which takes the GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine_config, "build_model", lambda cfg: pytest.fail("a model was built"))
    compat.tensorrt.cache_clear()
    for name in ("tensorrt", "torch2trt"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--config-file", str(CONFIG), "--weights", str(checkpoint), "--opts", "MODEL.DEVICE", device]
    for more in ([], ["MODEL.TENSORRT.CACHE.MODE", "require"]):  # which is not what decides here
        assert TOOL.main([*words, *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith(
            "build_engine.py: Building engines takes a GPU, TensorRT and torch2trt. Missing: "
        )
        for text in ("PyTorch", "`pip install tensorrt`", "`pip install --no-build-isolation git+"):
            assert text in err
        assert "MODEL.BACKEND" not in err and "Traceback" not in err
