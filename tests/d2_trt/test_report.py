"""What d2_trt.report makes of the engine inspector's answers and of the profiler's times."""

from __future__ import annotations

import json

import pytest
import torch

from d2_trt import builder
from d2_trt.build_spec import BuildSpec
from d2_trt.errors import BuildError, EngineShapeError
from d2_trt.profiler import EngineProbe
from d2_trt.report import (
    LayerInfo,
    common_path,
    data_type,
    group,
    module_group,
    module_paths,
    parse,
    summarize,
    time_layers,
)
from tests.doubles import conversion
from tests.doubles.fixtures import trt_double as trt  # noqa: F401
from tests.golden import mini_model

STEM = "model.backbone.stem.conv1:0:CONVOLUTION:GPU"
RELU = "model.backbone.stem.conv1:1:ACTIVATION:GPU"
CORE = "model.sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.core:3:PLUGIN_V2:GPU"
FIRST = "model.sem_seg_head.predictor.transformer_ffn_layers.0.linear1:0:MATRIX_MULTIPLY:GPU"
LAST = "model.sem_seg_head.predictor.mask_embed.layers.2:1:ELEMENTWISE:GPU"
DYNAMIC = "N/A due to dynamic shapes"


def tensor(name: str, kind: str, *dims: int) -> dict:
    return {"Name": name, "Location": "Device", "Dimensions": list(dims), "Format/Datatype": kind}


def layer(name: str, kind: str, inputs: list, outputs: list, **more) -> dict:
    return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs, **more}


# As TensorRT 8.6 answers.
DETAILED = {
    "Layers": [
        layer(
            f"Reformatting CopyNode for Input Tensor 0 to {STEM} + {RELU}",
            "Reformat",
            [tensor("images", "Row major linear FP32", 1, 3, 800, 1088)],
            [tensor("copy", "Channel major FP16 format where channel % 4 == 0", 1, 3, 800, 1088)],
            ParameterType="Reformat",
            Origin="REFORMAT",
            TacticValue="0x0",
        ),
        layer(
            f"{STEM} + {RELU}",
            "CaskConvolution",
            [tensor("copy", DYNAMIC, 1, 3, -1, -1)],
            [tensor("relu", DYNAMIC, 1, 64, -1, -1)],
            ParameterType="Convolution",
            Weights={"Type": "Half", "Count": 9408},
            TacticName="",
        ),
        layer(
            "model.backbone.res2.0.conv1:0:CONVOLUTION:GPU",
            "CaskConvolution",
            [tensor("relu", DYNAMIC, 1, 64, -1, -1)],
            [tensor("res", DYNAMIC, 1, 64, -1, -1)],
            Weights={"Type": "Float", "Count": 4096},
            TacticName="sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x64x16",
        ),
        layer(
            CORE,
            "PluginV2",
            [tensor("value", "Row major linear FP32", 1, 100, 8, 32), tensor("s", "Int32", 3, 2)],
            [tensor("attended", "Row major linear FP32", 1, 100, 8, 32)],
            PluginType="MultiscaleDeformableAttnPlugin_TRT",
        ),
        layer(
            f"{{ForeignNode[{FIRST}...{LAST}]}}",
            "Myelin",
            [tensor("attended", "Row major linear FP32", 1, 100, 256)],
            [tensor("mask", "Row major Bool format", 1, 100), tensor("e", "Row major linear FP16", 1, 100)],
        ),
    ],
    "Bindings": ["images", "pred_logits", "pred_masks"],
}

# As TensorRT 10 answers: the parts of a compiled region one by one, their origin in the metadata.
COMPILED = {
    "Layers": [
        layer(
            "__myl_MovSliSliTra_myl109_1",
            "kgen",
            [tensor("a", "Half", 1, 100)],
            [tensor("b", "Half", 1, 100)],
            Metadata=f"{FIRST}\u001e{LAST}",
        ),
        layer(f"{FIRST}_myl109_2", "gemm", [tensor("b", "BFloat16", 1)], [tensor("c", "BFloat16", 1)]),
    ],
    "Bindings": [],
}


