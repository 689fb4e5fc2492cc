#!/usr/bin/env python3
"""Time a model stage by stage: network, post-processing, whole forward pass, DefaultPredictor.

    python tools/benchmark.py --image-size 480x640 --precision fp32 tf32 fp16
    python tools/benchmark.py --release ../Mask2Former      # an official checkout, timed beside this project

Each stage is warmed up, then timed call by call; the table shows medians. On CUDA, calls are timed with events on an idle
device, so that a figure is the latency of one call; `predictor` is wall-clock time, since most of it is spent on the CPU.
Every row goes to a CSV file with the GPU and the versions.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
STAGES = ("core", "postprocess", "forward", "predictor")
FIELDS = (
    *(
        "date",
        "implementation",
        "gpu",
        "torch",
        "cuda",
        "detectron2",
        "python",
        "config",
        "backend",
        "precision",
    ),
    *(
        "batch",
        "image",
        "padded",
        "output",
        "stage",
        "median_ms",
        "p10_ms",
        "p90_ms",
        "iterations",
        "peak_mib",
    ),
    *("segments", "instances"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        default="configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
        help="under this project's root unless the path exists as given",
    )
    parser.add_argument(
        "--image-size", default="480x640", type=_size, help="HEIGHTxWIDTH in pixels, before resizing"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "tf32", "fp16", "bf16"), default=["fp32"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--all-tasks", action="store_true", help="semantic, instance and panoptic on together"
    )
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--device", default=None, help="cuda or cpu; cuda where there is one")
    parser.add_argument("--output", default="results", help="folder of the CSV files")
    parser.add_argument(
        "--release", metavar="DIR", help="also time the official checkout in DIR, in its own process"
    )
    parser.add_argument("--implementation", default="d2_trt", help=argparse.SUPPRESS)
    parser.add_argument("--package-root", default=str(REPO), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config, after --")
    args = parser.parse_args(argv)
    if not os.path.exists(args.config_file):
        args.config_file = str(REPO / args.config_file)
    if not os.path.exists(args.config_file):
        parser.error(f"no config file {args.config_file}")
    if args.iterations < 1 or args.warmup < 0 or min(args.batch) < 1:
        parser.error("--iterations and --batch must be at least 1, --warmup at least 0")
    return args


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(v) for v in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 480x640") from None
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a side below 1")
    return height, width


def build_cfg(args: argparse.Namespace, device: str):
    from detectron2.config import get_cfg
    from detectron2.projects.deeplab import add_deeplab_config

    from mask2former import add_maskformer2_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.merge_from_file(args.config_file)
    opts = list(args.opts)
    if args.implementation == "release":
        ours = ("MODEL.BACKEND", "MODEL.MASK_FORMER.TEST.BOXES_FROM_MASKS", "TEST.BATCH_SIZE")
        pairs = zip(opts[::2], opts[1::2])
        opts = [word for key, value in pairs if key not in ours for word in (key, value)]
    if args.all_tasks:
        for task in ("SEMANTIC", "INSTANCE", "PANOPTIC"):
            opts += [f"MODEL.MASK_FORMER.TEST.{task}_ON", "True"]
    cfg.merge_from_list(["MODEL.WEIGHTS", "", *opts, "MODEL.DEVICE", device])
    return cfg


class Timer:
    """Times calls one by one; on CUDA with events, or wall-clock time around a synchronised call."""

    def __init__(self, device: str, warmup: int, iterations: int):
        self.cuda = device.startswith("cuda")
        self.warmup = warmup
        self.iterations = iterations

    def measure(self, call, wall_clock: bool = False) -> dict:
        import torch

        for _ in range(self.warmup):
            call()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.iterations):
            if self.cuda and not wall_clock:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
                continue
            begin = time.perf_counter()
            call()
            if self.cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
        times.sort()
        return {
            "median_ms": round(statistics.median(times), 3),
            "p10_ms": round(times[int(0.1 * (len(times) - 1))], 3),
            "p90_ms": round(times[int(0.9 * (len(times) - 1))], 3),
            "iterations": len(times),
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if self.cuda else "",
        }


def set_precision(precision: str, device: str):
    """Sets PyTorch's TF32 switches; returns the context that a call runs in."""
    import contextlib

    import torch

    tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if precision in ("fp16", "bf16"):
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(device.split(":")[0], dtype=dtype)
    return contextlib.nullcontext()


