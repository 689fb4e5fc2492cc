"""Calls of the kernels before and after the network, on small images, for tools/sanitize_kernels.py."""

from __future__ import annotations

from types import ModuleType

import numpy as np
from sanitizer_gpu import DTYPES, Gpu, as_dtype


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
            gpu.synchronize()
        gpu.finish()
