"""tools/precision_search.py with a small model on the CPU, emulated, and with doubles of engines; and its strategy alone."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import precision_measure
import pytest
import torch
import yaml
from detectron2.data.detection_utils import read_image
from ledger_evaluation import pytorch_precision
from precision_emulation import OperationTimes
from precision_measure import ALL_BUT
from precision_strategy import Block, Wanted, find_blocks, ranked, search, shortened

from d2_trt import plugin
from d2_trt.build_spec import BuildSpec, default_fp32_modules, pattern_covers, precision_policy
from d2_trt.options import VerifyOptions
from mask2former import get_mask2former_cfg
from tests.d2_trt.backend_helpers import workshop as workshop
from tests.tools.shapes_checkpoint import CONFIG, REPO, make_checkpoint, overrides
from tests.tools.shapes_checkpoint import one_thread as one_thread

PREFIX = "precisiontest"
OPTS = overrides(PREFIX)
BUILT_IN = default_fp32_modules("native")


# The strategy


def test_pattern_of_a_module_alone_leaves_what_is_below_it():
    assert pattern_covers("=a.b", "a.b") and not pattern_covers("=a.b", "a.b.c")
    assert pattern_covers("a.b", "a.b.c") and not pattern_covers("a.b", "a.bc")
    assert pattern_covers("=", "") and not pattern_covers("=", "a")
    policy = precision_policy(
        BuildSpec((1, 1, 1), (1, 1, 1), (1, 1, 1), "fp16", ("=sem_seg_head.predictor",))
    )
    assert policy("model.sem_seg_head.predictor") == torch.float32
    assert policy("model.sem_seg_head.predictor.class_embed") == torch.float16


MODULES = [
    *("", "backbone.stem.conv1", "backbone.res2.0.conv1", "backbone.res2.1", "backbone.layers.0.blocks.1"),
    *("sem_seg_head", "sem_seg_head.pixel_decoder.transformer.encoder.layers.3.norm1"),
    *(
        "sem_seg_head.predictor",
        "sem_seg_head.predictor.mask_embed.layers.0",
        "sem_seg_head.predictor.class_embed",
    ),
]


def test_blocks_share_out_the_modules():
    times = {name: OperationTimes(1, 2.0, 1.5) for name in MODULES}
    blocks = find_blocks(times)
    assert [block.pattern for block in blocks] == [
        *("=", "backbone.stem", "backbone.res2", "backbone.layers.0", "=sem_seg_head"),
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.3",
        *(
            "=sem_seg_head.predictor",
            "sem_seg_head.predictor.mask_embed",
            "sem_seg_head.predictor.class_embed",
        ),
    ]
    for name in MODULES:
        assert sum(pattern_covers(block.pattern, name) for block in blocks) == 1
    assert blocks[2].times.count == 2 and blocks[2].gain_ms == pytest.approx(1.0)
    finer = [block.pattern for block in find_blocks(times, ["backbone.res?"])]
    assert "backbone.res2.0" in finer and "backbone.res2.1" in finer and "backbone.res2" not in finer


def test_whole_module_stands_for_all_its_blocks():
    blocks = find_blocks({name: OperationTimes(1) for name in MODULES})
    names = [block.pattern for block in blocks]
    predictor = names[-3:]
    assert shortened(predictor, blocks) == ["sem_seg_head.predictor"]
    assert shortened([*predictor[:2], "backbone.stem"], blocks) == ["backbone.stem", *predictor[:2]]
    assert shortened(names, blocks) == ["=", "backbone", "sem_seg_head"]
    assert shortened([], blocks) == []
    for pins in (names, predictor, names[::2]):
        short = shortened(pins, blocks)
        for name in MODULES:
            assert any(pattern_covers(p, name) for p in short) == any(pattern_covers(p, name) for p in pins)


def numbers(sign=1.0, kind=1.0, logit=0.0, mask=0.0) -> dict[str, float]:
    return {"sign_agreement": sign, "class_agreement": kind, "logit_error": logit, "mask_error": mask}


def test_wanted_is_the_gate_with_a_margin():
    wanted = Wanted(VerifyOptions(min_sign_agreement=0.99, max_mask_error=0.1), margin=2)
    assert wanted.reached(numbers(sign=0.9951, mask=0.049, kind=0.0))  # classes are not asked for
    assert not wanted.reached(numbers(sign=0.9949)) and not wanted.reached(numbers(mask=0.051))
    assert not wanted.reached(numbers(logit=float("nan")))
    assert wanted.damage(numbers(sign=0.995, mask=0.05)) == pytest.approx(2)
    assert "mask signs at least 99.5 %" in str(wanted) and "mask logits' error at most 0.05" in str(wanted)
    with pytest.raises(ValueError, match=r"MODEL\.TENSORRT\.VERIFY checks nothing"):
        Wanted(VerifyOptions())


def made(name: str, damage: float, gain: float) -> Block:
    return Block(name, OperationTimes(1, gain + 1, 1.0), damage)


WANTED = Wanted(VerifyOptions(max_mask_error=1.0))


def found(blocks: list[Block], limit: float = 1.0) -> list[str] | None:
    """Names of the blocks to keep where errors of the others add up."""

    def evaluate(pinned):
        return numbers(mask=sum(b.damage for b in blocks if b not in pinned) / limit)

    pinned = search(blocks, evaluate, WANTED)
    return None if pinned is None else [b.pattern for b in pinned]


def test_nothing_is_pinned_where_nothing_needs_it():
    assert found([made("a", 0.4, 1), made("b", 0.4, 1)]) == []


def test_damage_for_little_time_is_pinned_first():
    blocks = [
        made("dear", 3.0, 60),
        made("cheap", 3.0, 2),
        made("harmless", 0.001, 0.01),
        made("rest", 0.5, 38),
    ]
    assert [b.pattern for b in ranked(blocks)] == ["cheap", "rest", "dear", "harmless"] or (
        ranked(blocks)[0].pattern == "cheap" and ranked(blocks)[-1].pattern == "harmless"
    )
    assert found(blocks, limit=3.6) == ["cheap"]


def test_block_that_turns_out_not_to_be_needed_is_let_go():
    # By its ratio "small" comes first; "large" makes it needless.
    blocks = [made("small", 0.5, 0), made("large", 4.0, 10)]
    assert [b.pattern for b in ranked(blocks)] == ["small", "large"]
    assert found(blocks) == ["large"]


def test_overflow_is_pinned_and_what_cannot_be_reached_is_said():
    blocks = [made("overflows", float("inf"), 10), made("mild", 0.3, 1)]
    assert found(blocks) == ["overflows"]
    assert search(blocks, lambda pinned: numbers(mask=2.0), WANTED) is None


# The tool


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("precision"), PREFIX)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("precision_search", REPO / "tools" / "precision_search.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, weights, tmp_path, monkeypatch):
    """Exit status, and the rows of the CSV file."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(plugin, "is_built", lambda: False)  # whatever this machine has

    def call(*words: str, opts=()) -> tuple[int, list[dict[str, str]]]:
        quick = ["--config-file", CONFIG, "--weights", str(weights), "--device", "cpu", "--images", "1"]
        quick += ["--iterations", "1", "--output", str(tmp_path), "--size", "48/64"]
        status = tool.main([*quick, *words, "--", *OPTS, *opts])
        paths = list(tmp_path.glob("*.csv"))
        if not paths:
            return status, []
        assert len(paths) == 1
        with open(paths[0], newline="") as file:
            return status, list(csv.DictReader(file))

    return call