class Subject:
    """One implementation's model, behind the stages that are timed."""

    def __init__(self, cfg, implementation: str, image):
        import torch
        from detectron2.engine import DefaultPredictor

        torch.manual_seed(0)
        self.predictor = DefaultPredictor(cfg)
        self.model = self.predictor.model
        self.release = implementation == "release"
        self.image = image
        height, width = image.shape[:2]
        resize = self.predictor.aug if hasattr(self.predictor, "aug") else self.predictor.transform_gen
        resized = resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        self.input = {"image": tensor, "height": height, "width": width}
        if not self.release:
            self.model.prepare()

    def padded(self, batch: int):
        """(B, 3, H, W): what the network sees."""
        if not self.release:
            return self.model.preprocess([self.input] * batch)[0]
        from detectron2.structures import ImageList

        image = (self.input["image"].to(self.model.device) - self.model.pixel_mean) / self.model.pixel_std
        return ImageList.from_tensors([image] * batch, self.model.size_divisibility).tensor

    def core(self, images):
        if not self.release:
            return self.model.backend(images)
        return self.model.sem_seg_head(self.model.backbone(images))

    def postprocess_call(self, images, outputs):
        """A call that does all that follows the network."""
        inputs = [self.input] * len(images)
        if not self.release:
            from mask2former.postprocessing import postprocess

            sizes = [tuple(self.input["image"].shape[-2:])] * len(images)
            return lambda: postprocess(
                *outputs,
                padded_size=tuple(images.shape[-2:]),
                image_sizes=sizes,
                output_sizes=[self.image.shape[:2]] * len(images),
                options=self.model.postprocess_options,
                thing_classes=self.model.thing_classes,
            )
        # The release has no function for it: its forward with the network's outputs at hand is the nearest, and holds
        # the upload and normalisation of the image besides.
        model = self.model

        def call():
            head, backbone = model.sem_seg_head.forward, model.backbone.forward
            model.sem_seg_head.forward = lambda features: dict(outputs)
            model.backbone.forward = lambda x: None
            try:
                return model(inputs)
            finally:
                model.sem_seg_head.forward, model.backbone.forward = head, backbone

        return call


def draw_image(size: tuple[int, int]):
    """A smooth random BGR image (H, W, 3) uint8: noise alone would be unlike anything a camera sees."""
    import cv2
    import numpy as np

    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def run(args: argparse.Namespace, save_weights: str | None = None) -> list[dict]:
    """Rows of one implementation; its weights go to `save_weights`, so that another can be timed with the same."""
    sys.path.insert(0, args.package_root)
    import detectron2
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg = build_cfg(args, device)
    image = draw_image(args.image_size)
    subject = Subject(cfg, args.implementation, image)
    if save_weights:
        torch.save({"model": subject.model.state_dict()}, save_weights)
    timer = Timer(device, args.warmup, args.iterations)
    common = {
        "date": datetime.date.today().isoformat(),
        "implementation": args.implementation,
        "gpu": torch.cuda.get_device_name() if timer.cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "detectron2": detectron2.__version__,
        "python": platform.python_version(),
        "config": os.path.relpath(args.config_file, REPO / "configs"),
        "backend": cfg.MODEL.get("BACKEND", "torch"),
        "image": "x".join(map(str, args.image_size)),
        "output": "x".join(map(str, args.image_size)),
    }
    rows = []
    for precision in args.precision:
        for batch in args.batch:
            with torch.inference_mode(), set_precision(precision, device):
                images = subject.padded(batch)
                outputs = subject.core(images)
                results = subject.postprocess_call(images, outputs)()
                inputs = [subject.input] * batch
                calls = {
                    "core": lambda images=images: subject.core(images),
                    "postprocess": subject.postprocess_call(images, outputs),
                    "forward": lambda inputs=inputs: subject.model(inputs),
                    "predictor": lambda: subject.predictor(image),
                }
                for stage in args.stages:
                    if stage == "predictor" and batch != 1:
                        continue  # DefaultPredictor takes one image
                    row = {
                        **common,
                        "precision": precision,
                        "batch": batch,
                        "padded": "x".join(map(str, images.shape[-2:])),
                        "stage": stage,
                        # What there was to post-process: few segments make it easy.
                        "segments": len(results[0]["panoptic_seg"][1])
                        if "panoptic_seg" in results[0]
                        else "",
                        "instances": len(results[0]["instances"]) if "instances" in results[0] else "",
                    }
                    row.update(timer.measure(calls[stage], wall_clock=stage == "predictor"))
                    rows.append(row)
    return rows


def run_release(args: argparse.Namespace, argv: list[str], weights: str) -> list[dict]:
    """Rows of the official checkout, from a process in which `mask2former` is the release's package."""
    command = [
        sys.executable,
        __file__,
        "--implementation",
        "release",
        "--package-root",
        args.release,
        "--json",
    ]
    command += [*argv, *([] if "--" in argv else ["--"]), "MODEL.WEIGHTS", weights]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"timing the release in {args.release} failed, see above: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def write_csv(folder: str, rows: list[dict]) -> Path:
    first = rows[0]
    name = f"{first['gpu']}_torch{first['torch']}_{time.strftime('%Y%m%d-%H%M%S')}.csv"
    path = Path(folder) / "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def print_table(rows: list[dict]) -> None:
    columns = ["implementation", "precision", "batch", "padded", "stage", "median_ms", "p10_ms", "p90_ms"]
    columns += ["peak_mib", "segments", "instances"]
    table = [columns] + [[str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    first = rows[0]
    print(
        f"{first['config']}, {first['gpu']}, torch {first['torch']}, detectron2 {first['detectron2']}, {first['date']}"
    )
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.json:
        # Everything printed on the way belongs on stderr: the last line of stdout is the result.
        stdout, sys.stdout = sys.stdout, sys.stderr
        rows = run(args)
        print(json.dumps(rows), file=stdout)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.pth") if args.release else None
        rows = run(args, weights)
        if args.release:
            kept = [
                w for i, w in enumerate(argv) if w != "--release" and (i == 0 or argv[i - 1] != "--release")
            ]
            rows += run_release(args, kept, weights)
    print_table(rows)
    print(f"written to {write_csv(args.output, rows)}")


if __name__ == "__main__":
    main()
