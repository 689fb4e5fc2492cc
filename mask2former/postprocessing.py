"""From class and mask logits to panoptic, instance and semantic results at the images' own sizes.

The results are those of the Mask2Former release, ties included. What differs is the order of the work: what depends on
class logits alone is computed for the whole batch and read by the host once, so that each image then resizes only the
masks that are needed; the areas of the panoptic segments of all images are read once more at the end. No loop over queries
touches the device, and no temporary grows with queries times pixels beyond the mask logits at the output size.

On a GPU with the kernels of csrc/ built, postprocessing_cuda.py does the same faster and in less memory; what is here is
the CPU's way, that of other GPUs, and what the kernels are tested against.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor
from torch.nn import functional as F

from .postprocess_options import PostprocessOptions
from .postprocessing_cuda import postprocess_cuda, why_not
from .rle import RLEMasks

logger = logging.getLogger(__name__)

# Temporaries beside the mask logits stay near this many bytes; smaller pieces suit a CPU's caches.
CUDA_CHUNK_BYTES = 256 << 20
CPU_CHUNK_BYTES = 16 << 20


@dataclass
class _Selection:
    """What the class logits of one image say, on the host."""

    panoptic_queries: list[int]  # in the queries' order
    panoptic_classes: list[int]
    instance_queries: list[int]  # in the order of the results
    instance_ranks: list[int]  # their places among the top-k pairs


@torch.no_grad()
def postprocess(
    pred_logits: Tensor,
    pred_masks: Tensor,
    *,
    padded_size: tuple[int, int],
    image_sizes: list[tuple[int, int]],
    output_sizes: list[tuple[int, int]],
    options: PostprocessOptions,
    thing_classes: frozenset[int] = frozenset(),
    fused: bool | None = None,
) -> list[dict]:
    """Results of a batch.

    Args:
        pred_logits: (B, Q, K + 1), the last class "no object".
        pred_masks: (B, Q, h, w) logits over the padded image at any stride.
        padded_size, image_sizes, output_sizes: (height, width) in pixels; images lie at the top left of the padding.
        thing_classes: contiguous ids of the thing classes, for the panoptic task.
        fused: by the CUDA kernels (True), without them (False), or by them where they can (None).

    Returns:
        for each image the dict that MaskFormer.forward describes. With instance_format "rle" the instances have
        pred_masks_rle, an RLEMasks, instead of pred_masks; with semantic_format "labels" there is sem_seg_labels, each
        pixel's class of the highest score, (height, width) int64, instead of sem_seg.

    Raises:
        ValueError: fused is True, but the kernels cannot do this; the message says why.
    """
    reason = "" if fused is False else why_not(pred_logits, pred_masks, output_sizes, options)
    if fused and reason:
        raise ValueError(f"postprocess(fused=True): {reason}")
    if fused is not False and not reason:
        results = _fused_if_memory_allows(
            pred_logits,
            pred_masks,
            padded_size=padded_size,
            image_sizes=image_sizes,
            output_sizes=output_sizes,
            options=options,
            thing_classes=thing_classes,
        )
        if results is not None:
            return results
    pred_logits = pred_logits.float()
    probs = pred_logits.softmax(-1)  # (B, Q, K + 1)
    selections, instance_scores, instance_labels = _select(probs, options, thing_classes)
    results: list[dict] = []
    areas: list[Tensor | None] = []
    segment_maps: list[Tensor | None] = []
    for i, selection in enumerate(selections):
        infer = retry_if_cuda_oom(_infer_image)
        result, segment_map, area = infer(
            probs[i],
            pred_masks[i],
            None if instance_scores is None else instance_scores[i],
            None if instance_labels is None else instance_labels[i],
            padded_size=padded_size,
            image_size=image_sizes[i],
            output_size=output_sizes[i],
            selection=selection,
            options=options,
        )
        results.append(result)
        segment_maps.append(segment_map)
        areas.append(area)
    if options.panoptic_on:
        _finish_panoptic(results, segment_maps, areas, selections, options, thing_classes)
    return results


def _fused_if_memory_allows(pred_logits: Tensor, pred_masks: Tensor, **kwargs) -> list[dict] | None:
    """As retry_if_cuda_oom: again with PyTorch's cache emptied, then None, for the way that may end on the CPU."""
    for attempt in ("first", "second"):
        try:
            return postprocess_cuda(pred_logits, pred_masks, **kwargs)
        except torch.cuda.OutOfMemoryError as error:
            message = str(error)
        if attempt == "first":
            torch.cuda.empty_cache()
    logger.warning(
        "The results of post-processing do not fit the GPU, so it goes image by image, on the CPU where it must: %s",
        message,
    )
    return None


