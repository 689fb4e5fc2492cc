// The TensorRT plugin of GroupNorm, with a ReLU after it where asked for.
//
// Inputs: x (B, C, H, W); weight (C) and bias (C), float32, LINEAR. Output: as x. x and output are LINEAR, or both have their
// channels last (kHWC8 of 16-bit types, kHWC of float32), as TensorRT likes: the convolutions before and after it then need
// no reformatting. Statistics are float32 whatever the types.
#pragma once

#include <algorithm>

#include "normalization/normalization.h"
#include "trt_plugin/plugin.h"

namespace d2_trt::plugin {

// The types are fixed when the plugin is made: TensorRT then converts in front of it.
struct GroupNormPlugin {
    static constexpr char const* kName = "D2TRTGroupNorm";
    static constexpr char const* kVersion = "1";
    enum Tensor : int { kX = 0, kWeight = 1, kBias = 2, kOut = 3 };

    std::int32_t x_type = 0;
    std::int32_t out_type = 0;
    std::int32_t channels = 0;
    std::int32_t groups = 0;
    std::int32_t relu = 0;
    float epsilon = 0.0F;

    static std::array<Field<GroupNormPlugin>, 6> fields() {
        return {
            {{"x_type", &GroupNormPlugin::x_type},
             {"out_type", &GroupNormPlugin::out_type},
             {"channels", &GroupNormPlugin::channels},
             {"groups", &GroupNormPlugin::groups},
             {"relu", &GroupNormPlugin::relu},
             {"epsilon", &GroupNormPlugin::epsilon}}};
    }

    void check() const {
        check_type("x_type", x_type);
        check_type("out_type", out_type);
        require(
            groups >= 1 && channels >= groups && channels % groups == 0, channels, " channels in ", groups,
            " groups; expected a multiple of the groups");
        require(relu == 0 || relu == 1, "relu is ", relu, "; expected 0 or 1");
        require(epsilon >= 0.0F, "epsilon is ", epsilon, "; expected at least 0");
    }

    int inputs() const { return 3; }
    int outputs() const { return 1; }
    nvinfer1::DataType output_type(int) const { return trt_type(out_type); }

    static nvinfer1::TensorFormat channels_last(std::int32_t type) {
        return type == static_cast<std::int32_t>(DType::kFloat32) ? nvinfer1::TensorFormat::kHWC : nvinfer1::TensorFormat::kHWC8;
    }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        nvinfer1::PluginTensorDesc const& asked = tensors[at];
        switch (at) {
            case kX:
                return is_linear(asked, trt_type(x_type)) ||
                       (group_norm_takes_channels_last(channels, groups) && asked.type == trt_type(x_type) &&
                        asked.format == channels_last(x_type));
            case kWeight:
            case kBias: return is_linear(asked, nvinfer1::DataType::kFLOAT);
            case kOut:
                return asked.type == trt_type(out_type) &&
                       asked.format == (tensors[kX].format == nvinfer1::TensorFormat::kLINEAR ? nvinfer1::TensorFormat::kLINEAR
                                                                                             : channels_last(out_type));
            default: return false;
        }
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        constexpr std::int32_t kRanks[] = {4, 1, 1};
        constexpr char const* kNames[] = {"x", "weight", "bias"};
        for (int i = 0; i < 3; ++i) {
            require(in[i].nbDims == kRanks[i], kNames[i], " has ", in[i].nbDims, " dimensions; expected ", kRanks[i]);
        }
    }

    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder&) const { *out = in[kX]; }

    GroupNormSizes sizes_of(nvinfer1::PluginTensorDesc const* in) const {
        nvinfer1::Dims const dims[] = {in[0].dims, in[1].dims, in[2].dims};
        check_ranks(dims);
        for (int i = 0; i < 3; ++i) {
            require(
                dims[i].d[i == kX ? 1 : 0] == channels, i == kX ? "x" : "weight or bias", " has ", dims[i].d[i == kX ? 1 : 0],
                " channels; expected ", channels);
        }
        GroupNormSizes sizes;
        sizes.batch = dims[kX].d[0];
        sizes.channels = channels;
        sizes.pixels = static_cast<std::int64_t>(dims[kX].d[2]) * dims[kX].d[3];
        sizes.groups = groups;
        return sizes;
    }

    // Enough for either format.
    std::size_t workspace(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*) const {
        GroupNormSizes const sizes = sizes_of(in);
        std::size_t bytes = group_norm_workspace(sizes, MapLayout::kPlanar);
        if (group_norm_takes_channels_last(channels, groups)) {
            bytes = std::max(bytes, group_norm_workspace(sizes, MapLayout::kChannelsLast));
        }
        return bytes;
    }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) const {
        GroupNormTensors t;
        t.x = inputs[kX];
        t.weight = static_cast<float const*>(inputs[kWeight]);
        t.bias = static_cast<float const*>(inputs[kBias]);
        t.out = outputs[0];
        t.workspace = workspace;
        t.x_type = static_cast<DType>(x_type);
        t.out_type = static_cast<DType>(out_type);
        t.layout = in[kX].format == nvinfer1::TensorFormat::kLINEAR ? MapLayout::kPlanar : MapLayout::kChannelsLast;
        group_norm(t, sizes_of(in), epsilon, relu != 0, stream);
    }
};

}  // namespace d2_trt::plugin
