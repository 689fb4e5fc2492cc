"""tools/export_checkpoint.py: half the precision, the same model."""

from __future__ import annotations

import pickle
from pathlib import Path

import export_checkpoint
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from mask2former import get_mask2former_cfg

CONFIG = Path(__file__).resolve().parents[2] / "configs/shapes/maskformer2_mini_shapes.yaml"


def new_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_model(get_mask2former_cfg(CONFIG, ["MODEL.DEVICE", "cpu"])).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
            module.num_batches_tracked.fill_(4000)
    # A channel that is always zero, as training leaves some: less than half precision holds.
    model.backbone.stem.conv1.norm.running_var[0] = 1e-9
    return model


@pytest.fixture
def trained(tmp_path):
    """A folder as training leaves it, and the model of its checkpoint."""
    model = new_model(0)
    optimizer = {"optimizer": {"state": torch.zeros(1000)}}
    torch.save({"model": model.state_dict(), "trainer": optimizer, "iteration": 9}, tmp_path / "model_9.pth")
    (tmp_path / "last_checkpoint").write_text("model_9.pth")
    return tmp_path, model


def test_exported_model_is_the_trained_one_in_half_precision(trained, tmp_path, capsys):
    folder, model = trained
    assert export_checkpoint.main([str(folder), str(tmp_path / "out" / "half.pth")]) == 0
    assert "0.9 million values" in capsys.readouterr().out
    saved = torch.load(tmp_path / "out" / "half.pth", weights_only=True)
    assert set(saved) == {"model"}
    size = (tmp_path / "out" / "half.pth").stat().st_size
    assert size < 0.6 * (folder / "model_9.pth").stat().st_size

    other = new_model(1)
    DetectionCheckpointer(other).load(str(tmp_path / "out" / "half.pth"))
    for name, value in model.state_dict().items():
        got = other.state_dict()[name]
        assert got.dtype == value.dtype
        rounded = value.half().float() if value.dim() > 1 else value
        assert torch.equal(got, rounded), name
    images = 255 * torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for one, two in zip(model.core(images), other.core(images)):
            assert (one - two).norm() < 0.02 * one.norm()


def test_parts_are_the_file(trained, tmp_path, monkeypatch):
    target = tmp_path / "half.pth"
    (tmp_path / "half.pth.07").write_bytes(b"of an earlier, larger file")
    assert export_checkpoint.main([str(trained[0]), str(target), "--split-mib", "1"]) == 0
    parts = sorted(tmp_path.glob("half.pth.*"))
    assert [p.name for p in parts] == ["half.pth.00", "half.pth.01"]
    assert [p.stat().st_size <= 2**20 for p in parts] == [True, True]
    assert b"".join(p.read_bytes() for p in parts) == target.read_bytes()


def test_more_parts_than_names_are_refused_and_change_nothing(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_checkpoint, "MOST_PARTS", 1)
    target = tmp_path / "half.pth"
    target.write_bytes(b"of before")
    (tmp_path / "half.pth.00").write_bytes(b"of before")
    assert export_checkpoint.main([str(trained[0]), str(target), "--split-mib", "1"]) == 2
    assert "--split-mib 1: makes 2 parts, more than 1. Take at least 2" in capsys.readouterr().err
    assert [p.read_bytes() for p in sorted(tmp_path.glob("half.pth*"))] == [b"of before"] * 2


def test_parts_have_two_digits():
    mib = 2**20
    export_checkpoint.check_parts(100 * mib, mib)  # .00 to .99
    with pytest.raises(export_checkpoint.ExportError, match="makes 101 parts, more than 100"):
        export_checkpoint.check_parts(100 * mib + 1, mib)


def test_export_that_fails_leaves_the_file_of_before(trained, tmp_path, capsys, monkeypatch):
    target = tmp_path / "half.pth"
    target.write_bytes(b"of before")

    def full_disk(data, path):
        Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    assert export_checkpoint.main([str(trained[0]), str(target)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.glob("half*")] == ["half.pth"] and target.read_bytes() == b"of before"


@pytest.mark.parametrize(
    "value, message",
    [
        (1e6, "goes to 1e+06, more than the 65504"),
        (float("nan"), "NaN or infinite values: this training has failed"),
    ],
)
def test_values_that_half_precision_does_not_hold_are_refused(trained, tmp_path, capsys, value, message):
    path = trained[0] / "model_9.pth"
    checkpoint = torch.load(path, weights_only=True)
    name = "sem_seg_head.predictor.query_feat.weight"
    checkpoint["model"][name][0, 0] = value
    torch.save(checkpoint, path)
    assert export_checkpoint.main([str(path), str(tmp_path / "half.pth")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("export_checkpoint.py: ") and name in error and message in error
    assert not (tmp_path / "half.pth").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gone.pth", "x.pth"], "there is no file gone.pth"),
        ([".", "x.pth"], "has no last_checkpoint"),
        (["other.pth", "x.pth"], "holds no weights of a model"),
        (["list.pth", "x.pth"], "holds no weights of a model"),
        (["zoo.pkl", "x.pth"], "zoo.pkl cannot be read (Weights only load failed"),
        (["cut.pth", "x.pth"], "cut.pth cannot be read ("),
        (["half.pth", "x.pth"], "half.pth cannot be read ("),
        (["empty.pth", "x.pth"], "must be a whole .pth of weights that training or this tool wrote"),
        (["whole.pth", "whole.pth"], "whole.pth is the checkpoint itself: name another file to write"),
        (["whole.pth", "."], ". is a folder: name the .pth to write"),
        (["other.pth", "x.pth", "--split-mib", "0"], "--split-mib 0: must be at least 1"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"metrics": 3}, tmp_path / "other.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": {"weight": np.zeros(3)}}))
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:-500])
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.pth").write_bytes(whole)
    (tmp_path / "empty.pth").touch()
    assert export_checkpoint.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "weights_only" not in error
    assert (tmp_path / "whole.pth").read_bytes() == whole
    assert not (tmp_path / "x.pth").exists()