def printed_config(text: str) -> list[str]:
    """FP32_MODULES of the config that was printed, as get_mask2former_cfg reads it."""
    begin = text.index("\nMODEL:\n")
    part = text[begin : text.index("\n\n", begin)]
    node = yaml.safe_load(part)["MODEL"]["TENSORRT"]
    override = text[text.index("\nMODEL.TENSORRT.PRECISION ") :].strip().splitlines()[0]
    import shlex

    cfg = get_mask2former_cfg(REPO / CONFIG, shlex.split(override))
    assert list(cfg.MODEL.TENSORRT.FP32_MODULES) == node["FP32_MODULES"]
    assert cfg.MODEL.TENSORRT.PRECISION == node["PRECISION"]
    return node["FP32_MODULES"]


def test_set_that_is_found_reaches_what_is_wanted(run, tmp_path, capsys, monkeypatch):
    beside = []  # the precision of what is not in half precision
    monkeypatch.setattr(
        precision_measure,
        "pytorch_precision",
        lambda precision, device: (beside.append(precision), pytorch_precision(precision, device))[1],
    )
    words = ("--engines", "0", "--precision", "bf16", "--margin", "1")
    status, rows = run(*words)
    out = capsys.readouterr()
    assert status == 0
    pins = printed_config(out.out)
    by_pins = {row["fp32_modules"]: row for row in rows}
    good = by_pins[" ".join(pins)]
    assert float(good["sign_agreement"]) >= 0.995 and float(good["class_agreement"]) >= 0.99
    assert pins and float(by_pins[""]["sign_agreement"]) < 0.995  # something had to be pinned
    assert {"(everything)", " ".join(BUILT_IN)} <= set(by_pins)
    alone = [row for row in rows if row["fp32_modules"].startswith(ALL_BUT)]
    assert (
        len(alone) == beside.count("fp32") and beside.count("tf32") == len(rows) - len(alone) + 1
    )  # and the times
    assert len(alone) > 15 and all(float(row["block_float32_ms"]) > 0 for row in alone)
    assert all(row["how"] == "emulated" and row["precision"] == "bf16" for row in rows)
    assert float(by_pins["(everything)"]["mask_error"]) == 0
    assert "emulated only: no engine has confirmed it" in out.out and "ENGINE  " not in out.out
    # Continued, it measures nothing anew and finds the same.
    (path,) = tmp_path.glob("*.csv")
    before = path.read_bytes()
    status, _ = run(*words, "--resume", str(path))
    again = capsys.readouterr()
    assert status == 0 and path.read_bytes() == before and "emulated, float32:" not in again.err
    assert printed_config(again.out) == pins


