"""postprocessing.py on CUDA kernels (csrc/postprocess/): the same results, from the stride-4 logits directly.

Mask logits are interpolated in registers, pixel by pixel, and never written at the output size. For a batch the order is:

    top_pairs     the best pairs of query and class, which are the instances
    select        which queries the tasks need (their "slots"), from class probabilities, on the device
    mask_pass     for each image: winner of each pixel, bit masks of the instances, areas and sums
    decide        segment ids and scores of the instances, on the device
    (report)      one asynchronous copy to pinned memory: counts, classes, run lengths
    assign_ids    slots to segment ids; then the semantic scores, while the report travels
    (wait)        the only one of the host; it sizes the instances' masks, which are then expanded from their bits

Instances as RLE need no bool masks: boundaries of runs are found on the device and travel with the report. Where they
do not fit the room that earlier images suggest, they are copied again, which is the one case of a second wait.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from . import kernels
from .postprocess_options import PostprocessOptions
from .rle import RLEMasks

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Bytes that scratch areas are aligned to.
_ALIGNMENT = 256


@functools.lru_cache(maxsize=64)
def _things(module: ModuleType, classes: frozenset[int], num_classes: int):
    """The kernels' set of thing classes."""
    return module.ThingClasses(sorted(c for c in classes if 0 <= c < num_classes))


@functools.lru_cache(maxsize=64)
def _report_layout(module: ModuleType, queries: int, topk: int) -> dict[str, int]:
    return module.report_layout(queries, topk)


