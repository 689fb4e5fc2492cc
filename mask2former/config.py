"""Configuration keys of Mask2Former, under the official release's names and defaults."""

import copy
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .config_merge import CHECKS, explain_merges

_DEFAULTS = {
    "INPUT": {
        # train_net.py's mapper: mask_former_{semantic,instance,panoptic} or coco_{instance,panoptic}_lsj.
        "DATASET_MAPPER_NAME": "mask_former_semantic",
        "COLOR_AUG_SSD": False,
        # A random crop is drawn again while one category covers more than this share of it. 1.0: never again.
        "CROP": {"SINGLE_CATEGORY_MAX_AREA": 1.0},
        # Training images and labels are padded to a square of this side by the mapper; -1: not padded.
        # Not what inference pads to, which is MODEL.MASK_FORMER.SIZE_DIVISIBILITY.
        "SIZE_DIVISIBILITY": -1,
        # Large-scale jitter of the coco_*_lsj mappers: side of the square, and the range of the random scale.
        "IMAGE_SIZE": 1024,
        "MIN_SCALE": 0.1,
        "MAX_SCALE": 2.0,
    },
    "SOLVER": {
        "OPTIMIZER": "ADAMW",
        # Weight decay of nn.Embedding parameters (queries, level embeddings).
        "WEIGHT_DECAY_EMBED": 0.0,
        # The backbone's learning rate is SOLVER.BASE_LR times this.
        "BACKBONE_MULTIPLIER": 0.1,
    },
    "TEST": {
        # Images per batch of evaluation, per process.
        "BATCH_SIZE": 1,
        # Images of one padded size follow each other, the largest first, where the records tell sizes: batches are padded
        # less, and engines need not change their shape for each. False: in the data set's order. Predictions of a batch of
        # one do not depend on it.
        "GROUP_BY_SIZE": True,
        # Threads of a process that compare results with the truth while the model has the next images. 0: none, each
        # image is compared before the next; -1: its share of the CPUs, at most 8. The figures do not depend on it.
        # Also how many processes compute AP afterwards, at most; there -1 are all CPUs: a job's other processes wait.
        "EVALUATION_THREADS": -1,
    },
    "MODEL": {
        # What runs the network, by its name in mask2former.BACKEND_REGISTRY.
        "BACKEND": "torch",
        "MASK_FORMER": {
            "TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
            # "multi_scale_pixel_decoder", "transformer_encoder", "pixel_embedding" or a backbone feature.
            "TRANSFORMER_IN_FEATURE": "res5",
            "HIDDEN_DIM": 256,
            "NUM_OBJECT_QUERIES": 100,
            "NHEADS": 8,
            "DIM_FEEDFORWARD": 2048,
            "DROPOUT": 0.1,
            "ENC_LAYERS": 0,
            # With deep supervision this counts the prediction from the learned queries too: 10 is 9 layers.
            "DEC_LAYERS": 6,
            "PRE_NORM": False,
            # A 1x1 convolution before the decoder even where channels already equal HIDDEN_DIM.
            "ENFORCE_INPUT_PROJ": False,
            # Images are padded to a multiple of this. Wins over the backbone's own, which ResNet leaves at 0.
            "SIZE_DIVISIBILITY": 32,
            # Loss weights; NO_OBJECT_WEIGHT is the class weight of "no object" in the cross entropy.
            "DEEP_SUPERVISION": True,
            "NO_OBJECT_WEIGHT": 0.1,
            "CLASS_WEIGHT": 1.0,
            "DICE_WEIGHT": 1.0,
            "MASK_WEIGHT": 20.0,
            # Mask losses are taken at TRAIN_NUM_POINTS points: OVERSAMPLE_RATIO times as many are drawn, the
            # least certain make up IMPORTANCE_SAMPLE_RATIO of those kept, the others are uniform (PointRend).
            "TRAIN_NUM_POINTS": 112 * 112,
            "OVERSAMPLE_RATIO": 3.0,
            "IMPORTANCE_SAMPLE_RATIO": 0.75,
            "TEST": {
                "SEMANTIC_ON": True,
                "INSTANCE_ON": False,
                "PANOPTIC_ON": False,
                # Panoptic: a query below this class score is dropped, and so is a segment of which less than
                # OVERLAP_THRESHOLD stays visible.
                "OBJECT_MASK_THRESHOLD": 0.0,
                "OVERLAP_THRESHOLD": 0.0,
                # Resize the mask logits to the output before semantic inference (exact, more memory), or
                # the class scores after it. Instance and panoptic inference always resize first.
                "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
                # Instances.pred_boxes: zeros as in the release (False), or the masks' tight boxes (True).
                "BOXES_FROM_MASKS": False,
                # Instances.pred_masks, bool ("bitmask"), or pred_masks_rle, COCO's run lengths ("rle").
                # "auto": bitmask, but rle in tools/train_net.py's evaluation where the evaluators read it.
                "INSTANCE_FORMAT": "auto",
                # "sem_seg", a score for every class ("scores"), or "sem_seg_labels", the best class
                # alone ("labels"). "auto": scores, but labels in tools/train_net.py's evaluation.
                "SEMANTIC_FORMAT": "auto",
            },
        },
        "SEM_SEG_HEAD": {
            "PIXEL_DECODER_NAME": "BasePixelDecoder",
            # Channels of the mask features.
            "MASK_DIM": 256,
            "TRANSFORMER_ENC_LAYERS": 0,
            "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
            "DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": 4,
            "DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": 8,
        },
        "SWIN": {
            # Side of the pre-training images. Only absolute position embeddings (APE) depend on it.
            "PRETRAIN_IMG_SIZE": 224,
            "PATCH_SIZE": 4,
            "EMBED_DIM": 96,
            "DEPTHS": [2, 2, 6, 2],
            "NUM_HEADS": [3, 6, 12, 24],
            "WINDOW_SIZE": 7,
            "MLP_RATIO": 4.0,
            "QKV_BIAS": True,
            # None: head dimension ** -0.5.
            "QK_SCALE": None,
            "DROP_RATE": 0.0,
            "ATTN_DROP_RATE": 0.0,
            "DROP_PATH_RATE": 0.3,
            "APE": False,
            "PATCH_NORM": True,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            # Recompute blocks in the backward pass to save memory.
            "USE_CHECKPOINT": False,
        },
    },
}


