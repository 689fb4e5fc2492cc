// The plugins as IPluginV2DynamicExt, for TensorRT 8.6; see plugin.h.
#include "trt_plugin/plugins.h"

#if NV_TENSORRT_MAJOR < 10

// TensorRT 8.6 deprecates its own base classes, before there is anything to take their place.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace d2_trt::plugin {
namespace {

using namespace nvinfer1;

// What is serialized: a number of the format, then the fields in their order.
constexpr std::int32_t kFormat = 1;

template <typename Core>
constexpr std::size_t kSerializedBytes = sizeof kFormat + kFieldCount<Core>* kFieldBytes;

template <typename Core>
void write(Core const& core, void* buffer) {
    char* at = static_cast<char*>(buffer);
    std::memcpy(at, &kFormat, sizeof kFormat);
    at += sizeof kFormat;
    for (auto const& field : Core::fields()) {
        std::memcpy(at, field.in(core), kFieldBytes);
        at += kFieldBytes;
    }
}

template <typename Core>
Core read(void const* data, std::size_t length) {
    require(
        data != nullptr && length == kSerializedBytes<Core>, length, " bytes of a serialized plugin; expected ",
        kSerializedBytes<Core>);
    char const* at = static_cast<char const*>(data);
    std::int32_t format = 0;
    std::memcpy(&format, at, sizeof format);
    require(format == kFormat, "serialized in format ", format, "; expected ", kFormat);
    at += sizeof format;
    Core core;
    for (auto const& field : Core::fields()) {
        std::memcpy(field.in(core), at, kFieldBytes);
        at += kFieldBytes;
    }
    core.check();
    return core;
}

template <typename Core>
class PluginV2 final : public IPluginV2DynamicExt {
public:
    PluginV2(Core const& core, std::string name_space) : core_(core), namespace_(std::move(name_space)) {}

    AsciiChar const* getPluginType() const noexcept override { return Core::kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return Core::kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    void setPluginNamespace(AsciiChar const* name) noexcept override {
        guarded<Core>("setPluginNamespace", 0, [&] { return namespace_ = name ? name : "", 0; });
    }
    int32_t getNbOutputs() const noexcept override { return core_.outputs(); }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    IPluginV2DynamicExt* clone() const noexcept override {
        return guarded<Core>("clone", static_cast<PluginV2*>(nullptr), [&] { return new PluginV2(core_, namespace_); });
    }

    DataType getOutputDataType(int32_t index, DataType const*, int32_t) const noexcept override {
        return guarded<Core>("getOutputDataType", DataType::kFLOAT, [&] { return core_.output_type(index); });
    }
    DimsExprs getOutputDimensions(
        int32_t index, DimsExprs const* inputs, int32_t count, IExprBuilder& builder) noexcept override {
        return guarded<Core>("getOutputDimensions", DimsExprs{}, [&] {
            require_counts(core_, count, core_.outputs());
            require(index >= 0 && index < core_.outputs(), "output ", index, "; expected 0 to ", core_.outputs() - 1);
            DimsExprs out[kMaxTensors]{};
            core_.output_dims(inputs, out, builder);
            return out[index];
        });
    }
    bool supportsFormatCombination(
        int32_t position, PluginTensorDesc const* tensors, int32_t inputs, int32_t outputs) noexcept override {
        return guarded<Core>("supportsFormatCombination", false, [&] {
            return inputs == core_.inputs() && outputs == core_.outputs() && core_.supports(position, tensors);
        });
    }
    // Returns nothing in this interface: what does not fit is told here, and fails in enqueue.
    void configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t outputs) noexcept override {
        guarded<Core>("configurePlugin", 0, [&] { return check_inputs(core_, in, inputs, outputs), 0; });
    }
    size_t getWorkspaceSize(
        PluginTensorDesc const* in, int32_t, PluginTensorDesc const* out, int32_t) const noexcept override {
        return guarded<Core>("getWorkspaceSize", size_t{0}, [&] { return core_.workspace(in, out); });
    }
    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept override {
        return guarded<Core>(
            "enqueue", 1, [&] { return core_.enqueue(in, out, inputs, outputs, workspace, stream), 0; });
    }

    size_t getSerializationSize() const noexcept override { return kSerializedBytes<Core>; }
    void serialize(void* buffer) const noexcept override { write(core_, buffer); }

private:
    Core core_;
    std::string namespace_;
};

template <typename Core>
class CreatorV2 final : public IPluginCreator {
public:
    AsciiChar const* getPluginName() const noexcept override { return Core::kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return Core::kVersion; }
    PluginFieldCollection const* getFieldNames() noexcept override { return fields_.get(); }
    AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    // The registry tells under which namespace it keeps the creator, which plans then name.
    void setPluginNamespace(AsciiChar const* name) noexcept override {
        guarded<Core>("setPluginNamespace", 0, [&] { return namespace_ = name ? name : "", 0; });
    }
    IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const* fields) noexcept override {
        return guarded<Core>("createPlugin", static_cast<PluginV2<Core>*>(nullptr), [&] {
            return new PluginV2<Core>(core_from_fields<Core>(fields), namespace_);
        });
    }
    IPluginV2* deserializePlugin(AsciiChar const*, void const* data, size_t length) noexcept override {
        return guarded<Core>("deserializePlugin", static_cast<PluginV2<Core>*>(nullptr), [&] {
            return new PluginV2<Core>(read<Core>(data, length), namespace_);
        });
    }

private:
    FieldCollection<Core> fields_{nullptr};
    std::string namespace_ = kNamespace;
};

template <typename... Cores>
IPluginCreator* const* creators_of(PluginList<Cores...>, std::int32_t& count) {
    static std::tuple<CreatorV2<Cores>...> creators;
    static std::array<IPluginCreator*, sizeof...(Cores)> const pointers =
        std::apply([](auto&... creator) { return std::array<IPluginCreator*, sizeof...(Cores)>{&creator...}; }, creators);
    count = sizeof...(Cores);
    return pointers.data();
}

}  // namespace
}  // namespace d2_trt::plugin

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreator* const* getPluginCreators(std::int32_t& count) {
    return d2_trt::plugin::creators_of(d2_trt::plugin::Plugins{}, count);
}

#endif  // NV_TENSORRT_MAJOR < 10
