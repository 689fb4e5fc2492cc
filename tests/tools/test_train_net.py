"""tools/train_net.py: evaluation end to end through the command, and its messages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch.multiprocessing import ProcessExitedException

from d2_trt import requirements
from mask2former import get_mask2former_cfg
from mask2former.backend import BackendError
from mask2former.data.datasets.shapes import register_shapes
from mask2former.data.datasets.shapes_files import ShapesOptions, make_shapes_dataset

REPO_ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/shapes/maskformer2_mini_shapes.yaml"
METRICS = {
    "panoptic_seg": {"PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"},
    "segm": {"AP", "AP50", "AP75", "APs", "APm", "APl"},
    "bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl"},
    "sem_seg": {"mIoU", "fwIoU", "mACC", "pACC"},
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """A value for DETECTRON2_DATASETS."""
    root = tmp_path_factory.mktemp("datasets")
    make_shapes_dataset(root / "shapes", ShapesOptions(train=1, val=5, min_size=48, max_size=96))
    return root


@pytest.mark.slow
def test_evaluation_end_to_end(datasets, tmp_path):
    """The whole command, on the CPU, with the small model and small images."""
    arguments = ["--eval-only", "--config-file", CONFIG, "MODEL.DEVICE", "cpu", "TEST.BATCH_SIZE", "2"]
    arguments += ["INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "tools/train_net.py", *arguments],
        cwd=REPO_ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    results = json.loads((tmp_path / "inference" / "results.json").read_text())["shapes_val_panoptic"]
    assert set(results) == set(METRICS)
    for task, metrics in METRICS.items():
        assert metrics <= set(results[task])
    assert 0 <= results["sem_seg"]["pACC"] <= 100
    assert len(list((tmp_path / "inference" / "panoptic_predictions").glob("*.png"))) == 5
    # detectron2's own logs, its copy-paste lines, and one warning for the weights.
    assert "Start inference on 3 batches" in result.stdout
    assert "copypaste: PQ,SQ,RQ" in result.stdout
    assert result.stdout.count("MODEL.WEIGHTS is empty") == 1
    assert (tmp_path / "config.yaml").is_file() and (tmp_path / "log.txt").is_file()


@pytest.fixture(scope="module")
def train_net():
    spec = importlib.util.spec_from_file_location("train_net", REPO_ROOT / "tools" / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(train_net, capsys, monkeypatch):
    """Runs it in this process with arguments that must be refused, and returns the message."""
    monkeypatch.chdir(REPO_ROOT)
    monkeypatch.setattr(train_net, "launch", lambda *a, **k: pytest.fail("the command was started"))

    def refused(*arguments: str) -> str:
        assert train_net.run(list(arguments)) == 2
        return capsys.readouterr().err

    return refused


TRAIN = ("--config-file", CONFIG, "MODEL.DEVICE", "cpu")


@pytest.fixture
def trainable(train_net, available, monkeypatch):
    """As if the training set were there too."""
    monkeypatch.setattr(train_net, "check_train_sets", lambda cfg: None)


def test_training_set_that_is_not_there(run, available, tmp_path):
    register_shapes(str(tmp_path / "absent"), "shapes_trainnet2")
    message = run(*TRAIN, "DATASETS.TRAIN", "('shapes_trainnet2_train_panoptic',)")
    assert str(tmp_path / "absent") in message and "make_shapes_dataset.py" in message
    assert "DATASETS.TRAIN is empty" in run(*TRAIN, "DATASETS.TRAIN", "()")


@pytest.mark.parametrize(
    "override, message",
    [
        (("INPUT.DATASET_MAPPER_NAME", "coco"), "'coco'; allowed: 'mask_former_semantic'"),
        (("SOLVER.IMS_PER_BATCH", "0"), "SOLVER.IMS_PER_BATCH is 0"),
        (("SOLVER.MAX_ITER", "0"), "SOLVER.MAX_ITER is 0: must be at least 1"),
        (("MODEL.RESNETS.NORM", "SyncBN"), "MODEL.RESNETS.NORM SyncBN trains on GPUs only"),
        (("MODEL.WEIGHTS", "nope.pkl"), "MODEL.WEIGHTS nope.pkl: there is no such file"),
    ],
)
def test_mistakes_in_training_keys(run, trainable, override, message):
    assert message in run(*TRAIN, *override)


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_evaluation_that_could_not_be_is_told_before_training(run, trainable, monkeypatch, flags):
    """Training would come to it with its first evaluation, after thousands of iterations."""
    words = [*flags, *TRAIN, "DATASETS.TEST", "('shapes_val_instance',)"]
    assert "MODEL.MASK_FORMER.TEST.INSTANCE_ON True" in run(
        *words, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", "False"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert "pip install cityscapesscripts" in run(
        *flags, *TRAIN, "DATASETS.TEST", "('cityscapes_fine_instance_seg_val',)"
    )


def test_time_limit_that_is_none(run):
    for seconds in ("0", "-3", "nan"):
        assert "must be a positive number of seconds" in run("--time-limit", seconds, *TRAIN)


def test_time_limit_of_an_evaluation_is_refused(run):
    words = ("--eval-only", "--time-limit", "60", "--config-file", CONFIG, "MODEL.DEVICE", "cpu")
    assert "--time-limit is of training: leave it out with --eval-only" in run(*words)


def test_batch_that_the_gpus_cannot_share(run, trainable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = run("--config-file", CONFIG, "--num-gpus", "3", "MODEL.DEVICE", "cuda")
    assert "SOLVER.IMS_PER_BATCH is 16, for all 3 GPUs together" in message


def test_resumed_training_does_not_need_the_weights_it_began_with(
    train_net, trainable, tmp_path, monkeypatch
):
    monkeypatch.chdir(REPO_ROOT)
    words = [*TRAIN, "MODEL.WEIGHTS", "gone.pkl", "OUTPUT_DIR", str(tmp_path)]
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    arguments = train_net.build_parser().parse_args(["--resume", *words])
    with pytest.raises(
        train_net.UsageError, match=r"last_checkpoint names 'model_0000001.pth', which is not in"
    ):
        train_net.load_config(arguments)
    (tmp_path / "model_0000001.pth").touch()
    assert train_net.load_config(arguments).MODEL.WEIGHTS == "gone.pkl"
    with pytest.raises(train_net.UsageError, match=r"gone\.pkl: there is no such file"):
        train_net.load_config(train_net.build_parser().parse_args(words))


@pytest.mark.slow
def test_training_end_to_end(tmp_path):
    """The whole command on the CPU: iterations, evaluation in between, a checkpoint, and on from it."""
    make_shapes_dataset(tmp_path / "shapes", ShapesOptions(train=4, val=2, min_size=48, max_size=64))
    words = [*TRAIN, "SOLVER.IMS_PER_BATCH", "2", "INPUT.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TEST", "64"]
    words += ["MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "128", "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "2"]
    words += ["DATALOADER.NUM_WORKERS", "1", "SOLVER.CHECKPOINT_PERIOD", "1", "MODEL.BACKEND", "tensorrt"]

    def train(*more: str) -> str:
        result = subprocess.run(
            [
                sys.executable,
                "tools/train_net.py",
                *more[:1],
                *words,
                *more[1:],
                "OUTPUT_DIR",
                str(tmp_path / "out"),
            ],
            cwd=REPO_ROOT,
            env={
                **os.environ,
                "DETECTRON2_DATASETS": str(tmp_path),
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    told = train("--resume", "SOLVER.MAX_ITER", "3")
    assert told.count("training, and the evaluations in it, run in PyTorch; MODEL.BACKEND tensorrt") == 1
    assert "there is no checkpoint in" in told and "Starting training from iteration 0" in told
    assert told.count("Evaluation results for shapes_val_panoptic in csv format") == 2
    results = json.loads((tmp_path / "out" / "inference" / "results.json").read_text())
    assert set(METRICS) <= set(results["shapes_val_panoptic"]) and results["backend"]["backend"] == "torch"
    assert (tmp_path / "out" / "model_final.pth").is_file()
    # Interrupted after the second of then five iterations, as it were.
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")
    told = train("--resume", "SOLVER.MAX_ITER", "5", "DATASETS.TEST", "()")
    assert "Starting training from iteration 2" in told and "Loading scheduler from state_dict" in told
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 4


def test_resumed_evaluation_is_asked_for(train_net, available, monkeypatch, tmp_path):
    asked = []
    monkeypatch.chdir(REPO_ROOT)
    monkeypatch.setattr(train_net, "setup", lambda args: get_mask2former_cfg(args.config_file, args.opts))
    monkeypatch.setattr(train_net, "evaluate_model", lambda cfg, model, resume: asked.append(resume) or {})
    words = ["--config-file", CONFIG, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path)]
    assert train_net.run(["--eval-only", *words]) == train_net.run(["--eval-only", "--resume", *words]) == 0
    assert asked == [False, True]


def test_config_is_required(run):
    assert "--config-file is missing" in run("--eval-only")


def test_config_that_is_missing_is_named(run):
    assert "'configs/nope.yaml' does not exist" in run("--eval-only", "--config-file", "configs/nope.yaml")


@pytest.mark.parametrize("count, available", [(2, 0), (3, 2), (2, 1)])
def test_more_gpus_than_there_are(run, monkeypatch, count, available):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    message = run("--eval-only", "--config-file", CONFIG, "--num-gpus", str(count))
    assert f"--num-gpus {count}" in message and f"sees {available} GPUs" in message


def test_two_jobs_of_a_user_do_not_share_a_port(train_net, available, monkeypatch):
    made = []
    monkeypatch.setattr(train_net, "launch", lambda main, gpus, **more: made.append((gpus, more)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["--eval-only", "--config-file", CONFIG, "--num-gpus", "2"]
    assert train_net.run(words) == 0
    assert train_net.run([*words, "--dist-url", "tcp://10.0.0.1:5000"]) == 0
    # detectron2's launch finds a free port for "auto".
    assert [(gpus, more["dist_url"]) for gpus, more in made] == [(2, "auto"), (2, "tcp://10.0.0.1:5000")]


def test_several_machines_have_to_know_where_to_meet(run):
    message = run("--eval-only", "--config-file", CONFIG, "--num-machines", "2", "MODEL.DEVICE", "cpu")
    assert "--num-machines 2 needs --dist-url tcp://HOST:PORT" in message


def test_no_gpus_at_all_is_spelled_otherwise(run):
    assert "MODEL.DEVICE cpu" in run("--eval-only", "--config-file", CONFIG, "--num-gpus", "0")


@pytest.fixture
def available(train_net, monkeypatch):
    """As if the data set were there."""
    monkeypatch.setattr(train_net, "check_test_sets", lambda cfg: None)


def test_cuda_that_is_absent(run, available, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = run("--eval-only", "--config-file", CONFIG, "MODEL.DEVICE", "cuda")
    assert "MODEL.DEVICE is cuda" in message and "Add MODEL.DEVICE cpu" in message


def test_several_gpus_with_device_cpu(run, available, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = run("--eval-only", "--config-file", CONFIG, "--num-gpus", "2", "MODEL.DEVICE", "cpu")
    assert "--num-gpus 2 with MODEL.DEVICE cpu" in message


@pytest.mark.parametrize(
    "override, message",
    [
        (("MODEL.FOO", "1"), "MODEL.FOO is no key of this config (its value is 1)"),
        (("MODEL.FOO",), "KEY VALUE"),
        (("TEST.BATCH_SIZE", "many"), "TEST.BATCH_SIZE"),
        (("MODEL.WEIGHTS", "no_such_file.pkl"), "MODEL.WEIGHTS no_such_file.pkl: there is no such file"),
        (("TEST.AUG.ENABLED", "True"), "TEST.AUG.ENABLED False"),
        (("OUTPUT_DIR", f"{__file__}/out"), f"{__file__} is a file: name a folder"),
    ],
)
def test_wrong_overrides(run, available, override, message):
    assert message in run("--eval-only", "--config-file", CONFIG, "MODEL.DEVICE", "cpu", *override)


def test_data_set_that_is_not_registered(run):
    message = run("--eval-only", "--config-file", CONFIG, "MODEL.DEVICE", "cpu", "DATASETS.TEST", "('nope',)")
    assert "'nope', which is not registered" in message


def test_data_set_that_is_not_drawn(run, tmp_path):
    register_shapes(str(tmp_path / "absent"), "shapes_trainnet")
    arguments = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "('shapes_trainnet_val_panoptic',)"]
    message = run("--eval-only", "--config-file", CONFIG, *arguments, "OUTPUT_DIR", str(tmp_path / "out"))
    assert "python tools/make_shapes_dataset.py" in message and str(tmp_path / "absent") in message
    assert not (tmp_path / "out").exists()


def test_help_tells_the_usual_overrides(train_net):
    text = train_net.build_parser().format_help()
    for word in (
        "--eval-only",
        "--num-gpus",
        "TEST.BATCH_SIZE",
        "MODEL.DEVICE cpu",
        "make_shapes_dataset.py",
    ):
        assert word in text


def test_checkpoint_and_expected_results(train_net, datasets, tmp_path, monkeypatch):
    """Weights saved from a model give its results again, and TEST.EXPECTED_RESULTS is verified."""
    register_shapes(str(datasets / "shapes"), "trainnettest")
    monkeypatch.chdir(REPO_ROOT)
    overrides = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "('trainnettest_val_sem_seg',)"]
    overrides += ["INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"]
    config = "configs/shapes/maskformer2_mini_shapes_semantic.yaml"
    model = build_model(get_mask2former_cfg(config, overrides))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    overrides += ["MODEL.WEIGHTS", str(tmp_path / "weights.pth")]

    def results_of(name: str, *more: str) -> dict:
        arguments = [
            "--eval-only",
            "--config-file",
            config,
            *overrides,
            "OUTPUT_DIR",
            str(tmp_path / name),
            *more,
        ]
        assert train_net.run(arguments) == 0
        return json.loads((tmp_path / name / "inference" / "results.json").read_text())

    first = results_of("first")
    accuracy = first["trainnettest_val_sem_seg"]["sem_seg"]["pACC"]

    def expected(value: float) -> tuple[str, str]:
        return "TEST.EXPECTED_RESULTS", f"[['sem_seg', 'pACC', {value}, 0.001]]"

    assert results_of("second", *expected(accuracy)) == first
    with pytest.raises(SystemExit):
        results_of("third", *expected(accuracy + 50))


TENSORRT = ("--eval-only", "--config-file", CONFIG, "MODEL.DEVICE", "cpu", "MODEL.BACKEND", "tensorrt")


@pytest.mark.parametrize(
    "override, message",
    [
        (("PRECISION", "fp8"), "MODEL.TENSORRT.PRECISION is 'fp8'; allowed: 'fp32'"),
        (
            ("MAX_BATCH_SIZES", "2"),
            "MODEL.TENSORRT.MAX_BATCH_SIZES is no option of the TensorRT backend (its value",
        ),
        (("PRECISON", "fp16"), "did you mean PRECISION? allowed: ATTENTION, "),
        (("STATIC", "1"), "MODEL.TENSORRT.STATIC is 1; allowed: True or False"),
        (("SHAPES", "800x1088"), "MODEL.TENSORRT.SHAPES is '800x1088'; allowed: [], one 'HxW', or three"),
        (("SHAPES", "['100x100']"), "MODEL.TENSORRT.SHAPES has '100x100'; allowed: heights and widths"),
    ],
)
def test_mistakes_in_the_backends_keys(run, available, override, message):
    assert message in run(*TENSORRT, "MODEL.TENSORRT." + override[0], override[1])


@pytest.mark.parametrize("choice", [("MODEL.BACKEND",), ("MODEL.META_ARCHITECTURE",)])
def test_batches_that_the_engine_would_not_take(run, available, train_net, choice, monkeypatch):
    monkeypatch.setattr(requirements, "require", lambda *_, **__: None)
    name = "tensorrt" if choice[0] == "MODEL.BACKEND" else "TensorRTMaskFormer"
    words = ["--eval-only", "--config-file", CONFIG, "MODEL.DEVICE", "cpu", *choice, name]
    words += ["TEST.BATCH_SIZE", "4", "MODEL.TENSORRT.MAX_BATCH_SIZE", "2"]
    message = run(*words, "MODEL.TENSORRT.ON_OUT_OF_RANGE", "raise")
    assert "TEST.BATCH_SIZE is 4" in message and "MODEL.TENSORRT.MAX_BATCH_SIZE 2" in message
    # By default PyTorch runs them: a warning, once the logs are set up.
    arguments = train_net.build_parser().parse_args(words)
    assert "TEST.BATCH_SIZE is 4" in train_net.engine_too_small(train_net.load_config(arguments))
    enough = train_net.build_parser().parse_args([*words, "MODEL.TENSORRT.MAX_BATCH_SIZE", "0"])
    assert train_net.engine_too_small(train_net.load_config(enough)) == ""


@pytest.fixture
def drawn(datasets, tmp_path, monkeypatch) -> list[str]:
    """Overrides for a quick evaluation on drawn scenes."""
    register_shapes(str(datasets / "shapes"), "trainnetdrawn")
    monkeypatch.chdir(REPO_ROOT)
    words = ["DATASETS.TEST", "('trainnetdrawn_val_sem_seg',)", "OUTPUT_DIR", str(tmp_path)]
    return [*words, "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("choice", [TENSORRT[5:], ("MODEL.META_ARCHITECTURE", "TensorRTMaskFormer")])
def test_backend_that_cannot_run_ends_in_one_message(train_net, drawn, capsys, no_gpu, device, choice):
    assert train_net.run([*TENSORRT[:3], "MODEL.DEVICE", device, *choice, *drawn]) == 2
    message = capsys.readouterr().err
    assert message.count("runs on an NVIDIA GPU, by TensorRT and torch2trt. Missing: a GPU") == 1
    assert (
        "To do without: MODEL.BACKEND torch with MODEL.DEVICE cpu" in message and "Traceback" not in message
    )
    assert "Add MODEL.DEVICE cpu" not in message


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fallback_is_told_in_the_results(train_net, drawn, tmp_path, no_gpu, device):
    words = [*TENSORRT[:3], *TENSORRT[5:], "MODEL.DEVICE", device, *drawn, "MODEL.TENSORRT.ON_ERROR", "torch"]
    assert train_net.run(words) == 0
    results = json.loads((tmp_path / "inference" / "results.json").read_text())
    told = results["backend"]
    assert told["backend"].startswith("torch (fallback: MODEL.BACKEND 'tensorrt' runs on an NVIDIA GPU")
    assert told["images"] == {"tensorrt": 0, "torch": 5}
    assert results["trainnetdrawn_val_sem_seg"]["sem_seg"]["pACC"] >= 0
    log = (tmp_path / "log.txt").read_text()
    assert log.count("PyTorch runs the network on cpu (MODEL.TENSORRT.ON_ERROR torch)") == 1
    assert "The network was run by torch (fallback" in log


def one_image_each(tmp_path, prefix: str, workers: str) -> list[str]:
    """Draws an image to train with and one to evaluate on, and gives what to add to a command for them."""
    make_shapes_dataset(tmp_path / "shapes", ShapesOptions(train=1, val=1, min_size=48, max_size=64))
    register_shapes(str(tmp_path / "shapes"), prefix)
    words = [*TRAIN, "OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", workers]
    words += [
        "DATASETS.TRAIN",
        f"('{prefix}_train_panoptic',)",
        "DATASETS.TEST",
        f"('{prefix}_val_panoptic',)",
    ]
    words += ["SOLVER.IMS_PER_BATCH", "1", "INPUT.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TEST", "64"]
    return words


@pytest.mark.parametrize("what", ["train", "val"])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_damaged_image_ends_in_one_message(train_net, tmp_path, monkeypatch, capsys, what, workers):
    monkeypatch.chdir(REPO_ROOT)
    prefix = f"damaged_{what}_{workers}"
    words = one_image_each(tmp_path, prefix, workers)
    (image,) = (tmp_path / "shapes" / what / "images").iterdir()
    image.write_bytes(image.read_bytes()[:500])
    assert train_net.run([*words] if what == "train" else ["--eval-only", *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"train_net.py: {image} (image_id {int(image.stem)}) cannot be ")
    assert not (tmp_path / "out" / "inference" / "results.json").exists()


@pytest.fixture
def quick(train_net, tmp_path, monkeypatch):
    """A command of one drawn image each, with small sizes: runs it, and tells its status."""
    monkeypatch.chdir(REPO_ROOT)
    prefix = f"quick_{tmp_path.name}"
    words = one_image_each(tmp_path, prefix, "0")
    words += ["SOLVER.STEPS", "()", "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64", "TEST.EVAL_PERIOD", "0"]

    def quick(flags: list[str], *opts: str) -> int:
        return train_net.run([*flags, *words, *opts])

    return quick


@pytest.mark.parametrize(
    "what, kind, change, message",
    [
        (
            "train",
            "panoptic",
            lambda c: c["annotations"][0]["segments_info"][0].update(id=None),
            "its id is null",
        ),
        ("val", "panoptic", lambda c: c["annotations"][0]["segments_info"][0].pop("id"), "its id is missing"),
        (
            "val",
            "instances",
            lambda c: c["annotations"][0].update(segmentation=None),
            "its segmentation is null",
        ),
        ("val", "instances", lambda c: c["annotations"][0].pop("area"), "it has no area"),
        ("train", "panoptic", lambda c: c["annotations"].clear(), "is empty! Allowed: at least one image"),
    ],
)
def test_bad_annotation_ends_in_one_message(quick, tmp_path, capsys, what, kind, change, message):
    path = tmp_path / "shapes" / "annotations" / f"{kind}_{what}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert quick([] if what == "train" else ["--eval-only"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train_net.py: ") and str(path) in last and message in last


def test_checkpoint_that_is_cut_off_ends_in_one_message(quick, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    model = build_model(get_mask2former_cfg(str(REPO_ROOT / CONFIG), ["MODEL.DEVICE", "cpu"]))
    torch.save({"model": model.state_dict()}, out / "model_0000000.pth")
    broken = out / "model_0000001.pth"
    (out / "last_checkpoint").write_text(broken.name)
    whole = (out / "model_0000000.pth").read_bytes()
    for size in (0, 5000, len(whole) - 100):
        broken.write_bytes(whole[:size])
        assert quick(["--resume"]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"train_net.py: the checkpoint {broken} cannot be read (")
        assert f"(model_0000000.pth) into {out / 'last_checkpoint'}, or remove that file" in last
    assert quick(["--eval-only"], "MODEL.WEIGHTS", str(broken)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"the checkpoint {broken} cannot be read (" in last


def test_training_that_diverges_ends_in_one_message(quick, tmp_path, capsys):
    assert quick([], "SOLVER.MAX_ITER", "30", "SOLVER.BASE_LR", "1e12", "SOLVER.WARMUP_ITERS", "0") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train_net.py: ")
    assert "training has diverged. Lower SOLVER.BASE_LR" in last
    assert not list((tmp_path / "out").glob("*.pth"))


def test_process_that_said_what_is_wrong_ends_the_job_without_traceback(train_net, available, monkeypatch):
    def launch(main, num_gpus, **more):
        raise ProcessExitedException("process 1 ended", error_index=1, error_pid=1, exit_code=code)

    monkeypatch.setattr(train_net, "launch", launch)
    arguments = ["--eval-only", "--config-file", CONFIG, "MODEL.DEVICE", "cpu"]
    code = 2
    assert train_net.run(arguments) == 2
    code = 1
    with pytest.raises(ProcessExitedException):
        train_net.run(arguments)


def test_each_process_of_several_says_what_is_wrong_itself(train_net, monkeypatch, capsys):
    def fail(args):
        raise BackendError("no engine")

    monkeypatch.setattr(train_net, "evaluate", fail)
    monkeypatch.setattr(train_net.comm, "get_world_size", lambda: 2)
    with pytest.raises(SystemExit) as error:
        train_net.main(train_net.build_parser().parse_args(["--eval-only"]))
    assert error.value.code == 2
    assert capsys.readouterr().err == "train_net.py: no engine\n"
