// What the TensorRT plugin of multi-scale deformable attention is, whatever interface of TensorRT it stands behind.
//
// Inputs, all LINEAR: value (B, S, heads, D); offsets (B, S, heads, levels, points, 2); logits (B, S, heads, levels *
// points); level sizes (levels, 2) int32: height and width. Output: (B, S, heads * D), of value's type. The level sizes
// are read on the device, so that one enqueue needs nothing from the host whatever the shapes.
#pragma once

#include <NvInferRuntime.h>

#include <cstring>
#include <string>

#include "ms_deform_attn/ms_deform_attn.h"

namespace d2_trt::plugin {

inline constexpr char const* kName = "D2TRTMSDeformAttn";
inline constexpr char const* kVersion = "1";
inline constexpr char const* kNamespace = "d2_trt";

enum Tensor : int { kValue = 0, kOffsets = 1, kLogits = 2, kLevelSizes = 3, kInputs = 4, kOut = 4, kTensors = 5 };

inline nvinfer1::DataType trt_type(DType type) {
    switch (type) {
        case DType::kFloat32: return nvinfer1::DataType::kFLOAT;
        case DType::kFloat16: return nvinfer1::DataType::kHALF;
#if NV_TENSORRT_MAJOR >= 10
        case DType::kBFloat16: return nvinfer1::DataType::kBF16;
#else
        case DType::kBFloat16: break;
#endif
    }
    require(false, "bfloat16 needs TensorRT 10 or newer; this plugin is for TensorRT ", NV_TENSORRT_MAJOR);
    return nvinfer1::DataType::kFLOAT;
}

// The types are fixed when the plugin is made: TensorRT then converts in front of it, and has no choice to time. Both are
// numbers of DType; they are also the plugin's fields, and what is serialized.
struct MsDeformAttnPlugin {
    std::int32_t value_type = 0;
    std::int32_t sampling_type = 0;  // of offsets and logits: float32, or value_type

    void check() const {
        for (std::int32_t type : {value_type, sampling_type}) {
            require(type >= 0 && type <= 2, "type ", type, "; expected 0 (float32), 1 (float16) or 2 (bfloat16)");
            trt_type(static_cast<DType>(type));
        }
        require(
            sampling_type == 0 || sampling_type == value_type, "sampling_type is ", sampling_type, "; expected 0 (float32) or ",
            value_type, ", that of the value");
    }

    static MsDeformAttnPlugin from_fields(nvinfer1::PluginFieldCollection const* fields) {
        require(fields != nullptr, "no fields");
        MsDeformAttnPlugin made{-1, -1};
        for (std::int32_t i = 0; i < fields->nbFields; ++i) {
            nvinfer1::PluginField const& field = fields->fields[i];
            bool const is_value = std::strcmp(field.name, "value_type") == 0;
            require(
                is_value || std::strcmp(field.name, "sampling_type") == 0, "unknown field ", field.name,
                "; expected value_type and sampling_type");
            require(
                field.type == nvinfer1::PluginFieldType::kINT32 && field.length == 1 && field.data != nullptr, "field ",
                field.name, " must be one int32");
            std::memcpy(is_value ? &made.value_type : &made.sampling_type, field.data, sizeof(std::int32_t));
        }
        require(
            made.value_type != -1 && made.sampling_type != -1, "field ",
            made.value_type == -1 ? "value_type" : "sampling_type", " is missing");
        made.check();
        return made;
    }

    nvinfer1::DataType out_type() const { return trt_type(static_cast<DType>(value_type)); }

    nvinfer1::DataType type_of(int tensor) const {
        if (tensor == kLevelSizes) return nvinfer1::DataType::kINT32;
        bool const sampling = tensor == kOffsets || tensor == kLogits;
        return trt_type(static_cast<DType>(sampling ? sampling_type : value_type));
    }

    bool supports(int tensor, nvinfer1::PluginTensorDesc const& desc) const {
        return tensor >= 0 && tensor < kTensors && desc.format == nvinfer1::TensorFormat::kLINEAR && desc.type == type_of(tensor);
    }

