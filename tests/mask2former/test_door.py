"""What the compiled kernels refuse before they launch anything, by name: addresses, sizes, strides and limits.

Checks come before launches, so that these need the compiled module but no GPU: what is allowed ends in CUDA's own error
where there is none. With one, addresses are a tensor's, and what is allowed runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import timeit

import numpy as np
import pytest
import torch

from mask2former import kernels

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason=f"the kernels are not built: {kernels.BUILD_HINT}"
)

ROOM = 1 << 17  # bytes for each argument
ARGUMENTS = 16


class At(int):
    """Stands for an address: the argument's alignment in bytes, and whether it may be null."""

    def __new__(cls, alignment: int, *, optional: bool = False):
        self = super().__new__(cls, alignment)
        self.optional = optional
        return self


class Made:
    """Stands for an object of the module, which `make(module)` gives."""

    def __init__(self, make):
        self.make = make


# fmt: off
GEOMETRY = Made(lambda m: m.postprocess.Geometry((8, 8), (32, 32), (30, 32), (16, 20)))
THINGS = Made(lambda m: m.postprocess.ThingClasses([0, 1]))
MASKS = {"pred_masks": At(4), "dtype": "float32", "query_stride": 64, "geometry": GEOMETRY}
SEMANTIC = {**MASKS, "probs": At(4), "queries": 8, "classes": 4}
SIZE = {"height": 16, "width": 20}
OF_IMAGE = {"queries": 8, "topk": 5}
ATTENTION = {
    **{name: At(16) for name in ("q", "k", "v", "out")},
    "dtype": "float16", "batch": 1, "queries": 16, "keys": 16, "heads": 2, "dim": 32,
    "q_stride": 64, "k_stride": 64, "v_stride": 64, "stream": 0,
}
DEFORMABLE = {
    "value": At(16), "offsets": At(4), "logits": At(4), "out": At(16),
    "value_dtype": "float32", "sampling_dtype": "float32", "batch": 1, "heads": 1, "dim": 4, "points": 2,
    "offsets_stride": 4, "logits_stride": 2, "stream": 0,
}
MLP = {
    "x": At(16), "weights": At(16), "biases": At(16), "norm": At(16), "out": At(16),
    **{f"{name}dtype": "float16" for name in ("", "x_", "residual_", "out_", "normed_")},
    "rows": 3, "widths": [64, 64], "epsilon": 1e-5, "stream": 0,
}

