"""MODEL.TENSORRT.* of a config, and the range of shapes that follows from it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from d2_trt.config import add_tensorrt_config
from d2_trt.errors import D2TRTError, EngineShapeError, OptionsError
from d2_trt.options import VERIFY_DEFAULTS, CacheOptions, TensorRTOptions, default_cache_dir
from d2_trt.shape_range import ShapeRange
from mask2former.config import add_maskformer2_config, get_mask2former_cfg

RANGE = ShapeRange((1, 256, 256), (1, 800, 1088), (1, 1344, 1344))


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    add_tensorrt_config(cfg)
    return cfg


def set_key(cfg, key: str, value) -> None:
    """Past yacs' own check of types, as code may."""
    *groups, name = key.split(".")
    for group in groups:
        cfg = cfg[group]
    cfg[name] = value


def options(cfg, **changes) -> TensorRTOptions:
    for key, value in changes.items():
        set_key(cfg, "MODEL.TENSORRT." + key.replace("__", "."), value)
    return TensorRTOptions.from_cfg(cfg)


# add_tensorrt_config


def test_second_call_keeps_what_was_set(cfg):
    cfg.MODEL.BACKEND = "tensorrt"
    cfg.MODEL.TENSORRT.CACHE.MAX_GB = 5.0
    cfg.MODEL.TENSORRT.PRECISION = "fp32"
    del cfg.MODEL.TENSORRT["STATIC"]
    add_tensorrt_config(cfg)
    add_maskformer2_config(cfg)
    assert cfg.MODEL.BACKEND == "tensorrt"
    assert (cfg.MODEL.TENSORRT.CACHE.MAX_GB, cfg.MODEL.TENSORRT.PRECISION) == (5.0, "fp32")
    assert cfg.MODEL.TENSORRT.STATIC is False


def test_backend_is_added_without_mask2former():
    cfg = get_cfg()
    add_tensorrt_config(cfg)
    assert cfg.MODEL.BACKEND == "torch"


def test_configs_share_no_list(cfg):
    other = get_cfg()
    add_tensorrt_config(other)
    cfg.MODEL.TENSORRT.FP32_MODULES.append("backbone")
    assert other.MODEL.TENSORRT.FP32_MODULES == ["default"]


def test_value_in_the_place_of_a_group_is_told(cfg):
    cfg.MODEL.TENSORRT = "fp16"
    with pytest.raises(TypeError, match=r"MODEL\.TENSORRT is 'fp16'"):
        add_tensorrt_config(cfg)


def test_overrides_of_a_command_line(cfg):
    overrides = {
        "PRECISION": "fp32",
        "SHAPES": "['256x256','512x512','768x1024']",
        "FP32_MODULES": "('default','backbone')",
        "WORKSPACE": "4.0",
        "CACHE.MODE": "read",
        "VERIFY.MIN_SIGN_AGREEMENT": "-1.0",
    }
    cfg.merge_from_list([word for k, v in overrides.items() for word in (f"MODEL.TENSORRT.{k}", v)])
    read = TensorRTOptions.from_cfg(cfg)
    assert read.precision == "fp32"
    assert read.shapes.max == (1, 768, 1024)
    assert read.fp32_modules == ("default", "backbone")
    assert read.workspace_bytes == 4 * 2**30
    assert read.cache.mode == "read"
    assert read.verify.min_sign_agreement is None


def test_every_key_is_documented_where_it_is_defined():
    lines = (Path(__file__).resolve().parents[2] / "d2_trt" / "config.py").read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.fullmatch(r' +"[A-Z0-9_]+": [^{]+,', line)]
    assert len(keys) > 20
    undocumented = []
    for i in keys:
        above = lines[i - 1].strip()
        # Keys of a kind, such as the two error limits, share the comment above the first.
        if not above.startswith("#") and i - 1 not in keys:
            undocumented.append(lines[i].strip())
    assert undocumented == []


# Defaults


