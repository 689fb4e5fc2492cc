from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

from mask2former import config
from mask2former.config import add_maskformer2_config, get_mask2former_cfg

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# Every config of the official tree that names a model. Tasks: Semantic, Instance, Panoptic.
# The last column is the thousandths of SOLVER.MAX_ITER.
MODELS = """
file                                                                       backbone  classes queries tasks thresh min  max  iters
coco/panoptic-segmentation/maskformer2_R50_bs16_50ep                              R50       133     100     SIP   0.8    800  1333 368.75
coco/panoptic-segmentation/maskformer2_R101_bs16_50ep                             R101      133     100     SIP   0.8    800  1333 368.75
coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep                   swin_tiny 133     100     SIP   0.8    800  1333 368.75
coco/panoptic-segmentation/swin/maskformer2_swin_small_bs16_50ep                  swin_small 133    100     SIP   0.8    800  1333 368.75
coco/panoptic-segmentation/swin/maskformer2_swin_base_384_bs16_50ep               swin_base_1k 133  100     SIP   0.8    800  1333 368.75
coco/panoptic-segmentation/swin/maskformer2_swin_base_IN21k_384_bs16_50ep         swin_base 133     100     SIP   0.8    800  1333 368.75
coco/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_100ep       swin_large 133    200     SIP   0.8    800  1333 737.5
coco/instance-segmentation/maskformer2_R50_bs16_50ep                              R50        80     100     I     0.8    800  1333 368.75
coco/instance-segmentation/maskformer2_R101_bs16_50ep                             R101       80     100     I     0.8    800  1333 368.75
coco/instance-segmentation/swin/maskformer2_swin_tiny_bs16_50ep                   swin_tiny  80     100     I     0.8    800  1333 368.75
coco/instance-segmentation/swin/maskformer2_swin_small_bs16_50ep                  swin_small 80     100     I     0.8    800  1333 368.75
coco/instance-segmentation/swin/maskformer2_swin_base_384_bs16_50ep               swin_base_1k 80   100     I     0.8    800  1333 368.75
coco/instance-segmentation/swin/maskformer2_swin_base_IN21k_384_bs16_50ep         swin_base  80     100     I     0.8    800  1333 368.75
coco/instance-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_100ep       swin_large 80     200     I     0.8    800  1333 737.5
ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k                            R50       150     100     SIP   0.8    640  2560 160
ade20k/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_160k      swin_large 150    200     SIP   0.8    640  2560 160
ade20k/instance-segmentation/maskformer2_R50_bs16_160k                            R50       100     100     SIP   0.8    640  2560 160
ade20k/instance-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_160k      swin_large 100    200     SIP   0.8    640  2560 160
ade20k/semantic-segmentation/maskformer2_R50_bs16_160k                            R50       150     100     S     0.8    512  2048 160
ade20k/semantic-segmentation/maskformer2_R101_bs16_90k                            R101_SyncBN 150   100     S     0.8    512  2048 160
ade20k/semantic-segmentation/swin/maskformer2_swin_tiny_bs16_160k                 swin_tiny 150     100     S     0.8    512  2048 160
ade20k/semantic-segmentation/swin/maskformer2_swin_small_bs16_160k                swin_small 150    100     S     0.8    512  2048 160
ade20k/semantic-segmentation/swin/maskformer2_swin_base_384_bs16_160k_res640      swin_base_1k 150  100     S     0.8    640  2560 160
ade20k/semantic-segmentation/swin/maskformer2_swin_base_IN21k_384_bs16_160k_res640 swin_base 150    100     S     0.8    640  2560 160
ade20k/semantic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_160k_res640 swin_large 150  100     S     0.8    640  2560 160
cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k                         R50_SyncBN 19     100     SIP   0.8   1024  2048 90
cityscapes/panoptic-segmentation/maskformer2_R101_bs16_90k                        R101_SyncBN 19    100     SIP   0.8   1024  2048 90
cityscapes/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_90k              swin_tiny  19     100     SIP   0.8   1024  2048 90
cityscapes/panoptic-segmentation/swin/maskformer2_swin_small_bs16_90k             swin_small 19     100     SIP   0.8   1024  2048 90
cityscapes/panoptic-segmentation/swin/maskformer2_swin_base_IN21k_384_bs16_90k    swin_base  19     100     SIP   0.8   1024  2048 90
cityscapes/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_90k   swin_large 19     200     SIP   0.8   1024  2048 90
cityscapes/instance-segmentation/maskformer2_R50_bs16_90k                         R50_SyncBN  8     100     I     0.8   1024  2048 90
cityscapes/instance-segmentation/maskformer2_R101_bs16_90k                        R101_SyncBN 8     100     I     0.8   1024  2048 90
cityscapes/instance-segmentation/swin/maskformer2_swin_tiny_bs16_90k              swin_tiny   8     100     I     0.8   1024  2048 90
cityscapes/instance-segmentation/swin/maskformer2_swin_small_bs16_90k             swin_small  8     100     I     0.8   1024  2048 90
cityscapes/instance-segmentation/swin/maskformer2_swin_base_IN21k_384_bs16_90k    swin_base   8     100     I     0.8   1024  2048 90
cityscapes/instance-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_90k   swin_large  8     200     I     0.8   1024  2048 90
cityscapes/semantic-segmentation/maskformer2_R50_bs16_90k                         R50_SyncBN 19     100     S     0.8   1024  2048 90
cityscapes/semantic-segmentation/maskformer2_R101_bs16_90k                        R101_SyncBN 19    100     S     0.8   1024  2048 90
cityscapes/semantic-segmentation/swin/maskformer2_swin_tiny_bs16_90k              swin_tiny  19     100     S     0.8   1024  2048 90
cityscapes/semantic-segmentation/swin/maskformer2_swin_small_bs16_90k             swin_small 19     100     S     0.8   1024  2048 90
cityscapes/semantic-segmentation/swin/maskformer2_swin_base_IN21k_384_bs16_90k    swin_base  19     100     S     0.8   1024  2048 90
cityscapes/semantic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_90k   swin_large 19     100     S     0.8   1024  2048 90
mapillary-vistas/panoptic-segmentation/maskformer_R50_bs16_300k                   R50        65     100     SP    0.0   2048  2048 300
mapillary-vistas/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_300k swin_large 65 200    SP    0.0   2048  2048 300
mapillary-vistas/semantic-segmentation/maskformer2_R50_bs16_300k                  R50        65     100     S     0.0   2048  2048 300
mapillary-vistas/semantic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_300k swin_large 65 100    S     0.0   2048  2048 300
"""  # noqa: E501
ROWS = [line.split() for line in MODELS.strip().splitlines()[1:]]

