"""tools/accuracy_ledger.py with the small model on the CPU, and doubles of TensorRT: rows, table, what fails."""

from __future__ import annotations

import ast
import csv
import json
from pathlib import Path

import accuracy_ledger
import ledger_evaluation
import ledger_markdown
import pytest
import torch
import train_net
from ledger_evaluation import metric_columns, pytorch_precision
from ledger_images import ImageTables
from measurements import read_rows

from mask2former import MaskFormer, get_mask2former_cfg
from mask2former.backend import TorchBackend
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.data.errors import AnnotationError
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.tools.shapes_checkpoint import CONFIG, REPO, make_checkpoint, overrides
from tests.tools.shapes_checkpoint import one_thread as one_thread

PREFIX = "ledgertest"
OPTS = overrides(PREFIX)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ledger"), PREFIX)


@pytest.fixture
def run(weights, tmp_path, monkeypatch):
    """Exit status, and the rows of the newest CSV file."""
    monkeypatch.chdir(REPO)

    def call(*words: str, opts=()) -> tuple[int, list[dict[str, str]]]:
        quick = ["--config-file", CONFIG, "--weights", str(weights), "--device", "cpu", "--compare", "2"]
        quick += ["--warmup", "0", "--iterations", "1", "--work", str(tmp_path / "work")]
        quick += ["--output", str(tmp_path / "results")]
        quick += [] if "--size" in words else ["--size", "64/80"]
        status = accuracy_ledger.main([*quick, *words, "--", *OPTS, *opts])
        paths = sorted((tmp_path / "results").glob("*.csv"), key=lambda path: path.stat().st_mtime_ns)
        if not paths:
            return status, []
        with open(paths[-1], newline="") as file:
            return status, list(csv.DictReader(file))

    return call


@pytest.fixture
def page(tmp_path) -> Path:
    """A Markdown file with a place for the table."""
    begin, end = ledger_markdown.markers("zoo")
    path = tmp_path / "page.md"
    path.write_bytes(f"# Title\r\n\n{begin}\nan old table\n{end}\n\nThe | rest\n".encode())
    return path


def test_every_size_batch_and_precision_is_a_row(run, capsys):
    status, rows = run(
        "--backend", "torch", "--precision", "fp32", "bf16", "--size", "64/80", "48/64", "--batch", "1", "2"
    )
    assert status == 0 and len(rows) == 2 * 2 * 2
    assert {(r["min_size"], r["max_size"]) for r in rows} == {("64", "80"), ("48", "64")}
    for row in rows:
        assert row["status"] == "ok" and row["config"] == "shapes/maskformer2_mini_shapes.yaml"
        assert row["images"] == "3" and row["compared"] == "2" and len(row["checkpoint"]) == 12
        assert all(
            0 <= float(row[name]) <= 100
            for name in ("PQ", "SQ", "RQ", "AP", "AP50", "AP75", "mIoU", "fwIoU", "mACC")
        )
        assert float(row["core_ms"]) > 0
        if row["precision"] == "fp32":
            assert float(row["mask_error"]) == 0 and float(row["sign_agreement"]) == 1 and row["d_PQ"] == ""
        else:
            assert 1e-4 < float(row["mask_error"]) < 0.5 and row["d_PQ"] != ""
    printed = capsys.readouterr().out
    assert "mIoU (fwIoU, mACC)" in printed and "python tools/" in printed


def test_metrics_are_those_of_train_net(run, weights, tmp_path, monkeypatch):
    _, (row,) = run("--backend", "torch", "--precision", "fp32")
    words = [
        "--eval-only",
        "--config-file",
        CONFIG,
        *OPTS,
        "MODEL.DEVICE",
        "cpu",
        "MODEL.WEIGHTS",
        str(weights),
    ]
    words += ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "80", "OUTPUT_DIR", str(tmp_path / "plain")]
    assert train_net.run(words) == 0
    results = json.loads((tmp_path / "plain" / "inference" / "results.json").read_text())
    expected = {k: str(v) for k, v in metric_columns(results[f"{PREFIX}_val_panoptic"]).items()}
    assert {k: row[k] for k in expected} == expected and len(expected) >= 12
    assert float(row["mIoU"]) > 0