# A call that is allowed for every function, some with other optional arguments. Those of `postprocess` are positional.
CALLS = {
    "postprocess.top_pairs": {
        "probs": At(4), "batch": 1, "queries": 8, "classes": 4, "topk": 5,
        "pair_scores": At(4), "pairs": At(8), "stream": 0,
    },
    "postprocess.select": {
        "probs": At(4), "pair_scores": At(4), "pairs": At(8), "batch": 1, "queries": 8, "classes": 4, "topk": 5,
        "panoptic": True, "things_only": True, "score_threshold": 0.5, "work": At(8), "report": At(4),
        "instance_scores": At(4), "instance_labels": At(8), "things": THINGS, "stream": 0,
    },
    "postprocess.mask_pass": {
        **MASKS,
        **OF_IMAGE, "work": At(8), "report": At(4), "segment_map": At(4, optional=True),
        "bits": At(4, optional=True), "partial_counts": At(4), "partial_sums": At(8), "stream": 0,
    },
    "postprocess.decide": {
        "work": At(8), "report": At(4), "instance_scores": At(4), "batch": 1, **OF_IMAGE, "panoptic": True,
        "overlap_threshold": 0.8, "things": THINGS, "stream": 0,
    },
    "postprocess.assign_ids": {"segment_map": At(4), "pixels": 320, "work": At(8), "queries": 8, "stream": 0},
    "postprocess.expand_masks": {
        "bits": At(4), "report": At(4), "instances": 2, **SIZE, **OF_IMAGE, "masks": At(16), "stream": 0
    },
    "postprocess.mask_boxes": {"bits": At(4), "report": At(4), **SIZE, **OF_IMAGE, "boxes": At(4), "stream": 0},
    "postprocess.mask_runs": {
        "bits": At(4), "work": At(8), "report": At(4), "total_runs": At(4), **SIZE, **OF_IMAGE,
        "boundaries": At(4), "capacity": 100, "stream": 0,
    },
    "postprocess.semantic": {**SEMANTIC, "scores": At(8, optional=True), "labels": 0, "weights": At(16), "stream": 0},
    "postprocess.semantic labels": {**SEMANTIC, "scores": 0, "labels": At(8, optional=True), "weights": At(16), "stream": 0},
    "preprocess.resize_bilinear": {
        "image": At(1), "size": (4, 6), "channels": 3, "reverse_channels": True, "vertical_first": False,
        "horizontal": At(4), "vertical": At(4), "scratch": At(4), "scratch_size": 3 * 4 * 4, "out": At(1),
        "out_size": (2, 3), "stream": 0,
    },
    "attention": ATTENTION,
    "attention positions": {
        **ATTENTION,
        "q_pos": At(16, optional=True), "k_pos": At(16, optional=True), "pos_stride": 64,
    },
    "attention masked": {
        **ATTENTION,
        "mask_embed": At(16), "features": At(16), "workspace": At(16), "mask_dim": 32,
    },
    "mask_product": {
        "embed": At(16), "features": At(16), "logits": At(16), "dtype": "float16", "batch": 1, "queries": 4,
        "pixels": 16, "channels": 32, "stream": 0,
    },
    "resize_mask_features": {
        "features": At(16), "out": At(16), "dtype": "float16", "batch": 1, "height": 4, "width": 4,
        "channels": 8, "out_height": 2, "out_width": 2, "stream": 0,
    },
    "mlp": {**MLP, "residual": At(16, optional=True), "normed": 0, "after": True},
    "mlp before": {**MLP, "residual": 0, "normed": At(16, optional=True), "after": False},
    "window_attention": {
        "qkv": At(16), "qkv_bias": At(4), "bias": At(4), "out": At(16), "dtype": "float16", "batch": 1,
        "height": 4, "width": 4, "heads": 1, "dim": 16, "window": 4, "shift": 0, "scale": 1.0, "stream": 0,
    },
    "ms_deform_attn": {**DEFORMABLE, "level_sizes": [(2, 2)]},
    "ms_deform_attn_device_levels": {**DEFORMABLE, "pixels": 4, "levels": 1, "level_sizes": At(4)},
    "ms_deform_attn_backward": {
        **{name: At(16) for name in ("grad", "value", "offsets", "logits")},
        **{f"grad_{name}": At(16) for name in ("value", "offsets", "logits")},
        "batch": 1, "pixels": 4, "heads": 1, "dim": 4, "points": 2, "level_sizes": [(2, 2)], "stream": 0,
    },
    "layer_norm": {
        "x": At(4), "residual": At(4, optional=True), "weight": At(4), "bias": At(4), "out": At(4),
        **{f"{name}_dtype": "float32" for name in ("x", "residual", "out", "position")},
        "rows": 4, "channels": 8, "epsilon": 1e-5, "stream": 0, "position": At(4, optional=True),
        "sum": At(4, optional=True), "position_rows": 2,
    },
    "group_norm": {
        "x": At(4), "weight": At(4), "bias": At(4), "out": At(4), "workspace": At(16),
        "x_dtype": "float32", "out_dtype": "float32", "batch": 1, "channels": 8, "pixels": 9, "groups": 2,
        "epsilon": 1e-5, "relu": False, "channels_last": False, "stream": 0,
    },
    "normalize_images": {
        "images": At(4), "mean": At(4), "std": At(4), "out": At(4), "out_dtype": "float32", "batch": 1,
        "channels": 3, "pixels": 9, "pixel_stride": 0, "stream": 0,
    },
}
# fmt: on
ADDRESSES = [
    (call, name) for call, given in CALLS.items() for name, value in given.items() if isinstance(value, At)
]


