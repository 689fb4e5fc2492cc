"""Our models as those of the transformers library: its configuration, its names of our tensors, and weights.

Theirs are independent implementations of Mask2Former, ResNet and Swin: they check ours without checkpoints.
"""

from __future__ import annotations

import re

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_ENCODER = "model.pixel_level_module.encoder"
_PIXEL_DECODER = "model.pixel_level_module.decoder"
_TRANSFORMER = "model.transformer_module"
_BLOCK = rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2"
_DECODER_LAYER = rf"{_TRANSFORMER}.decoder.layers.\1"
_BATCH_NORM = r"(weight|bias|running_mean|running_var)"
_LINEAR = r"(weight|bias)"


# (pattern of our key, their key or keys). Several keys: our tensor holds theirs one after the other along
# axis 0. "{n-2}" stands for what group n matched, a number, less 2.
_RULES = [
    (r"criterion\.empty_weight", "criterion.empty_weight"),
    # ResNet: res2..res5 are their stages 0..3, conv1..conv3 their layers 0..2.
    (r"backbone\.stem\.conv1\.weight", f"{_ENCODER}.embedder.embedder.convolution.weight"),
    (rf"backbone\.stem\.conv1\.norm\.{_BATCH_NORM}", rf"{_ENCODER}.embedder.embedder.normalization.\1"),
    (
        r"backbone\.res(\d)\.(\d+)\.conv(\d)\.weight",
        rf"{_ENCODER}.encoder.stages.{{1-2}}.layers.\2.layer.{{3-1}}.convolution.weight",
    ),
    (
        rf"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.{_BATCH_NORM}",
        rf"{_ENCODER}.encoder.stages.{{1-2}}.layers.\2.layer.{{3-1}}.normalization.\4",
    ),
    (
        r"backbone\.res(\d)\.(\d+)\.shortcut\.weight",
        rf"{_ENCODER}.encoder.stages.{{1-2}}.layers.\2.shortcut.convolution.weight",
    ),
    (
        rf"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.{_BATCH_NORM}",
        rf"{_ENCODER}.encoder.stages.{{1-2}}.layers.\2.shortcut.normalization.\3",
    ),
    # Swin
    (
        rf"backbone\.patch_embed\.proj\.{_LINEAR}",
        rf"{_ENCODER}.swin.embeddings.patch_embeddings.projection.\1",
    ),
    (rf"backbone\.patch_embed\.norm\.{_LINEAR}", rf"{_ENCODER}.swin.embeddings.norm.\1"),
    (rf"backbone\.layers\.(\d)\.blocks\.(\d+)\.norm1\.{_LINEAR}", rf"{_BLOCK}.layernorm_before.\3"),
    (rf"backbone\.layers\.(\d)\.blocks\.(\d+)\.norm2\.{_LINEAR}", rf"{_BLOCK}.layernorm_after.\3"),
    (
        rf"backbone\.layers\.(\d)\.blocks\.(\d+)\.attn\.qkv\.{_LINEAR}",
        [rf"{_BLOCK}.attention.{x}_proj.\3" for x in "qkv"],
    ),
    (rf"backbone\.layers\.(\d)\.blocks\.(\d+)\.attn\.proj\.{_LINEAR}", rf"{_BLOCK}.attention.o_proj.\3"),
    (
        r"backbone\.layers\.(\d)\.blocks\.(\d+)\.attn\.relative_position_bias_table",
        rf"{_BLOCK}.attention.relative_position_bias.relative_position_bias_table",
    ),
    (rf"backbone\.layers\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.{_LINEAR}", rf"{_BLOCK}.mlp.fc\3.\4"),
    (
        rf"backbone\.layers\.(\d)\.downsample\.(reduction|norm)\.{_LINEAR}",
        rf"{_ENCODER}.swin.encoder.layers.\1.downsample.\2.\3",
    ),
    (rf"backbone\.norm(\d)\.{_LINEAR}", rf"{_ENCODER}.hidden_states_norms.stage{{1+1}}.\2"),
    # Pixel decoder
    (r"sem_seg_head\.pixel_decoder\.transformer\.level_embed", f"{_PIXEL_DECODER}.level_embed"),
    (
        rf"sem_seg_head\.pixel_decoder\.input_proj\.(\d)\.([01])\.{_LINEAR}",
        rf"{_PIXEL_DECODER}.input_projections.\1.\2.\3",
    ),
    (
        r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn\."
        rf"(sampling_offsets|attention_weights|value_proj|output_proj)\.{_LINEAR}",
        rf"{_PIXEL_DECODER}.encoder.layers.\1.self_attn.\2.\3",
    ),
    (
        rf"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm1\.{_LINEAR}",
        rf"{_PIXEL_DECODER}.encoder.layers.\1.self_attn_layer_norm.\2",
    ),
    (
        rf"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm2\.{_LINEAR}",
        rf"{_PIXEL_DECODER}.encoder.layers.\1.final_layer_norm.\2",
    ),
    (
        rf"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.linear([12])\.{_LINEAR}",
        rf"{_PIXEL_DECODER}.encoder.layers.\1.fc\2.\3",
    ),
    (r"sem_seg_head\.pixel_decoder\.(adapter|layer)_(\d)\.weight", rf"{_PIXEL_DECODER}.\1_\2.0.weight"),
    (rf"sem_seg_head\.pixel_decoder\.(adapter|layer)_(\d)\.norm\.{_LINEAR}", rf"{_PIXEL_DECODER}.\1_\2.1.\3"),
    (rf"sem_seg_head\.pixel_decoder\.mask_features\.{_LINEAR}", rf"{_PIXEL_DECODER}.mask_projection.\1"),
    # Transformer decoder
    (r"sem_seg_head\.predictor\.query_feat\.weight", f"{_TRANSFORMER}.queries_features.weight"),
    (r"sem_seg_head\.predictor\.query_embed\.weight", f"{_TRANSFORMER}.queries_embedder.weight"),
    (r"sem_seg_head\.predictor\.level_embed\.weight", f"{_TRANSFORMER}.level_embed.weight"),
    (
        r"sem_seg_head\.predictor\.transformer_self_attention_layers\.(\d+)\.self_attn\.in_proj_(weight|bias)",
        [rf"{_DECODER_LAYER}.self_attn.{x}_proj.\2" for x in "qkv"],
    ),
    (
        rf"sem_seg_head\.predictor\.transformer_self_attention_layers\.(\d+)\.self_attn\.out_proj\.{_LINEAR}",
        rf"{_DECODER_LAYER}.self_attn.out_proj.\2",
    ),
    (
        rf"sem_seg_head\.predictor\.transformer_self_attention_layers\.(\d+)\.norm\.{_LINEAR}",
        rf"{_DECODER_LAYER}.self_attn_layer_norm.\2",
    ),
    (
        r"sem_seg_head\.predictor\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(in_proj_weight|in_proj_bias)",
        rf"{_DECODER_LAYER}.cross_attn.\2",
    ),
    (
        rf"sem_seg_head\.predictor\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.out_proj\.{_LINEAR}",
        rf"{_DECODER_LAYER}.cross_attn.out_proj.\2",
    ),
    (
        rf"sem_seg_head\.predictor\.transformer_cross_attention_layers\.(\d+)\.norm\.{_LINEAR}",
        rf"{_DECODER_LAYER}.cross_attn_layer_norm.\2",
    ),
    (
        rf"sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)\.linear([12])\.{_LINEAR}",
        rf"{_DECODER_LAYER}.fc\2.\3",
    ),
    (
        rf"sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)\.norm\.{_LINEAR}",
        rf"{_DECODER_LAYER}.final_layer_norm.\2",
    ),
    (rf"sem_seg_head\.predictor\.decoder_norm\.{_LINEAR}", rf"{_TRANSFORMER}.decoder.layernorm.\1"),
    (
        rf"sem_seg_head\.predictor\.mask_embed\.layers\.(\d)\.{_LINEAR}",
        rf"{_TRANSFORMER}.decoder.mask_predictor.mask_embedder.\1.0.\2",
    ),
    (rf"sem_seg_head\.predictor\.class_embed\.{_LINEAR}", r"class_predictor.\1"),
]

