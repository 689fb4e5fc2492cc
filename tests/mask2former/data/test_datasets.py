import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from mask2former.config import get_mask2former_cfg
from mask2former.data import check_dataset_on_disk
from mask2former.data.datasets import ade20k, coco, datasets_root, mapillary_vistas
from mask2former.data.datasets.catalog import load_categories

CONFIGS = Path(__file__).resolve().parents[3] / "configs"

SPLITS = ("train", "val")
FAMILIES = ("ade20k_panoptic", "ade20k_instance", "mapillary_vistas_panoptic", "mapillary_vistas_sem_seg")
OURS = [f"{family}_{split}" for family in FAMILIES for split in SPLITS]
OURS += [f"coco_2017_{split}_panoptic_with_sem_seg" for split in SPLITS]


@pytest.fixture
def catalog(monkeypatch, tmp_path):
    """detectron2's catalogs without our data sets, COCO under tmp_path; restored afterwards."""
    loaders = {name: load for name, load in DatasetCatalog.data.items() if name not in OURS}
    metadata = {
        name: Metadata(**entry.as_dict()) for name, entry in MetadataCatalog.data.items() if name not in OURS
    }
    for split in SPLITS:
        name = f"coco_2017_{split}"
        metadata[name] = Metadata(
            name=name,
            image_root=str(tmp_path / f"coco/{split}2017"),
            json_file=str(tmp_path / f"coco/annotations/instances_{split}2017.json"),
        )
        vars(metadata[f"{name}_panoptic"]).update(
            thing_classes=[c["name"] for c in COCO_CATEGORIES],
            thing_colors=[c["color"] for c in COCO_CATEGORIES],
        )
        vars(metadata[f"ade20k_sem_seg_{split}"]).pop("stuff_colors", None)
    monkeypatch.setattr(DatasetCatalog, "data", loaders)
    monkeypatch.setattr(MetadataCatalog, "data", metadata)
    return tmp_path


def register_all(root):
    for module in (coco, ade20k, mapillary_vistas):
        module.register_all(str(root))


