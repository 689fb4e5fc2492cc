"""tools/demo.py from its arguments to its files, with a mini model on the CPU."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from PIL import Image

from mask2former import get_mask2former_cfg
from mask2former.backend import BACKEND_REGISTRY
from mask2former.data.datasets.shapes import draw_scene
from mask2former.utils import demo as demo_module
from mask2former.utils.media import MediaError, VideoSink, count_frames
from mask2former.utils.visualization import Painter
from tests.tools.loading import REPO, load_tool

CONFIG = REPO / "configs" / "coco" / "panoptic-segmentation" / "maskformer2_R50_bs16_50ep.yaml"
MINI = {
    "DATASETS.TRAIN": "('shapes_train_panoptic',)",
    "DATASETS.TEST": "('shapes_val_panoptic',)",
    "INPUT.MIN_SIZE_TEST": "64",
    "MODEL.MASK_FORMER.DEC_LAYERS": "2",
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": "32",
    "MODEL.MASK_FORMER.HIDDEN_DIM": "32",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": "10",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "32",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "8",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": "32",
    "MODEL.SEM_SEG_HEAD.MASK_DIM": "32",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "13",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": "1",
    "TEST.DETECTIONS_PER_IMAGE": "10",
}
CPU = ("--device", "cpu")


def words(opts: dict[str, str]) -> list[str]:
    return [word for pair in opts.items() for word in pair]


TOOL = load_tool("demo")


def run(*arguments, **opts: str) -> int:
    """Exit status of the demo with the mini model; `opts` with "__" for dots go to --opts."""
    more = {key.replace("__", "."): value for key, value in opts.items()}
    arguments = [str(argument) for argument in (*arguments, *CPU)]
    return TOOL.main([*arguments, "--config-file", str(CONFIG), "--opts", *words({**MINI, **more})])


def make_picture(path: Path, seed: int, size: tuple[int, int] = (48, 72)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_scene(seed, *size).image).save(path)
    return path


def make_video(path: Path, frames: int = 8, fps: float = 5) -> Path:
    sink = VideoSink(path, fps)
    scene = draw_scene(3, 48, 96).image
    for i in range(frames):
        sink.write(np.roll(scene, 2 * i, axis=1)[:, :64])
    sink.finish()
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_folder_pattern_and_drawn_scenes_in_one_run(tmp_path, capsys):
    make_picture(tmp_path / "in" / "a.png", 1)
    make_picture(tmp_path / "in" / "b.jpg", 2, (60, 50))
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    make_picture(tmp_path / "more" / "a.png", 3)
    out, report = tmp_path / "out" / "new", tmp_path / "report.json"
    status = run(tmp_path / "in", tmp_path / "more" / "*.png", "--draw", 1, "--output", out, "--json", report)
    assert status == 0
    assert files(out) == ["a.png", "a_2.png", "b.jpg", "scene_000.png"]
    assert pixels(out / "b.jpg").shape == (60, 50, 3)
    assert pixels(out / "scene_000.png").shape == draw_scene(0).image.shape
    assert (pixels(out / "a.png") != pixels(tmp_path / "in" / "a.png")).mean() > 0.1

    printed = capsys.readouterr()
    assert "skipped 1 file(s)" in printed.out
    assert f"{tmp_path}/in/b.jpg 60x50: " in printed.out
    assert "things" in printed.out and "instances >= 0.5" in printed.out
    assert "4 image(s) or frame(s) in" in printed.out
    assert printed.err.count("the weights are random") == 1

    content = json.loads(report.read_text())
    assert content["random_weights"] is True and content["failures"] == []
    assert [Path(entry["output"]).name for entry in content["results"]] == [
        "a.png",
        "b.jpg",
        "a_2.png",
        "scene_000.png",
    ]
    stages = ["read", "preprocess", "network", "postprocess", "draw", "write"]
    assert all(list(entry["stages_ms"]) == stages for entry in content["results"])
    assert list(content["summary"]["median_ms"]) == [*stages, "total"]
    assert min(content["summary"]["median_ms"].values()) > 0
    assert content["summary"]["images"] == 4
    assert content["summary"]["images_per_second"] == pytest.approx(
        4 / content["summary"]["seconds"], rel=0.01
    )


def test_report_holds_what_detectron2s_predictor_gives(tmp_path):
    picture = make_picture(tmp_path / "a.png", 1)
    opts = {**MINI, "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": "0.08", "MODEL.WEIGHTS": ""}
    cfg = get_mask2former_cfg(str(CONFIG), [*words(opts), "MODEL.DEVICE", "cpu"])
    torch.manual_seed(1)
    predictor = DefaultPredictor(cfg)
    torch.save({"model": predictor.model.state_dict()}, tmp_path / "model.pth")
    segments, info = predictor(cv2.imread(str(picture)))["panoptic_seg"]
    assert info
    status = run(
        picture,
        *("--output", tmp_path / "out/", "--json", tmp_path / "r.json", "--weights", tmp_path / "model.pth"),
        MODEL__MASK_FORMER__TEST__OBJECT_MASK_THRESHOLD="0.08",
    )
    assert status == 0
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["random_weights"] is False
    regions = content["results"][0]["regions"]
    assert [(r["class_id"], r["isthing"], r["area"]) for r in regions] == [
        (s["category_id"], s["isthing"], int((segments == s["id"]).sum())) for s in info
    ]


def test_runs_with_random_weights_are_alike_and_leave_the_random_state(tmp_path, capsys):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    for name in ("one.png", "two.png"):
        assert run("--draw", 1, "--output", tmp_path / name) == 0
    assert (pixels(tmp_path / "one.png") == pixels(tmp_path / "two.png")).all()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_damaged_image_is_reported_and_the_run_goes_on(tmp_path, capsys):
    make_picture(tmp_path / "a.png", 1)
    damaged = make_picture(tmp_path / "b.png", 2)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    make_picture(tmp_path / "c.png", 3)
    out = tmp_path / "out"
    assert run(tmp_path, "--output", out, "--json", tmp_path / "r.json") == 1
    assert files(out) == ["a.png", "c.png"]
    printed = capsys.readouterr().out
    assert f"{damaged}: FAILED: " in printed
    assert "1 of 3 inputs failed:" in printed
    (failure,) = json.loads((tmp_path / "r.json").read_text())["failures"]
    assert failure["input"] == str(damaged) and "truncated" in failure["reason"]


def test_image_that_the_model_cannot_take_is_reported(tmp_path, capsys):
    thin = tmp_path / "thin.png"
    Image.new("RGB", (4000, 1)).save(thin)
    assert run(thin, "--output", tmp_path / "out/") == 1
    assert f"{thin}: FAILED: " in capsys.readouterr().out


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_chosen_task_is_drawn_and_reported(tmp_path, capsys, task):
    status = run(
        *("--draw", 1, "--task", task, "--confidence-threshold", "0.01"),
        *("--output", tmp_path / "x.png", "--json", tmp_path / "r.json"),
        MODEL__MASK_FORMER__TEST__SEMANTIC_ON="True",
    )
    assert status == 0
    (entry,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert entry["task"] == task and entry["regions"]
    assert all(("score" in region) == (task == "instance") for region in entry["regions"])
    assert (pixels(tmp_path / "x.png") != draw_scene(0).image).mean() > 0.1


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_results_in_other_formats_are_drawn_alike(tmp_path, task):
    pictures = []
    for rle, labels in (("bitmask", "scores"), ("rle", "labels")):
        target = tmp_path / f"{rle}.png"
        status = run(
            *("--draw", 1, "--task", task, "--confidence-threshold", "0.01", "--output", target),
            MODEL__MASK_FORMER__TEST__SEMANTIC_ON="True",
            MODEL__MASK_FORMER__TEST__INSTANCE_FORMAT=rle,
            MODEL__MASK_FORMER__TEST__SEMANTIC_FORMAT=labels,
        )
        assert status == 0
        pictures.append(pixels(target))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != draw_scene(0).image).mean() > 0.1


def test_video_comes_out_with_all_frames_and_its_rate(tmp_path, capsys):
    clip = make_video(tmp_path / "clip.avi", frames=6, fps=12.5)
    out = tmp_path / "out"
    assert run(clip, "--output", out, "--json", tmp_path / "r.json") == 0
    assert files(out) == ["clip.mp4"]
    assert count_frames(out / "clip.mp4") == 6
    capture = cv2.VideoCapture(str(out / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    assert capture.read()[1].shape == (48, 64, 3)
    assert f"{clip} 48x64: 6 frames, " in capsys.readouterr().out
    content = json.loads((tmp_path / "r.json").read_text())
    (entry,) = content["results"]
    assert entry["frames"] == 6 and content["summary"]["images"] == 6
    assert entry["seen"] and max(seen["frames"] for seen in entry["seen"].values()) <= 6


def test_max_frames_limits_a_video(tmp_path):
    clip = make_video(tmp_path / "clip.mp4")
    assert run(clip, "--max-frames", 2, "--output", tmp_path / "short.mp4") == 0
    assert count_frames(tmp_path / "short.mp4") == 2


def test_damaged_video_is_reported_and_leaves_no_file(tmp_path, capsys):
    clip = make_video(tmp_path / "clip.mp4")
    clip.write_bytes(clip.read_bytes()[:200])
    assert run(clip, "--draw", 1, "--output", tmp_path / "out") == 1
    assert files(tmp_path / "out") == ["scene_000.png"]
    assert f"{clip}: FAILED: OpenCV cannot open" in capsys.readouterr().out


def test_failed_writing_removes_the_unfinished_video(tmp_path, monkeypatch):
    clip = make_video(tmp_path / "clip.mp4")
    write = VideoSink.write

    def write_two(self, rgb, times=1):
        if self.frames == 2:
            raise MediaError("disk full")
        write(self, rgb, times)

    monkeypatch.setattr(VideoSink, "write", write_two)
    assert run(clip, "--output", tmp_path / "out") == 1
    assert files(tmp_path / "out") == []


def interrupt_after(monkeypatch, count: int) -> None:
    paint, calls = Painter.paint, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        return paint(self, *arguments)

    monkeypatch.setattr(Painter, "paint", interrupted)


def test_ctrl_c_keeps_the_frames_so_far_and_prints_the_summary(tmp_path, monkeypatch, capsys):
    clip = make_video(tmp_path / "clip.mp4")
    interrupt_after(monkeypatch, 3)
    assert run(clip, "--output", tmp_path / "out", "--json", tmp_path / "r.json") == 130
    assert files(tmp_path / "out") == ["clip.mp4"]
    assert count_frames(tmp_path / "out" / "clip.mp4") == 3
    printed = capsys.readouterr().out
    assert "3 image(s) or frame(s) in" in printed and "stopped by Ctrl-C" in printed
    assert json.loads((tmp_path / "r.json").read_text())["interrupted"] is True


def test_ctrl_c_between_images_keeps_the_results_so_far(tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 1)
    assert run("--draw", 3, "--output", tmp_path / "out") == 130
    assert files(tmp_path / "out") == ["scene_000.png"]
    assert "1 of 3 inputs have results" in capsys.readouterr().out


class FakeCamera:
    """Three frames, then unplugged."""

    def __init__(self, index):
        self.frames = [draw_scene(seed, 48, 64).image for seed in range(3)] if index == 0 else []

    def isOpened(self):
        return bool(self.frames)

    def get(self, key):
        return 30.0 if key == cv2.CAP_PROP_FPS else -1.0

    def read(self):
        return (True, self.frames.pop()) if self.frames else (False, None)

    def release(self):
        pass


def test_camera_is_recorded(tmp_path, monkeypatch):
    capture = cv2.VideoCapture
    monkeypatch.setattr(
        cv2, "VideoCapture", lambda source: FakeCamera(source) if source == 0 else capture(source)
    )
    assert run("--camera", "--output", tmp_path / "out", "--json", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["frames"] == 3
    # At least once each; more often where the model is slower than the camera.
    assert count_frames(tmp_path / "out" / "camera_000.mp4") >= 3


class FakeWindow:
    shown = 0

    def __init__(self, title):
        pass

    def show(self, rgb, until_key):
        FakeWindow.shown += 1
        return FakeWindow.shown < 2

    def close(self):
        FakeWindow.shown += 100


def test_window_shows_results_until_it_is_closed_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_module, "Window", FakeWindow)
    assert run("--draw", 5, "--window") == 0
    assert FakeWindow.shown == 102
    assert files(tmp_path) == []


def test_input_is_never_overwritten(tmp_path, capsys):
    picture = make_picture(tmp_path / "a.png", 1)
    before = picture.read_bytes()
    assert run(picture, "--output", tmp_path) == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "opts", "message"),
    [
        (["gone/*.jpg"], {}, "no image or video matches the pattern 'gone/*.jpg'"),
        (["--draw", "2", "--output", "x.png"], {}, "one file, but there are 2 inputs"),
        (["--draw", "1", "--weights", "gone.pkl"], {}, "no checkpoint gone.pkl"),
        (["--draw", "1"], {"MODEL.WEIGHTS": "gone.pkl"}, "no checkpoint gone.pkl"),
        (["--draw", "1", "--task", "semantic"], {}, "--opts MODEL.MASK_FORMER.TEST.SEMANTIC_ON True"),
        (["--draw", "1", "--json", "."], {}, "--json .: it is a folder"),
        (["--draw", "1"], {"MODEL.BACKEND": "gone"}, "MODEL.BACKEND is 'gone', which is not registered"),
        (["--draw", "1"], {"MODEL.NO_SUCH_KEY": "1"}, "NO_SUCH_KEY"),
        (["--draw", "1", "--device", "abacus"], {}, "'abacus' is no device"),
        (["--draw", "1", "--device", "cuda:99"], {}, "device cuda:99 was asked for, but"),
    ],
)
def test_run_that_cannot_start_says_why(tmp_path, monkeypatch, capsys, arguments, opts, message):
    monkeypatch.chdir(tmp_path)
    off = {"MODEL.MASK_FORMER.TEST.SEMANTIC_ON": "False", **opts}
    status = TOOL.main([*CPU, *arguments, "--config-file", str(CONFIG), "--opts", *words({**MINI, **off})])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("demo.py: error: ") and message in error
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["half.pth", "half.pkl"])
def test_checkpoint_that_cannot_be_read_is_named(tmp_path, capsys, name):
    half = tmp_path / name
    half.write_bytes(b"PK")
    assert run("--draw", "1", "--weights", half, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"demo.py: error: the checkpoint {half} cannot be read (" in error and "weights_only" not in error
    assert files(tmp_path) == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no inputs: name images"),
        (["--draw", "0"], "at least 1"),
        (["--camera", "clip.mp4"], "is not a camera's number"),
        (["--draw", "1", "--confidence-threshold", "50"], "is not a number from 0 to 1"),
    ],
)
def test_wrong_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        TOOL.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the config's device is used")
def test_without_cuda_the_cpu_is_used_and_named_once(tmp_path, capsys):
    status = TOOL.main(
        ["--draw", "1", "--output", str(tmp_path), "--config-file", str(CONFIG), "--opts", *words(MINI)]
    )
    assert status == 0
    assert capsys.readouterr().out.count("running on the CPU: ") == 1


def heed_interrupts() -> None:
    """In a child: a job that a shell put into the background ignores Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, str(REPO / "tools" / "demo.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 1}
    return subprocess.Popen(command, cwd=cwd, text=True, preexec_fn=heed_interrupts, **pipes)


def test_command_of_make_demo_works_from_any_folder(tmp_path):
    process = start("--draw", "2", cwd=tmp_path)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "scene 1 " in printed and "images per second" in printed
    assert "2/2" in errors
    assert files(tmp_path) == ["output/demo/scene_000.png", "output/demo/scene_001.png"]


def test_sigint_ends_the_command_with_130_and_whole_files(tmp_path):
    process = start("--draw", "500", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("scene 1 "):
            break
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "stopped by Ctrl-C" in printed and "Traceback" not in errors
    results = files(tmp_path)
    assert 2 <= len(results) < 500 and not any(".part" in name for name in results)
    for name in results:
        assert pixels(tmp_path / name).ndim == 3


def test_backend_that_ran_is_told(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert run("--draw", 1, "--output", tmp_path / "out", "--json", report) == 0
    assert json.loads(report.read_text())["backend"] == {"backend": "torch"}
    opts = {"MODEL__BACKEND": "tensorrt", "MODEL__TENSORRT__ON_ERROR": "torch"}
    assert run("--draw", 2, "--output", tmp_path / "out", "--json", report, **opts) == 0
    printed = capsys.readouterr().out
    assert (
        "backend torch (fallback: MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU" in printed
    )  # at the start
    assert "\nbackend: torch (fallback: MODEL.BACKEND 'tensorrt'" in printed  # and in the summary
    told = json.loads(report.read_text())["backend"]
    assert told["backend"].startswith("torch (fallback: ") and told["images"] == {"tensorrt": 0, "torch": 2}


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "BACKEND",
            "tensorrt",
            "MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU, by TensorRT and torch2trt. Missing: ",
        ),
        ("META_ARCHITECTURE", "TensorRTMaskFormer", "MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU"),
        ("TENSORRT__OPT_LEVEL", "9", "MODEL.TENSORRT.OPT_LEVEL is 9; allowed: a whole number from 0 to 5"),
    ],
)
def test_backend_that_cannot_run_stops_the_demo(tmp_path, capsys, key, value, message):
    opts = {"MODEL__BACKEND": "tensorrt"} if key.startswith("TENSORRT") else {}
    assert run("--draw", 1, "--output", tmp_path, **opts, **{f"MODEL__{key}": value}) == 2
    error = capsys.readouterr().err
    assert error.count(message) == error.count("demo.py: error: MODEL.") == 1 and "Traceback" not in error