def add_maskformer2_config(cfg: CfgNode) -> None:
    """Add the keys of Mask2Former to a detectron2 config, in place.

    Keys that are already there keep their values, so a second call, or one after other projects added
    some of the same keys, resets nothing. From then on merges say what is allowed where they fail, and take 4 for 4.0:
    see ExplainingCfgNode.

    Raises:
        TypeError: a value stands where a group of keys (such as MODEL.SWIN) belongs.

    Names and defaults: the official release. Ours: MODEL.BACKEND, TEST.BATCH_SIZE, TEST.GROUP_BY_SIZE,
    TEST.EVALUATION_THREADS and, below MODEL.MASK_FORMER.TEST, BOXES_FROM_MASKS, INSTANCE_FORMAT and SEMANTIC_FORMAT.
    """
    explain_merges(cfg)
    add_missing(cfg, _DEFAULTS)


def _check_backend(key: str, value) -> None:
    from .backend import BACKEND_REGISTRY

    if key == "MODEL.BACKEND" and not isinstance(value, str):
        known = ", ".join(repr(name) for name, _ in BACKEND_REGISTRY)
        raise ValueError(f"MODEL.BACKEND is {value!r}; allowed: {known}.")


CHECKS["MODEL.BACKEND"] = _check_backend


def add_missing(node: CfgNode, defaults: Mapping, prefix: str = "") -> None:
    """Add the keys of nested defaults that a config lacks; TypeError where a value stands in place of a group."""
    for key, value in defaults.items():
        if not isinstance(value, Mapping):
            if key not in node:
                node[key] = copy.deepcopy(value)  # lists must not be shared between configs
            continue
        if key not in node:
            node[key] = CfgNode()
        elif not isinstance(node[key], CfgNode):
            raise TypeError(f"{prefix}{key} is {node[key]!r}, but it must be a group of keys (a CfgNode).")
        add_missing(node[key], value, prefix=f"{prefix}{key}.")


# Called by get_mask2former_cfg: functions that add a plugin's keys to a config, in place. A plugin appends its own when
# it is imported, so that the tools know its keys as they know its backend.
EXTENSIONS: list[Callable[[CfgNode], None]] = []


def get_mask2former_cfg(config_file: str | os.PathLike | None = None, opts: Sequence = ()) -> CfgNode:
    """detectron2's defaults plus the DeepLab, Mask2Former and imported plugins' keys, then a file, then overrides.

    Args:
        config_file: YAML of this project or of the official release; None for the defaults alone.
            A file with python tags, as the release's, is read by yaml's unsafe loader: merge only files you
            trust.
        opts: KEY, VALUE, KEY, VALUE, ... as on a command line.

    Raises:
        FileNotFoundError: no such file; names near matches under configs/.
        KeyError: a key that no config defines, with the file or override it came from.
        ValueError: a value of the wrong type, likewise; or a key in opts that has no value.
    """
    # Here rather than on top: add_maskformer2_config must not need detectron2's projects.
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    for add_keys in EXTENSIONS:
        add_keys(cfg)
    if config_file is not None:
        config_file = os.fspath(config_file)
        if not PathManager.isfile(config_file):
            raise FileNotFoundError(_missing_file_message(config_file))
        _merge(cfg.merge_from_file, config_file, f"config file {config_file} (with its _BASE_ files)")
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(
            f"Overrides are KEY VALUE pairs, but {len(opts)} words were given: {' '.join(map(str, opts))}"
        )
    _merge(cfg.merge_from_list, opts, f"overrides {' '.join(map(str, opts))}")
    return cfg


def _merge(merge, source, what: str) -> None:
    try:
        merge(source)
    except (KeyError, ValueError, AssertionError) as error:
        # They say which key but not where it was read.
        message = str(error.args[0]) if error.args else type(error).__name__
        kind = KeyError if isinstance(error, KeyError) else ValueError
        raise kind(f"{message.removesuffix('.')} -- in {what}") from error


def _missing_file_message(config_file: str) -> str:
    message = f"Config file '{config_file}' does not exist."
    found = {}
    for root in dict.fromkeys([Path("configs"), Path(__file__).resolve().parents[1] / "configs"]):
        for path in sorted(root.rglob("*.yaml")):
            found.setdefault(path.relative_to(root).as_posix(), path)
    wanted = Path(config_file).as_posix().rpartition("configs/")[2]
    # The same file name in another folder first: it is the usual slip.
    same = [name for name in found if Path(name).name == Path(wanted).name]
    near = difflib.get_close_matches(wanted, same, n=5, cutoff=0.0)
    near += [name for name in difflib.get_close_matches(wanted, found, n=5, cutoff=0.5) if name not in near]
    if near:
        message += " Did you mean one of these?" + "".join(f"\n  {found[name]}" for name in near[:5])
    elif found:
        message += (
            " Configs are under " + ", ".join(sorted({str(Path(p).parent) for p in found.values()})) + "."
        )
    else:
        message += " No configs/ folder was found either: pass a path to a YAML file."
    return message
