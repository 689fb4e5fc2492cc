// The TensorRT plugin of multi-scale deformable attention.
//
// Inputs, all LINEAR: value (B, S, heads, D); sampling (B, S, heads * levels * points * 3), of each pixel first all offsets
// (heads, levels, points, 2), then all logits (heads, levels * points), as one linear layer gives both; level sizes (levels, 2)
// int32: height and width. Output: (B, S, heads * D), of value's type. The level sizes are read on the device, so that one
// enqueue needs nothing from the host whatever the shapes.
#pragma once

#include "ms_deform_attn/ms_deform_attn.h"
#include "trt_plugin/plugin.h"

namespace d2_trt::plugin {

// The types are fixed when the plugin is made: TensorRT then converts in front of it, and has no choice to time.
struct MsDeformAttnPlugin {
    static constexpr char const* kName = "D2TRTMSDeformAttn";
    static constexpr char const* kVersion = "2";
    enum Tensor : int { kValue = 0, kSampling = 1, kLevelSizes = 2, kInputs = 3, kTensors = 4 };

    std::int32_t value_type = 0;
    std::int32_t sampling_type = 0;  // float32, or value_type

    static std::array<Field<MsDeformAttnPlugin>, 2> fields() {
        return {{{"value_type", &MsDeformAttnPlugin::value_type}, {"sampling_type", &MsDeformAttnPlugin::sampling_type}}};
    }

    void check() const {
        check_type("value_type", value_type);
        check_type("sampling_type", sampling_type);
        require(
            sampling_type == 0 || sampling_type == value_type, "sampling_type is ", sampling_type, "; expected 0 (float32) or ",
            value_type, ", that of the value");
    }

    int inputs() const { return kInputs; }
    int outputs() const { return 1; }
    nvinfer1::DataType output_type(int) const { return trt_type(value_type); }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        if (at < 0 || at >= kTensors) return false;
        if (at == kLevelSizes) return is_linear(tensors[at], nvinfer1::DataType::kINT32);
        return is_linear(tensors[at], trt_type(at == kSampling ? sampling_type : value_type));
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        constexpr std::int32_t kRanks[kInputs] = {4, 3, 2};
        constexpr char const* kNames[kInputs] = {"value", "sampling", "level sizes"};
        for (int i = 0; i < kInputs; ++i) {
            require(in[i].nbDims == kRanks[i], kNames[i], " has ", in[i].nbDims, " dimensions; expected ", kRanks[i]);
        }
    }

    // (B, S, heads * D)
    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& builder) const {
        require(in[kValue].nbDims == 4, "value has ", in[kValue].nbDims, " dimensions; expected 4");
        out->nbDims = 3;
        out->d[0] = in[kValue].d[0];
        out->d[1] = in[kValue].d[1];
        out->d[2] = builder.operation(nvinfer1::DimensionOperation::kPROD, *in[kValue].d[2], *in[kValue].d[3]);
        require(out->d[2] != nullptr, "TensorRT makes no dimension heads * D");
    }

    std::size_t workspace(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*) const { return 0; }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void*, cudaStream_t stream) const {
        nvinfer1::Dims const dims[kInputs] = {in[0].dims, in[1].dims, in[2].dims};
        check_ranks(dims);
        auto const& value = dims[kValue].d;
        auto const& sampling = dims[kSampling].d;
        auto const& levels = dims[kLevelSizes].d;
        require(levels[0] >= 1 && levels[1] == 2, "level sizes are ", levels[0], "x", levels[1], "; expected levels x 2");
        for (int i = 0; i < 2; ++i) {
            require(
                sampling[i] == value[i], "dimension ", i, " of value and sampling is ", value[i], " and ", sampling[i],
                "; expected equal ones");
        }
        std::int64_t const of_a_point = std::int64_t{3} * value[2] * levels[0];
        require(
            of_a_point > 0 && sampling[2] % of_a_point == 0, "sampling has ", sampling[2], " channels for ", value[2],
            " heads and ", levels[0], " levels; expected a multiple of ", of_a_point);
        MsDeformAttnSizes sizes;
        sizes.batch = value[0];
        sizes.pixels = value[1];
        sizes.heads = value[2];
        sizes.dim = value[3];
        sizes.levels = levels[0];
        sizes.points = sampling[2] / of_a_point;
        sizes.offsets_stride = sizes.logits_stride = sampling[2];
        MsDeformAttnTensors tensors;
        tensors.value = inputs[kValue];
        tensors.offsets = inputs[kSampling];
        tensors.logits = static_cast<unsigned char const*>(inputs[kSampling]) +
                         sampling[2] / 3 * 2 * size_of(static_cast<DType>(sampling_type));
        tensors.out = outputs[0];
        tensors.value_type = static_cast<DType>(value_type);
        tensors.sampling_type = static_cast<DType>(sampling_type);
        ms_deform_attn_device_levels(tensors, sizes, static_cast<std::int32_t const*>(inputs[kLevelSizes]), stream);
    }
};

}  // namespace d2_trt::plugin