    static void check_ranks(nvinfer1::Dims const* dims) {
        constexpr std::int32_t kRanks[kInputs] = {4, 6, 4, 2};
        constexpr char const* kNames[kInputs] = {"value", "offsets", "logits", "level sizes"};
        for (int i = 0; i < kInputs; ++i) {
            require(
                dims[i].nbDims == kRanks[i], kNames[i], " has ", dims[i].nbDims, " dimensions; expected ", kRanks[i]);
        }
    }

    // (B, S, heads * D), as expressions over the inputs' dimensions.
    template <typename Exprs, typename Builder>
    static void out_dims(Exprs const* inputs, Exprs& out, Builder& builder) {
        require(inputs[kValue].nbDims == 4, "value has ", inputs[kValue].nbDims, " dimensions; expected 4");
        out.nbDims = 3;
        out.d[0] = inputs[kValue].d[0];
        out.d[1] = inputs[kValue].d[1];
        out.d[2] = builder.operation(nvinfer1::DimensionOperation::kPROD, *inputs[kValue].d[2], *inputs[kValue].d[3]);
        require(out.d[2] != nullptr, "TensorRT makes no dimension heads * D");
    }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, cudaStream_t stream) const {
        nvinfer1::Dims const dims[kInputs] = {in[0].dims, in[1].dims, in[2].dims, in[3].dims};
        check_ranks(dims);
        auto const& value = dims[kValue].d;
        auto const& offsets = dims[kOffsets].d;
        auto const& logits = dims[kLogits].d;
        MsDeformAttnSizes sizes;
        sizes.batch = value[0];
        sizes.pixels = value[1];
        sizes.heads = value[2];
        sizes.dim = value[3];
        sizes.levels = offsets[3];
        sizes.points = offsets[4];
        for (int i = 0; i < 3; ++i) {
            require(
                offsets[i] == value[i] && logits[i] == value[i], "dimension ", i, " of value, offsets and logits is ", value[i],
                ", ", offsets[i], " and ", logits[i], "; expected equal ones");
        }
        require(
            offsets[5] == 2 && logits[3] == offsets[3] * offsets[4], "offsets end in ", offsets[3], "x", offsets[4], "x",
            offsets[5], " and logits in ", logits[3], "; expected levels x points x 2 and levels * points");
        require(
            dims[kLevelSizes].d[0] == offsets[3] && dims[kLevelSizes].d[1] == 2, "level sizes are ", dims[kLevelSizes].d[0], "x",
            dims[kLevelSizes].d[1], "; expected ", offsets[3], "x2");
        MsDeformAttnTensors tensors;
        tensors.value = inputs[kValue];
        tensors.offsets = inputs[kOffsets];
        tensors.logits = inputs[kLogits];
        tensors.out = outputs[0];
        tensors.value_type = static_cast<DType>(value_type);
        tensors.sampling_type = static_cast<DType>(sampling_type);
        ms_deform_attn_device_levels(tensors, sizes, static_cast<std::int32_t const*>(inputs[kLevelSizes]), stream);
    }
};

// The fields as TensorRT asks for them: names to a creator's users, values to be serialized.
struct Fields {
    nvinfer1::PluginField fields[2];
    nvinfer1::PluginFieldCollection collection;
    explicit Fields(MsDeformAttnPlugin const* plugin)
        : fields{
              {"value_type", plugin ? &plugin->value_type : nullptr, nvinfer1::PluginFieldType::kINT32, 1},
              {"sampling_type", plugin ? &plugin->sampling_type : nullptr, nvinfer1::PluginFieldType::kINT32, 1}},
          collection{2, fields} {}
    Fields(Fields const&) = delete;
    Fields& operator=(Fields const&) = delete;
};

// To TensorRT's log, where TensorRT lent us one.
void log_error(std::string const& what) noexcept;

// What `function` returns, or `otherwise`, with a message in the log, where it throws: TensorRT's callbacks must not.
template <typename Function, typename Result>
Result guarded(char const* where, Result otherwise, Function&& function) noexcept {
    try {
        return function();
    } catch (std::exception const& error) {
        log_error(std::string(kName) + "::" + where + ": " + error.what());
    } catch (...) {
        log_error(std::string(kName) + "::" + where + ": unknown error");
    }
    return otherwise;
}

}  // namespace d2_trt::plugin