@pytest.mark.parametrize("allowed", [False, True])
def test_reference_is_computed_without_tf32(run, monkeypatch, allowed):
    """Whatever was allowed before. On a CPU the switches have no effect, but every call of the network can read them."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for switch in switches:
        switch.allow_tf32 = allowed  # every test's fixture puts them back
    row, seen, references = [], {}, set()
    measure, call, core = accuracy_ledger.Ledger._measure, TorchBackend.__call__, MaskFormer.core

    def modes() -> tuple[bool, ...]:
        return (*(switch.allow_tf32 for switch in switches), torch.is_autocast_enabled("cpu"))

    def watched_measure(self, columns):
        row[:] = [columns["precision"]]
        return measure(self, columns)

    def watched_call(self, images):
        seen.setdefault(row[0], []).append(modes())
        with monkeypatch.context() as patch:
            patch.setattr(MaskFormer, "core", core)
            return call(self, images)

    def watched_core(self, images):
        references.add(modes())
        return core(self, images)

    monkeypatch.setattr(accuracy_ledger.Ledger, "_measure", watched_measure)
    monkeypatch.setattr(TorchBackend, "__call__", watched_call)
    monkeypatch.setattr(MaskFormer, "core", watched_core)
    assert run("--backend", "torch", "--precision", "fp32", "tf32", "bf16")[0] == 0
    expected = {"fp32": (False, False, False), "tf32": (True, True, False), "bf16": (True, True, True)}
    assert {name: set(values) for name, values in seen.items()} == {k: {v} for k, v in expected.items()}
    # Tensors to compare with (2 images), time (1) and metrics (3).
    assert all(len(values) == 6 for values in seen.values())
    assert references == {expected["fp32"]}, "what the tensors of a row are compared with"
    assert [switch.allow_tf32 for switch in switches] == [allowed, allowed]


@pytest.mark.gpu
def test_products_and_convolutions_have_the_precision_of_the_row():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator).cuda() for _ in range(2))
    image, kernel = (
        torch.randn(1, 64, 64, 64, generator=generator),
        torch.randn(64, 64, 3, 3, generator=generator),
    )
    image, kernel = image.cuda(), kernel.cuda()

    def results(a, b, image, kernel) -> list[torch.Tensor]:
        return [a @ b, torch.nn.functional.conv2d(image, kernel)]

    wanted = results(*(x.double() for x in (a, b, image, kernel)))
    errors = {}
    for precision in ("fp32", "tf32"):
        with pytorch_precision(precision, "cuda"):
            made = results(a, b, image, kernel)
        errors[precision] = [float((x - y).norm() / y.norm()) for x, y in zip(made, wanted)]
    assert max(errors["fp32"]) < 1e-5
    if torch.cuda.get_device_capability() >= (8, 0):  # those before have no TF32
        # Of a convolution cuDNN may find another kernel faster.
        assert errors["tf32"][0] > 1e-4


def test_engine_of_all_rows_is_built_once_and_serves_every_size(run, workshop):
    words = (
        "--size",
        "48/64",
        "64/80",
        "--batch",
        "1",
        "2",
        "--backend",
        "tensorrt",
        "--precision",
        "fp32",
        "--limits",
    )
    status, rows = run(*words)
    assert status == 0 and len(workshop.built) == 1
    spec = workshop.built[0]
    assert spec.min_shape[0] == 1 and spec.max_shape[0] == 2 and spec.precision == "fp32"
    assert [r["backend"] for r in rows] == ["torch"] * 4 + [
        "tensorrt"
    ] * 4  # the reference came first, unasked
    for row in rows[4:]:
        assert row["status"] == "ok" and float(row["engine_mib"]) >= 0 and row["d_PQ"] == "0.0"
        assert float(row["class_agreement"]) == 1


def test_refused_engine_is_a_row_and_the_others_are_measured(run, workshop, page, capsys):
    workshop.disturb = lambda logits, masks: (logits, masks.neg())
    status, rows = run(
        *("--backend", "torch", "tensorrt", "--precision", "fp32", "bf16", "--batch", "1", "2"),
        *("--markdown", str(page), "--section", "zoo"),
    )
    assert status == 1
    told = {(r["backend"], r["precision"], r["batch"]): r["status"] for r in rows}
    assert [told["torch", p, b] for p in ("fp32", "bf16") for b in "12"] == ["ok"] * 4
    for batch in "12":
        assert told["tensorrt", "fp32", batch].startswith("failed: the engine disagrees with PyTorch float32")
    assert len(workshop.built) == 2  # one a precision: what was refused is not built again for the next batch
    text = page.read_text()
    assert "failed: the engine disagrees" in text and text.count("| torch | bf16 |") == 2
    assert "failed: the engine disagrees" in capsys.readouterr().err


def test_engine_beyond_the_limits_is_told(run, workshop, capsys):
    workshop.disturb = lambda logits, masks: (logits.roll(1, -1), masks)
    words = ("--backend", "tensorrt", "--precision", "fp32")
    opts = ("MODEL.TENSORRT.VERIFY.ENABLED", "False")
    status, rows = run(*words, opts=opts)
    assert status == 0 and [r["status"] for r in rows] == ["ok"] * 2  # only told to measure
    status, rows = run(*words, "--limits", "mIoU", opts=opts)
    assert status == 1 and float(rows[1]["d_mIoU"]) != 0
    assert "mIoU differs by" in capsys.readouterr().err


def test_interrupted_run_is_continued_and_failures_are_tried_again(
    run, tmp_path, capsys, workshop, monkeypatch
):
    words = ("--backend", "torch", "tensorrt", "--precision", "fp32")
    workshop.fail = RuntimeError("CUDA error: out of patience")
    status, rows = run(*words)
    assert status == 1 and rows[1]["status"].startswith("failed: ")
    assert "RuntimeError: CUDA error: out of patience" in rows[1]["status"]
    (path,) = (tmp_path / "results").glob("*.csv")
    # As a kill leaves it: the last line cut off in the middle.
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    workshop.fail = None
    status, rows = run(*words, "--resume", str(path))
    assert status == 0 and [r["backend"] for r in rows] == ["torch", "tensorrt"] and rows[1]["status"] == "ok"
    assert "torch fp32: measured before" in capsys.readouterr().err
    built = len(workshop.built)
    before = path.read_bytes()
    assert run(*words, "--resume", str(path))[0] == 0
    assert path.read_bytes() == before and len(workshop.built) == built
    # Another checkpoint, another number of images compared: other measurements.
    words = ("--backend", "torch", "--precision", "fp32")
    assert run(*words, "--resume", str(path), "--compare", "1")[0] == 0
    assert len(read_rows(path, list(rows[0]))) == 3


def test_runs_of_one_second_have_files_of_their_own(run, tmp_path, monkeypatch):
    path = tmp_path / "results" / "accuracy.csv"
    monkeypatch.setattr(accuracy_ledger.MeasurementFile, "new_path", lambda *_: path)
    for _ in range(2):
        assert run("--backend", "torch", "--precision", "fp32")[0] == 0
    files = sorted(path.parent.glob("*.csv"))
    assert [file.name for file in files] == ["accuracy-2.csv", "accuracy.csv"]
    assert len({file.read_bytes().count(b"\n") for file in files}) == 1


def test_markdown_outside_the_markers_stays_as_it_is(run, page, tmp_path):
    assert (
        run("--backend", "torch", "--precision", "fp32", "--markdown", str(page), "--section", "zoo")[0] == 0
    )
    content = page.read_bytes()
    begin, end = (marker.encode() for marker in ledger_markdown.markers("zoo"))
    assert content.startswith(b"# Title\r\n\n" + begin + b"\n\n| backend |")
    assert content.endswith(b"```\n\n" + end + b"\n\nThe | rest\n")
    assert (b"an old table" not in content and b"x86_64" in content) or b"PyTorch " in content
    # The same table from the file alone, and nothing measured; written twice it does not grow.
    (path,) = (tmp_path / "results").glob("*.csv")
    assert run("--from-csv", str(path), "--markdown", str(page), "--section", "zoo")[0] == 0
    assert page.read_bytes() == content
    assert list(tmp_path.glob(".page*")) == []


@pytest.mark.parametrize("text", ["nothing", "{end}\n{begin}", "{begin}\n{begin}\n{end}", "{begin}"])
def test_page_without_a_place_is_refused_before_anything_is_measured(run, tmp_path, capsys, text):
    begin, end = ledger_markdown.markers("zoo")
    path = tmp_path / "page.md"
    path.write_text(text.format(begin=begin, end=end))
    before = path.read_bytes()
    status, rows = run("--backend", "torch", "--markdown", str(path), "--section", "zoo")
    assert status == 2 and rows == [] and path.read_bytes() == before
    assert begin in capsys.readouterr().err


def test_damaged_image_is_named(tmp_path):
    prefix = "ledgerdamaged"
    make_shapes_dataset(tmp_path / "shapes", ShapesOptions(train=1, val=3, min_size=48, max_size=80))
    register_shapes(str(tmp_path / "shapes"), prefix)
    image = tmp_path / "shapes" / "val" / "images" / "1000002.png"
    image.write_bytes(image.read_bytes()[:300])
    cfg = get_mask2former_cfg(REPO / CONFIG, ["MODEL.DEVICE", "cpu", *overrides(prefix)])
    with pytest.raises(AnnotationError, match=r"1000002\.png \(image_id 1000002\) cannot be read"):
        ledger_evaluation.Images(cfg, None, 3)
    assert ledger_evaluation.Images(cfg, None, 1).count == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--weights", "nope.pth"], "MODEL.WEIGHTS nope.pth: there is no such file"),
        (["--weights", "half.pth"], "the checkpoint half.pth cannot be read ("),
        (["--backend", "tensorflow"], "MODEL.BACKEND is 'tensorflow', which is not registered"),
        (["--config-file", "configs/nope.yaml"], "does not exist"),
    ],
)
def test_mistakes_end_before_anything_is_measured(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.pth").write_bytes(b"PK")
    status, rows = run(*words)
    assert status == 2 and rows == [] and message in capsys.readouterr().err


def test_several_data_sets_are_refused(run, capsys):
    sets = f"('{PREFIX}_val_panoptic','{PREFIX}_val_instance')"
    assert run(opts=("DATASETS.TEST", sets))[0] == 2
    assert "a ledger is of one data set" in capsys.readouterr().err


def test_tensorrt_that_is_missing_is_a_row(run, capsys):
    status, rows = run("--backend", "tensorrt", "--precision", "fp16")
    assert status == 1 and [r["status"][:7] for r in rows] == ["ok", "failed:"]
    assert "runs on an NVIDIA GPU" in rows[1]["status"]


@pytest.mark.parametrize(
    "words", [["--size", "800"], ["--size", "800/600"], ["--batch", "0"], ["--limits", "IQ"], []]
)
def test_wrong_arguments(words):
    given = ["--config-file", CONFIG, "--weights", "w.pth"] if words else []
    with pytest.raises(SystemExit) as error:
        accuracy_ledger.parse_args([*given, *words])
    assert error.value.code == 2


def test_images_that_the_engine_would_not_take_are_told_before_it_is_built(run, workshop, capsys):
    narrow = ("MODEL.TENSORRT.SHAPES", "['64x64','64x64','64x96']")
    status, rows = run("--backend", "tensorrt", "--precision", "fp32", "--size", "72/112", opts=narrow)
    assert status == 2 and rows == [] and workshop.built == []
    message = capsys.readouterr().err
    assert "are outside the engine's range" in message
    advice = message.split("Add: ")[1].split(None, 1)
    status, rows = run(
        *("--backend", "tensorrt", "--precision", "fp32", "--size", "72/112"),
        opts=(advice[0], ast.literal_eval(advice[1])),
    )
    assert status == 0 and {row["status"] for row in rows} == {"ok"}


def test_row_is_written_where_its_single_images_fail(run, monkeypatch, capsys):
    def fail(self, path):
        raise OSError("no space left")

    monkeypatch.setattr(ImageTables, "save", fail)
    status, rows = run("--backend", "torch", "--precision", "fp32", "bf16")
    assert status == 0 and [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[1]["d_PQ"] != "" and {rows[1][f"se_{name}"] for name in ("PQ", "AP", "mIoU")} == {""}
    assert "bf16 64/80 batch 1: no standard errors, failed: OSError: no space left" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["shapes-r50", "shapes-swin-t", "shapes-small"])
def test_model_zoo_has_a_place_for_the_table(section):
    ledger_markdown.check_section(str(REPO / "MODEL_ZOO.md"), section)