RESNETS = {  # depth, norm, weights
    "R50": (50, "FrozenBN", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"),
    "R50_SyncBN": (50, "SyncBN", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"),
    "R101": (101, "FrozenBN", "R-101.pkl"),
    "R101_SyncBN": (101, "SyncBN", "R-101.pkl"),
}
SWINS = {  # embedding, depths, heads, window, weights
    "swin_tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7, "swin_tiny_patch4_window7_224.pkl"),
    "swin_small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7, "swin_small_patch4_window7_224.pkl"),
    "swin_base_1k": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12, "swin_base_patch4_window12_384.pkl"),
    "swin_base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12, "swin_base_patch4_window12_384_22k.pkl"),
    "swin_large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12, "swin_large_patch4_window12_384_22k.pkl"),
}


def flatten(node, prefix=""):
    flat = {}
    for key, value in node.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_config_describes_the_official_model(row):
    name, backbone, classes, queries, tasks, threshold, min_size, max_size, thousand_iterations = row
    cfg = get_mask2former_cfg(CONFIGS / f"{name}.yaml")
    model, test = cfg.MODEL, cfg.MODEL.MASK_FORMER.TEST

    if backbone in RESNETS:
        assert model.BACKBONE.NAME == "build_resnet_backbone"
        assert (model.RESNETS.DEPTH, model.RESNETS.NORM, model.WEIGHTS) == RESNETS[backbone]
        assert not model.RESNETS.STRIDE_IN_1X1
        assert model.RESNETS.OUT_FEATURES == ["res2", "res3", "res4", "res5"]
    else:
        swin = model.SWIN
        assert model.BACKBONE.NAME == "D2SwinTransformer"
        got = (swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS, swin.WINDOW_SIZE, model.WEIGHTS)
        assert got == SWINS[backbone]
        assert swin.PRETRAIN_IMG_SIZE == (384 if swin.WINDOW_SIZE == 12 else 224)

    assert model.SEM_SEG_HEAD.NUM_CLASSES == int(classes)
    assert model.MASK_FORMER.NUM_OBJECT_QUERIES == int(queries)
    assert (test.SEMANTIC_ON, test.INSTANCE_ON, test.PANOPTIC_ON) == tuple(task in tasks for task in "SIP")
    assert (test.OBJECT_MASK_THRESHOLD, test.OVERLAP_THRESHOLD) == (float(threshold), 0.8)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (int(min_size), int(max_size))
    assert cfg.SOLVER.MAX_ITER == float(thousand_iterations) * 1000
    assert cfg.INPUT.FORMAT == "RGB"
    assert model.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert model.PIXEL_STD == [58.395, 57.12, 57.375]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_network_and_losses_are_the_same_everywhere(row):
    model = get_mask2former_cfg(CONFIGS / f"{row[0]}.yaml").MODEL
    assert model.META_ARCHITECTURE == "MaskFormer"
    head, mask_former = model.SEM_SEG_HEAD, model.MASK_FORMER
    assert head.NAME == "MaskFormerHead"
    assert head.PIXEL_DECODER_NAME == "MSDeformAttnPixelDecoder"
    assert (head.CONVS_DIM, head.MASK_DIM, head.NORM, head.COMMON_STRIDE) == (256, 256, "GN", 4)
    assert head.IN_FEATURES == ["res2", "res3", "res4", "res5"]
    assert head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES == ["res3", "res4", "res5"]
    assert head.TRANSFORMER_ENC_LAYERS == 6
    assert mask_former.TRANSFORMER_DECODER_NAME == "MultiScaleMaskedTransformerDecoder"
    assert mask_former.TRANSFORMER_IN_FEATURE == "multi_scale_pixel_decoder"
    assert (mask_former.HIDDEN_DIM, mask_former.NHEADS, mask_former.DIM_FEEDFORWARD) == (256, 8, 2048)
    assert (mask_former.DEC_LAYERS, mask_former.DROPOUT, mask_former.PRE_NORM) == (10, 0.0, False)
    assert mask_former.SIZE_DIVISIBILITY == 32
    assert (mask_former.CLASS_WEIGHT, mask_former.MASK_WEIGHT, mask_former.DICE_WEIGHT) == (2.0, 5.0, 5.0)


def test_table_holds_every_model_of_the_four_data_sets():
    folders = [CONFIGS / name for name in ("coco", "ade20k", "cityscapes", "mapillary-vistas")]
    found = {
        path.relative_to(CONFIGS).with_suffix("").as_posix()
        for f in folders
        for path in f.rglob("mask*.yaml")
    }
    assert found == {row[0] for row in ROWS}


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_file_merges_with_the_safe_loader(path):
    loaded = CfgNode.load_yaml_with_base(str(path), allow_unsafe=False)
    cfg = get_mask2former_cfg(path)
    merged = flatten(cfg)
    for key, value in flatten(loaded).items():
        want = tuple(value) if isinstance(merged[key], tuple) else value
        assert merged[key] == want, key


@pytest.mark.parametrize(
    "file, scale, crop, divisibility, max_train",
    [
        ("ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k", 640, [640, 640], 640, 2560),
        ("ade20k/instance-segmentation/maskformer2_R50_bs16_160k", 640, [640, 640], 640, 2560),
        ("ade20k/semantic-segmentation/maskformer2_R50_bs16_160k", 512, [512, 512], 512, 2048),
        (
            "ade20k/semantic-segmentation/swin/maskformer2_swin_base_384_bs16_160k_res640",
            640,
            [640, 640],
            640,
            2560,
        ),
        ("cityscapes/semantic-segmentation/maskformer2_R50_bs16_90k", 1024, [512, 1024], -1, 4096),
        ("mapillary-vistas/semantic-segmentation/maskformer2_R50_bs16_300k", 2048, [1024, 1024], 1024, 8192),
    ],
)
def test_crop_recipes_scale_from_half_to_double(file, scale, crop, divisibility, max_train):
    cfg = get_mask2former_cfg(CONFIGS / f"{file}.yaml")
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(int(x * 0.1 * scale) for x in range(5, 21))
    assert cfg.INPUT.MAX_SIZE_TRAIN == max_train
    assert (cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE) == (True, "absolute", crop)
    assert cfg.INPUT.SIZE_DIVISIBILITY == divisibility
    assert (cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_ITERS) == ("WarmupPolyLR", 0)


def test_coco_schedules():
    folder = CONFIGS / "coco/panoptic-segmentation"
    usual = get_mask2former_cfg(folder / "maskformer2_R50_bs16_50ep.yaml")
    twice = get_mask2former_cfg(folder / "swin/maskformer2_swin_large_IN21k_384_bs16_100ep.yaml")
    assert (usual.SOLVER.STEPS, usual.SOLVER.WARMUP_ITERS) == ((327778, 355092), 10)
    assert (twice.SOLVER.STEPS, twice.SOLVER.WARMUP_ITERS) == ((655556, 710184), 10)
    assert usual.INPUT.DATASET_MAPPER_NAME == "coco_panoptic_lsj"


def test_base_files_leave_the_network_alone():
    cfg = get_mask2former_cfg(CONFIGS / "coco/panoptic-segmentation/Base-COCO-PanopticSegmentation.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == get_cfg().MODEL.META_ARCHITECTURE
    assert cfg.MODEL.MASK_FORMER == get_mask2former_cfg().MODEL.MASK_FORMER


def test_release_defaults():
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    mask_former = cfg.MODEL.MASK_FORMER
    assert (mask_former.DEC_LAYERS, mask_former.DROPOUT, mask_former.MASK_WEIGHT) == (6, 0.1, 20.0)
    assert mask_former.TRANSFORMER_IN_FEATURE == "res5"
    assert (mask_former.TEST.SEMANTIC_ON, mask_former.TEST.INSTANCE_ON) == (True, False)
    assert (mask_former.TEST.OBJECT_MASK_THRESHOLD, mask_former.TEST.OVERLAP_THRESHOLD) == (0.0, 0.0)
    assert cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME == "BasePixelDecoder"
    assert cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS == 4
    assert (cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.QK_SCALE, cfg.MODEL.SWIN.DROP_PATH_RATE) == (
        96,
        None,
        0.3,
    )
    assert (cfg.INPUT.IMAGE_SIZE, cfg.INPUT.SIZE_DIVISIBILITY) == (1024, -1)
    # The keys the release does not have leave its behaviour as it is.
    assert (mask_former.TEST.INSTANCE_FORMAT, mask_former.TEST.SEMANTIC_FORMAT) == ("auto", "auto")
    assert (cfg.MODEL.BACKEND, mask_former.TEST.BOXES_FROM_MASKS, cfg.TEST.BATCH_SIZE) == ("torch", False, 1)
    assert cfg.TEST.EVALUATION_THREADS == -1


def test_defaults_of_detectron2_are_untouched():
    before, cfg = flatten(get_cfg()), get_cfg()
    add_maskformer2_config(cfg)
    after = flatten(cfg)
    assert {key: after[key] for key in before} == before


def test_second_call_keeps_merged_values():
    cfg = get_mask2former_cfg(
        CONFIGS / "coco/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_100ep.yaml",
        ["MODEL.BACKEND", "tensorrt", "MODEL.SWIN.DEPTHS", "[1, 1, 1, 1]"],
    )
    before = flatten(cfg.clone())
    add_maskformer2_config(cfg)
    assert flatten(cfg) == before
    assert cfg.MODEL.SWIN.DEPTHS == [1, 1, 1, 1]


def test_keys_of_another_project_keep_their_values():
    cfg = get_cfg()
    cfg.MODEL.SWIN = CfgNode({"EMBED_DIM": 64})
    add_maskformer2_config(cfg)
    assert cfg.MODEL.SWIN.EMBED_DIM == 64
    assert cfg.MODEL.SWIN.WINDOW_SIZE == 7


def test_value_where_a_group_belongs_is_an_error():
    cfg = get_cfg()
    cfg.MODEL.SWIN = "tiny"
    with pytest.raises(TypeError, match=r"MODEL\.SWIN is 'tiny'"):
        add_maskformer2_config(cfg)


def test_configs_share_no_lists():
    first, second = get_mask2former_cfg(), get_mask2former_cfg()
    first.MODEL.SWIN.DEPTHS.append(9)
    assert second.MODEL.SWIN.DEPTHS == [2, 2, 6, 2]


def test_helper_equals_the_calls_users_know(monkeypatch):
    monkeypatch.setattr(config, "EXTENSIONS", [])  # a test before may have imported a plugin
    file = str(CONFIGS / "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml")
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.merge_from_file(file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu"])
    assert flatten(get_mask2former_cfg(file, ["MODEL.DEVICE", "cpu"])) == flatten(cfg)


def test_helper_adds_the_keys_of_imported_plugins(monkeypatch):
    def add_keys(cfg):
        cfg.MODEL.PLUGIN = CfgNode({"SPEED": 1})

    monkeypatch.setattr(config, "EXTENSIONS", [add_keys])
    assert get_mask2former_cfg(None, ["MODEL.PLUGIN.SPEED", "3"]).MODEL.PLUGIN.SPEED == 3


def test_file_of_the_release_with_an_eval_tag_loads(tmp_path):
    file = tmp_path / "release.yaml"
    file.write_text(
        "INPUT:\n"
        '  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)]"]\n'
        "VERSION: 2\n"
    )
    sizes = get_mask2former_cfg(file).INPUT.MIN_SIZE_TRAIN
    assert (len(sizes), sizes[0], sizes[-1]) == (16, 256, 1024)


def test_missing_file_names_near_matches(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        get_mask2former_cfg("configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50eps.yaml")
    assert "'configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50eps.yaml' does not exist" in str(
        error.value
    )
    assert str(CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml") in str(error.value)


def test_file_in_another_folder_is_found_by_name():
    with pytest.raises(FileNotFoundError) as error:
        get_mask2former_cfg("maskformer_R50_bs16_300k.yaml")
    assert "mapillary-vistas/panoptic-segmentation/maskformer_R50_bs16_300k.yaml" in str(error.value)


def test_nearest_folder_of_a_file_name_comes_first():
    with pytest.raises(FileNotFoundError) as error:
        get_mask2former_cfg("configs/coco/panoptic/maskformer2_R50_bs16_50ep.yaml")
    first = str(error.value).splitlines()[1]
    assert first.endswith("coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml")


def test_unknown_key_in_a_file_names_key_and_file(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("MODEL:\n  MASK_FORMER:\n    NUM_QUERYS: 3\nVERSION: 2\n")
    with pytest.raises(KeyError) as error:
        get_mask2former_cfg(file)
    assert "MODEL.MASK_FORMER.NUM_QUERYS" in str(error.value)
    assert str(file) in str(error.value)


def test_wrong_type_in_a_file_names_key_and_file(tmp_path):
    file = tmp_path / "type.yaml"
    file.write_text("MODEL:\n  MASK_FORMER:\n    NUM_OBJECT_QUERIES: many\nVERSION: 2\n")
    with pytest.raises(ValueError) as error:
        get_mask2former_cfg(file)
    assert "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES" in str(error.value)
    assert str(file) in str(error.value)


def test_unknown_override_is_quoted():
    with pytest.raises(KeyError) as error:
        get_mask2former_cfg(None, ["MODEL.BACKENDS", "torch"])
    assert "overrides MODEL.BACKENDS torch" in str(error.value)


def test_override_without_value_is_an_error():
    with pytest.raises(ValueError, match="KEY VALUE pairs, but 1 words were given"):
        get_mask2former_cfg(None, ["MODEL.BACKEND"])