def test_detailed_answer():
    reformat, conv, tf32, plugin, region = parse(json.dumps(DETAILED))
    assert reformat.is_reformat and reformat.precision == "fp16" and reformat.output == (1, 3, 800, 1088)
    assert reformat.module == "backbone.stem.conv1"
    assert (conv.kind, conv.precision, conv.module) == ("CaskConvolution", "fp16", "backbone.stem.conv1")
    assert tf32.precision == "tf32" and tf32.tactic.startswith("sm80_xmma")
    assert (plugin.plugin, plugin.precision) == ("MultiscaleDeformableAttnPlugin_TRT", "fp32")
    assert plugin.module == "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.core"
    assert region.modules == (
        "sem_seg_head.predictor.transformer_ffn_layers.0.linear1",
        "sem_seg_head.predictor.mask_embed.layers.2",
    )
    assert region.module == "sem_seg_head.predictor"
    assert (
        region.precision == "fp16"
    )  # of its floating tensors: the boolean one says nothing of the arithmetic


def test_parts_of_compiled_regions_are_traced_by_metadata_and_name():
    # The character that joins metadata may come unescaped, which strict JSON forbids.
    text = json.dumps(COMPILED).replace("\\u001e", "\x1e")
    fused, product = parse(text)
    assert fused.module == "sem_seg_head.predictor" and fused.precision == "fp16"
    assert product.module == "sem_seg_head.predictor.transformer_ffn_layers.0.linear1"
    assert (product.kind, product.precision) == ("gemm", "bf16")


def test_answer_with_names_only():
    layers = parse(json.dumps({"Layers": [f"{STEM} + {RELU}", CORE], "Bindings": ["images"]}))
    assert [x.kind for x in layers] == ["unknown", "unknown"]
    assert layers[0].module == "backbone.stem.conv1"
    summary = summarize(json.dumps({"Layers": [STEM]}))
    assert summary == {
        "count": 1,
        "detailed": False,
        "kinds": {"unknown": 1},
        "precisions": {"unknown": 1},
        "plugins": {},
        "reformats": 0,
    }


def test_summary():
    summary = summarize(json.dumps(DETAILED))
    assert summary == {
        "count": 5,
        "detailed": True,
        "kinds": {"CaskConvolution": 2, "Myelin": 1, "PluginV2": 1, "Reformat": 1},
        "precisions": {"fp16": 3, "fp32": 1, "tf32": 1},
        "plugins": {"MultiscaleDeformableAttnPlugin_TRT": 1},
        "reformats": 1,
    }
    assert next(iter(summary["kinds"])) == "CaskConvolution"  # the most frequent first
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON"),
        ('{"Layers": [', "is not JSON"),
        ("[]", 'no list "Layers"'),
        ('{"Layers": {}}', 'no list "Layers"'),
        ('{"Layers": [3]}', "int 3 where a layer is expected"),
    ],
)
def test_answer_that_cannot_be_read_does_not_fail_a_build(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse(text)
    assert list(summarize(text)) == ["problem"] and problem in summarize(text)["problem"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Row major linear FP32", "fp32"),
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Half(64,1:8,4096)", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("TF32", "tf32"),
        ("Int64", "int64"),
        ("Row major Bool format", "bool"),
        (DYNAMIC, ""),
        ("", ""),
    ],
)
def test_types_in_tensorrts_words(text, kind):
    assert data_type(text) == kind


@pytest.mark.parametrize(
    ("tactic", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize64x32x64", "fp16"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8", "fp32"),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32", "int8"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128", "bf16"),
        ("generated kernel 7", "unknown"),
    ],
)
def test_kernels_name_says_in_what_it_multiplies(tactic, kind):
    text = json.dumps({"Layers": [layer("a", "CaskGemm", [], [], TacticName=tactic)]})
    assert parse(text)[0].precision == kind


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        (STEM, ("backbone.stem.conv1",)),
        (f"PWN({STEM}, {LAST})", ("backbone.stem.conv1", "sem_seg_head.predictor.mask_embed.layers.2")),
        ("model.a:0:CONVOLUTION:GPU || model.b:0:CONVOLUTION:GPU", ("a", "b")),
        # A block's own addition joined with its convolution: the deeper path says more.
        ("model.res2.0.conv3:0:CONVOLUTION:GPU + model.res2.0:1:ELEMENTWISE:GPU", ("res2.0.conv3",)),
        ("model.a:0:CONVOLUTION:GPU(DLA)", ("a",)),
        ("model.a:0:SLICE", ("a",)),  # without the device, as the tests' double names them
        (":7:SHUFFLE:GPU", ()),  # of no module: the normalisation
        ("model:7:SHUFFLE:GPU", ()),
        ("(Unnamed Layer* 12) [Shuffle]", ()),
        ("__myl_MulAddResh_myl3_2", ()),
    ],
)
def test_module_paths_of_layer_names(name, paths):
    assert module_paths(name) == paths


