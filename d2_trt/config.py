"""Configuration keys of the TensorRT backend."""

from __future__ import annotations

from detectron2.config import CfgNode

from mask2former.config import add_missing
from mask2former.config_merge import CHECKS, explain_merges

_DEFAULTS = {
    "MODEL": {
        # What runs the network: "torch", or "tensorrt" for this plugin.
        "BACKEND": "torch",
        "TENSORRT": {
            # Arithmetic of the engine: "fp32", "tf32" (fp32 with TF32 matrix products and convolutions), "fp16", or "bf16"
            # (TensorRT 10 and later).
            "PRECISION": "fp16",
            # Modules that compute in float32 in an fp16 or bf16 engine, with all that is below them: names as in
            # model.named_modules(), with the wildcards * ? [] of fnmatch; "=name" is a module's own operations without
            # those of the modules below it. "default" stands for the built-in list, which protects accuracy: add to
            # it, ["default", "backbone.res5"], rather than replace it. What covers no module of the model is an error.
            # tools/precision_search.py finds what a model needs. Float32 here is that of "tf32": matrix products and
            # convolutions of these modules may use TF32, whose factors have fp16's precision and float32's range; only
            # PRECISION "fp32" does without. In fp32 and tf32 engines this key changes nothing; in tf32 another value is
            # another engine in the cache all the same.
            "FP32_MODULES": ["default"],
            # Padded image sizes that one engine serves, as three strings "HxW": smallest, the one to be fastest
            # at, largest. One string: that size alone. []: derived from INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST
            # and MODEL.MASK_FORMER.SIZE_DIVISIBILITY (d2_trt.options.derive_sizes).
            "SHAPES": [],
            # Batches of 1 to MAX_BATCH_SIZE images; memory grows with it. 0: TEST.BATCH_SIZE.
            "MAX_BATCH_SIZE": 0,
            # The batch size to be fastest at. 0: MAX_BATCH_SIZE.
            "OPT_BATCH_SIZE": 0,
            # One engine for every batch and padded size, built when it first comes, instead of one for the whole
            # range: faster, at the price of a build for each. SHAPES still bounds the sizes. An evaluation builds those of
            # the (up to 8) sizes that come most often before its timing starts.
            "STATIC": False,
            # Multi-scale deformable attention by: "plugin", this project's own kernel; "stock", the plugin that
            # comes with TensorRT; "native", TensorRT's own layers (slow); "auto", the first of them that is there.
            "MSDA": "auto",
            # LayerNorm and GroupNorm by: "plugin", this project's own kernels, which sum in float32, take and give 16-bit
            # tensors, and fuse the residual sum and ReLU around them, and the images' normalisation; "native", TensorRT's
            # layers; "auto", the plugin where it is built. On TensorRT 8.6 "native" may not build in fp16.
            "NORMALIZATION": "auto",
            # The transformer decoder's attention with its output projections, feed-forward layers and mask embedding, and
            # Swin's window attention: "plugin" (fp16 and bf16 engines, on GPUs of compute capability 8.0 or higher; output
            # projections and feed-forward layers from 9.0 on), "native" or "auto", as for NORMALIZATION.
            "ATTENTION": "auto",
            # Scratch memory that the engine may use, in GiB. 0.0: TensorRT's default, all of the GPU's.
            "WORKSPACE": 0.0,
            # Effort of the builder, 0 (quick build) to 5 (long build, perhaps a faster engine).
            "OPT_LEVEL": 3,
            # Keep kernel timings between builds, in CACHE.DIR: the second build takes a fraction of the first. Not at
            # OPT_LEVEL 0, where TensorRT times nothing.
            "TIMING_CACHE": True,
            "CACHE": {
                # Where engines are kept. "": $XDG_CACHE_HOME/d2_trt, else ~/.cache/d2_trt. Engines hold code for
                # the GPU: load them only from a folder that nobody you distrust can write to.
                "DIR": "",
                # "readwrite": use what is there, build and keep what is not.
                # "read": use what is there, build what is not but keep nothing; never writes to DIR.
                # "require": use what is there, raise CacheError for what is not; never builds, never writes.
                # "rebuild": build once more, and replace what is there.
                # "off": build, keep nothing, look at nothing.
                "MODE": "readwrite",
                # Engines in DIR take at most this many GB (10^9 bytes); the least recently used goes first.
                "MAX_GB": 20.0,
            },
            "VERIFY": {
                # Compare every new engine with PyTorch in float32, and refuse one that misses the figures below. A cached
                # one is compared, without a build, where it was not compared as is asked for here.
                "ENABLED": True,
                # Padded sizes of the range to compare at, the fastest, smallest and largest among them, and
                # images at each.
                "SIZES": 3,
                "IMAGES": 1,
                # 0.0: by PRECISION (d2_trt.options.VERIFY_DEFAULTS). Negative: not checked.
                # Share of mask pixels whose logits have PyTorch's sign.
                "MIN_SIGN_AGREEMENT": 0.0,
                # Share of queries whose best class is PyTorch's.
                "MIN_CLASS_AGREEMENT": 0.0,
                # Norm of the difference over the norm of PyTorch's, for class logits and for mask logits.
                "MAX_LOGIT_ERROR": 0.0,
                "MAX_MASK_ERROR": 0.0,
            },
            # Images of a padded size or number outside the engine's range: "torch" runs them in PyTorch, with one
            # warning; "raise" raises EngineShapeError.
            "ON_OUT_OF_RANGE": "torch",
            # Something is missing, or an engine cannot be built, loaded or run: "raise" says what; "torch" warns once and
            # runs PyTorch, without a GPU on the CPU.
            "ON_ERROR": "raise",
            # Replay a CUDA graph for each batch and padded size instead of launching the engine's kernels one by one:
            # captured when a size comes again, on the GPU with its images and outputs (31 MiB at 800x1088).
            "CUDA_GRAPHS": True,
            # Graphs that an engine keeps; the least recently used size goes first.
            "MAX_CUDA_GRAPHS": 8,
            # GPU memory that these may take together, in GiB: their images and outputs, and what the driver keeps for them
            # (other processes that take memory while a graph is captured count for it). 0.0: a twentieth of the GPU's.
            "CUDA_GRAPH_MEMORY": 0.0,
        },
    },
}


def add_tensorrt_config(cfg: CfgNode) -> None:
    """Add MODEL.TENSORRT.* to a detectron2 config, in place, and MODEL.BACKEND where it is missing.

    Keys that are already there keep their values, so that a second call resets nothing. Values are checked by
    TensorRTOptions.from_cfg.

    Raises:
        TypeError: a value stands where a group of keys (such as MODEL.TENSORRT) belongs.
    """
    explain_merges(cfg)
    add_missing(cfg, _DEFAULTS)


def _check(key: str, value) -> None:
    from .options import check_value

    check_value(key, value)


CHECKS["MODEL.TENSORRT"] = _check