# Follows from the window size; theirs is not in the state dict. The test compares it by itself.
_OURS_ONLY = re.compile(r"backbone\.layers\.\d\.blocks\.\d+\.attn\.relative_position_index")
# A counter that only training reads, and a norm that their classifier uses and their backbone does not.
_THEIRS_ONLY = re.compile(rf".*\.num_batches_tracked|{re.escape(_ENCODER)}\.swin\.layernorm\.{_LINEAR}")


def their_keys(key: str) -> list[str]:
    """Their names of one of our tensors, in order along axis 0; [] where they lack it.

    Raises:
        ValueError: no rule covers the key, or more than one.
    """
    if _OURS_ONLY.fullmatch(key):
        return []
    found = [(match, names) for pattern, names in _RULES if (match := re.fullmatch(pattern, key))]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rules of the mapping cover our key {key!r}; exactly one must")
    match, names = found[0]
    return [_expand(match, name) for name in ([names] if isinstance(names, str) else names)]


def _expand(match: re.Match, template: str) -> str:
    shifted = re.sub(r"\{(\d)([+-]\d)\}", lambda m: str(int(match[int(m[1])]) + int(m[2])), template)
    return match.expand(shifted)


def convert_state_dict(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their names.

    Args:
        ours, theirs: state dicts of both; theirs is read for its names and shapes, and for what only it has.

    Returns:
        a state dict with exactly their names.

    Raises:
        ValueError: a tensor of either that is mapped not at all, twice or to another shape.
    """
    converted = {}
    for key, tensor in ours.items():
        names = their_keys(key)
        if not names:
            continue
        if tensor.shape[0] % len(names):
            raise ValueError(f"{key} of shape {tuple(tensor.shape)} does not split into {names}")
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            if name in converted:
                raise ValueError(f"{name} is mapped twice, the second time from {key}")
            if name not in theirs:
                raise ValueError(f"{key} is mapped to {name}, which they lack")
            if theirs[name].shape != part.shape:
                raise ValueError(
                    f"{key}: {tuple(part.shape)} here, {tuple(theirs[name].shape)} there ({name})"
                )
            converted[name] = part
    left = {name: tensor for name, tensor in theirs.items() if name not in converted}
    unmapped = [name for name in left if not _THEIRS_ONLY.fullmatch(name)]
    if unmapped:
        raise ValueError(f"nothing of ours is mapped to {unmapped}")
    return {**converted, **left}


def transformers_model(cfg) -> nn.Module:
    """Their Mask2FormerForUniversalSegmentation as our config describes it, in evaluation mode."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    head, mask_former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    config = Mask2FormerConfig(
        backbone_config=_backbone_config(cfg),
        num_labels=head.NUM_CLASSES,
        feature_size=head.CONVS_DIM,
        mask_feature_size=head.MASK_DIM,
        common_stride=head.COMMON_STRIDE,
        encoder_layers=head.TRANSFORMER_ENC_LAYERS,
        hidden_dim=mask_former.HIDDEN_DIM,
        decoder_layers=mask_former.DEC_LAYERS,
        num_attention_heads=mask_former.NHEADS,
        dim_feedforward=mask_former.DIM_FEEDFORWARD,
        dropout=mask_former.DROPOUT,
        pre_norm=mask_former.PRE_NORM,
        enforce_input_projection=mask_former.ENFORCE_INPUT_PROJ,
        num_queries=mask_former.NUM_OBJECT_QUERIES,
        no_object_weight=mask_former.NO_OBJECT_WEIGHT,
        class_weight=mask_former.CLASS_WEIGHT,
        mask_weight=mask_former.MASK_WEIGHT,
        dice_weight=mask_former.DICE_WEIGHT,
        train_num_points=mask_former.TRAIN_NUM_POINTS,
        oversample_ratio=mask_former.OVERSAMPLE_RATIO,
        importance_sample_ratio=mask_former.IMPORTANCE_SAMPLE_RATIO,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    # Their own arithmetic: by default their Swin calls the same function of torch as ours.
    model.model.pixel_level_module.encoder.set_attn_implementation("eager")
    return model


def _backbone_config(cfg):
    from transformers import ResNetConfig, SwinConfig

    if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":
        resnet = cfg.MODEL.RESNETS
        widths = [resnet.RES2_OUT_CHANNELS * 2**i for i in range(4)]
        return ResNetConfig(
            embedding_size=resnet.STEM_OUT_CHANNELS,
            hidden_sizes=widths,
            depths={50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[resnet.DEPTH],
            layer_type="bottleneck",
            downsample_in_bottleneck=resnet.STRIDE_IN_1X1,
            out_features=_STAGES,
        )
    if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        swin = cfg.MODEL.SWIN
        return SwinConfig(
            patch_size=swin.PATCH_SIZE,
            embed_dim=swin.EMBED_DIM,
            depths=swin.DEPTHS,
            num_heads=swin.NUM_HEADS,
            window_size=swin.WINDOW_SIZE,
            mlp_ratio=swin.MLP_RATIO,
            qkv_bias=swin.QKV_BIAS,
            drop_path_rate=swin.DROP_PATH_RATE,
            use_absolute_embeddings=swin.APE,
            out_features=_STAGES,
        )
    raise ValueError(f"no counterpart is known of MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r}")


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Give every weight of our model a value that matters to the output.

    Freshly made models hide faults: sampling offsets and attention logits of the encoder do not depend on the
    image, biases are zero, norms are the identity, all levels look alike. Here a layer about keeps the scale
    of its input, and offsets move by about a pixel.

    Two more things keep the masked attention at work. The decoder's attention logits have a scale of several,
    and its layers add less than what they add to; otherwise they average the queries until all are one. And
    the mask features' weights sum to zero over their inputs, which a ReLU made positive; otherwise most masks
    have one sign everywhere.

    Raises:
        ValueError: no rule gives a value to some parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    done = set()

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.empty(tensor.shape).normal_(mean, std, generator=generator))
        done.add(tensor)

    for prefix, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            normal(module.running_mean, 0.1)
            variance = torch.empty(module.running_var.shape).uniform_(0.5, 1.5, generator=generator)
            module.running_var.copy_(variance)
        if isinstance(module, (FrozenBatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            normal(module.weight, 0.2, mean=1.0)
            normal(module.bias, 0.1)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            adds_to_queries = re.search(r"predictor\..*(out_proj|linear2)$", prefix)
            gain = 0.5 if adds_to_queries else 1.0
            normal(module.weight, gain * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                normal(module.bias, 0.1)
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 0.3 if prefix.endswith("level_embed") else 1.0)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if name == "in_proj_weight":
                    channels = parameter.shape[1]
                    normal(parameter, channels**-0.5)
                    parameter[: 2 * channels] *= 3  # those of the queries and keys
                elif name == "in_proj_bias":
                    normal(parameter, 0.1)
                elif name in ("relative_position_bias_table", "level_embed"):
                    normal(parameter, 1.0)
    mask_weight = model.sem_seg_head.pixel_decoder.mask_features.weight
    mask_weight -= mask_weight.mean(dim=1, keepdim=True)
    left = [name for name, tensor in model.named_parameters() if tensor not in done]
    if left:
        raise ValueError(f"no rule gives a value to {left}")