def test_defaults(cfg, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert TensorRTOptions.from_cfg(cfg) == TensorRTOptions(
        shapes=RANGE,
        cache=CacheOptions(dir="/caches/d2_trt", mode="readwrite", max_gb=20.0),
        verify=TensorRTOptions.from_cfg(cfg).verify,
        precision="fp16",
        fp32_modules=("default",),
        static=False,
        msda="auto",
        normalization="auto",
        attention="auto",
        workspace=0.0,
        opt_level=3,
        timing_cache=True,
        on_out_of_range="torch",
        on_error="raise",
        cuda_graphs=True,
        max_cuda_graphs=8,
        cuda_graph_memory=0.0,
    )


def test_options_are_frozen(cfg):
    read = TensorRTOptions.from_cfg(cfg)
    for target, name in (
        (read, "precision"),
        (read.cache, "dir"),
        (read.verify, "sizes"),
        (read.shapes, "min"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, None)
    cfg.MODEL.TENSORRT.FP32_MODULES.append("backbone")
    assert read.fp32_modules == ("default",)


@pytest.mark.parametrize("precision", VERIFY_DEFAULTS)
def test_verify_limits_by_precision(cfg, precision):
    verify = options(cfg, PRECISION=precision).verify
    exact = precision == "fp32"
    assert verify.min_sign_agreement == (0.999 if exact else 0.995)
    assert verify.min_class_agreement == 0.99
    assert verify.max_logit_error == verify.max_mask_error == (2e-3 if exact else None)


def test_verify_limits_given(cfg):
    verify = options(
        cfg, VERIFY__MIN_SIGN_AGREEMENT=0.9, VERIFY__MAX_LOGIT_ERROR=5, VERIFY__MIN_CLASS_AGREEMENT=-1.0
    ).verify
    assert (verify.min_sign_agreement, verify.max_logit_error) == (0.9, 5.0)
    assert verify.min_class_agreement is verify.max_mask_error is None


def test_cache_folder(cfg, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert default_cache_dir() == f"{tmp_path}/.cache/d2_trt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert options(cfg).cache.dir == f"{tmp_path}/.cache/d2_trt"
    assert options(cfg, CACHE__DIR="~/engines").cache.dir == f"{tmp_path}/engines"
    monkeypatch.chdir(tmp_path)
    assert options(cfg, CACHE__DIR="engines").cache.dir == f"{tmp_path}/engines"
    assert options(cfg, CACHE__DIR=tmp_path / "x").cache.dir == f"{tmp_path}/x"


def test_no_home_folder_names_the_key(cfg, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OptionsError, match=r"MODEL\.TENSORRT\.CACHE\.DIR is ''"):
        options(cfg)


@pytest.mark.parametrize("mode", ["readwrite", "read", "require", "rebuild", "off"])
def test_modes_that_write(cfg, mode):
    assert options(cfg, CACHE__MODE=mode).cache.writable == (mode in ("readwrite", "rebuild"))


def test_size_limits(cfg):
    assert options(cfg, CACHE__MAX_GB=1.5).cache.max_bytes == 1.5e9
    assert options(cfg, CACHE__MAX_GB=math.inf).cache.max_bytes == math.inf
    assert options(cfg, WORKSPACE=2).workspace_bytes == 2**31
    assert options(cfg, CUDA_GRAPH_MEMORY=0.5).cuda_graph_bytes == 2**29
    # Not 0, which stands for a default.
    assert options(cfg, CUDA_GRAPH_MEMORY=1e-12).cuda_graph_bytes == 1


# Errors

T_ = "MODEL.TENSORRT."
WRONG = [
    (T_ + "PRECISION", "fp8", "'fp32', 'tf32', 'fp16', 'bf16'"),
    (T_ + "PRECISION", "FP16", "'fp32', 'tf32', 'fp16', 'bf16'"),
    (T_ + "PRECISION", None, "'fp32', 'tf32', 'fp16', 'bf16'"),
    (T_ + "MSDA", "grid_sample", "'auto', 'plugin', 'stock', 'native'"),
    (T_ + "NORMALIZATION", "stock", "'auto', 'plugin', 'native'"),
    (T_ + "ATTENTION", True, "'auto', 'plugin', 'native'"),
    (T_ + "ON_ERROR", "ignore", "'raise', 'torch'"),
    (T_ + "ON_OUT_OF_RANGE", True, "'torch', 'raise'"),
    (T_ + "STATIC", 1, "True or False"),
    (T_ + "TIMING_CACHE", "yes", "True or False"),
    (T_ + "CUDA_GRAPHS", 0, "True or False"),
    (T_ + "MAX_CUDA_GRAPHS", 0, "a whole number of at least 1"),
    (T_ + "CUDA_GRAPH_MEMORY", -0.5, "a number of at least 0"),
    (T_ + "CUDA_GRAPH_MEMORY", math.inf, "a number of at least 0"),
    (T_ + "VERIFY.ENABLED", None, "True or False"),
    (T_ + "MAX_BATCH_SIZE", -1, "a whole number of at least 0 (0 stands for TEST.BATCH_SIZE)"),
    (T_ + "MAX_BATCH_SIZE", 2.0, "a whole number of at least 0"),
    (T_ + "MAX_BATCH_SIZE", True, "a whole number of at least 0"),
    (T_ + "OPT_BATCH_SIZE", 2, "from 0 to 1 (at most MAX_BATCH_SIZE"),
    (T_ + "OPT_LEVEL", 6, "a whole number from 0 to 5"),
    (T_ + "OPT_LEVEL", -1, "a whole number from 0 to 5"),
    (T_ + "WORKSPACE", -1.0, "a number of at least 0"),
    (T_ + "WORKSPACE", math.nan, "a number of at least 0"),
    (T_ + "WORKSPACE", "4G", "a number of at least 0"),
    (T_ + "CACHE.MAX_GB", 0.0, "a number above 0, .inf for no limit"),
    (T_ + "CACHE.MODE", "write", "'readwrite', 'read', 'require', 'rebuild', 'off'"),
    (T_ + "CACHE.DIR", 3, "a path, or ''"),
    (T_ + "CACHE", "off", "a group of the keys DIR, MODE, MAX_GB"),
    (T_ + "FP32_MODULES", "default", "a list of module names or patterns"),
    (T_ + "FP32_MODULES", ["default", ""], "a list of module names or patterns"),
    (T_ + "FP32_MODULES", [3], "a list of module names or patterns"),
    (T_ + "VERIFY.SIZES", 0, "a whole number of at least 1"),
    (T_ + "VERIFY.IMAGES", 0, "a whole number of at least 1"),
    (
        T_ + "VERIFY.MIN_SIGN_AGREEMENT",
        99.0,
        "up to 1.0, 0.0 for the precision's own limit, or a negative one",
    ),
    (T_ + "VERIFY.MAX_MASK_ERROR", math.inf, "above 0.0, 0.0 for the precision's own limit"),
    (T_ + "VERIFY.MAX_LOGIT_ERROR", True, "above 0.0, 0.0 for the precision's own limit"),
    (T_ + "SHAPES", "800x1088", "[], one 'HxW', or three"),
    (T_ + "SHAPES", ["256x256", "1344x1344"], "[], one 'HxW', or three"),
    (T_ + "SHAPES", ["800"], "[], one 'HxW', or three"),
    (T_ + "SHAPES", [(800, 1088)], "[], one 'HxW', or three"),
    (T_ + "SHAPES", None, "[], one 'HxW', or three"),
    (
        T_ + "SHAPES",
        ["512x512", "256x256", "512x512"],
        "no height and no width smaller than the one before it",
    ),
    (
        T_ + "SHAPES",
        ["256x512", "512x256", "512x512"],
        "no height and no width smaller than the one before it",
    ),
    ("INPUT.MIN_SIZE_TEST", 0, "at least 1, or give MODEL.TENSORRT.SHAPES"),
    ("INPUT.MIN_SIZE_TEST", (640, 0), "at least 1, or give MODEL.TENSORRT.SHAPES"),
    (
        "INPUT.MIN_SIZE_TEST",
        (),
        "a whole number of pixels of at least 1, or several, or give MODEL.TENSORRT.SHAPES",
    ),
    ("INPUT.MIN_SIZE_TEST", "800", "a whole number of pixels of at least 1, or several, or give"),
    ("INPUT.MAX_SIZE_TEST", 0, "from 1 to 8192, or give MODEL.TENSORRT.SHAPES"),
    ("INPUT.MAX_SIZE_TEST", 2**63 - 1, "from 1 to 8192, or give MODEL.TENSORRT.SHAPES"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG, ids=[f"{k}={v!r}" for k, v, _ in WRONG])
def test_error_names_key_value_and_what_is_allowed(cfg, key, value, allowed):
    set_key(cfg, key, value)
    with pytest.raises(OptionsError) as error:
        TensorRTOptions.from_cfg(cfg)
    message = str(error.value)
    assert message.startswith(f"{key} is {value!r}")
    assert allowed in message
    assert isinstance(error.value, (ValueError, D2TRTError))


def test_misspelt_key_is_told(cfg):
    with pytest.raises(
        OptionsError, match=r"MODEL\.TENSORRT\.PRECISON is no option .*'fp32'.*did you mean PRECISION"
    ):
        options(cfg, PRECISON="fp32")
    del cfg.MODEL.TENSORRT["PRECISON"]
    with pytest.raises(
        OptionsError, match=r"MODEL\.TENSORRT\.CACHE\.FOLDER is no option .*allowed: DIR, MAX_GB, MODE"
    ):
        options(cfg, CACHE__FOLDER="x")


MERGES = [
    (
        "PRECISON",
        "fp32",
        "PRECISON is no option of the TensorRT backend (its value is 'fp32'); did you mean PRECISION?",
    ),
    (
        "CACHE.PATH",
        "x",
        "CACHE.PATH is no option of the TensorRT backend (its value is 'x'); allowed: DIR, MAX_GB, MODE",
    ),
    (
        "VERFY.SIZES",
        "3",
        "VERFY is no option of the TensorRT backend (its value is {'SIZES': 3}); did you mean VERIFY?",
    ),
    ("STATIC", "1", "STATIC is 1; allowed: True or False"),
    ("SHAPES", "800x1088", "SHAPES is '800x1088'; allowed: [], one 'HxW', or three"),
    ("WORKSPACE", "4G", "WORKSPACE is '4G'; allowed: a number of at least 0"),
    ("PRECISION", "16", "PRECISION is 16; allowed: 'fp32', 'tf32', 'fp16', 'bf16'"),
    ("OPT_LEVEL", "3.0", "OPT_LEVEL is 3.0; allowed: a whole number from 0 to 5"),
    ("FP32_MODULES", "backbone", "FP32_MODULES is 'backbone'; allowed: a list of module names or patterns"),
    ("CACHE", "0", "CACHE is 0; allowed: a group of the keys DIR, MODE, MAX_GB"),
    ("CACHE.DIR", "7", "CACHE.DIR is 7; allowed: a path, or ''"),
]


@pytest.mark.parametrize("way", ["plain list", "plain file", "helper"])
@pytest.mark.parametrize(("key", "word", "message"), MERGES, ids=[f"{k}={w}" for k, w, _ in MERGES])
def test_merge_of_a_wrong_key_or_type_says_what_is_allowed(cfg, tmp_path, way, key, word, message):
    full = T_ + key
    with pytest.raises((KeyError, ValueError)) as error:
        if way == "helper":
            get_mask2former_cfg(None, [full, word])
        elif way == "plain list":
            cfg.merge_from_list([full, word])
        else:
            *groups, name = full.split(".")
            text = "".join(f"{'  ' * i}{group}:\n" for i, group in enumerate(groups))
            (tmp_path / "file.yaml").write_text(f"{text}{'  ' * len(groups)}{name}: {word}\nVERSION: 2\n")
            cfg.merge_from_file(str(tmp_path / "file.yaml"))
    assert error.value.args[0].startswith(T_ + message)


def test_numbers_without_a_decimal_point_are_taken(cfg, tmp_path):
    cfg.merge_from_list([T_ + "WORKSPACE", "4", T_ + "CACHE.MAX_GB", ".inf", T_ + "STATIC", "true"])
    read = TensorRTOptions.from_cfg(cfg)
    assert (read.workspace_bytes, read.cache.max_bytes, read.static) == (4 * 2**30, math.inf, True)
    (tmp_path / "file.yaml").write_text("MODEL:\n  TENSORRT:\n    WORKSPACE: 2\nVERSION: 2\n")
    cfg.merge_from_file(str(tmp_path / "file.yaml"))
    assert TensorRTOptions.from_cfg(cfg).workspace_bytes == 2 * 2**30


def test_merges_explain_without_mask2formers_keys():
    cfg = get_cfg()
    add_tensorrt_config(cfg)
    with pytest.raises(ValueError, match="STATIC is 1; allowed: True or False"):
        cfg.merge_from_list([T_ + "STATIC", 1])


def test_missing_keys_say_what_adds_them(cfg):
    with pytest.raises(OptionsError, match="add_tensorrt_config"):
        TensorRTOptions.from_cfg(get_cfg())
    del cfg.MODEL.TENSORRT["MSDA"]
    with pytest.raises(
        OptionsError, match=r"MODEL\.TENSORRT\.MSDA is missing: call d2_trt\.add_tensorrt_config"
    ):
        TensorRTOptions.from_cfg(cfg)
    plain = get_cfg()
    add_tensorrt_config(plain)
    with pytest.raises(OptionsError, match="add_maskformer2_config"):
        TensorRTOptions.from_cfg(plain)
    assert TensorRTOptions.from_cfg(plain, size_divisibility=32).shapes == RANGE


# Shapes


def test_three_shapes_and_batches(cfg):
    read = options(cfg, SHAPES=["256x320", " 800 X 1088", "1344x1344"], MAX_BATCH_SIZE=4)
    assert read.shapes == ShapeRange((1, 256, 320), (4, 800, 1088), (4, 1344, 1344))
    assert options(cfg, OPT_BATCH_SIZE=2).shapes.opt == (2, 800, 1088)


def test_largest_batch_follows_the_evaluation_unless_it_is_given(cfg):
    cfg.TEST.BATCH_SIZE = 4
    assert (options(cfg).shapes.opt[0], options(cfg).shapes.max[0]) == (4, 4)
    assert options(cfg, MAX_BATCH_SIZE=2).shapes.max[0] == 2
    cfg.TEST.BATCH_SIZE = 0
    assert options(cfg).shapes.max[0] == 2  # not asked for
    with pytest.raises(OptionsError, match=r"TEST\.BATCH_SIZE is 0; allowed: a whole number of at least 1"):
        options(cfg, MAX_BATCH_SIZE=0)


def test_one_shape_is_static(cfg):
    read = options(cfg, SHAPES=("512x1024",))
    assert read.shapes == ShapeRange.fixed(1, 512, 1024)
    assert read.shapes.is_static


@pytest.mark.parametrize(
    ("given", "advice"), [("800x1067", "'800x1088'"), ("0x32", "'32x32'"), ("1000x1000", "'1024x1024'")]
)
def test_shape_that_padding_cannot_give_is_rounded_in_the_error(cfg, given, advice):
    with pytest.raises(OptionsError) as error:
        options(cfg, SHAPES=[given])
    message = str(error.value)
    assert message.startswith(f"MODEL.TENSORRT.SHAPES has '{given}'; allowed: ")
    assert "multiples of 32" in message
    assert advice in message


def test_divisibility_of_the_model_wins(cfg):
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = -1
    cfg.MODEL.TENSORRT.SHAPES = ["64x96"]
    assert TensorRTOptions.from_cfg(cfg, size_divisibility=32).shapes.max == (1, 64, 96)
    with pytest.raises(OptionsError, match="multiples of 64"):
        TensorRTOptions.from_cfg(cfg, size_divisibility=64)
    cfg.MODEL.TENSORRT.SHAPES = ["33x35"]  # the backbone's own divisibility, not known: anything goes
    assert TensorRTOptions.from_cfg(cfg).shapes.max == (1, 33, 35)


# The configs' settings, and odd ones.
@pytest.mark.parametrize(
    ("min_size", "max_size", "smallest", "usual", "largest"),
    [
        (800, 1333, 256, (800, 1088), 1344),  # COCO
        (640, 2560, 512, (640, 864), 2560),  # ADE20K
        (512, 2048, 384, (512, 704), 2048),
        (1024, 2048, 384, (1024, 1376), 2048),  # Cityscapes
        (2048, 2048, 384, (1536, 2048), 2048),  # Mapillary Vistas
        (320, 512, 96, (320, 448), 512),  # shapes
        (64, 1333, 64, (64, 96), 320),
        (800, 600, 96, (480, 608), 608),
        (20, 30, 32, (32, 32), 32),
    ],
)
def test_derived_sizes(cfg, min_size, max_size, smallest, usual, largest):
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = min_size, max_size
    shapes = TensorRTOptions.from_cfg(cfg).shapes
    assert shapes == ShapeRange((1, smallest, smallest), (1, *usual), (1, largest, largest))


def test_several_sizes_span_one_range(cfg):
    cfg.INPUT.MIN_SIZE_TEST = (400, 640, 800)
    shapes = TensorRTOptions.from_cfg(cfg).shapes
    assert shapes == RANGE
    cfg.INPUT.MIN_SIZE_TEST = [100, 800]
    assert TensorRTOptions.from_cfg(cfg).shapes.min == (1, 96, 96)


def test_explicit_shapes_need_no_input_sizes(cfg):
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert options(cfg, SHAPES=["256x256"]).shapes == ShapeRange.fixed(1, 256, 256)


def test_static_engines_serve_one_shape_within_the_range(cfg):
    dynamic = options(cfg, MAX_BATCH_SIZE=2)
    assert dynamic.engine_range(1, 800, 1088) is dynamic.shapes
    static = options(cfg, STATIC=True)
    assert static.engine_range(2, 800, 1088) == ShapeRange.fixed(2, 800, 1088)
    for read in (dynamic, static):
        with pytest.raises(EngineShapeError):
            read.engine_range(3, 800, 1088)


# Keys and JSON


def test_options_go_through_json(cfg):
    value = json.loads(json.dumps(options(cfg, CACHE__MAX_GB=math.inf).to_json(), allow_nan=False))
    assert value["precision"] == "fp16"
    assert value["shapes"] == RANGE.to_json()
    assert value["cache"]["max_gb"] == "inf"
    assert value["verify"]["max_mask_error"] is None
    assert set(value) == {f.name for f in dataclasses.fields(TensorRTOptions)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PRECISION", "bf16"),
        ("FP32_MODULES", ["default", "backbone"]),
        ("STATIC", True),
        ("MSDA", "stock"),
        ("NORMALIZATION", "native"),
        ("ATTENTION", "native"),
        ("WORKSPACE", 1.0),
        ("OPT_LEVEL", 5),
    ],
)
def test_graph_key_changes_with_what_decides_the_engine(cfg, key, value):
    before = options(cfg).graph_key()
    after = options(cfg, **{key: value}).graph_key()
    assert before != after
    assert json.loads(json.dumps(after)) == after


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ON_ERROR", "torch"),
        ("ON_OUT_OF_RANGE", "raise"),
        ("CUDA_GRAPHS", False),
        ("MAX_CUDA_GRAPHS", 3),
        ("CUDA_GRAPH_MEMORY", 1.0),
        ("TIMING_CACHE", False),
        ("CACHE__DIR", "/elsewhere"),
        ("CACHE__MODE", "read"),
        ("CACHE__MAX_GB", 1.0),
        ("VERIFY__ENABLED", False),
        ("VERIFY__MIN_SIGN_AGREEMENT", 0.5),
        ("SHAPES", ["32x32"]),  # they have an entry of their own in the cache's key
        ("FP32_MODULES", ["default", "default"]),
    ],
)
def test_graph_key_ignores_what_does_not(cfg, key, value):
    before = options(cfg).graph_key()
    assert options(cfg, **{key: value}).graph_key() == before


def test_graph_key_holds_the_built_in_pins(cfg):
    read = options(cfg, FP32_MODULES=["backbone", "default"])
    assert read.resolve_fp32_modules(["pe", "core"]) == ("backbone", "pe", "core")
    assert read.graph_key(["pe", "core"])["fp32_modules"] == ["backbone", "core", "pe"]
    assert read.graph_key(["core", "pe"]) == read.graph_key(["pe", "core"]) != read.graph_key(["pe"])


def test_pins_mean_nothing_to_a_float32_engine(cfg):
    before = options(cfg, PRECISION="fp32").graph_key()
    assert options(cfg, FP32_MODULES=[]).graph_key() == before


def test_group_may_be_any_mapping(cfg):
    cfg.MODEL.TENSORRT = CfgNode(cfg.MODEL.TENSORRT)
    cfg.freeze()
    assert TensorRTOptions.from_cfg(cfg).shapes == RANGE