def test_common_path_ends_between_names():
    assert common_path(["a.layer1.x", "a.layer2.x"]) == "a"
    assert common_path(["a.b", "a.b"]) == "a.b"
    assert common_path(["a", "b"]) == common_path([]) == ""


def test_times_are_means_over_runs_slowest_first():
    layers = parse(json.dumps(DETAILED))
    conv, core = layers[1].name, layers[3].name
    runs = [{conv: 1.0, core: 4.0, "stranger": 0.5}, {conv: 2.0, core: 2.0, "stranger": 0.5}]
    timings = time_layers(runs, layers)
    assert [(t.layer.name, t.ms) for t in timings] == [(core, 3.0), (conv, 1.5), ("stranger", 0.5)]
    assert [t.share for t in timings] == [0.6, 0.3, 0.1]
    assert timings[0].layer.kind == "PluginV2" and timings[2].layer == LayerInfo("stranger")
    # What ran in one of the runs only counts for half.
    assert time_layers([{"a": 1.0}, {}])[0].ms == 0.5
    with pytest.raises(ValueError, match="no runs"):
        time_layers([])


def test_times_by_module_and_kind():
    timings = time_layers(
        [{STEM: 1.0, "model.backbone.res2.0.conv1:0:CONVOLUTION:GPU": 2.0, CORE: 3.5, "x": 4.0}]
    )
    two = group(timings, module_group(1))
    assert [(g.name, g.layers, g.ms) for g in two] == [
        ("(no module)", 1, 4.0),
        ("sem_seg_head", 1, 3.5),
        ("backbone", 2, 3.0),
    ]
    assert sum(g.share for g in two) == pytest.approx(1.0)
    deep = {g.name for g in group(timings, module_group(3))}
    assert deep == {
        "backbone.stem.conv1",
        "backbone.res2.0",
        "sem_seg_head.pixel_decoder.transformer",
        "(no module)",
    }
    assert [(g.name, g.layers) for g in group(timings, lambda x: x.kind)] == [("unknown", 4)]


# Engines of the double of TensorRT, opened as real ones are.


@pytest.fixture
def plan(trt, monkeypatch) -> bytes:  # noqa: F811
    """A mini model's engine."""
    conversion.use_conversion(monkeypatch)
    shapes = {"min_shape": (1, 64, 64), "opt_shape": (1, 64, 96), "max_shape": (2, 96, 128)}
    create = trt.Builder.create_network

    def create_network(self, flags=0):
        network = create(self, flags)
        network.examples = {"images": [(1, 3, 64, 96), (2, 3, 96, 128)]}
        return network

    monkeypatch.setattr(trt.Builder, "create_network", create_network, raising=False)
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    return builder.build_engine(mini_model("resnet50-mini").cpu(), BuildSpec(**shapes), images)[0]


def test_engine_is_inspected_and_timed(plan):
    probe = EngineProbe(plan, "cpu")
    images, *outputs = probe.tensors()
    assert images == {
        "name": "images",
        "mode": "input",
        "dtype": "FLOAT",
        "shape": [-1, 3, -1, -1],
        "min": [1, 3, 64, 64],
        "opt": [1, 3, 64, 96],
        "max": [2, 3, 96, 128],
    }
    assert [(t["name"], t["mode"]) for t in outputs] == [("pred_logits", "output"), ("pred_masks", "output")]
    assert probe.is_ours and probe.usual_shape == (1, 3, 64, 96)
    layers = parse(probe.inspect(probe.usual_shape))
    assert any(layer.module == "backbone.stem.conv1" for layer in layers)
    assert any(layer.plugin for layer in layers)
    milliseconds, runs = probe.profile(torch.rand(2, 3, 64, 64) * 255, runs=2, warmup=0)
    assert milliseconds > 0 and len(runs) == 2
    timings = time_layers(runs, layers)
    assert sum(t.share for t in timings) == pytest.approx(1.0)
    assert {t.layer.name for t in timings} == {layer.name for layer in layers}
    with pytest.raises(EngineShapeError, match=r"\(1, 3, 160, 64\).*1\.\.2 \(B\), 64\.\.96 \(H\)"):
        probe.profile(torch.zeros(1, 3, 160, 64))


def test_damaged_engine_is_refused(trt):  # noqa: F811
    with pytest.raises(BuildError, match=r"does not load.*\n.*damaged"):
        EngineProbe(b"no engine", "cpu")
