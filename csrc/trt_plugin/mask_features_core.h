// The TensorRT plugins that read the mask features, channels last (kHWC8), which is how convolutions leave them.
//
// D2TRTLevelMaskFeatures: mask features (B, C, H, W) -> (B, h * w, C), resized by 1 / `factor`, sides rounded up. Both of
// `type`; the output is LINEAR.
// D2TRTMaskProduct: mask embedding (B, Q, C) float32 LINEAR and mask features (B, C, H, W) of `type` -> mask logits
// (B, Q, H, W) float32 LINEAR.
#pragma once

#include "attention/attention.h"
#include "attention/mask_features.h"
#include "trt_plugin/plugin.h"

namespace d2_trt::plugin {

inline void check_half_type(std::int32_t type) {
    require(type == 1 || type == 2, "type is ", type, "; expected 1 (float16) or 2 (bfloat16)");
    check_type("type", type);
}

inline bool is_channels_last(nvinfer1::PluginTensorDesc const& desc, std::int32_t type) {
    return desc.format == nvinfer1::TensorFormat::kHWC8 && desc.type == trt_type(type);
}

struct LevelMaskFeaturesPlugin {
    static constexpr char const* kName = "D2TRTLevelMaskFeatures";
    static constexpr char const* kVersion = "1";

    std::int32_t type = 1;    // float16 or bfloat16
    std::int32_t factor = 1;  // of the level's stride to that of the features

    static std::array<Field<LevelMaskFeaturesPlugin>, 2> fields() {
        return {{{"type", &LevelMaskFeaturesPlugin::type}, {"factor", &LevelMaskFeaturesPlugin::factor}}};
    }

    void check() const {
        check_half_type(type);
        require(factor >= 1 && factor <= 64, "factor is ", factor, "; expected 1 to 64");
    }

    int inputs() const { return 1; }
    int outputs() const { return 1; }
    nvinfer1::DataType output_type(int) const { return trt_type(type); }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        return at == 0 ? is_channels_last(tensors[0], type) : at == 1 && is_linear(tensors[1], trt_type(type));
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        require(in[0].nbDims == 4, "mask features have ", in[0].nbDims, " dimensions; expected 4");
    }

    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& builder) const {
        require(in[0].nbDims == 4, "mask features have ", in[0].nbDims, " dimensions; expected 4");
        nvinfer1::IDimensionExpr const* const by = builder.constant(factor);
        require(by != nullptr, "TensorRT makes no constant dimension");
        auto const side = [&](int i) {
            return builder.operation(nvinfer1::DimensionOperation::kCEIL_DIV, *in[0].d[i], *by);
        };
        auto const* const height = side(2);
        auto const* const width = side(3);
        require(height != nullptr && width != nullptr, "TensorRT makes no dimension H / factor");
        out->nbDims = 3;
        out->d[0] = in[0].d[0];
        out->d[1] = builder.operation(nvinfer1::DimensionOperation::kPROD, *height, *width);
        out->d[2] = in[0].d[1];
        require(out->d[1] != nullptr, "TensorRT makes no dimension h * w");
    }

    std::size_t workspace(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*) const { return 0; }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void*, cudaStream_t stream) const {
        check_ranks(&in[0].dims);
        auto const& dims = in[0].dims.d;
        ResizeSizes sizes;
        sizes.batch = dims[0];
        sizes.channels = dims[1];
        sizes.height = dims[2];
        sizes.width = dims[3];
        sizes.out_height = (sizes.height + factor - 1) / factor;
        sizes.out_width = (sizes.width + factor - 1) / factor;
        resize_mask_features(inputs[0], outputs[0], static_cast<DType>(type), sizes, stream);
    }
};

struct MaskProductPlugin {
    static constexpr char const* kName = "D2TRTMaskProduct";
    static constexpr char const* kVersion = "1";

    std::int32_t type = 1;  // of the features: float16 or bfloat16

    static std::array<Field<MaskProductPlugin>, 1> fields() { return {{{"type", &MaskProductPlugin::type}}}; }

    void check() const { check_half_type(type); }

    int inputs() const { return 2; }
    int outputs() const { return 1; }
    nvinfer1::DataType output_type(int) const { return nvinfer1::DataType::kFLOAT; }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        if (at == 1) return is_channels_last(tensors[1], type);
        return (at == 0 || at == 2) && is_linear(tensors[at], nvinfer1::DataType::kFLOAT);
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        require(in[0].nbDims == 3, "mask embedding has ", in[0].nbDims, " dimensions; expected 3");
        require(in[1].nbDims == 4, "mask features have ", in[1].nbDims, " dimensions; expected 4");
    }

    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder&) const {
        require(in[0].nbDims == 3 && in[1].nbDims == 4, "inputs have ", in[0].nbDims, " and ", in[1].nbDims, " dimensions");
        out->nbDims = 4;
        out->d[0] = in[0].d[0];
        out->d[1] = in[0].d[1];
        out->d[2] = in[1].d[2];
        out->d[3] = in[1].d[3];
    }

    std::size_t workspace(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*) const { return 0; }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void*, cudaStream_t stream) const {
        nvinfer1::Dims const dims[2] = {in[0].dims, in[1].dims};
        check_ranks(dims);
        auto const& embed = dims[0].d;
        auto const& features = dims[1].d;
        require(
            embed[0] == features[0] && embed[2] == features[1], "a mask embedding of batch ", embed[0], " with ", embed[2],
            " channels, and mask features of batch ", features[0], " with ", features[1], "; expected equal ones");
        mask_product(
            static_cast<float const*>(inputs[0]), inputs[1], static_cast<float*>(outputs[0]), static_cast<DType>(type),
            embed[0], embed[1], static_cast<std::int64_t>(features[2]) * features[3], embed[2], stream);
    }
};

}  // namespace d2_trt::plugin