@functools.lru_cache(maxsize=64)
def _has_tensor_cores(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


class _RunRoom:
    """Run boundaries that the report has room for, for each image; grows with what images turn out to need."""

    per_image = 1 << 16


def why_not(
    pred_logits: Tensor, pred_masks: Tensor, output_sizes: list[tuple[int, int]], options: PostprocessOptions
) -> str:
    """Why the kernels cannot do this; empty where they can."""
    if not pred_masks.is_cuda:
        return f"the masks are on {pred_masks.device}, not on a GPU"
    if pred_logits.device != pred_masks.device:
        return f"the class logits are on {pred_logits.device}, the masks on {pred_masks.device}"
    if not kernels.available():
        return f"the kernels are not built or do not load: {kernels.BUILD_HINT}"
    if not _has_tensor_cores(pred_masks.device):
        return "the kernels need a GPU of compute capability 8.0 or higher"
    if pred_masks.dtype not in _DTYPES:
        return f"the masks are {pred_masks.dtype}; the kernels take float32, float16 and bfloat16"
    module = kernels.load().postprocess
    queries, classes = pred_logits.shape[1], options.num_classes
    if not 1 <= queries <= module.MAX_QUERIES or not 1 <= classes <= module.MAX_CLASSES:
        return (
            f"{queries} queries and {classes} classes; the kernels take at most {module.MAX_QUERIES} and "
            f"{module.MAX_CLASSES}"
        )
    # The kernels' grids: 65,535 tiles of 16 rows, and 31 bits for a pixel's place.
    if any(height > 65535 * 16 or height * width > 2**31 - 256 for height, width in output_sizes):
        return "an output has more than 2^31 - 256 pixels or 1,048,560 rows"
    return ""


def postprocess_cuda(
    pred_logits: Tensor,
    pred_masks: Tensor,
    *,
    padded_size: tuple[int, int],
    image_sizes: list[tuple[int, int]],
    output_sizes: list[tuple[int, int]],
    options: PostprocessOptions,
    thing_classes: frozenset[int],
) -> list[dict]:
    """`postprocess` of postprocessing.py, with its arguments and results, on the caller's current stream.

    Raises:
        KernelsMissing: the kernels are not built.
        torch.cuda.OutOfMemoryError: the results do not fit; nothing else of their size is made.
    """
    if pred_logits.shape[-1] != options.num_classes + 1 or pred_logits.shape[:2] != pred_masks.shape[:2]:
        raise ValueError(
            f"pred_logits {tuple(pred_logits.shape)} and pred_masks {tuple(pred_masks.shape)} do not fit "
            f"{options.num_classes} classes; expected (B, Q, {options.num_classes + 1}) and (B, Q, h, w)"
        )
    with torch.cuda.device(pred_masks.device):
        batch = _Batch(
            pred_logits, pred_masks, padded_size, image_sizes, output_sizes, options, thing_classes
        )
        return batch.run()


class _Batch:
    def __init__(
        self, pred_logits, pred_masks, padded_size, image_sizes, output_sizes, options, thing_classes
    ):
        self.module = kernels.load().postprocess
        self.options = options
        self.thing_classes = thing_classes
        self.device = pred_masks.device
        self.stream = kernels.stream_of(pred_masks)
        self.probs = pred_logits.float().softmax(-1).contiguous()  # (B, Q, K + 1)
        # Rows of a mask must follow one another; images and queries may lie anywhere, as in an expanded batch.
        if pred_masks.stride(-1) != 1 or pred_masks.stride(-2) != pred_masks.shape[-1]:
            pred_masks = pred_masks.contiguous()
        self.masks = pred_masks
        self.dtype = kernels.dtype_name(pred_masks)
        self.batch, self.queries = pred_masks.shape[:2]
        self.padded_size, self.image_sizes, self.output_sizes = padded_size, image_sizes, output_sizes
        self.topk = options.topk if options.instance_on else 0
        self.rle = options.instance_on and options.instance_format == "rle"
        self.by_mask = options.panoptic_on or options.instance_on
        self.things = _things(self.module, thing_classes, options.num_classes)
        sizes = output_sizes if options.resize_before_inference else image_sizes
        self.geometries = [self._geometry(i, size) for i, size in enumerate(sizes)]
        self._make_scratch()

    def run(self) -> list[dict]:
        options = self.options
        results: list[dict] = [{} for _ in range(self.batch)]
        if not options.resize_before_inference:
            for i, result in enumerate(results):
                self._semantic_then_resize(i, result)
            return results
        if self.by_mask:
            self._select()
            self.maps = []
            for i in range(self.batch):
                self._mask_pass(i)
            self._decide()
            report = self._send_report()
            for i, segment_map in enumerate(self.maps):
                self.module.assign_ids(
                    segment_map.data_ptr(), segment_map.numel(), self._work(i), self.queries, self.stream
                )
        if options.semantic_on:
            for i, result in enumerate(results):
                self._semantic(i, result)
        if self.by_mask:
            rows, boundaries = self._read_report(report)
            for i, result in enumerate(results):
                self._assemble(i, result, rows[i], boundaries)
        return results

    def _make_scratch(self) -> None:
        """One allocation for all that only the kernels see, and where in it each part is.

        Images run one after the other, and share what none needs after its own kernels.
        """
        self._scratch_bytes = 0
        if self.by_mask:
            self._work_bytes = 4 * self.module.work_words(self.queries)
            self._work_at = self._reserve(self.batch * self._work_bytes)
            tiles = max(geometry.mask_tiles for geometry in self.geometries)
            self._counts_at = self._reserve(16 * tiles * self.queries)
            self._sums_at = self._reserve(8 * tiles * self.queries)
            if self.options.instance_on:
                words = [height * -(-width // 32) for height, width in self.output_sizes]
                self._pairs_at = self._reserve(8 * self.batch * self.topk)
                self._pair_scores_at = self._reserve(4 * self.batch * self.topk)
                self._bits_at = [self._reserve(4 * self.queries * count) for count in words]
        if self.options.semantic_on or not self.options.resize_before_inference:
            size = self.module.semantic_weights_bytes(self.queries, self.options.num_classes)
            self._weights_at = self._reserve(size)
        self.scratch = self._new(self._scratch_bytes, dtype=torch.uint8)
        self._scratch_address = self.scratch.data_ptr()

    def _reserve(self, size: int) -> int:
        """Where `size` bytes of scratch begin."""
        start = self._scratch_bytes
        self._scratch_bytes = start + -(-size // _ALIGNMENT) * _ALIGNMENT
        return start

    def _work(self, image: int) -> int:
        """The address of an image's work; see layout.h."""
        return self._scratch_address + self._work_at + image * self._work_bytes

    def _bits(self, image: int) -> int:
        """The address of an image's mask bits (Q, height, ceil(width / 32)); 0 without instances."""
        return self._scratch_address + self._bits_at[image] if self.options.instance_on else 0

    def _report(self, image: int) -> int:
        """The address of an image's report; see layout.h."""
        return self.report.data_ptr() + 4 * image * self.layout["words"]

    def _geometry(self, image: int, output_size: tuple[int, int]):
        masks = tuple(self.masks.shape[-2:])
        return self.module.Geometry(
            masks, tuple(self.padded_size), tuple(self.image_sizes[image]), tuple(output_size)
        )

    def _masks_of(self, image: int) -> tuple[int, str, int]:
        """What the C++ side wants of an image's masks: pointer, dtype, distance between queries."""
        start = self.masks.data_ptr() + image * self.masks.stride(0) * self.masks.element_size()
        return start, self.dtype, self.masks.stride(1)

    def _new(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _select(self) -> None:
        options, module = self.options, self.module
        pair_scores = pairs = 0
        if options.instance_on:
            pairs = self._scratch_address + self._pairs_at
            pair_scores = self._scratch_address + self._pair_scores_at
            module.top_pairs(
                self.probs.data_ptr(),
                self.batch,
                self.queries,
                options.num_classes,
                self.topk,
                pair_scores,
                pairs,
                self.stream,
            )
        self.layout = _report_layout(module, self.queries, self.topk)
        self._make_report(self.batch * _RunRoom.per_image if self.rle else 0)
        self.scores = self._new(self.batch, self.topk, dtype=torch.float32)
        self.labels = self._new(self.batch, self.topk, dtype=torch.int64)
        module.select(
            self.probs.data_ptr(),
            pair_scores,
            pairs,
            self.batch,
            self.queries,
            options.num_classes,
            self.topk,
            options.panoptic_on,
            options.panoptic_on,  # with the panoptic task on, instances are things only
            options.object_mask_threshold,
            self._work(0),
            self._report(0),
            self.scores.data_ptr(),
            self.labels.data_ptr(),
            self.things,
            self.stream,
        )

    def _make_report(self, capacity: int) -> None:
        """One tensor for all that the host reads, so that one copy does: the images' reports, then run boundaries."""
        words = self.batch * self.layout["words"]
        self.capacity = capacity
        self.to_host = self._new(words + capacity)
        self.report = self.to_host[:words].view(self.batch, -1)
        self.boundaries = self.to_host[words:]

    def _mask_pass(self, image: int) -> None:
        if self.options.panoptic_on:
            self.maps.append(self._new(*self.output_sizes[image]))
        self.module.mask_pass(
            *self._masks_of(image),
            self.geometries[image],
            self.queries,
            self.topk,
            self._work(image),
            self._report(image),
            self.maps[image].data_ptr() if self.options.panoptic_on else 0,
            self._bits(image),
            self._scratch_address + self._counts_at,
            self._scratch_address + self._sums_at,
            self.stream,
        )

    def _decide(self) -> None:
        options = self.options
        self.module.decide(
            self._work(0),
            self._report(0),
            self.scores.data_ptr(),
            self.batch,
            self.queries,
            self.topk,
            options.panoptic_on,
            options.overlap_threshold,
            self.things,
            self.stream,
        )

    def _send_report(self) -> _HostCopy:
        if self.rle:
            for i, (height, width) in enumerate(self.output_sizes):
                self.module.mask_runs(
                    self._bits(i),
                    self._work(i),
                    self._report(i),
                    self._report(0) + 4 * self.layout["runs"],
                    height,
                    width,
                    self.queries,
                    self.topk,
                    self.boundaries.data_ptr(),
                    self.capacity,
                    self.stream,
                )
        return _HostCopy(self.to_host)

    def _read_report(self, copy: _HostCopy) -> tuple[list[list[int]], Tensor]:
        """Reports (B, words) as lists, and run boundaries (capacity,) int32 on the host."""
        words = self.report.numel()
        host = copy.wait()
        needed = int(host[self.layout["runs"]])
        if needed > self.capacity:
            _RunRoom.per_image = max(_RunRoom.per_image, 2 * -(-needed // self.batch))
            report = self.report
            self._make_report(needed)
            self.report.copy_(report)
            self.report[0, self.layout["runs"]].zero_()
            host = self._send_report().wait()
        return host[:words].view(self.batch, -1).tolist(), host[words:]

    def _assemble(self, image: int, result: dict, row: list[int], boundaries: Tensor) -> None:
        if self.options.instance_on:
            result["instances"] = self._instances(image, row, boundaries)
        if self.options.panoptic_on:
            at = self.layout
            classes = row[at["segment_classes"] :][: row[at["segments"]]]
            segments = [
                {"id": i, "isthing": c in self.thing_classes, "category_id": c}
                for i, c in enumerate(classes, start=1)
            ]
            result["panoptic_seg"] = (self.maps[image], segments)

    def _instances(self, image: int, row: list[int], boundaries: Tensor) -> Instances:
        height, width = self.output_sizes[image]
        count = row[self.layout["instances"]]
        instances = Instances((height, width))
        if self.rle:
            instances.pred_masks_rle = self._rle(image, row, boundaries)
        else:
            masks = self._new(count, height, width, dtype=torch.bool)
            if count:
                self.module.expand_masks(
                    self._bits(image),
                    self._report(image),
                    count,
                    height,
                    width,
                    self.queries,
                    self.topk,
                    masks.data_ptr(),
                    self.stream,
                )
            instances.pred_masks = masks
        if self.options.boxes_from_masks:
            boxes = self._new(self.topk, 4, dtype=torch.float32)
            self.module.mask_boxes(
                self._bits(image),
                self._report(image),
                height,
                width,
                self.queries,
                self.topk,
                boxes.data_ptr(),
                self.stream,
            )
            instances.pred_boxes = Boxes(boxes[:count])
        else:
            instances.pred_boxes = Boxes(torch.zeros(count, 4))
        instances.scores = self.scores[image, :count]
        instances.pred_classes = self.labels[image, :count]
        return instances

    def _rle(self, image: int, row: list[int], boundaries: Tensor) -> RLEMasks:
        at = self.layout
        height, width = self.output_sizes[image]
        slots = row[at["instance_slots"] :][: row[at["instances"]]]
        distinct = sorted(set(slots))  # a query may stand for several classes
        starts, counts = row[at["run_starts"] :], row[at["run_counts"] :]
        texts = self.module.encode_runs(
            boundaries.data_ptr(),
            len(boundaries),
            [starts[s] for s in distinct],
            [counts[s] for s in distinct],
            height * width,
        )
        by_slot = dict(zip(distinct, texts))
        return RLEMasks({"size": [height, width], "counts": by_slot[s]} for s in slots)

    def _semantic(self, image: int, result: dict) -> None:
        size = self.output_sizes[image]
        if self.options.semantic_format == "labels":
            labels = self._new(*size, dtype=torch.int64)
            self._run_semantic(image, labels=labels)
            result["sem_seg_labels"] = labels
        else:
            scores = self._new(self.options.num_classes, *size, dtype=torch.float32)
            self._run_semantic(image, scores=scores)
            result["sem_seg"] = scores

    def _semantic_then_resize(self, image: int, result: dict) -> None:
        """The release's way for large images: scores at the image's size, resized to the output."""
        size, output_size = tuple(self.image_sizes[image]), tuple(self.output_sizes[image])
        if size == output_size:
            self._semantic(image, result)
            return
        scores = self._new(self.options.num_classes, *size, dtype=torch.float32)
        self._run_semantic(image, scores=scores)
        scores = torch.nn.functional.interpolate(
            scores[None], size=output_size, mode="bilinear", align_corners=False
        )[0]
        if self.options.semantic_format == "labels":
            result["sem_seg_labels"] = scores.argmax(0)
        else:
            result["sem_seg"] = scores

    def _run_semantic(self, image: int, scores=None, labels=None) -> None:
        self.module.semantic(
            *self._masks_of(image),
            self.geometries[image],
            self.probs.data_ptr() + 4 * image * self.probs.stride(0),
            self.queries,
            self.options.num_classes,
            0 if scores is None else scores.data_ptr(),
            0 if labels is None else labels.data_ptr(),
            self._scratch_address + self._weights_at,
            self.stream,
        )


class _HostCopy:
    """A copy to pinned memory that is under way on the current stream."""

    def __init__(self, tensor: Tensor):
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def wait(self) -> Tensor:
        self._done.synchronize()
        return self._host