def _select(
    probs: Tensor, options: PostprocessOptions, thing_classes: frozenset[int]
) -> tuple[list[_Selection], Tensor | None, Tensor | None]:
    """Queries that each image's tasks need; the one place where the host waits for the network."""
    batch = probs.shape[0]
    scores = labels = None
    columns = []
    if options.panoptic_on:
        best, classes = probs.max(-1)  # (B, Q)
        keep = (classes != options.num_classes) & (best > options.object_mask_threshold)
        columns.append(torch.where(keep, classes, -1))
    if options.instance_on:
        # Unsorted, as in the release: the order of the results is this call's.
        scores, pairs = probs[..., :-1].flatten(1).topk(options.topk, sorted=False)  # (B, topk)
        labels = pairs % options.num_classes
        columns += [torch.div(pairs, options.num_classes, rounding_mode="floor"), labels]
    selections = [_Selection([], [], [], []) for _ in range(batch)]
    if not columns:
        return selections, None, None
    rows = torch.cat(columns, dim=1).tolist()
    for selection, row in zip(selections, rows):
        if options.panoptic_on:
            row, kept = row[-2 * options.topk :] if options.instance_on else [], row[: probs.shape[1]]
            selection.panoptic_queries = [q for q, c in enumerate(kept) if c >= 0]
            selection.panoptic_classes = [c for c in kept if c >= 0]
        if options.instance_on:
            queries, classes = row[: options.topk], row[options.topk :]
            # With the panoptic task on, instances are things only.
            ranks = [r for r, c in enumerate(classes) if not options.panoptic_on or c in thing_classes]
            selection.instance_ranks = ranks
            selection.instance_queries = [queries[r] for r in ranks]
    return selections, scores, labels


def _infer_image(
    probs: Tensor,
    masks: Tensor,
    instance_scores: Tensor | None,
    instance_labels: Tensor | None,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    selection: _Selection,
    options: PostprocessOptions,
) -> tuple[dict, Tensor | None, Tensor | None]:
    """All that one image needs but the panoptic segments' ids: results, segment map, areas. Nothing waits here."""
    result: dict = {}
    if not options.resize_before_inference:
        scores = _semantic_then_resize(probs, masks, padded_size, image_size, output_size)
        _put_semantic(result, scores, options)
        return result, None, None

    if options.semantic_on:
        queries = list(range(masks.shape[0]))
    else:
        queries = sorted({*selection.panoptic_queries, *selection.instance_queries})
    place = {q: i for i, q in enumerate(queries)}
    if len(queries) < masks.shape[0]:
        masks = masks[_index(queries, masks.device)]
    logits = resize_masks(masks, padded_size, image_size, output_size)  # (n, height, width)

    segment_map = area = None
    if options.semantic_on:
        _put_semantic(result, semantic_inference(probs[:, :-1], logits), options)
    if options.panoptic_on:
        kept = _index(selection.panoptic_queries, masks.device)
        rows = _index([place[q] for q in selection.panoptic_queries], masks.device)
        segment_map, area = _panoptic_map(probs[kept].amax(-1), logits, rows)
    if options.instance_on:
        ranks = _index(selection.instance_ranks, masks.device)
        rows = _index([place[q] for q in selection.instance_queries], masks.device)
        result["instances"] = _instances(
            instance_scores[ranks],
            instance_labels[ranks],
            logits,
            rows,
            options.boxes_from_masks,
            options.instance_format == "rle",
        )
    return result, segment_map, area