def write_panoptic(root, images, panoptic, panoptic_json, labels, image_id, stem, categories):
    for folder, suffix in ((images, ".jpg"), (panoptic, ".png"), (labels, ".png")):
        path = root / folder / (stem + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(path)
    segments = [{"id": i + 1, "category_id": c, "iscrowd": 0} for i, c in enumerate(categories)]
    annotation = {"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments}
    (root / panoptic_json).parent.mkdir(parents=True, exist_ok=True)
    (root / panoptic_json).write_text(json.dumps({"annotations": [annotation]}))


def write_coco(root, categories=(90, 92), image_id=139):
    write_panoptic(
        root,
        "coco/val2017",
        "coco/panoptic_val2017",
        "coco/annotations/panoptic_val2017.json",
        "coco/panoptic_semseg_val2017",
        image_id,
        "000000000139",
        categories,
    )


def test_everything_is_registered_by_import():
    assert set(OURS) <= set(DatasetCatalog.list())


def test_detectron2_brings_the_other_data_sets_of_the_configs():
    names = [f"cityscapes_fine_{task}" for task in ("instance_seg", "sem_seg", "panoptic")]
    names += ["ade20k_sem_seg", "coco_2017"]
    assert {f"{name}_{split}" for name in names for split in SPLITS} <= set(DatasetCatalog.list())
    assert {f"coco_2017_{split}_panoptic" for split in SPLITS} <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("cityscapes_fine_panoptic_val").evaluator_type == "cityscapes_panoptic_seg"


MODEL_CONFIGS = sorted(
    path
    for name in ("coco", "ade20k", "cityscapes", "mapillary-vistas")
    for path in (CONFIGS / name).rglob("mask*.yaml")
)


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_and_data_set_agree_on_classes(path):
    task = path.relative_to(CONFIGS).parts[1]
    cfg = get_mask2former_cfg(path)
    head = cfg.MODEL.SEM_SEG_HEAD
    for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]:
        assert name in DatasetCatalog.list()
        metadata = MetadataCatalog.get(name)
        if task == "instance-segmentation":
            assert len(metadata.thing_classes) == head.NUM_CLASSES
        else:
            assert len(metadata.stuff_classes) == head.NUM_CLASSES
            assert metadata.ignore_label == head.IGNORE_VALUE


def test_coco_panoptic_metadata():
    for split in SPLITS:
        metadata = MetadataCatalog.get(f"coco_2017_{split}_panoptic_with_sem_seg")
        assert (len(metadata.thing_classes), len(metadata.stuff_classes)) == (80, 133)
        assert (metadata.thing_classes[0], metadata.thing_classes[79]) == ("person", "toothbrush")
        assert (metadata.stuff_classes[80], metadata.stuff_classes[132]) == ("banner", "rug-merged")
        assert metadata.stuff_classes[:80] == metadata.thing_classes
        assert metadata.stuff_colors[0] == [220, 20, 60]
        things = metadata.thing_dataset_id_to_contiguous_id
        assert (len(things), things[1], things[90]) == (80, 0, 79)
        stuff = metadata.stuff_dataset_id_to_contiguous_id
        assert (len(stuff), stuff[1], stuff[92], stuff[200]) == (133, 0, 80, 132)
        assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
        assert metadata.evaluator_type == "coco_panoptic_seg"
        assert metadata.json_file.endswith(f"coco/annotations/instances_{split}2017.json")
        assert metadata.sem_seg_root.endswith(f"coco/panoptic_semseg_{split}2017")
        plain = MetadataCatalog.get(f"coco_2017_{split}_panoptic")
        assert (plain.thing_classes, plain.thing_colors) == (metadata.thing_classes, metadata.thing_colors)


def test_ade20k_panoptic_metadata():
    metadata = MetadataCatalog.get("ade20k_panoptic_val")
    assert metadata.stuff_dataset_id_to_contiguous_id == {i: i for i in range(150)}
    things = metadata.thing_dataset_id_to_contiguous_id
    assert len(things) == len(metadata.thing_classes) == 100
    assert all(key == value for key, value in things.items())
    assert list(things)[:5] == [7, 8, 10, 12, 14]
    assert metadata.thing_classes[:4] == ["bed", "window ", "cabinet", "person"]
    assert metadata.thing_classes == [metadata.stuff_classes[i] for i in things]
    assert metadata.stuff_classes[0] == "wall" and metadata.stuff_classes[149] == "flag"
    assert metadata.stuff_colors[:2] == [[120, 120, 120], [180, 120, 120]]
    assert metadata.thing_colors[-1] == metadata.stuff_colors[149] == [92, 0, 255]
    assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
    assert metadata.evaluator_type == "ade20k_panoptic_seg"
    assert metadata.image_root.endswith("ADEChallengeData2016/images/validation")
    assert metadata.panoptic_json.endswith("ADEChallengeData2016/ade20k_panoptic_val.json")
    assert metadata.json_file.endswith("ADEChallengeData2016/ade20k_instance_val.json")


def test_ade20k_instance_ids_are_the_panoptic_things_in_order():
    metadata = MetadataCatalog.get("ade20k_instance_val")
    panoptic = MetadataCatalog.get("ade20k_panoptic_val")
    ids = metadata.thing_dataset_id_to_contiguous_id
    assert list(ids) == list(panoptic.thing_dataset_id_to_contiguous_id)
    assert list(ids.values()) == list(range(100))
    assert metadata.thing_classes[:4] == ["bed", "windowpane", "cabinet", "person"]
    assert metadata.thing_classes[-1] == "flag"
    assert metadata.evaluator_type == "coco"


def test_ade20k_semantic_data_set_of_detectron2_gets_colours(catalog):
    MetadataCatalog.get("ade20k_sem_seg_train").stuff_colors = [[1, 2, 3]]
    register_all(catalog)
    colors = MetadataCatalog.get("ade20k_sem_seg_val").stuff_colors
    assert len(colors) == len(MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes) == 150
    assert colors[2] == [6, 230, 230]
    assert MetadataCatalog.get("ade20k_sem_seg_train").stuff_colors == [[1, 2, 3]]


def test_mapillary_vistas_metadata():
    panoptic = MetadataCatalog.get("mapillary_vistas_panoptic_val")
    sem_seg = MetadataCatalog.get("mapillary_vistas_sem_seg_val")
    assert panoptic.stuff_dataset_id_to_contiguous_id == {i + 1: i for i in range(65)}
    things = panoptic.thing_dataset_id_to_contiguous_id
    assert len(things) == 37
    assert (things[1], things[20]) == (0, 19) and 3 not in things
    assert panoptic.thing_classes == panoptic.stuff_classes == sem_seg.stuff_classes
    assert (panoptic.stuff_classes[0], panoptic.stuff_classes[19]) == ("Bird", "Person")
    assert (panoptic.stuff_classes[13], panoptic.stuff_classes[64]) == ("Road", "Ego Vehicle")
    assert panoptic.stuff_colors == panoptic.thing_colors == sem_seg.stuff_colors
    assert (panoptic.stuff_colors[0], panoptic.stuff_colors[13]) == ([165, 42, 42], [128, 64, 128])
    assert panoptic.ignore_label == sem_seg.ignore_label == 65
    assert panoptic.label_divisor == 1000
    assert panoptic.evaluator_type == "mapillary_vistas_panoptic_seg"
    assert sem_seg.evaluator_type == "sem_seg"
    assert panoptic.panoptic_json.endswith("mapillary_vistas/validation/panoptic/panoptic_2018.json")


@pytest.mark.parametrize("table, count, things", [("ade20k", 150, 100), ("mapillary_vistas", 65, 37)])
def test_category_tables_are_well_formed(table, count, things):
    categories = load_categories(table)
    assert len(categories) == count
    assert len({c["id"] for c in categories}) == len({c["name"] for c in categories}) == count
    assert sum(c["isthing"] for c in categories) == things
    for category in categories:
        assert category["isthing"] in (0, 1)
        assert len(category["color"]) == 3 and all(0 <= value <= 255 for value in category["color"])
        if table == "ade20k":
            assert (category["instance_name"] is not None) == bool(category["isthing"])


def test_coco_records(catalog):
    write_coco(catalog, image_id="139")
    register_all(catalog)
    assert DatasetCatalog.get("coco_2017_val_panoptic_with_sem_seg") == [
        {
            "file_name": str(catalog / "coco/val2017/000000000139.jpg"),
            "image_id": 139,
            "pan_seg_file_name": str(catalog / "coco/panoptic_val2017/000000000139.png"),
            "sem_seg_file_name": str(catalog / "coco/panoptic_semseg_val2017/000000000139.png"),
            "segments_info": [
                {"id": 1, "category_id": 79, "iscrowd": 0, "isthing": True},
                {"id": 2, "category_id": 80, "iscrowd": 0, "isthing": False},
            ],
        }
    ]


def test_sizes_are_those_of_the_json(catalog):
    """Who asks which sizes come, as the ledger before it builds an engine, need not open the images."""
    write_coco(catalog)
    path = catalog / "coco/annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    other = {**content["annotations"][0], "image_id": 140, "file_name": "000000000140.png"}
    content["annotations"].append(other)
    content["images"] = [{"id": 140, "height": 7}, {"id": 139, "height": 3, "width": 4, "license": 1}]
    path.write_text(json.dumps(content))
    register_all(catalog)
    first, second = DatasetCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    assert (first["height"], first["width"]) == (3, 4) and "license" not in first
    assert "height" not in second and "width" not in second


def test_ade20k_and_mapillary_records(catalog):
    ade = "ADEChallengeData2016"
    write_panoptic(
        catalog,
        f"{ade}/images/validation",
        f"{ade}/ade20k_panoptic_val",
        f"{ade}/ade20k_panoptic_val.json",
        f"{ade}/annotations_detectron2/validation",
        "ADE_val_00000001",
        "ADE_val_00000001",
        (0, 7),
    )
    vistas = "mapillary_vistas/validation"
    write_panoptic(
        catalog,
        f"{vistas}/images",
        f"{vistas}/panoptic",
        f"{vistas}/panoptic/panoptic_2018.json",
        f"{vistas}/labels",
        "abc",
        "abc",
        (3, 65),
    )
    register_all(catalog)
    (record,) = DatasetCatalog.get("ade20k_panoptic_val")
    assert record["image_id"] == "ADE_val_00000001"
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [(0, False), (7, True)]
    (record,) = DatasetCatalog.get("mapillary_vistas_panoptic_val")
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [(2, False), (64, False)]
    (record,) = DatasetCatalog.get("mapillary_vistas_sem_seg_val")
    assert record["sem_seg_file_name"] == str(catalog / vistas / "labels/abc.png")


def test_ade20k_instance_records_have_contiguous_ids(catalog):
    root = catalog / "ADEChallengeData2016"
    (root / "images/validation").mkdir(parents=True)
    ring = [0, 0, 2, 0, 2, 2, 0, 2]
    things = [c for c in load_categories("ade20k") if c["isthing"]]
    annotation = {"id": 1, "image_id": 1, "category_id": 149, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 3, "width": 4}],
        "annotations": [{**annotation, "segmentation": [ring]}],
        "categories": [{"id": c["id"], "name": c["instance_name"]} for c in things],
    }
    (root / "ade20k_instance_val.json").write_text(json.dumps(content))
    register_all(catalog)
    (record,) = DatasetCatalog.get("ade20k_instance_val")
    assert record["file_name"] == str(root / "images/validation/a.jpg")
    assert [a["category_id"] for a in record["annotations"]] == [99]


