"""What tools/demo.py runs: detectron2's DefaultPredictor over images, videos, a camera or drawn scenes."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import detectron2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..backend import BackendError, check_backend
from ..config import get_mask2former_cfg
from ..data.datasets.shapes import draw_scene
from ..engine.checkpoint import CheckpointError, explain_failure
from .media import (
    FrameSource,
    Item,
    MediaError,
    VideoSink,
    Window,
    assign_outputs,
    find_inputs,
    read_picture,
    write_picture,
)
from .pictures_ahead import PicturesAhead
from .timing import StageClock, median_ms, time_backend
from .visualization import TASKS, ClassTable, Findings, Painter, interpret

# Checkpoints of backbones alone, which training starts from.
_BACKBONE_ONLY = re.compile(r"ImageNetPretrained|swin_\w+_patch\d+_window\d+")
# What ends an input and not the run.
_ONE_INPUT = (MediaError, BackendError, ValueError, OverflowError, cv2.error, torch.cuda.OutOfMemoryError)
_THRESHOLDS = ("OBJECT_MASK_THRESHOLD", "OVERLAP_THRESHOLD")


class DemoError(Exception):
    """The run cannot start; the message says why and what to change."""


def run_demo(args: argparse.Namespace) -> int:
    """Run with the arguments of tools/demo.py and return its exit status. Raises DemoError."""
    if args.json and Path(args.json).expanduser().is_dir():
        raise DemoError(f"--json {args.json}: it is a folder; name a file")
    try:
        found = find_inputs(args.inputs)
        items = found.items + [Item("scene", seed) for seed in range(args.draw)]
        if args.camera is not None:
            items.append(Item("camera", args.camera))
        if args.output is not None:
            assign_outputs(items, args.output)
        window = Window("Mask2Former") if args.window else None
    except MediaError as error:
        raise DemoError(str(error)) from error
    if found.skipped:
        print(f"skipped {found.skipped} file(s) that are neither images nor videos")
    cfg, random_weights = make_cfg(args)
    return Demo(cfg, args, random_weights, window, items).run(items)


def make_cfg(args: argparse.Namespace):
    """The config to run, and whether its weights are random. Raises DemoError."""
    try:
        cfg = get_mask2former_cfg(args.config_file, args.opts)
        check_backend(cfg.MODEL.BACKEND, cfg)
    except (FileNotFoundError, KeyError, ValueError, BackendError) as error:
        raise DemoError(error.args[0] if isinstance(error, KeyError) else str(error)) from error
    given = set(args.opts[::2])
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
        given.add("MODEL.WEIGHTS")
    _choose_device(cfg, args.device, "MODEL.DEVICE" in given)
    tests = cfg.MODEL.MASK_FORMER.TEST
    on = [task for task in TASKS if tests[f"{task.upper()}_ON"]]
    if not on or (args.task != "auto" and args.task not in on):
        wanted = "PANOPTIC" if args.task == "auto" else args.task.upper()
        raise DemoError(
            f"--task {args.task}: the config has {', '.join(on) or 'no task'} on. Add "
            f"--opts MODEL.MASK_FORMER.TEST.{wanted}_ON True, or use another --config-file"
        )
    random_weights = _choose_weights(cfg, "MODEL.WEIGHTS" in given)
    if random_weights:
        # No query of a random model is as sure as the configs ask, and the picture would stay empty.
        for key in _THRESHOLDS:
            if f"MODEL.MASK_FORMER.TEST.{key}" not in given:
                tests[key] = 0.0
    return cfg, random_weights


def _choose_device(cfg, device: str | None, in_opts: bool) -> None:
    asked = device is not None or in_opts
    if device is not None:
        cfg.MODEL.DEVICE = device
    try:
        chosen = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise DemoError(f"'{cfg.MODEL.DEVICE}' is no device: {str(error).splitlines()[0]}") from error
    if chosen.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (chosen.index or 0) < count:
        return
    reason = (
        "this PyTorch was built without CUDA"
        if torch.version.cuda is None
        else f"PyTorch sees {count} GPU(s)"
    )
    if asked:
        raise DemoError(
            f"device {cfg.MODEL.DEVICE} was asked for, but {reason}; use --device cpu or leave it out"
        )
    print(f"running on the CPU: {reason}")
    cfg.MODEL.DEVICE = "cpu"


def _choose_weights(cfg, asked: bool) -> bool:
    weights = cfg.MODEL.WEIGHTS
    why = "no checkpoint is given"
    if weights and not asked and _BACKBONE_ONLY.search(weights):
        why = f"no checkpoint is given (the config's own, {weights}, is a backbone to start training from)"
        weights = ""
    if weights and "://" not in weights and not PathManager.isfile(weights):
        raise DemoError(f"no checkpoint {weights}; give an existing file with --weights (MODEL.WEIGHTS)")
    cfg.MODEL.WEIGHTS = weights
    if weights:
        return False
    print(
        f"WARNING: {why}, so the weights are random, and masks, names and colours mean nothing. Segments are "
        "drawn however unsure the model is. For real results add --weights FILE",
        file=sys.stderr,
    )
    return True


class Demo:
    """A model, where its results go, and what happened so far."""

    def __init__(
        self,
        cfg,
        args: argparse.Namespace,
        random_weights: bool,
        window: Window | None,
        items: Sequence[Item] = (),
    ):
        """
        Args:
            items: what is going to be run; pictures of it are what the backend builds with.
        """
        self.cfg, self.args, self.window = cfg, args, window
        started = time.perf_counter()
        # The same random weights each time, without a change to the caller's random numbers.
        with torch.random.fork_rng(enabled=random_weights):
            if random_weights:
                torch.manual_seed(0)
            try:
                self.predictor = DefaultPredictor(cfg)
                self.predictor.model.prepare(_pictures_ahead(cfg, items))
            except BackendError as error:
                raise DemoError(str(error)) from error
            except Exception:
                try:
                    explain_failure(cfg.MODEL.WEIGHTS)
                except CheckpointError as error:
                    raise DemoError(str(error)) from error
                raise
        self.clock = StageClock(cfg.MODEL.DEVICE)
        time_backend(self.predictor.model, self.clock)
        datasets = tuple(cfg.DATASETS.TEST) or tuple(cfg.DATASETS.TRAIN)
        metadata = MetadataCatalog.get(datasets[0]) if datasets else None
        self.classes = ClassTable(metadata, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        self.random_weights = random_weights
        self.laps: list[dict[str, float]] = []
        self.entries: list[dict] = []
        self.failures: list[dict[str, str]] = []
        seconds = time.perf_counter() - started
        print(
            f"model ready in {seconds:.1f} s: {args.config_file} on {cfg.MODEL.DEVICE}, "
            f"backend {self._backend()['backend']}"
        )

    def _backend(self) -> dict:
        """What has run the network so far."""
        return self.predictor.model.backend.describe()

    def run(self, items: list[Item]) -> int:
        started = time.perf_counter()
        interrupted = False
        # A bar that is redrawn in a log file is noise: there it comes once in ten seconds.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        try:
            with tqdm(items, unit="input", mininterval=interval, disable=len(items) == 1) as bar:
                for item in bar:
                    if not self._run_item(item):
                        break
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if self.window is not None:
                self.window.close()
        self._summarize(time.perf_counter() - started, interrupted, len(items))
        if interrupted:
            return 130
        return 1 if self.failures else 0

    def _run_item(self, item: Item) -> bool:
        """False where the user closed the window."""
        try:
            return self._run_stream(item) if item.is_stream else self._run_image(item)
        except _ONE_INPUT as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            reason = (
                str(error)
                if isinstance(error, (MediaError, BackendError))
                else f"{type(error).__name__}: {error}"
            )
            self.failures.append({"input": item.name, "reason": reason})
            _say(f"{item.name}: FAILED: {reason}")
            return True

    def _run_image(self, item: Item) -> bool:
        self.clock.start()
        bgr, notes = _read(item)
        self.clock.lap("read")
        findings, drawn = self._segment(bgr, Painter(self.classes))
        if item.output is not None:
            write_picture(item.output, drawn)
        self.clock.lap("write")
        laps = self.clock.seconds
        self.laps.append(laps)
        stages = {stage: round(1e3 * seconds, 2) for stage, seconds in laps.items()}
        self._record(item, findings, notes=notes, stages_ms=stages, **findings.to_dict())
        _say(
            f"{item.name} {findings.height}x{findings.width}: {findings.describe()}"
            + (f" [{'; '.join(notes)}]" if notes else "")
            + f" | {', '.join(f'{stage} {ms:.0f}' for stage, ms in stages.items())} ms"
            + _arrow(item)
        )
        return self.window is None or self.window.show(drawn, until_key=True)

    def _run_stream(self, item: Item) -> bool:
        source = FrameSource(item, self.args.max_frames)
        sink = None if item.output is None else VideoSink(item.output, source.fps)
        seen = _Seen()
        try:
            going_on = self._run_frames(item, source, sink, seen)
        except KeyboardInterrupt:
            # What there is so far is a whole, shorter video.
            self._finish_stream(item, sink, seen)
            raise
        else:
            self._finish_stream(item, sink, seen)
            return going_on
        finally:
            source.close()
            if sink is not None:
                sink.abort()

    def _run_frames(self, item: Item, source: FrameSource, sink: VideoSink | None, seen: _Seen) -> bool:
        painter = Painter(self.classes)
        live = item.kind == "camera"
        bar = tqdm(total=source.total, unit="frame", desc=Path(item.name).name, leave=False)
        started = None
        with bar:
            self.clock.start()
            for bgr in source:
                started = started or time.perf_counter()
                self.clock.lap("read")
                findings, drawn = self._segment(bgr, painter)
                if sink is not None:
                    # A camera's frames are repeated, so that the recording plays at the speed of life.
                    due = round((time.perf_counter() - started) * source.fps) - sink.frames if live else 1
                    sink.write(drawn, times=max(due, 1))
                self.clock.lap("write")
                self.laps.append(self.clock.seconds)
                seen.add(findings)
                bar.update()
                if self.window is not None and not self.window.show(drawn, until_key=False):
                    return False
                self.clock.start()
        return True

    def _finish_stream(self, item: Item, sink: VideoSink | None, seen: _Seen) -> None:
        if seen.last is None:
            return
        if sink is not None:
            sink.finish()
        self._record(
            item, seen.last, frames=seen.frames, fps=None if sink is None else sink.fps, seen=seen.to_dict()
        )
        _say(
            f"{item.name} {seen.last.height}x{seen.last.width}: {seen.frames} frames, {seen.describe()}"
            f"{_arrow(item)}"
        )

    def _segment(self, bgr: np.ndarray, painter: Painter) -> tuple[Findings, np.ndarray]:
        outputs = self.predictor(bgr)
        self.clock.lap("postprocess")
        findings = interpret(outputs, self.classes, self.args.task, self.args.confidence_threshold)
        drawn = painter.paint(bgr[:, :, ::-1], findings)
        self.clock.lap("draw")
        return findings, drawn

    def _record(self, item: Item, findings: Findings, **more) -> None:
        output = None if item.output is None else str(item.output)
        size = {"height": findings.height, "width": findings.width}
        self.entries.append({"input": item.name, "kind": item.kind, "output": output, **size, **more})

    def _summarize(self, seconds: float, interrupted: bool, count: int) -> None:
        medians = median_ms(self.laps)
        images = len(self.laps)
        rate = images / seconds if seconds > 0 else 0.0
        lines = [""]
        if medians:
            lines += ["stage          median ms"] + [
                f"{stage:<14}{ms:>10.1f}" for stage, ms in medians.items()
            ]
        lines.append(f"{images} image(s) or frame(s) in {seconds:.1f} s: {rate:.2f} images per second")
        backend = self._backend()
        lines.append(f"backend: {backend['backend']}")
        if interrupted:
            lines.append(f"stopped by Ctrl-C: {len(self.entries)} of {count} inputs have results")
        if self.failures:
            lines.append(f"{len(self.failures)} of {count} inputs failed:")
            lines += [f"  {failure['input']}: {failure['reason']}" for failure in self.failures]
        print("\n".join(lines))
        if self.args.json:
            content = {
                "config": str(self.args.config_file),
                "weights": self.cfg.MODEL.WEIGHTS,
                "random_weights": self.random_weights,
                "device": self.cfg.MODEL.DEVICE,
                "backend": backend,
                "versions": {"torch": torch.__version__, "detectron2": detectron2.__version__},
                "confidence_threshold": self.args.confidence_threshold,
                "results": self.entries,
                "failures": self.failures,
                "interrupted": interrupted,
                "summary": {
                    "images": images,
                    "seconds": round(seconds, 3),
                    "images_per_second": round(rate, 3),
                    "median_ms": {stage: round(ms, 3) for stage, ms in medians.items()},
                },
            }
            path = Path(self.args.json).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class _Seen:
    """Classes over the frames of a video: in how many they are, and how many at once."""

    def __init__(self):
        self.frames = 0
        self.last: Findings | None = None
        self._in_frames: Counter = Counter()
        self._most: Counter = Counter()

    def add(self, findings: Findings) -> None:
        self.frames += 1
        # Without the regions, whose masks would hold memory.
        self.last = Findings(findings.task, findings.height, findings.width, [], findings.threshold)
        for name, count in Counter(region.name for region in findings.regions).items():
            self._in_frames[name] += 1
            self._most[name] = max(self._most[name], count)

    def describe(self) -> str:
        names = [
            f"{name} in {frames} (up to {self._most[name]})"
            for name, frames in self._in_frames.most_common(8)
        ]
        more = f", and {len(self._in_frames) - 8} more classes" if len(self._in_frames) > 8 else ""
        return (", ".join(names) or "nothing found") + more

    def to_dict(self) -> dict:
        return {
            name: {"frames": n, "most_at_once": self._most[name]} for name, n in self._in_frames.most_common()
        }


def _read(item: Item) -> tuple[np.ndarray, list[str]]:
    """An image or scene, (H, W, 3) uint8 BGR, and notes on what was left out or changed."""
    if item.kind == "scene":
        return np.ascontiguousarray(draw_scene(item.source).image[:, :, ::-1]), []
    return read_picture(item.source)


def _pictures_ahead(cfg, items: Sequence[Item]) -> PicturesAhead | None:
    """None where all are streams: a camera is not opened twice."""
    readers = [lambda item=item: _read(item)[0] for item in items if not item.is_stream]
    return PicturesAhead(cfg, readers) if readers else None


def _arrow(item: Item) -> str:
    return "" if item.output is None else f" -> {item.output}"


def _say(line: str) -> None:
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stdout)  # above the progress bar
        sys.stdout.flush()
    else:
        print(line, flush=True)