@functools.lru_cache(maxsize=1)
def memory() -> tuple[object, int]:
    """What holds the arguments' memory, zeros, and its address: a GPU's where there is one, else the host's."""
    if torch.cuda.is_available():
        tensor = torch.zeros(ROOM * ARGUMENTS, dtype=torch.uint8, device="cuda")
        return tensor, tensor.data_ptr()
    array = np.zeros(ROOM * ARGUMENTS + 256, np.uint8)
    return array, -(-array.ctypes.data // 256) * 256


def prepare(call: str, **changes):
    """The function, with the arguments of CALLS but for these."""
    name, given = call.split(" ")[0], {**CALLS[call], **changes}
    module = kernels.load()
    places = iter(range(memory()[1], memory()[1] + ROOM * ARGUMENTS, ROOM))
    arguments = {}
    for key, value in given.items():
        if isinstance(value, At):
            value = next(places)
        arguments[key] = value.make(module) if isinstance(value, Made) else value
    function = operator.attrgetter(name)(module)
    if name.startswith("postprocess."):
        return functools.partial(function, *arguments.values())
    return functools.partial(function, **arguments)


def passes(call: str, **changes) -> None:
    """Nothing refuses the arguments before the launch."""
    launch = prepare(call, **changes)
    if torch.cuda.is_available():
        memory()[0].zero_()
        launch()
        torch.cuda.synchronize()
    else:
        with pytest.raises(RuntimeError, match="cudaError"):
            launch()


@pytest.mark.parametrize("call", CALLS)
def test_allowed_arguments_reach_the_launch(call):
    passes(call)


@pytest.mark.parametrize(
    ("call", "name"), [pair for pair in ADDRESSES if not CALLS[pair[0]][pair[1]].optional]
)
def test_null_pointer_is_named(call, name):
    function = call.split(".")[-1].split(" ")[0].removesuffix("_device_levels")
    with pytest.raises(ValueError, match=f"^{function}: {name} is a null pointer"):
        prepare(call, **{name: 0})()


@pytest.mark.parametrize(("call", "name"), [pair for pair in ADDRESSES if CALLS[pair[0]][pair[1]] > 1])
def test_address_that_is_not_aligned_is_named(call, name):
    alignment = CALLS[call][name]
    for offset in (1, alignment // 2):
        with pytest.raises(ValueError, match=f": {name} is not aligned to {alignment} bytes"):
            prepare(call, **{name: memory()[1] + offset})()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        ("postprocess.mask_pass", ["segment_map"]),
        ("postprocess.mask_pass", ["bits"]),
        ("mlp", ["residual"]),
        ("mlp before", ["normed"]),
        ("layer_norm", ["residual"]),
        ("layer_norm", ["position", "sum"]),
        ("attention positions", ["q_pos"]),
        ("attention positions", ["k_pos"]),
    ],
)
def test_optional_arguments_may_be_null(call, names):
    passes(call, **dict.fromkeys(names, 0))


def test_without_instances_their_tensors_may_be_null():
    passes(
        "postprocess.select",
        topk=0,
        pair_scores=0,
        pairs=0,
        instance_scores=0,
        instance_labels=0,
    )
    passes("postprocess.decide", topk=0, instance_scores=0)
    passes("postprocess.mask_runs", capacity=0, boundaries=0)