@pytest.mark.parametrize("name", OURS)
def test_absent_data_set_names_paths_and_variable(catalog, monkeypatch, name):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    register_all(catalog)
    with pytest.raises(FileNotFoundError) as error:
        DatasetCatalog.get(name)
    message = str(error.value)
    assert f"'{name}'" in message
    assert MetadataCatalog.get(name).image_root in message
    assert "Set DETECTRON2_DATASETS" in message and "it is not set" in message


def test_only_what_is_missing_is_named(catalog, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(catalog))
    write_coco(catalog)
    labels = catalog / "coco/panoptic_semseg_val2017"
    (labels / "000000000139.png").unlink()
    labels.rmdir()
    register_all(catalog)
    with pytest.raises(FileNotFoundError) as error:
        DatasetCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    message = str(error.value)
    assert f"{labels}  (made by prepare_coco_semantic_annos_from_panoptic_annos.py" in message
    assert "coco/val2017" not in message
    assert f"it is '{catalog}'" in message


def test_folder_without_the_first_image_is_an_error(catalog):
    write_coco(catalog)
    image = catalog / "coco/val2017/000000000139.jpg"
    image.unlink()
    register_all(catalog)
    with pytest.raises(FileNotFoundError, match=r"000000000139\.jpg"):
        DatasetCatalog.get("coco_2017_val_panoptic_with_sem_seg")