class BuildingBackend:
    """Runs PyTorch, and keeps what it would build with."""

    def __init__(self, model, cfg):
        self._model = model

    def prepare(self, ahead=None):
        BuildingBackend.ahead = ahead
        BuildingBackend.examples = None if ahead is None else ahead.examples(8)

    def describe(self):
        return {"backend": "building"}

    def __call__(self, images):
        return self._model.core(images)


@pytest.fixture
def building():
    BACKEND_REGISTRY._do_register("building", BuildingBackend)
    yield BuildingBackend
    del BACKEND_REGISTRY._obj_map["building"]


def test_backend_builds_with_the_pictures_that_are_going_to_be_run(building, tmp_path, capsys):
    make_picture(tmp_path / "in" / "a.png", 1, (96, 72))
    (tmp_path / "in" / "damaged.png").write_text("no picture")
    status = run(tmp_path / "in", "--draw", 2, "--output", tmp_path / "out", MODEL__BACKEND="building")
    assert status == 1 and "damaged.png: FAILED" in capsys.readouterr().out
    # With the pixels of DefaultPredictor.
    resize = ResizeShortestEdge([64, 64], 1333)
    pictures = [cv2.imread(str(tmp_path / "in" / "a.png"))[:, :, ::-1]]
    pictures += [draw_scene(seed).image for seed in range(2)]
    for image, rgb in zip(building.examples, pictures, strict=True):
        assert np.array_equal(image, resize.get_transform(rgb).apply_image(rgb).transpose(2, 0, 1))
    assert building.ahead.sizes(32) == {}


def test_examples_come_from_all_over_the_pictures(building, tmp_path):
    for i in range(20):
        make_picture(tmp_path / "in" / f"{i:02}.png", 1, (40 + 2 * i, 40))
    assert run(tmp_path / "in", "--output", tmp_path / "out", MODEL__BACKEND="building") == 0
    heights = [image.shape[1] for image in building.examples]
    assert len(heights) == 8 and heights == sorted(heights) and heights[0] == 64 and heights[-1] > 115


def test_channels_are_in_the_configs_order(building, tmp_path):
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "a.png")
    for order, colour in (("RGB", [1, 2, 3]), ("BGR", [3, 2, 1])):
        run(tmp_path / "a.png", "--output", tmp_path / "out/", MODEL__BACKEND="building", INPUT__FORMAT=order)
        assert building.examples[0][:, 0, 0].tolist() == colour


def test_streams_tell_nothing_ahead(building, tmp_path):
    video = make_video(tmp_path / "a.avi")
    assert run(video, "--output", tmp_path / "out/", MODEL__BACKEND="building") == 0
    assert building.ahead is None