HUGE = 1 << 40


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        ("postprocess.top_pairs", {"batch": 0}, "top_pairs: a batch of 0; expected at least 1"),
        ("postprocess.top_pairs", {"topk": 10**6}, "top_pairs: topk is 1000000; expected 1 to 32 for 8 queries"),
        ("postprocess.top_pairs", {"topk": 0}, "top_pairs: topk is 0; expected 1 to 32"),
        ("postprocess.top_pairs", {"queries": 1025}, "top_pairs: 1025 queries; expected 1 to 1024"),
        ("postprocess.select", {"batch": -1}, "select: a batch of -1; expected at least 1"),
        ("postprocess.select", {"queries": 0}, "select: 0 queries; expected 1 to 1024"),
        ("postprocess.select", {"classes": 5000}, "select: 5000 classes; expected 1 to 4096"),
        ("postprocess.select", {"topk": 33}, "select: topk is 33; expected 0 to 32 for 8 queries"),
        ("postprocess.mask_pass", {"query_stride": -5}, "mask_pass: masks are -5 elements apart; expected 0 to"),
        ("postprocess.mask_pass", {"query_stride": 1 << 41}, "mask_pass: masks are 2199023255552 elements apart"),
        ("postprocess.mask_pass", {"queries": 100000}, "mask_pass: 100000 queries; expected 1 to 1024"),
        ("postprocess.mask_pass", {"topk": -1}, "mask_pass: topk is -1; expected 0 to"),
        ("postprocess.mask_pass", {"dtype": "float64"}, "pred_masks has dtype float64; expected float32, float16"),
        ("postprocess.decide", {"queries": 100000}, "decide: 100000 queries; expected 1 to 1024"),
        ("postprocess.decide", {"topk": 10**6}, "decide: topk is 1000000; expected 0 to 32768 for 8 queries"),
        ("postprocess.decide", {"batch": 0}, "decide: a batch of 0; expected at least 1"),
        ("postprocess.assign_ids", {"pixels": 0}, "assign_ids: 0 pixels; expected 1 to 2147483519"),
        ("postprocess.assign_ids", {"pixels": HUGE}, "assign_ids: 1099511627776 pixels; expected 1 to"),
        ("postprocess.assign_ids", {"queries": -3}, "assign_ids: -3 queries; expected 1 to 1024"),
        ("postprocess.expand_masks", {"height": -8}, r"expand_masks: masks of -8x20 \(height x width\); expected at"),
        ("postprocess.expand_masks", {"instances": 6}, "expand_masks: 6 instances; expected 1 to 5"),
        (
            "postprocess.expand_masks",
            {"instances": 30000, "topk": 30000, "height": 40000, "width": 50000},
            "expand_masks: 30000 masks of 40000x50000 .* expected at most 8796093018112 pixels together",
        ),
        ("postprocess.mask_boxes", {"width": 0}, "mask_boxes: masks of 16x0"),
        ("postprocess.mask_boxes", {"topk": 0}, "mask_boxes: topk is 0; expected 1 to 32768"),
        ("postprocess.mask_boxes", {"topk": 10**6}, "mask_boxes: topk is 1000000; expected 1 to 32768"),
        ("postprocess.mask_runs", {"height": 1 << 16, "width": 1 << 16}, "mask_runs: masks of 65536x65536"),
        ("postprocess.mask_runs", {"capacity": -1}, "mask_runs: room for -1 boundaries; expected 0 to 2147483647"),
        ("postprocess.mask_runs", {"queries": 0}, "mask_runs: 0 queries"),
        ("postprocess.semantic", {"query_stride": -64}, "semantic: masks are -64 elements apart"),
        ("postprocess.semantic", {"classes": 0}, "semantic: 0 classes; expected 1 to 4096"),
        ("postprocess.semantic", {"labels": At(8)}, "semantic: scores and labels are both given; expected one"),
        ("postprocess.semantic", {"scores": 0}, "semantic: scores and labels are both null pointers; expected one"),
        ("preprocess.resize_bilinear", {"size": (0, 6)}, "resize_bilinear: size is 0x6"),
        ("preprocess.resize_bilinear", {"size": (HUGE, HUGE)}, "resize_bilinear: size is .* 1 to 16777216 each"),
        ("preprocess.resize_bilinear", {"out_size": (2, -3)}, "resize_bilinear: out_size is 2x-3"),
        ("preprocess.resize_bilinear", {"channels": 4}, "4 channels; expected 1 or 3"),
        ("preprocess.resize_bilinear", {"scratch_size": 47}, "scratch_size is 47; expected at least 48 bytes"),
        ("attention", {"heads": 0}, "attention: 0 heads; expected 1 to 256"),
        ("attention", {"k_stride": -64}, "attention: rows of k are -64 elements apart"),
        ("attention masked", {"mask_dim": 33}, "attention: mask_dim is 33; expected a multiple of 32"),
        ("mask_product", {"pixels": HUGE}, "mask_product: .* 1099511627776 pixels"),
        ("resize_mask_features", {"out_height": 0}, "resize_mask_features: results are 0x2"),
        ("mlp", {"rows": -1}, "mlp: -1 rows; expected 0 to"),
        ("mlp", {"widths": [64, 1 << 20]}, "mlp: a width of 1048576; expected 1 to 8192"),
        ("window_attention", {"shift": 4}, "window_attention: shift is 4; expected 0 to 3"),
        ("window_attention", {"height": HUGE}, "window_attention: .* expected sides of at most"),
        ("ms_deform_attn", {"level_sizes": [(-1, 1)]}, "ms_deform_attn: level 0 is -1x1"),
        ("ms_deform_attn", {"offsets_stride": -4}, "ms_deform_attn: -4 and 2 elements between"),
        ("ms_deform_attn_device_levels", {"levels": 9}, "ms_deform_attn: 9 levels; expected 1 to 8"),
        ("ms_deform_attn_backward", {"pixels": 5}, "ms_deform_attn_backward: the levels hold 4 pixels, the value 5"),
        ("layer_norm", {"channels": 0}, "layer_norm: 0 channels; expected 1 to"),
        ("layer_norm", {"position_rows": 3}, "layer_norm: 3 rows of positions for 4 rows; expected a divisor"),
        ("layer_norm", {"position": 0}, "layer_norm: a position without a sum, or a sum without a position"),
        ("group_norm", {"groups": 0}, "group_norm: 8 channels in 0 groups; expected a multiple"),
        ("normalize_images", {"pixel_stride": 5}, "normalize_images: 5 elements from pixel to pixel"),
    ],
)  # fmt: skip
def test_sizes_strides_and_limits_are_refused_with_what_is_allowed(call, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(call, **changes)()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.work_words(0), "work_words: 0 queries; expected 1 to 1024"),
        (lambda p: p.report_layout(5000, 1), "report_layout: 5000 queries"),
        (lambda p: p.report_layout(8, -1), "report_layout: topk is -1; expected 0 to"),
        (lambda p: p.semantic_weights_bytes(8, -1), "semantic_weights_bytes: -1 classes; expected 1 to 4096"),
        (lambda p: p.ThingClasses([4096]), "thing class 4096 is outside 0 to 4095"),
        (lambda p: p.Geometry((8, 8), (32, 32), (33, 32), (4, 4)), "an image of 33x32 in a padded one of 32x32"),
        (lambda p: p.Geometry((0, 8), (32, 32), (32, 32), (4, 4)), "Geometry: masks of 0x8"),
        (lambda p: p.Geometry((8, 8), (32, 32), (32, -1), (4, 4)), "Geometry: an image of 32x-1"),
        (lambda p: p.Geometry((8, 8), (32, 32), (32, 32), (1 << 16, 1 << 16)), "Geometry: an output of 65536x65536"),
    ],
)  # fmt: skip
def test_objects_and_sizes_of_scratch_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call(kernels.load().postprocess)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 6, [0], [5], 100), "encode_runs: boundaries is a null pointer"),
        ((0, 0, [0], [5], 100), "5 boundaries from place 0 on; expected them within the 0 that there are"),
        (
            ("here", 6, [2], [5], 100),
            "5 boundaries from place 2 on; expected them within the 6 that there are",
        ),
        (("here", 6, [-1], [2], 100), "2 boundaries from place -1 on"),
        (("here", 6, [7], [0], 100), "0 boundaries from place 7 on"),
        (("here", 6, [1], [-1], 100), "-1 boundaries from place 1 on"),
        (("here", 6, [1 << 62], [1 << 62], 100), "within the 6 that there are"),
        (("odd", 6, [0], [1], 100), "encode_runs: boundaries is not aligned to 4 bytes"),
        (("here", 6, [0, 1], [1], 100), "2 starts and 1 counts of boundaries; expected as many"),
        (("here", 6, [0], [1], 0), "encode_runs: 0 pixels; expected 1 to"),
    ],
)
def test_coder_of_runs_reads_nothing_that_is_not_there(arguments, message):
    boundaries = (ctypes.c_int32 * 6)(1, 2, 3, 4, 5, 6)
    places = {"here": ctypes.addressof(boundaries), "odd": ctypes.addressof(boundaries) + 1}
    first, *rest = arguments
    with pytest.raises(ValueError, match=message):
        kernels.load().postprocess.encode_runs(places.get(first, first), *rest)


