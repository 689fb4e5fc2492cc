"""Calls of the network's kernels on small inputs, for tools/sanitize_kernels.py."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
from sanitizer_gpu import DTYPES, Gpu, as_dtype

PYRAMIDS = (
    ((3, 5), (6, 9), (12, 18)),
    ((0, 4), (5, 6), (7, 2)),
    ((1, 1), (1, 9), (8, 1)),
    ((6, 5), (2, 2), (0, 0)),
)


def ms_deform_attn(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    pyramids = PYRAMIDS
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


def ms_deform_attn_backward(kernels: ModuleType, gpu: Gpu) -> None:
    rng = np.random.default_rng(0)
    cases = [(pyramid, 8, 32, 4) for pyramid in PYRAMIDS]
    cases += [(PYRAMIDS[0], 3, 33, 3), (PYRAMIDS[0], 1, 4, 16), (((5, 7),), 2, 1, 1)]
    for levels, heads, dim, points in cases:
        pixels, samples = sum(h * w for h, w in levels), len(levels) * points
        shapes = {
            "value": (2, pixels, heads, dim),
            "offsets": (2, pixels, heads, samples, 2),
            "logits": (2, pixels, heads, samples),
        }
        inputs = {name: rng.standard_normal(shape, dtype=np.float32) * 4 for name, shape in shapes.items()}
        outputs = {
            f"grad_{name}": gpu.out(f"grad_{name}", inputs[name].nbytes) for name in ("offsets", "logits")
        }
        kernels.ms_deform_attn_backward(
            grad=gpu.put(inputs["value"]),
            **{name: gpu.put(array) for name, array in inputs.items()},
            grad_value=gpu.put(np.zeros_like(inputs["value"])),
            **outputs,
            batch=2,
            pixels=pixels,
            heads=heads,
            dim=dim,
            points=points,
            level_sizes=list(levels),
            stream=0,
        )
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
        ([256, 256], True),
        ([96, 96], True),
    ]
    for widths, after in cases:
        weights = sum(i * o for i, o in itertools.pairwise(widths))
        norm = rng.standard_normal((2, widths[0])).astype(np.float32)
        biases = rng.standard_normal(sum(widths[1:])).astype(np.float32)
        # Of one layer with residual, x is read as it lies in memory, or by way of shared memory where it is float32.
        x_types = (None, "float32") if after and len(widths) == 2 else (None,)
        for rows, dtype, x_type in itertools.product((1, 100, 803), DTYPES, x_types):
            if dtype == "float32" and max(widths) > 1024:
                continue  # there is no kernel: it is more than shared memory holds
            half = dtype if dtype != "float32" else "bfloat16"  # float32 is packed as two of these
            count = weights * (2 if dtype == "float32" else 1)
            types = {"dtype": dtype, "x_dtype": x_type or half, "residual_dtype": half}
            types.update(out_dtype="float32", normed_dtype=half)
            kernels.mlp(
                gpu.put(as_dtype(rng.standard_normal((rows, widths[0])), x_type or half)),
                gpu.put(as_dtype(rng.standard_normal(count) / 16, half)),
                gpu.put(biases),
                gpu.put(norm),
                gpu.put(as_dtype(rng.standard_normal((rows, widths[0])), half)) if after else 0,
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