def test_unknown_category_is_an_error(catalog):
    write_coco(catalog, categories=(1, 12))
    register_all(catalog)
    with pytest.raises(ValueError, match=r"category_id 12 of 000000000139\.png .* 133 ids from 1 to 200"):
        DatasetCatalog.get("coco_2017_val_panoptic_with_sem_seg")


def test_json_without_annotations_is_an_error(catalog):
    write_coco(catalog)
    (catalog / "coco/annotations/panoptic_val2017.json").write_text('{"annotations": []}')
    register_all(catalog)
    with pytest.raises(ValueError, match="lists no annotations"):
        DatasetCatalog.get("coco_2017_val_panoptic_with_sem_seg")


def test_names_that_are_taken_are_kept(catalog):
    DatasetCatalog.register("ade20k_panoptic_val", lambda: ["theirs"])
    MetadataCatalog.get("ade20k_panoptic_val").set(ignore_label=7, thing_classes=["x"])
    vars(MetadataCatalog.get("coco_2017_val_panoptic")).update(thing_classes=["theirs"])
    register_all(catalog)
    assert DatasetCatalog.get("ade20k_panoptic_val") == ["theirs"]
    theirs = MetadataCatalog.get("ade20k_panoptic_val").as_dict()
    assert theirs == {"name": "ade20k_panoptic_val", "ignore_label": 7, "thing_classes": ["x"]}
    assert MetadataCatalog.get("coco_2017_val_panoptic").thing_classes == ["theirs"]
    assert "ade20k_panoptic_train" in DatasetCatalog.list()


def test_registering_twice_changes_nothing(catalog):
    register_all(catalog)
    first = {name: MetadataCatalog.get(name).as_dict() for name in DatasetCatalog.list()}
    register_all(catalog / "elsewhere")
    assert {name: MetadataCatalog.get(name).as_dict() for name in DatasetCatalog.list()} == first


def test_coco_things_replace_detectron2s_133(catalog):
    assert len(MetadataCatalog.get("coco_2017_val_panoptic").thing_classes) == 133
    register_all(catalog)
    assert len(MetadataCatalog.get("coco_2017_val_panoptic").thing_classes) == 80


def test_root_follows_the_variable(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    assert datasets_root() == str(Path.home() / "sets")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert datasets_root() == "datasets"


def test_check_covers_data_sets_of_detectron2(catalog):
    metadata = MetadataCatalog.get("cityscapes_fine_sem_seg_val")
    vars(metadata).update(image_dir=str(catalog / "images"), gt_dir=str(catalog / "gtFine"))
    (catalog / "images").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        check_dataset_on_disk("cityscapes_fine_sem_seg_val")
    assert str(catalog / "gtFine") in str(error.value)
    assert str(catalog / "images") not in str(error.value)
    (catalog / "gtFine").mkdir()
    check_dataset_on_disk("cityscapes_fine_sem_seg_val")


def test_check_of_an_unknown_name_lists_the_known():
    with pytest.raises(KeyError, match=r"'coco_2018' is not registered.*ade20k_panoptic_val"):
        check_dataset_on_disk("coco_2018")
