"""What merges into a config say where they fail, and which spellings they take."""

import copy
import math
import pickle

import pytest
from detectron2.config import CfgNode, get_cfg

from mask2former import add_maskformer2_config, get_mask2former_cfg


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    return cfg


def merge_file(cfg, tmp_path, text):
    file = tmp_path / "file.yaml"
    file.write_text(text + "\nVERSION: 2\n")
    cfg.merge_from_file(str(file))


UNKNOWN = [
    ("MODEL.BACKENDS", "did you mean MODEL.BACKEND?"),
    ("MODL.BACKEND", "did you mean MODEL.BACKEND?"),
    ("MODEL.MASK_FORMER.TEST.PANOPTIC_OM", "did you mean MODEL.MASK_FORMER.TEST.PANOPTIC_ON?"),
    ("MODEL.NUM_OBJECT_QUERIES", "did you mean MODEL.MASK_FORMER.NUM_OBJECT_QUERIES?"),
    ("MODEL.BACKEND.NAME", ""),
    ("XYZZY", "no other is spelled like it"),
]


@pytest.mark.parametrize(("key", "hint"), UNKNOWN, ids=[key for key, _ in UNKNOWN])
def test_unknown_override_names_key_value_and_a_near_key(cfg, key, hint):
    with pytest.raises(KeyError) as error:
        cfg.merge_from_list([key, "4"])
    message = error.value.args[0]
    assert message.startswith(f"{key} is no key of this config (its value is 4); ")
    assert hint in message


def test_unknown_key_of_a_file_names_value_and_a_near_key(cfg, tmp_path):
    with pytest.raises(KeyError) as error:
        merge_file(cfg, tmp_path, "MODEL:\n  MASK_FORMER:\n    NUM_OBJECT_QUERYS: 3")
    assert error.value.args[0] == (
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERYS is no key of this config (its value is 3); did you mean "
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES?"
    )


WRONG = [
    ("MODEL.BACKEND", "1", "MODEL.BACKEND is 1; allowed: 'torch'"),
    ("MODEL.MASK_FORMER.NHEADS", "many", "MODEL.MASK_FORMER.NHEADS is 'many'; allowed: a whole number; now"),
    (
        "MODEL.MASK_FORMER.NHEADS",
        "8.0",
        "MODEL.MASK_FORMER.NHEADS is 8.0; allowed: a whole number; now it is 8",
    ),
    ("MODEL.MASK_FORMER.PRE_NORM", "1", "MODEL.MASK_FORMER.PRE_NORM is 1; allowed: True or False"),
    (
        "MODEL.MASK_FORMER.DROPOUT",
        "True",
        "MODEL.MASK_FORMER.DROPOUT is True; allowed: a number; now it is 0.1",
    ),
    ("MODEL.SWIN.DEPTHS", "2", "MODEL.SWIN.DEPTHS is 2; allowed: a list; now it is [2, 2, 6, 2]"),
    (
        "MODEL.MASK_FORMER.TEST",
        "on",
        "MODEL.MASK_FORMER.TEST is 'on'; allowed: a group of the keys SEMANTIC_ON,",
    ),
]


@pytest.mark.parametrize(("key", "word", "message"), WRONG, ids=[f"{k}={w}" for k, w, _ in WRONG])
def test_wrong_type_names_key_value_and_what_is_allowed(cfg, tmp_path, key, word, message):
    with pytest.raises(ValueError) as error:
        cfg.merge_from_list([key, word])
    assert str(error.value).startswith(message)
    *groups, name = key.split(".")
    text = "".join(f"{'  ' * i}{group}:\n" for i, group in enumerate(groups)) + "  " * len(groups)
    with pytest.raises(ValueError) as error:
        merge_file(cfg, tmp_path, f"{text}{name}: {word}")
    # YAML has "on" for True.
    assert str(error.value).startswith(message.replace("'on'", "True"))


def test_harmless_spellings_are_taken(cfg, tmp_path):
    words = {"MODEL.MASK_FORMER.DROPOUT": "0", "MODEL.MASK_FORMER.MASK_WEIGHT": 5}
    words |= {"MODEL.MASK_FORMER.PRE_NORM": "true", "MODEL.SWIN.APE": "True", "SOLVER.BASE_LR": ".inf"}
    cfg.merge_from_list([word for pair in words.items() for word in pair])
    assert repr(cfg.MODEL.MASK_FORMER.DROPOUT) == "0.0"
    assert repr(cfg.MODEL.MASK_FORMER.MASK_WEIGHT) == "5.0"
    assert cfg.MODEL.MASK_FORMER.PRE_NORM is cfg.MODEL.SWIN.APE is True
    assert cfg.SOLVER.BASE_LR == math.inf
    merge_file(cfg, tmp_path, "MODEL:\n  MASK_FORMER:\n    MASK_WEIGHT: 7\n    PRE_NORM: 'false'")
    assert repr(cfg.MODEL.MASK_FORMER.MASK_WEIGHT) == "7.0"
    assert cfg.MODEL.MASK_FORMER.PRE_NORM is False


def test_merged_config_is_left_as_it_was(cfg):
    other = CfgNode({"MODEL": {"MASK_FORMER": {"MASK_WEIGHT": 7}}})
    cfg.merge_from_other_cfg(other)
    assert repr(other.MODEL.MASK_FORMER.MASK_WEIGHT) == "7"


def test_groups_that_others_add_later_still_merge(cfg, tmp_path):
    cfg.MODEL.OTHER = CfgNode({"SPEED": 1})
    cfg.ANYTHING = CfgNode(new_allowed=True)
    merge_file(cfg, tmp_path, "MODEL:\n  OTHER:\n    SPEED: 3\nANYTHING:\n  GOES: {A: 1}")
    assert (cfg.MODEL.OTHER.SPEED, cfg.ANYTHING.GOES.A) == (3, 1)
    cfg.register_deprecated_key("MODEL.GONE")
    cfg.merge_from_list(["MODEL.GONE", "1"])


def test_config_is_copied_and_pickled_as_ever(cfg):
    for other in (cfg.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert other == cfg
        assert other.dump() == cfg.dump()
        with pytest.raises(KeyError, match=r"did you mean MODEL\.BACKEND"):
            other.merge_from_list(["MODEL.BACKENDS", "torch"])
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.VERSION = 3


def test_own_class_of_a_config_is_left_alone():
    class Own(CfgNode):
        pass

    cfg = Own(get_cfg())
    add_maskformer2_config(cfg)
    assert type(cfg) is Own


def test_helper_says_where_the_key_was_read(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("MODEL:\n  MASK_FORMER:\n    PRE_NORM: 1\nVERSION: 2\n")
    with pytest.raises(ValueError) as error:
        get_mask2former_cfg(file)
    assert "PRE_NORM is 1; allowed: True or False" in str(error.value)
    assert f"-- in config file {file}" in str(error.value)


def test_keys_of_the_plugin_say_what_adds_them(cfg):
    with pytest.raises(KeyError, match=r"d2_trt\.add_tensorrt_config\(cfg\) adds"):
        cfg.merge_from_list(["MODEL.TENSORRT.UNHEARD.OF", "fp16"])
