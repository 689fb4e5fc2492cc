// How a TensorRT plugin of this library is written, once for IPluginV2DynamicExt (TensorRT 8.6, plugin_v2.cpp) and
// IPluginV3 (TensorRT 10 and newer, plugin_v3.cpp).
//
// A plugin is a copyable struct, its core, whose members are its fields: four-byte integers and floats that are given when
// the plugin is made, all of them required, and serialized with the engine. It has:
//
//     struct Core {
//         static constexpr char const* kName = "D2TRT...";  // both are written in d2_trt/plugin.py too; a plugin that
//         static constexpr char const* kVersion = "1";      // computes something else, or has other fields, is a new version
//
//         std::int32_t x_type = 0;
//         float epsilon = 0.0F;
//         static std::array<Field<Core>, 2> fields() {      // in the order in which they are serialized
//             return {{{"x_type", &Core::x_type}, {"epsilon", &Core::epsilon}}};
//         }
//
//         void check() const;                               // throws where the fields are not allowed
//         int inputs() const;                               // how many tensors, kMaxTensors at most together
//         int outputs() const;
//         nvinfer1::DataType output_type(int output) const;
//         void check_ranks(nvinfer1::Dims const* in) const; // throws; dimensions may still be -1
//         void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& builder) const;
//
//         // Whether tensor `at` (inputs first, then outputs) may have type and format of tensors[at], given those before it.
//         bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const;
//
//         // Bytes of scratch memory for shapes of at most these sizes; 0 where there is no need.
//         std::size_t workspace(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out) const;
//
//         // Launches on the stream, and neither waits nor allocates. Checks shapes; throws where they do not fit.
//         void enqueue(
//             nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out, void const* const* inputs,
//             void* const* outputs, void* workspace, cudaStream_t stream) const;
//     };
//
// Everything may throw: the wrappers tell TensorRT's log, and return an error where the interface has one to return.
// To add a plugin: write its core in a header here, list it in plugins.h, its kernels' folder in setup.py (PLUGIN_KERNELS)
// and its name and version in d2_trt/plugin.py (PLUGINS).
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/dtype.h"

namespace d2_trt::plugin {

inline constexpr char const* kNamespace = "d2_trt";
inline constexpr int kMaxTensors = 16;

// One field: its name and the member that holds it.
template <typename Core>
struct Field {
    char const* name;
    std::int32_t Core::*integer = nullptr;
    float Core::*real = nullptr;

    constexpr Field(char const* field, std::int32_t Core::*member) : name(field), integer(member) {}
    constexpr Field(char const* field, float Core::*member) : name(field), real(member) {}

    nvinfer1::PluginFieldType type() const {
        return integer != nullptr ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;
    }
    void* in(Core& core) const {
        return integer != nullptr ? static_cast<void*>(&(core.*integer)) : static_cast<void*>(&(core.*real));
    }
    void const* in(Core const& core) const { return in(const_cast<Core&>(core)); }
};

inline constexpr std::size_t kFieldBytes = 4;

template <typename Core>
inline constexpr std::size_t kFieldCount = std::tuple_size<decltype(Core::fields())>::value;

// The fields as TensorRT asks for them: names for those who use a creator, with values where they are serialized.
template <typename Core>
class FieldCollection {
public:
    explicit FieldCollection(Core const* core) {
        auto const fields = Core::fields();
        for (std::size_t i = 0; i < fields.size(); ++i) {
            fields_[i] = {fields[i].name, core != nullptr ? fields[i].in(*core) : nullptr, fields[i].type(), 1};
        }
        collection_.nbFields = static_cast<std::int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }
    FieldCollection(FieldCollection const&) = delete;
    FieldCollection& operator=(FieldCollection const&) = delete;
    nvinfer1::PluginFieldCollection const* get() const { return &collection_; }

private:
    std::array<nvinfer1::PluginField, kFieldCount<Core>> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

// A core from the fields that a creator is given, checked.
template <typename Core>
Core core_from_fields(nvinfer1::PluginFieldCollection const* given) {
    require(given != nullptr, "no fields");
    Core core;
    auto const fields = Core::fields();
    std::array<bool, kFieldCount<Core>> found{};
    for (std::int32_t i = 0; i < given->nbFields; ++i) {
        nvinfer1::PluginField const& field = given->fields[i];
        std::size_t at = 0;
        while (at < fields.size() && std::strcmp(field.name, fields[at].name) != 0) ++at;
        require(at < fields.size(), "unknown field ", field.name);
        require(
            field.type == fields[at].type() && field.length == 1 && field.data != nullptr, "field ", field.name, " must be one ",
            fields[at].integer != nullptr ? "int32" : "float32");
        std::memcpy(fields[at].in(core), field.data, kFieldBytes);
        found[at] = true;
    }
    for (std::size_t at = 0; at < fields.size(); ++at) require(found[at], "field ", fields[at].name, " is missing");
    core.check();
    return core;
}

// Types. Fields that hold one have the numbers of DType (common/dtype.h).

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

inline nvinfer1::DataType trt_type(std::int32_t field) { return trt_type(static_cast<DType>(field)); }

// Throws unless a field holds a type that this TensorRT has.
inline void check_type(char const* name, std::int32_t field) {
    require(field >= 0 && field <= 2, name, " is ", field, "; expected 0 (float32), 1 (float16) or 2 (bfloat16)");
    trt_type(field);
}

inline bool is_linear(nvinfer1::PluginTensorDesc const& desc, nvinfer1::DataType type) {
    return desc.format == nvinfer1::TensorFormat::kLINEAR && desc.type == type;
}

// Callbacks

// To TensorRT's log, where TensorRT lent us one.
void log_error(std::string const& what) noexcept;

// What `function` returns, or `otherwise`, with a message in the log, where it throws: TensorRT's callbacks must not.
template <typename Core, typename Result, typename Function>
Result guarded(char const* where, Result otherwise, Function&& function) noexcept {
    try {
        return function();
    } catch (std::exception const& error) {
        log_error(std::string(Core::kName) + "::" + where + ": " + error.what());
    } catch (...) {
        log_error(std::string(Core::kName) + "::" + where + ": unknown error");
    }
    return otherwise;
}

template <typename Core>
void require_counts(Core const& core, std::int32_t inputs, std::int32_t outputs) {
    require(
        inputs == core.inputs() && outputs == core.outputs(), inputs, " inputs and ", outputs, " outputs; expected ",
        core.inputs(), " and ", core.outputs());
    require(inputs + outputs <= kMaxTensors, inputs + outputs, " tensors; expected at most ", kMaxTensors);
}

// Checks the ranks of inputs that TensorRT describes while it builds.
template <typename Core>
void check_inputs(Core const& core, nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t inputs, std::int32_t outputs) {
    require_counts(core, inputs, outputs);
    nvinfer1::Dims dims[kMaxTensors];
    for (std::int32_t i = 0; i < inputs; ++i) dims[i] = in[i].desc.dims;
    core.check_ranks(dims);
}

}  // namespace d2_trt::plugin
