"""The parts of tools/benchmark.py: turns, what is counted, the release's pipe, torch.compile's requirements."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import types

import benchmark_bench
import benchmark_compile
import benchmark_limits
import benchmark_release
import benchmark_rounds
import pytest
import torch
from benchmark_bench import LocalBench, MeasureError, _Member
from benchmark_evaluation import EvaluationCase, stand_in_for_panopticapi
from benchmark_limits import Ceilings
from benchmark_model import Footprint, draw_image
from benchmark_rounds import run_all
from benchmark_table import Report
from benchmark_timing import Stage, Timer, summary
from benchmark_work import PARTS, Work, Workload
from torch import nn

from mask2former import get_mask2former_cfg
from mask2former.backend import BackendError
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset
from mask2former.evaluation import PanopticEvaluator
from mask2former.evaluation.panoptic_quality import PQStat, rgb_to_ids
from mask2former.maskformer_model import MaskFormer
from mask2former.modeling.pixel_decoder.ms_deform_attn import MSDeformAttn
from tests.tools.test_benchmark import OPTS, REPO

COLUMNS = {"gpu": "a GPU", "torch": "2", "tensorrt": ""}


class FakeBench:
    """Takes notes of what is asked of it; `failures` are (method, configuration) -> how often it fails."""

    def __init__(self, names, log, failures=()):
        self._names, self._log, self._failures = names, log, dict(failures)

    @property
    def configurations(self):
        return [{"implementation": "x", "backend": name, "precision": "fp32"} for name in self._names]

    def _do(self, what, index, *more):
        name = self._names[index]
        self._log.append((what, name, *more))
        if self._failures.get((what, name), 0) > 0:
            self._failures[what, name] -= 1
            raise MeasureError(f"{what} of {name}", memory=what == "install")

    def install(self, index):
        self._do("install", index)
        return {}

    def uninstall(self, index):
        self._log.append(("uninstall", self._names[index]))

    def prepare(self, index, case, batch):
        self._do("prepare", index)
        return {"columns": {"batch": batch, "image": "64x64"}, "stages": ["core"]}

    def measure(self, index, stage, samples, warmup):
        self._do("measure", index, samples, warmup)
        told = {"times": [1.0 + index] * samples, "images": 1, "void": ""}
        return {**told, "call_mib": 10.0, "resident_mib": 5.0, "weights_mib": 2.0}

    def forget(self, index):
        self._log.append(("forget", self._names[index]))


@pytest.fixture
def turns(tmp_path):
    """What the benches were asked, the rows and the failures."""

    def call(names, failures=(), **options):
        log: list = []
        report = Report(tmp_path, COLUMNS)
        usual = {"stages": ["core"], "image_size": [], "size": [(64, 64)], "batch": [1], "iterations": 5}
        usual |= {"rounds": 2, "warmup": 10, "no_interleave": False}
        args = argparse.Namespace(**{**usual, **options})
        run_all([FakeBench(names, log, failures)], args, report, lambda *_: {})
        return log, report

    return call


def test_configurations_take_turns_and_each_round_starts_with_another(turns):
    log, report = turns("abc")
    measured = [entry[1:] for entry in log if entry[0] == "measure"]
    # All five calls in two rounds; the full warm-up only at first.
    first, second = measured[:3], measured[3:]
    assert first == [("a", 2, 10), ("b", 2, 10), ("c", 2, 10)]
    assert second == [("b", 3, 2), ("c", 3, 2), ("a", 3, 2)]
    assert [row["iterations"] for row in report.rows] == [5, 5, 5]
    assert [row["median_ms"] for row in report.rows] == [1.0, 2.0, 3.0]
    assert {(row["peak_mib"], row["resident_mib"], row["weights_mib"]) for row in report.rows} == {(15, 5, 2)}
    assert {row["note"] for row in report.rows} == {""}


def test_no_memory_is_told_where_one_of_the_rounds_was_void(turns, monkeypatch):
    good = {"call_mib": 10.0, "resident_mib": 5.0, "weights_mib": 2.0}
    answers = [{"void": "it fell"}, {"void": "", **good}]
    told = {"times": [1.0], "images": 1}
    monkeypatch.setattr(FakeBench, "measure", lambda *_: {**told, **answers.pop(0)})
    _, report = turns("a", iterations=2)
    (row,) = report.rows
    assert not {"resident_mib", "peak_mib", "weights_mib"} & set(row)
    assert row["note"] == "memory is not told: it fell"


def test_configurations_alone_where_asked(turns):
    log, report = turns("ab", no_interleave=True)
    assert [e[:2] for e in log if e[0] in ("install", "uninstall")] == [
        *(("install", "a"), ("uninstall", "a"), ("install", "b"), ("uninstall", "b")),
    ]
    assert len(report.rows) == 2


def test_configuration_that_finds_no_memory_comes_again_when_the_others_are_gone(turns):
    log, report = turns("abc", {("install", "b"): 1})
    assert not report.failures
    order = [e[:2] for e in log if e[0] in ("install", "uninstall")]
    assert order.index(("uninstall", "a")) < len(order) - 1 - order[::-1].index(("install", "b"))
    assert [row["backend"] for row in report.rows] == ["a", "b", "c"]
    start = "the GPU's memory did not hold all configurations: "
    end = ", the others ran at another time"
    alone, together = "a fp32 ran alone", "b fp32, c fp32 took turns"
    assert [row["note"] for row in report.rows] == [start + who + end for who in (alone, together, together)]


def test_rows_say_which_configurations_took_turns_where_memory_was_short(turns, monkeypatch):
    short = iter((False, True))  # before b, before c
    monkeypatch.setattr(benchmark_rounds, "_memory_is_short", lambda: next(short))
    _, report = turns("abc")
    told = [row["note"].split(": ")[1].split(",  the")[0] for row in report.rows]
    assert [note.startswith("a fp32, b fp32 took turns") for note in told] == [True, True, False]
    assert told[2].startswith("c fp32 ran alone")


def test_failures_have_a_row_with_the_reason(turns):
    _, report = turns("abcd", {("install", "a"): 2, ("prepare", "b"): 1, ("measure", "c"): 1})
    assert report.failures == [
        "a fp32: install of a",
        "b fp32 batch 1 at 64x64: prepare of b",
        "c fp32 batch 1 at 64x64, core: measure of c",
    ]
    assert [row["backend"] for row in report.rows] == ["d"]
    assert [row["error"] for row in report._file.rows] == ["install of a", "prepare of b", "measure of c", ""]


def test_case_that_fails_leaves_nothing_to_the_next(turns):
    log, _ = turns("ab", {("prepare", "a"): 1}, batch=[1, 2])
    done = [what for what, name, *_ in log if name == "a"]
    assert done[:4] == ["install", "prepare", "forget", "prepare"]


# Times


def test_slow_stages_are_warmed_up_in_the_first_round_only(monkeypatch):
    stages = {name: Stage(lambda: None, images=4, slow=name == "slow") for name in ("slow", "core")}
    member = benchmark_bench._Member({"backend": "torch"}, False)
    bench = object.__new__(LocalBench)
    bench._members, bench._timer, bench._reference = [member], Timer("cpu"), None
    case = types.SimpleNamespace(loader=None, prepare=lambda *_: ({}, stages))
    bench.subject, bench.cfg = types.SimpleNamespace(release=True), None
    monkeypatch.setattr(bench, "_case", lambda case_index: case)
    monkeypatch.setattr(bench, "_active", lambda member: contextlib.nullcontext())
    asked = []
    monkeypatch.setattr(
        bench._timer,
        "samples",
        lambda work, samples, warmup: asked.append((work.slow, samples, warmup)) or [8.0] * samples,
    )
    for case_index in (0, 1):
        bench.prepare(0, case_index, 1)
        for warmup in (10, 2, 2):
            assert bench.measure(0, "slow", 3, warmup)["times"] == [2.0]  # an image's share
            bench.measure(0, "core", 3, warmup)
        bench.forget(0)
    one_case = [(True, 1, 1), (False, 3, 10), (True, 1, 0), (False, 3, 2), (True, 1, 0), (False, 3, 2)]
    assert asked == one_case * 2


def test_summary_of_times():
    told = summary([4.0, 1.0, 2.0, 3.0, 5.0], images=2)
    assert (told["median_ms"], told["iterations"]) == (3.0, 5)
    assert told["p10_ms"] == pytest.approx(1.4) and told["p90_ms"] == pytest.approx(4.6)
    assert told["images_per_s"] == pytest.approx(2000 / 3, rel=1e-4)


def test_back_to_back_calls_make_one_sample():
    calls = []
    stage = Stage(lambda: calls.append(1), 1, back_to_back=True)
    times = Timer("cpu").samples(stage, 2, warmup=3)
    # A call of no time is repeated as often as allowed, after the warm-up and one call that finds this out.
    assert len(times) == 2 and len(calls) == 3 + 1 + 2 * 200


class _Gpu:
    """As much of torch.cuda as times and memory are read from; each call of work takes 4 ms and 3 MiB for a while."""

    def __init__(self, monkeypatch):
        self.clock = 0.0
        self.used, self.peak = 100 << 20, 0
        for name, value in {
            "Event": lambda enable_timing: _Event(self),
            "synchronize": lambda: None,
            "memory_allocated": lambda: self.used,
            "memory_reserved": lambda: self.used + (50 << 20),
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.used),
            "empty_cache": lambda: None,
            # 70 MiB are not PyTorch's.
            "mem_get_info": lambda: ((1 << 30) - self.used - (120 << 20), 1 << 30),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self):
        self.clock += 4.0
        self.peak = max(self.peak, self.used + (3 << 20))


class _Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.time = self.gpu.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.time - self.time


def test_calls_on_a_gpu_are_timed_by_its_own_clock(monkeypatch):
    gpu = _Gpu(monkeypatch)
    assert Timer("cuda").samples(Stage(gpu.work, 1), 3, warmup=1) == [4.0, 4.0, 4.0]
    assert gpu.clock == 16.0
    # 100 ms of calls of 4 ms, after one that tells how long they are.
    assert Timer("cuda").samples(Stage(gpu.work, 1, back_to_back=True), 2, warmup=0) == [4.0, 4.0]
    assert gpu.clock == 16.0 + 4 * (1 + 2 * 25)


def one_engine(monkeypatch):
    """A GPU, a bench on it, and its one configuration."""
    gpu = _Gpu(monkeypatch)
    bench = LocalBench.__new__(LocalBench)
    member = _Member({"backend": "tensorrt", "precision": "fp16"}, cuda=True)
    member.stages = {"core": Stage(gpu.work, 1)}
    bench._members, bench._timer = [member], Timer("cuda")
    bench.subject = types.SimpleNamespace(release=True, model=nn.Linear(1 << 18, 1))
    monkeypatch.setattr(benchmark_bench, "set_precision", lambda *_: contextlib.nullcontext())
    return gpu, bench, member


def test_memory_that_a_configuration_keeps_and_that_a_call_takes(monkeypatch):
    gpu, bench, member = one_engine(monkeypatch)
    with member.installed:
        gpu.used += 20 << 20
    gpu.used += 40 << 20  # another configuration's
    told = bench.measure(0, "core", samples=2, warmup=1)
    assert (told["times"], told["images"], told["call_mib"]) == ([4.0, 4.0], 1, 3.0)
    # PyTorch's weights, a MiB here, are there beside an engine too.
    assert told["weights_mib"] == pytest.approx(1.0, abs=1e-3)
    assert told["resident_mib"] == pytest.approx(21.0, abs=1e-3) and told["void"] == ""
    # What the next case finds does not count as its own, and what the tool holds is nobody's.
    gpu.used += 300 << 20
    member.case = Footprint(cuda=True)
    with member.case:
        gpu.used += 9 << 20
    member.case.leave_out(5 << 20)
    assert bench.measure(0, "core", 2, 1)["resident_mib"] == pytest.approx(25.0, abs=1e-3)


def test_memory_that_fell_is_not_told(monkeypatch):
    gpu, bench, member = one_engine(monkeypatch)
    with member.installed:
        gpu.used += 200 << 20
    with member.case:
        gpu.used -= 90 << 20
    told = bench.measure(0, "core", samples=2, warmup=1)
    assert told["void"] == "it fell by 90 MiB, which others freed" and "resident_mib" not in told


def _bench_with(monkeypatch, backend: str, mode: str = "readwrite"):
    """A bench of one configuration whose backend takes 20 MiB, and 30 more when it first runs a case."""
    gpu = _Gpu(monkeypatch)
    made = []

    class Backend:
        def __init__(self):
            made.append(backend)
            gpu.used += 20 << 20
            self.held = 20 << 20

        def run(self):
            gpu.used += 30 << 20
            self.held += 30 << 20

        def __del__(self):
            gpu.used -= self.held

    monkeypatch.setattr("benchmark_backends.make_backend", lambda *_: Backend())
    monkeypatch.setattr(benchmark_bench, "set_precision", lambda *_: contextlib.nullcontext())
    bench = LocalBench.__new__(LocalBench)
    member = _Member({"backend": backend, "precision": "fp16", "variant": ""}, cuda=True)
    bench._members, bench._timer, bench._reference = [member], Timer("cuda"), None
    bench.subject = types.SimpleNamespace(
        release=False, model=nn.Linear(1 << 18, 1), use=lambda backend: None
    )
    cache = types.SimpleNamespace(MODE=mode)
    tensorrt = types.SimpleNamespace(CACHE=cache)
    bench.cfg = types.SimpleNamespace(MODEL=types.SimpleNamespace(TENSORRT=tensorrt))

    def prepare(subject, cfg, batch):
        member.backend.run()
        return {}, {"core": Stage(gpu.work, 1)}

    monkeypatch.setattr(
        bench, "_case", lambda index: types.SimpleNamespace(loader=None, prepare=prepare), raising=False
    )
    return bench, made


@pytest.mark.parametrize(
    "backend, mode, loads", [("tensorrt", "readwrite", 3), ("tensorrt", "off", 1), ("torch", "", 1)]
)
def test_memory_of_a_case_does_not_grow_with_those_before_it(monkeypatch, backend, mode, loads):
    """Graphs of earlier sizes go with their engine, which the cache has; without a cache they are not counted."""
    bench, made = _bench_with(monkeypatch, backend, mode)
    bench._make_backend(bench._members[0])
    for case in range(3):
        bench.prepare(0, case, 1)
        assert bench.measure(0, "core", 2, 1)["resident_mib"] == pytest.approx(51.0, abs=1e-3)
        bench.forget(0)
    assert len(made) == loads


# What is counted


def test_matrix_products_and_convolutions_are_counted():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(2), nn.Linear(64, 5))
    images = torch.zeros(1, 3, 8, 8)
    work = Workload.count(lambda x: (model(x), x), model, images)
    conv, linear = work.layers
    assert conv.flops == 2 * 64 * 8 * 27 and linear.flops == 2 * 8 * 64 * 5
    assert conv.weights == 8 * 27 and conv.activations == 3 * 64 + 8 * 64
    assert linear.weights == 64 * 5 + 5 and linear.activations == 8 * 64 + 8 * 5
    assert work.weights == sum(p.numel() for p in model.parameters())
    assert work.images == 4 * 3 * 64 and work.results == 4 * (8 * 5 + 3 * 64)


def test_deformable_attention_is_counted_by_its_samples():
    attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
    shapes = ((4, 4), (2, 2))
    pixels = torch.zeros(1, 20, 32)
    work = Workload.count(lambda x: (attention(x, x, shapes),), attention, pixels)
    (core,) = [layer for layer in work.layers if layer.sampled]
    assert (
        core.flops == 20 * 4 * 2 * 3 * 8 * 8
    )  # queries, heads, levels, points, channels; four multiply-adds
    assert core.activations == 2 * 20 * 32 + 20 * 4 * 2 * 3 * 3
    linear = sum(layer.flops for layer in work.layers if not layer.sampled)
    assert linear == 2 * 20 * 32 * (32 + 4 * 2 * 3 * 2 + 4 * 2 * 3 + 32)


def test_model_is_counted_whole(monkeypatch):
    cfg = get_mask2former_cfg(None, ["MODEL.DEVICE", "cpu"])
    cfg.merge_from_file("configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml")
    cfg.merge_from_list([*OPTS, "MODEL.WEIGHTS", ""])
    model = MaskFormer(cfg).eval()
    with torch.no_grad():
        small = Workload.count(model.core, model, torch.zeros(1, 3, 64, 64))
        large = Workload.count(model.core, model, torch.zeros(1, 3, 128, 128))
    assert 3.5 < large.flops / small.flops < 4.5  # with the pixels, but for what queries do among themselves
    assert [layer.sampled for layer in small.layers].count(True) == 1  # one encoder layer
    stem = small.layers[0]
    assert stem.flops == 2 * 32 * 32 * 16 * 3 * 49 and stem.part == "backbone"
    assert {layer.part for layer in small.layers} == set(PARTS)
    # Two decoder layers less one: the first prediction comes before them. Q = 10, C = mask_dim = 32, 8 by 8 features in all.
    attentions = [layer for layer in small.layers if layer.name == "attention"]
    assert [layer.part for layer in attentions] == ["transformer decoder"] * len(attentions)
    masked, plain = attentions[:2]
    keys = 2 * 2  # stride 32
    assert masked.flops == 2 * 10 * keys * 3 * 32 and masked.activations == 2 * 320 + 3 * keys * 32 + 320
    assert plain.flops == 2 * 10 * 10 * 2 * 32 and plain.activations == 4 * 320


def test_floors():
    layers = (Work("mm", 1000, 10, 100), Work("ms_deform_attn", 400, 300, 0, sampled=True))
    work = Workload(layers, weights=100, images=50, results=30)
    ceilings = Ceilings(bandwidth=1e3, flops={"fp16": 1e4, "fp32": 1e3})
    one = work.columns(ceilings, "fp16", batch=1)
    # 0.1 + 0.4 s of arithmetic; 2 * 100 + 80 bytes.
    assert one["limit_ms"] == pytest.approx(500) and one["moved_mb"] == pytest.approx(280e-6, abs=1e-3)
    # The product takes 220 bytes' time, sampling that of 600 bytes.
    assert one["layers_ms"] == pytest.approx(820)
    four = work.columns(ceilings, "fp16", batch=4)
    assert four["limit_ms"] == pytest.approx(2000)
    assert four["layers_ms"] == pytest.approx(max(400, (40 + 100) * 2) + 2400)
    assert work.moved("fp32", 4) == 400 + 4 * 80


# The release's pipe


class _Bench:
    configurations = ({"backend": "torch"},)

    def install(self, index):
        return {"installed": index}

    def prepare(self, index, case, batch):
        raise MeasureError("no memory", memory=True)


def test_pipe_answers_calls_and_errors():
    requests = "\n".join(
        json.dumps({"call": call, "arguments": arguments})
        for call, arguments in (("install", [3]), ("prepare", [0, 1, 2]), ("close", []))
    )
    answers = io.StringIO()
    benchmark_release.serve(_Bench(), io.StringIO(requests), answers)
    first, second, third, fourth = map(json.loads, answers.getvalue().splitlines())
    assert first == {"result": [{"backend": "torch"}]}
    assert second == {"result": {"installed": 3}}
    assert third == {"error": "no memory", "memory": True}
    assert "'close' is none of install" in fourth["error"]


def test_release_that_dies_on_the_way_is_an_error(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text("print('{\"result\": []}', flush=True); input(); raise SystemExit(7)")
    bench = benchmark_release.RemoteBench(
        str(script), argparse.Namespace(release="../R"), ["--size", "64x64"], "weights.pth"
    )
    for _ in range(2):
        with pytest.raises(MeasureError, match=r"release in ../R ended with status 7"):
            bench.install(0)
    bench.close()


def test_options_without_meaning_for_the_release_are_left_out():
    words = ["--release", "../R", "--backend", "torch", "tensorrt", "--compile-mode", "default"]
    words += ["--output=here", "--batch", "1", "2", "--", "A.B", "3"]
    assert benchmark_release.without_ours(words) == ["--batch", "1", "2", "--", "A.B", "3"]


@pytest.mark.parametrize("release", [False, True])
def test_semantic_maps_are_not_decoded_for_our_rows(tmp_path, release):
    make_shapes_dataset(tmp_path / "shapes", ShapesOptions(train=1, val=2, max_size=128))
    register_shapes(str(tmp_path / "shapes"), f"benchparts{release}")
    opts = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", f"('benchparts{release}_val_panoptic',)"]
    cfg = get_mask2former_cfg(REPO / "configs/shapes/maskformer2_mini_shapes.yaml", opts)
    case = EvaluationCase(cfg, 1, release)
    (loaded,) = case.loader(cfg, 1)
    assert [("sem_seg" in one) for one in (*case._inputs, *loaded)] == [release] * 2


def test_evaluation_is_timed_until_every_image_has_been_processed(tmp_path, monkeypatch):
    make_shapes_dataset(tmp_path / "shapes", ShapesOptions(train=1, val=5, max_size=128))
    register_shapes(str(tmp_path / "shapes"), "benchwait")
    opts = [
        "MODEL.DEVICE",
        "cpu",
        "DATASETS.TEST",
        "('benchwait_val_panoptic',)",
        "TEST.EVALUATION_THREADS",
        2,
    ]
    opts += ["MODEL.MASK_FORMER.TEST.INSTANCE_ON", False, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False]
    cfg = get_mask2former_cfg(REPO / "configs/shapes/maskformer2_mini_shapes.yaml", opts)
    done = []

    def slow(self, image, fetched):
        time.sleep(0.05)
        done.append(image["image_id"])
        return image["image_id"], PQStat(), None

    class Model:
        postprocess_options = None

        def __call__(self, inputs):
            return [{"panoptic_seg": (torch.zeros(2, 2), [])} for _ in inputs]

    monkeypatch.setattr(PanopticEvaluator, "examine", slow)
    columns, stages = EvaluationCase(cfg, 0, release=False).prepare(
        types.SimpleNamespace(model=Model()), cfg, 2
    )
    done.clear()
    stages["evaluation"].call()
    assert len(done) == 5 and columns["note"] == "2 evaluation threads"


def test_release_finds_the_shapes_beside_a_package_of_the_same_name(tmp_path):
    (tmp_path / "mask2former").mkdir()
    (tmp_path / "mask2former" / "__init__.py").write_text("theirs = True")
    code = (
        "import benchmark_evaluation, mask2former; from detectron2.data import MetadataCatalog;"
        "benchmark_evaluation.register_shapes();"
        "assert mask2former.theirs and not hasattr(mask2former, 'data');"
        "print(MetadataCatalog.get('shapes_val_panoptic').evaluator_type)"
    )
    path = os.pathsep.join([str(tmp_path), str(REPO / "tools")])
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == ["coco_panoptic_seg"]


def test_stand_in_for_panopticapi_gives_its_colours(monkeypatch):
    for name in ("panopticapi", "panopticapi.utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if stand_in_for_panopticapi():
        monkeypatch.setitem(sys.modules, "panopticapi", sys.modules["panopticapi"])
        monkeypatch.setitem(sys.modules, "panopticapi.utils", sys.modules["panopticapi.utils"])
    from panopticapi.utils import id2rgb

    ids = torch.tensor([[0, 255, 256], [65536, 70000, 1]], dtype=torch.int32).numpy()
    assert (rgb_to_ids(id2rgb(ids)) == ids).all()


# torch.compile


def test_what_torch_compile_lacks_is_said(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match=r"no compiler: looked for g\+\+, clang\+\+, c\+\+"):
        benchmark_compile.CompileBackend(nn.Identity(), "cpu")
    monkeypatch.setattr(benchmark_compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="Triton is not installed"):
        benchmark_compile.CompileBackend(nn.Identity(), "cuda")


def test_compiled_backend_runs_the_core(monkeypatch):
    class Model(nn.Module):
        def core(self, images):
            return images * 2, images.sum((1, 2))

    # Inductor's own work is PyTorch's to test, and takes a compiler: "eager" goes the same way through Dynamo.
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, dynamic: compiled(f, backend="eager", dynamic=dynamic)
    )
    monkeypatch.setattr(benchmark_compile, "why_not", lambda device: "")
    backend = benchmark_compile.CompileBackend(Model(), "cpu", "default")
    for side in (3, 4):
        images = torch.randn(1, side, side)
        doubled, summed = backend(images)
        assert torch.equal(doubled, images * 2) and torch.equal(summed, images.sum((1, 2)))
    assert backend.describe()["backend"] == "compile"


def test_image_is_smooth_and_the_same_each_time():
    image = draw_image((48, 64))
    assert image.shape == (48, 64, 3) and (image == draw_image((48, 64))).all()


def test_work_of_a_network_is_printed_by_part(capsys):
    words = ["--size", "64x96", "--device", "cpu", "--speeds", "1000", "10", "1", "--precision", "fp16", "--"]
    assert benchmark_limits.main([*words, *OPTS, "MODEL.WEIGHTS", ""]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fp16: 1000 GB/s, 10.0 TFLOP/s, sampling 1.0 TFLOP/s" in lines
    rows = {
        part: next(line for line in lines if line.startswith(part)).split()[-3:] for part in (*PARTS, "all")
    }
    for column in range(3):  # as far as they are rounded
        whole = sum(float(rows[part][column]) for part in PARTS)
        assert float(rows["all"][column]) == pytest.approx(whole, abs=0.2)
    with pytest.raises(SystemExit):
        benchmark_limits.parse_args(["--size", "800x1067"])
