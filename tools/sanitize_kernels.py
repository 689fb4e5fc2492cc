#!/usr/bin/env python3
"""Run every CUDA kernel of this project once or more on small inputs, for NVIDIA's compute-sanitizer.

    python setup.py build_ext --inplace
    compute-sanitizer --tool memcheck python tools/sanitize_kernels.py
    compute-sanitizer --tool racecheck python tools/sanitize_kernels.py
    python tools/sanitize_kernels.py --list

Neither PyTorch nor detectron2 is imported: starting them under the checker takes minutes, and PyTorch's allocator hides
reads beyond a tensor in its pools. Here every array is an allocation of its own, of the array's size. What the kernels
compute is for the tests to check; this only sees that they wrote their outputs.

Exit status: 0, all ran; 1, a kernel failed or left an output unwritten; 2, the kernels are not built or there is no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mask2former"
UNWRITTEN = 0xFF  # bytes of an output before its kernel runs: NaN, or a number that no output holds


class Missing(Exception):
    """What is needed to run the kernels is not there."""


class Gpu:
    """Memory of the first GPU, by the driver's API, in the context that the kernels' CUDA runtime uses."""

    def __init__(self):
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Missing(f"no NVIDIA driver: {error}") from None
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if self._driver.cuInit(0) or self._driver.cuDeviceGet(ctypes.byref(device), 0):
            raise Missing("no GPU")
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._outputs: list[tuple[str, int, int]] = []
        self._allocated: list[int] = []

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'error').decode()}")

    def _allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._allocated.append(address.value)
        return address.value

    def put(self, array: np.ndarray) -> int:
        """The address of a copy of the array."""
        array = np.ascontiguousarray(array)
        address = self._allocate(array.nbytes)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), array.ctypes, ctypes.c_size_t(array.nbytes))
        return address

    def out(self, name: str, size: int) -> int:
        """The address of `size` bytes that a kernel is to write, at least some of them."""
        address = self.scratch(size)
        self._outputs.append((name, address, size))
        return address

    def scratch(self, size: int) -> int:
        """The address of `size` bytes that kernels may write."""
        return self.put(np.full(size, UNWRITTEN, np.uint8))

    def get(self, address: int, size: int, dtype: str) -> np.ndarray:
        array = np.empty(size // np.dtype(dtype).itemsize, dtype)
        self._call("cuMemcpyDtoH_v2", array.ctypes, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))
        return array

    def finish(self) -> None:
        """Wait for the kernels, look at their outputs, free everything.

        Raises:
            RuntimeError: a kernel failed, or wrote nothing.
        """
        self._call("cuCtxSynchronize")
        outputs, self._outputs = self._outputs, []
        unwritten = [n for n, address, size in outputs if (self.get(address, size, "u1") == UNWRITTEN).all()]
        allocated, self._allocated = self._allocated, []
        for address in allocated:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        if unwritten:
            raise RuntimeError(f"nothing was written to {', '.join(unwritten)}")


def load_kernels() -> ModuleType:
    """mask2former._kernels, without the package around it."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = PACKAGE / f"_kernels{suffix}"
    if not path.exists():
        raise Missing(f"{path} is not built: `python setup.py build_ext --inplace`, with nvcc on the PATH")
    spec = importlib.util.spec_from_file_location("_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DTYPES = ("float32", "float16", "bfloat16")


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array's bits in a dtype by its name in C++; NumPy has no bfloat16, so that its bits are int16."""
    if dtype == "bfloat16":
        return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(dtype)


def ms_deform_attn(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    pyramids = [
        ((3, 5), (6, 9), (12, 18)),
        ((0, 4), (5, 6), (7, 2)),
        ((1, 1), (1, 9), (8, 1)),
        ((6, 5), (2, 2), (0, 0)),
    ]
    # The model's own head count and width, for which there is a kernel of its own, and others.
    cases = [(pyramid, 8, 32, 4) for pyramid in pyramids]
    cases += [(pyramids[0], 3, 32, 4), (pyramids[0], 2, 33, 3), (pyramids[0] + ((2, 2), (1, 3)), 2, 64, 16)]
    cases += [(((5, 7),), 1, dim, 1) for dim in (1, 4, 8, 16, 256)]
    batch = 2
    for levels, heads, dim, points in cases:
        pixels, samples = sum(h * w for h, w in levels), len(levels) * points
        value = rng.standard_normal((batch, pixels, heads, dim))
        offsets = rng.standard_normal((batch, pixels, heads, samples, 2)) * 4
        logits = rng.standard_normal((batch, pixels, heads, samples))
        for dtype, sampling in [(d, s) for d in DTYPES for s in sorted({d, "float32"})]:
            tensors = (as_dtype(value, dtype), as_dtype(offsets, sampling), as_dtype(logits, sampling))
            addresses = [gpu.put(t) for t in tensors]
            # Both as columns of one tensor, as the TensorRT plugin has them.
            rows = [t.reshape(batch, pixels, -1) for t in tensors[1:]]
            joined = np.concatenate(rows, 2)
            both = gpu.put(joined)
            in_columns = [addresses[0], both, both + rows[0].shape[2] * joined.itemsize]
            strides = [
                {"offsets_stride": rows[0].shape[2], "logits_stride": rows[1].shape[2]},
                dict.fromkeys(("offsets_stride", "logits_stride"), joined.shape[2]),
            ]
            sizes = np.array(levels, np.int32)
            common = {
                "value_dtype": dtype,
                "sampling_dtype": sampling,
                "batch": batch,
                "heads": heads,
                "dim": dim,
                "points": points,
                "stream": 0,
            }
            for inputs, stride in zip((addresses, in_columns), strides):
                out = gpu.out("ms_deform_attn", tensors[0].nbytes)
                kernels.ms_deform_attn(*inputs, out, level_sizes=list(levels), **common, **stride)
                for wrong in (0, 1):  # sizes that do not hold the pixels make NaN of all
                    out = gpu.out("ms_deform_attn_device_levels", tensors[0].nbytes)
                    kernels.ms_deform_attn_device_levels(
                        *inputs,
                        out,
                        level_sizes=gpu.put(sizes + wrong),
                        levels=len(levels),
                        pixels=pixels,
                        **common,
                        **stride,
                    )
            gpu.finish()


def postprocess(kernels: ModuleType, gpu: Gpu) -> None:
    """The calls of mask2former/postprocessing_cuda.py, for one image at a time."""
    module = kernels.postprocess
    rng = np.random.default_rng(0)
    # Both resizes, either, none; sizes that are no multiples of a tile; more queries and classes than a block takes at once.
    cases = [
        ((25, 34), (100, 136), (97, 121), (75, 91), 40, 19, 30),
        ((25, 34), (100, 136), (97, 121), (97, 121), 7, 3, 5),
        ((30, 44), (30, 44), (29, 41), (50, 37), 33, 65, 100),
        ((30, 44), (30, 44), (30, 44), (30, 44), 100, 171, 100),
        ((5, 6), (20, 24), (20, 22), (3, 1100), 3, 2, 6),
    ]
    things = module.ThingClasses([0, 1])
    for mask_size, padded, image, output, queries, classes, topk in cases:
        height, width = output
        pixels = height * width
        geometry = module.Geometry(mask_size, padded, image, output)
        tiles, at = geometry.mask_tiles, module.report_layout(queries, topk)
        logits = rng.standard_normal((queries, classes + 1)).astype(np.float32) * 3
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        masks = rng.standard_normal((queries, *mask_size)) * 4
        probs_at, pairs_at = gpu.put(probs), gpu.out("pairs", 8 * topk)
        pair_scores = gpu.out("scores of pairs", 4 * topk)
        module.top_pairs(probs_at, 1, queries, classes, topk, pair_scores, pairs_at, 0)
        for dtype in DTYPES:
            masks_at = gpu.put(as_dtype(masks, dtype))
            source = (masks_at, dtype, mask_size[0] * mask_size[1])
            work = gpu.scratch(4 * module.work_words(queries))
            report = gpu.out("report", 4 * at["words"])
            scores, labels = gpu.scratch(4 * topk), gpu.scratch(8 * topk)
            segments = gpu.out("segment ids", 4 * pixels)
            bits = gpu.out("mask bits", 4 * queries * height * -(-width // 32))
            counts, sums = gpu.scratch(4 * tiles * 4 * queries), gpu.scratch(8 * tiles * queries)
            module.select(
                probs_at, pair_scores, pairs_at, 1, queries, classes, topk, True, False, 0.1, work, report,
                scores, labels, things, 0,
            )  # fmt: skip
            module.mask_pass(*source, geometry, queries, topk, work, report, segments, bits, counts, sums, 0)
            module.decide(work, report, scores, 1, queries, topk, True, 0.5, things, 0)
            capacity = queries * pixels
            boundaries = gpu.out("run boundaries", 4 * capacity)
            module.mask_runs(
                bits, work, report, report + 4 * at["runs"], height, width, queries, topk, boundaries, capacity, 0
            )  # fmt: skip
            module.assign_ids(segments, pixels, work, queries, 0)
            count = int(gpu.get(report, 4 * at["words"], "i4")[at["instances"]])
            expanded = gpu.out("masks", count * pixels)
            module.expand_masks(bits, report, count, height, width, queries, topk, expanded, 0)
            module.mask_boxes(bits, report, height, width, queries, topk, gpu.out("boxes", 16 * topk), 0)
            semantic_scores = gpu.out("semantic scores", 4 * classes * pixels)
            weights = gpu.scratch(module.semantic_weights_bytes(queries, classes))
            module.semantic(*source, geometry, probs_at, queries, classes, semantic_scores, 0, weights, 0)
            semantic_labels = gpu.out("semantic labels", 8 * pixels)
            module.semantic(*source, geometry, probs_at, queries, classes, 0, semantic_labels, weights, 0)
            gpu._call("cuCtxSynchronize")
        gpu.finish()


def normalization(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    types = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")]
    for rows, channels in ((5, 256), (3, 33), (1, 2048), (70, 64)):
        x, affine = (
            rng.standard_normal((rows, channels)),
            rng.standard_normal((2, channels)).astype(np.float32),
        )
        for x_dtype, out_dtype in types:
            for residual, position in ((False, False), (True, False), (True, True)):
                at = gpu.put(as_dtype(x, x_dtype))
                size = rows * channels * (4 if out_dtype == "float32" else 2)
                added = {}
                if position:
                    repeated = rows // 2 if rows % 2 == 0 else rows  # of two images, or of one
                    added = {
                        "position": gpu.put(as_dtype(x[:repeated], x_dtype)),
                        "sum": gpu.out("layer_norm with positions", size),
                        "position_dtype": x_dtype,
                        "position_rows": repeated,
                    }
                kernels.layer_norm(
                    at,
                    gpu.put(as_dtype(x, x_dtype)) if residual else 0,
                    gpu.put(affine[0]),
                    gpu.put(affine[1]),
                    gpu.out("layer_norm", size),
                    x_dtype=x_dtype,
                    residual_dtype=x_dtype,
                    out_dtype=out_dtype,
                    rows=rows,
                    channels=channels,
                    epsilon=1e-5,
                    stream=0,
                    **added,
                )
                gpu.finish()
    for channels, pixels, groups in ((256, 63, 32), (64, 1500, 4), (6, 7, 3), (256, 4000, 32)):
        affine = rng.standard_normal((2, channels)).astype(np.float32)
        for x_dtype, out_dtype in types:
            for channels_last in (False, True)[: 2 if channels // groups % 8 == 0 else 1]:
                sizes = {"batch": 2, "channels": channels, "pixels": pixels, "groups": groups}
                sizes["channels_last"] = channels_last
                count = 2 * channels * pixels
                kernels.group_norm(
                    gpu.put(as_dtype(rng.standard_normal(count), x_dtype)),
                    gpu.put(affine[0]),
                    gpu.put(affine[1]),
                    gpu.out("group_norm", count * (4 if out_dtype == "float32" else 2)),
                    gpu.scratch(kernels.group_norm_workspace(**sizes)),
                    x_dtype=x_dtype,
                    out_dtype=out_dtype,
                    epsilon=1e-5,
                    relu=channels_last,
                    stream=0,
                    **sizes,
                )
                gpu.finish()


def normalize_images(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    for channels, pixels, strides in (
        (3, 1056, (0, 3, 4, 8)),
        (3, 1237, (0, 3, 4, 8)),
        (8, 70, (8,)),
        (9, 7, (0,)),
    ):
        images = rng.uniform(0, 255, (2, channels, pixels)).astype(np.float32)
        mean, std = rng.uniform(50, 150, (2, channels)).astype(np.float32)
        for stride in strides:
            for out_dtype in DTYPES:
                kernels.normalize_images(
                    gpu.put(images),
                    gpu.put(mean),
                    gpu.put(std),
                    gpu.out(
                        "normalize_images",
                        2 * pixels * (stride or channels) * (4 if out_dtype == "float32" else 2),
                    ),
                    out_dtype=out_dtype,
                    batch=2,
                    channels=channels,
                    pixels=pixels,
                    pixel_stride=stride,
                    stream=0,
                )
                gpu.finish()


def attention(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    cases = [
        (2, 100, 850, 8, 32, 256),
        (1, 100, 100, 8, 32, 0),
        (1, 7, 300, 4, 16, 32),
        (2, 33, 65, 1, 64, 0),
    ]
    for batch, queries, keys, heads, dim, mask_dim in cases:
        width = heads * dim
        sizes = {
            "batch": batch,
            "queries": queries,
            "keys": keys,
            "heads": heads,
            "dim": dim,
            "mask_dim": mask_dim,
        }
        for dtype in ("float16", "bfloat16"):
            q, k, v = (as_dtype(rng.standard_normal((batch, n, width)), dtype) for n in (queries, keys, keys))
            mask = {}
            if mask_dim:
                embed = rng.standard_normal((batch, queries, mask_dim)).astype(np.float32)
                features = rng.standard_normal((batch, keys, mask_dim))
                mask = {"mask_embed": gpu.put(embed), "features": gpu.put(as_dtype(features, dtype))}
            for positions in (False, True):
                arguments = dict(mask)
                if positions:  # of masked keys they are added by the caller
                    arguments["q_pos"] = gpu.put(as_dtype(rng.standard_normal((queries, width)), dtype))
                    if not mask_dim:
                        arguments["k_pos"] = gpu.put(as_dtype(rng.standard_normal((keys, width)), dtype))
                    arguments["pos_stride"] = width
                workspace = kernels.attention_workspace(**sizes)
                kernels.attention(
                    gpu.put(q),
                    gpu.put(k),
                    gpu.put(v),
                    gpu.out("attention", q.nbytes),
                    workspace=gpu.scratch(workspace) if workspace else 0,
                    dtype=dtype,
                    q_stride=width,
                    k_stride=width,
                    v_stride=width,
                    stream=0,
                    **sizes,
                    **arguments,
                )
            gpu.finish()


def mask_features(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    for queries, (height, width), (out_height, out_width), channels in (
        (100, (20, 28), (5, 7), 256),
        (7, (12, 13), (6, 13), 64),
    ):
        features = rng.standard_normal((2, height * width, channels))
        embed = rng.standard_normal((2, queries, channels)).astype(np.float32)
        for dtype in ("float16", "bfloat16"):
            at = gpu.put(as_dtype(features, dtype))
            common = {"dtype": dtype, "batch": 2, "channels": channels, "stream": 0}
            kernels.mask_product(
                gpu.put(embed),
                at,
                gpu.out("mask_product", 4 * 2 * queries * height * width),
                queries=queries,
                pixels=height * width,
                **common,
            )
            kernels.resize_mask_features(
                at,
                gpu.out("resize_mask_features", 2 * 2 * out_height * out_width * channels),
                height=height,
                width=width,
                out_height=out_height,
                out_width=out_width,
                **common,
            )
            gpu.finish()


def window_attention(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    cases = [(20, 27, 3, 32, 7, 0), (20, 27, 3, 32, 7, 3), (24, 24, 2, 32, 12, 6), (5, 6, 1, 16, 4, 2)]
    for height, width, heads, dim, window, shift in cases:
        qkv = rng.standard_normal((2, height, width, 3, heads, dim))
        qkv_bias = rng.standard_normal((3, heads, dim)).astype(np.float32)
        bias = rng.standard_normal((heads, 2 * window - 1, 2 * window - 1)).astype(np.float32)
        for dtype in ("float16", "bfloat16"):
            kernels.window_attention(
                gpu.put(as_dtype(qkv, dtype)),
                gpu.put(qkv_bias),
                gpu.put(bias),
                gpu.out("window_attention", 2 * 2 * height * width * heads * dim),
                dtype=dtype,
                batch=2,
                height=height,
                width=width,
                heads=heads,
                dim=dim,
                window=window,
                shift=shift,
                scale=dim**-0.5,
                stream=0,
            )
            gpu.finish()


def mlp(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    cases = [
        ([64, 96, 160], False),
        ([256, 256, 256, 256], False),
        ([256, 2048, 256], True),
        ([32, 32, 32], True),
    ]
    for widths, after in cases:
        weights = sum(i * o for i, o in itertools.pairwise(widths))
        norm = rng.standard_normal((2, widths[0])).astype(np.float32)
        biases = rng.standard_normal(sum(widths[1:])).astype(np.float32)
        for rows, dtype in itertools.product((1, 100, 803), DTYPES):
            if dtype == "float32" and max(widths) > 1024:
                continue  # there is no kernel: it is more than shared memory holds
            half = dtype if dtype != "float32" else "bfloat16"  # float32 is packed as two of these
            count = weights * (2 if dtype == "float32" else 1)
            types = {"dtype": dtype, "x_dtype": half, "out_dtype": "float32", "normed_dtype": half}
            kernels.mlp(
                gpu.put(as_dtype(rng.standard_normal((rows, widths[0])), half)),
                gpu.put(as_dtype(rng.standard_normal(count) / 16, half)),
                gpu.put(biases),
                gpu.put(norm),
                gpu.out("mlp", 4 * rows * widths[-1]),
                0 if after else gpu.out("normed rows", 2 * rows * widths[0]),
                rows=rows,
                widths=widths,
                after=after,
                epsilon=1e-5,
                stream=0,
                **types,
            )
            gpu.finish()


def resize(kernels: ModuleType, gpu: Gpu) -> None:
    module = kernels.preprocess
    rng = np.random.default_rng(0)

    def table(in_size: int, out_size: int) -> np.ndarray:
        # As gpu_resize.axis_table lays it out, with weights that need not be Pillow's.
        scale = in_size / out_size
        support = max(scale, 1.0)
        center = (np.arange(out_size) + 0.5) * scale
        first = np.maximum((center - support + 0.5).astype(np.int64), 0)
        count = np.minimum((center + support + 0.5).astype(np.int64), in_size) - first
        taps = int(np.ceil(support)) * 2 + 1
        weight = (1 << module.PRECISION_BITS) // np.maximum(count, 1)
        weights = np.where(np.arange(taps)[:, None] < count, weight, 0)
        return np.concatenate([first[None], count[None], weights]).astype(np.int32)

    for size, out_size in (
        ((48, 64), (80, 107)),
        ((61, 47), (13, 21)),
        ((5, 1), (9, 2)),
        ((33, 40), (33, 40)),
    ):
        for channels in (1, 3):
            for vertical_first in (False, True):
                scratch = module.scratch_bytes(size, channels, out_size, vertical_first)
                module.resize_bilinear(
                    image=gpu.put(rng.integers(0, 255, (*size, channels), np.uint8)),
                    size=size,
                    channels=channels,
                    reverse_channels=True,
                    vertical_first=vertical_first,
                    horizontal=gpu.put(table(size[1], out_size[1])),
                    vertical=gpu.put(table(size[0], out_size[0])),
                    scratch=gpu.scratch(scratch),
                    scratch_size=scratch,
                    out=gpu.out("resized image", channels * out_size[0] * out_size[1]),
                    out_size=out_size,
                    stream=0,
                )
                gpu.finish()


CASES: dict[str, Callable[[ModuleType, Gpu], None]] = {
    "ms_deform_attn": ms_deform_attn,
    "postprocess": postprocess,
    "resize": resize,
    "normalization": normalization,
    "normalize_images": normalize_images,
    "attention": attention,
    "mask_features": mask_features,
    "window_attention": window_attention,
    "mlp": mlp,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all where none is named"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(CASES))
        return 0
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; expected some of {', '.join(CASES)}")
    try:
        kernels, gpu = load_kernels(), Gpu()
    except Missing as error:
        print(f"sanitize_kernels: {error}", file=sys.stderr)
        return 2
    failed = False
    for name in args.cases or CASES:
        try:
            CASES[name](kernels, gpu)
            print(f"{name}: ran")
        except (RuntimeError, ValueError) as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