def test_engine_confirms_and_the_others_are_built_to_compare(run, workshop, capsys):
    status, rows = run("--engines", "3")
    assert status == 0
    pins = printed_config(capsys.readouterr().out)
    engines = [row for row in rows if row["how"] == "engine"]
    assert [list(spec.fp32_modules) for spec in workshop.built][:2] == [pins, list(BUILT_IN)]
    assert all(row["status"] == "ok" and float(row["core_ms"]) > 0 for row in engines)
    assert all(row["class_agreement"] == "1.0" and row["engine_mib"] for row in engines)


def test_ledger_uses_the_engine_that_was_confirmed(run, workshop, weights, tmp_path, capsys):
    import accuracy_ledger

    words = ("--size", "48/64", "64/80", "--batch", "1", "2")
    assert run("--engines", "1", *words)[0] == 0
    pins = printed_config(capsys.readouterr().out)
    status = accuracy_ledger.main(
        [
            *(
                "--config-file",
                CONFIG,
                "--weights",
                str(weights),
                "--device",
                "cpu",
                *words,
                "--compare",
                "1",
            ),
            *("--backend", "tensorrt", "--precision", "fp16", "--iterations", "1", "--warmup", "0"),
            *("--output", str(tmp_path / "ledger"), "--work", str(tmp_path / "work")),
            *("--", *OPTS, "MODEL.TENSORRT.FP32_MODULES", str(pins)),
        ]
    )
    assert status == 0 and len(workshop.built) == 1


def test_set_is_widened_where_the_engine_misses_it(run, workshop, capsys):
    workshop.disturb = lambda logits, masks: (logits, masks.neg() if len(workshop.built) == 1 else masks)
    status, rows = run("--engines", "2")
    out = capsys.readouterr().out
    first, second = workshop.built
    assert status == 0 and len(second.fp32_modules) > len(first.fp32_modules)
    assert printed_config(out) == list(second.fp32_modules) and "confirmed by an engine" in out
    engines = [row for row in rows if row["how"] == "engine"]
    assert engines[0]["status"].startswith("failed: the engine disagrees with PyTorch float32")
    assert engines[0]["status"] in out and engines[1]["status"] == "ok"


def test_no_engine_reaches_it(run, workshop, capsys):
    workshop.disturb = lambda logits, masks: (logits, masks.neg())
    status, _ = run("--engines", "1")
    out = capsys.readouterr()
    assert status == 1 and len(workshop.built) == 1
    assert "emulated only" in out.out and "not confirmed" in out.err


def test_without_tensorrt_the_emulation_is_told_all_the_same(run, capsys):
    status, rows = run("--engines", "2")
    out = capsys.readouterr()
    assert status == 1 and all(row["how"] == "emulated" for row in rows)
    printed_config(out.out)
    assert "not confirmed: MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU" in out.err


def test_images_without_annotations(run, weights, capsys):
    images = sorted(str(path) for path in (weights.parent / "shapes" / "val" / "images").glob("*.png"))
    status, rows = run("--engines", "0", "--images", "2", "--batch", "1", "2", "--input", *images[:2])
    assert status == 0 and {row["source"] for row in rows} == {" ".join(images[:2])}
    assert {row["images"] for row in rows} == {"2"} and read_image(images[0]).ndim == 3


@pytest.mark.parametrize(
    "words, opts, message",
    [
        (["--weights", "nope.pth"], [], "MODEL.WEIGHTS nope.pth: there is no such file"),
        (["--input", "nope.png"], [], "--input nope.png"),
        ([], ["DATASETS.TEST", "('nope',)"], "Or give images with --input"),
        ([], ["DATASETS.TEST", f"('{PREFIX}_val_panoptic','{PREFIX}_val_instance')"], "name one of them"),
        ([], ["MODEL.TENSORRT.PRECISION", "fp16"], "is given twice"),
        (
            [],
            [
                "MODEL.TENSORRT.VERIFY.MIN_SIGN_AGREEMENT",
                "-1.0",
                "MODEL.TENSORRT.VERIFY.MIN_CLASS_AGREEMENT",
                "-1.0",
            ],
            "VERIFY checks nothing",
        ),
    ],
)
def test_mistakes_end_before_anything_is_measured(run, capsys, words, opts, message):
    status, rows = run(*words, opts=opts)
    assert status == 2 and rows == [] and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--engines", "-1"], ["--margin", "0"], ["--precision", "fp32"], ["--images", "0"]]
)
def test_wrong_arguments(tool, words):
    with pytest.raises(SystemExit) as error:
        tool.parse_args(["--config-file", CONFIG, "--weights", "w.pth", *words])
    assert error.value.code == 2