def _put_semantic(result: dict, scores: Tensor, options: PostprocessOptions) -> None:
    if options.semantic_format == "labels":
        result["sem_seg_labels"] = scores.argmax(0)
    else:
        result["sem_seg"] = scores


def resize_masks(
    masks: Tensor, padded_size: tuple[int, int], image_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Masks at the output size, by the release's two bilinear steps: to the padded size, then, cropped, to the output.

    Args:
        masks: (N, h, w) of any floating dtype.
        padded_size, image_size, output_size: (height, width).

    Returns:
        (N, *output_size) float32.
    """
    out = masks.new_empty((len(masks), *output_size), dtype=torch.float32)
    size = max(1, _chunk_bytes(masks.device) // (4 * padded_size[0] * padded_size[1]))
    for start in range(0, len(masks), size):
        part = _resize(masks[start : start + size].float(), padded_size)
        part = part[:, : image_size[0], : image_size[1]]
        out[start : start + size] = _resize(part, output_size)
    return out


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x  # bilinear resizing to the same size changes nothing
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def semantic_inference(class_probs: Tensor, mask_logits: Tensor) -> Tensor:
    """Class scores of each pixel: the queries' class probabilities, weighted with their mask probabilities.

    Args:
        class_probs: (Q, K) without "no object".
        mask_logits: (Q, height, width).

    Returns:
        (K, height, width) float32.
    """
    logits = mask_logits.flatten(1)  # (Q, P)
    out = logits.new_empty((class_probs.shape[1], logits.shape[1]))
    weights = class_probs.t().contiguous()
    for pixels in _pixel_chunks(logits):
        # mm into a slice of the result would need a contiguous slice; one chunk, the usual case on a GPU, is.
        part = logits[:, pixels].sigmoid()
        if part.shape[1] == out.shape[1]:
            torch.mm(weights, part, out=out)
        else:
            out[:, pixels] = weights @ part
    return out.unflatten(1, mask_logits.shape[1:])


def _semantic_then_resize(
    probs: Tensor,
    masks: Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
) -> Tensor:
    """Semantic scores at the padded size, resized to the output: the release's way for large images."""
    height, width = image_size
    weights = probs[:, :-1].t().contiguous()  # (K, Q)
    scores = masks.new_zeros((len(weights), height * width), dtype=torch.float32)
    step = max(1, _chunk_bytes(masks.device) // (4 * padded_size[0] * padded_size[1]))
    for start in range(0, len(masks), step):
        part = _resize(masks[start : start + step].float(), padded_size)[:, :height, :width]
        scores.addmm_(weights[:, start : start + step], part.sigmoid().flatten(1))
    return _resize(scores.unflatten(1, image_size), output_size)


def _panoptic_map(scores: Tensor, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which kept query each pixel belongs to, and the areas that decide which of them stay.

    Args:
        scores: (n,) class scores of the kept queries.
        logits: (m, height, width) mask logits, of which `rows` (n,) are the kept queries'.

    Returns:
        segment map (height, width) int64: 1 + place of the pixel's query among the kept ones where that query's mask
        probability is at least 0.5, else 0; and areas (3, n) int64: pixels won, pixels of probability at least 0.5, both.
    """
    shape = logits.shape[1:]
    logits = logits.flatten(1)
    kept = len(rows)
    segment_map = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    areas = torch.zeros((3, kept), dtype=torch.int64, device=logits.device)
    if kept == 0:
        return segment_map.view(shape), areas
    query = torch.arange(kept, device=logits.device)[:, None]
    for pixels in _pixel_chunks(logits, rows=kept, tensors=3):
        probs = logits[rows, pixels].sigmoid()  # (n, P)
        winner = (scores[:, None] * probs).argmax(0)  # (P,)
        inside = probs >= 0.5
        won = winner == query  # (n, P)
        areas[0] += won.sum(1)
        areas[1] += inside.sum(1)
        won &= inside
        areas[2] += won.sum(1)
        segment_map[pixels] = torch.where(won.any(0), winner + 1, 0)
    return segment_map.view(shape), areas


def _finish_panoptic(
    results: list[dict],
    segment_maps: list[Tensor],
    areas: list[Tensor],
    selections: list[_Selection],
    options: PostprocessOptions,
    thing_classes: frozenset[int],
) -> None:
    """Give the segments their ids: areas to the host once for all images, decisions there, a table back."""
    device = areas[0].device
    counts = torch.cat([a.to(device) for a in areas], dim=1).tolist()
    start = 0
    for result, segment_map, selection in zip(results, segment_maps, selections):
        end = start + len(selection.panoptic_queries)
        won, inside, both = (row[start:end] for row in counts)
        start = end
        table = [0]
        segments = []
        stuff_ids: dict[int, int] = {}
        for k, category in enumerate(selection.panoptic_classes):
            segment_id = 0
            if both[k] > 0 and won[k] / inside[k] >= options.overlap_threshold:
                isthing = category in thing_classes
                segment_id = 0 if isthing else stuff_ids.get(category, 0)
                if segment_id == 0:
                    segment_id = len(segments) + 1
                    segments.append({"id": segment_id, "isthing": isthing, "category_id": category})
                    if not isthing:
                        stuff_ids[category] = segment_id
            table.append(segment_id)
        ids = torch.tensor(table, dtype=torch.int32).to(segment_map.device, non_blocking=True)
        result["panoptic_seg"] = (ids[segment_map], segments)


def _instances(
    scores: Tensor,
    labels: Tensor,
    logits: Tensor,
    rows: Tensor,
    boxes_from_masks: bool,
    as_rle: bool = False,
) -> Instances:
    """Instances of the given classes and class scores.

    Args:
        scores, labels: (N,).
        logits: (m, height, width) mask logits, of which `rows` (N,) are the instances'; several may share one.
    """
    masks = logits > 0
    # One pass over each mask, however many classes it stands for.
    mask_scores = []
    step = max(1, _chunk_bytes(logits.device) // (8 * logits.shape[1] * logits.shape[2]))
    for part, inside in zip(logits.split(step), masks.split(step)):
        total = (part.sigmoid() * inside).flatten(1).sum(1)
        mask_scores.append(total / (inside.flatten(1).sum(1) + 1e-6))
    mask_scores = torch.cat(mask_scores) if mask_scores else logits.new_zeros(0)
    result = Instances(tuple(logits.shape[1:]))
    if as_rle:
        result.pred_masks_rle = RLEMasks.encode(masks)[rows]
    else:
        result.pred_masks = masks[rows]  # (N, height, width)
    result.pred_boxes = _boxes(masks, rows) if boxes_from_masks else Boxes(torch.zeros(len(rows), 4))
    result.scores = scores * mask_scores[rows]
    result.pred_classes = labels
    return result


def _boxes(masks: Tensor, rows: Tensor) -> Boxes:
    """Tight boxes (x0, y0, x1, y1), the far edges exclusive, as BitMasks.get_bounding_boxes; zeros for an empty mask."""
    height, width = masks.shape[1:]

    def span(hit: Tensor, length: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(length, device=masks.device)
        first = torch.where(hit, position, length).amin(1)
        last = torch.where(hit, position + 1, 0).amax(1)
        return torch.where(last > 0, first, 0), last

    x0, x1 = span(masks.any(1), width)
    y0, y1 = span(masks.any(2), height)
    return Boxes(torch.stack((x0, y0, x1, y1), dim=1)[rows].float())


def _index(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _chunk_bytes(device: torch.device) -> int:
    return CPU_CHUNK_BYTES if device.type == "cpu" else CUDA_CHUNK_BYTES


def _pixel_chunks(logits: Tensor, rows: int | None = None, tensors: int = 1) -> list[slice]:
    """Slices of the pixels of (n, P) logits, so that `tensors` float temporaries of (rows, chunk) fit the bound."""
    row_bytes = 4 * tensors * max(1, len(logits) if rows is None else rows)
    step = max(1024, _chunk_bytes(logits.device) // row_bytes)
    pixels = logits.shape[1]
    return [slice(start, min(start + step, pixels)) for start in range(0, pixels, step)]
