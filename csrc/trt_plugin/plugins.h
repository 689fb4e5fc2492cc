// The plugins of the library. d2_trt/plugin.py has the same list.
#pragma once

#include "trt_plugin/attention_core.h"
#include "trt_plugin/group_norm_core.h"
#include "trt_plugin/layer_norm_core.h"
#include "trt_plugin/mask_features_core.h"
#include "trt_plugin/mlp_core.h"
#include "trt_plugin/ms_deform_attn_core.h"
#include "trt_plugin/normalize_images_core.h"
#include "trt_plugin/window_attention_core.h"

namespace d2_trt::plugin {

template <typename... Cores>
struct PluginList {};

using Plugins = PluginList<
    AttentionPlugin, GroupNormPlugin, LayerNormPlugin, LevelMaskFeaturesPlugin, MaskProductPlugin, MlpPlugin,
    MsDeformAttnPlugin, NormalizeImagesPlugin, WindowAttentionPlugin>;

}  // namespace d2_trt::plugin