def test_coder_of_runs_takes_masks_without_runs():
    encode = kernels.load().postprocess.encode_runs
    assert encode(0, 0, [], [], 100) == []
    assert encode(0, 0, [0], [0], 100) == [b"T3"]  # a hundred zeros: 4 + 32, then 3


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "name"), ADDRESSES)
def test_memory_of_the_host_is_refused_by_name(call, name):
    host = np.zeros(512, np.uint8)
    pageable = -(-host.ctypes.data // 256) * 256
    pinned = torch.zeros(256, dtype=torch.uint8, pin_memory=True)
    for wrong in (pageable, pinned.data_ptr()):
        with pytest.raises(
            ValueError, match=f": {name} is an address in host memory; expected memory of CUDA device 0"
        ):
            prepare(call, **{name: wrong})()
    passes(call)  # nothing is left of it


@pytest.mark.gpu
def test_memory_of_another_gpu_is_refused_by_name():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = torch.zeros(256, dtype=torch.uint8, device="cuda:1")
    message = "layer_norm: bias is an address in memory of CUDA device 1; expected memory of CUDA device 0"
    with pytest.raises(ValueError, match=message):
        prepare("layer_norm", bias=there.data_ptr())()


@pytest.mark.gpu
def test_addresses_are_checked_while_a_graph_is_recorded():
    call = prepare("postprocess.assign_ids", stream=0)
    call()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        prepare("postprocess.assign_ids", stream=stream.cuda_stream)()
    graph.replay()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_asking_where_an_address_points_takes_less_than_a_microsecond():
    # Refused for its rows, after the addresses were looked up; null pointers are not.
    addresses = [name for name, value in CALLS["layer_norm"].items() if isinstance(value, At)]

    def seconds(call) -> float:
        def refused():
            with contextlib.suppress(ValueError):
                call()

        with pytest.raises(ValueError, match="-1 rows"):
            call()
        return min(timeit.repeat(refused, number=1000, repeat=20)) / 1000

    asked = seconds(prepare("layer_norm", rows=-1))
    unasked = seconds(prepare("layer_norm", rows=-1, **dict.fromkeys(addresses, 0)))
    of_one = (asked - unasked) / len(addresses) * 1e6
    print(f"{of_one:.3f} us for each address")
    assert of_one < 1.0
