// The plugin as IPluginV2DynamicExt, for TensorRT 8.6.
#include "trt_plugin/ms_deform_attn_core.h"

#if NV_TENSORRT_MAJOR < 10

// TensorRT 8.6 deprecates its own base classes, before there is anything to take their place.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace d2_trt::plugin {
namespace {

using namespace nvinfer1;

struct Serialized {
    std::int32_t format = 1;
    MsDeformAttnPlugin core;
};

class PluginV2 final : public IPluginV2DynamicExt {
public:
    PluginV2(MsDeformAttnPlugin const& core, std::string name_space) : core_(core), namespace_(std::move(name_space)) {}

    AsciiChar const* getPluginType() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    void setPluginNamespace(AsciiChar const* name) noexcept override {
        guarded("setPluginNamespace", 0, [&] { return namespace_ = name ? name : "", 0; });
    }
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    IPluginV2DynamicExt* clone() const noexcept override {
        return guarded("clone", static_cast<PluginV2*>(nullptr), [&] { return new PluginV2(core_, namespace_); });
    }

    DataType getOutputDataType(int32_t, DataType const*, int32_t) const noexcept override {
        return guarded("getOutputDataType", DataType::kFLOAT, [&] { return core_.out_type(); });
    }
    DimsExprs getOutputDimensions(
        int32_t index, DimsExprs const* inputs, int32_t count, IExprBuilder& builder) noexcept override {
        return guarded("getOutputDimensions", DimsExprs{}, [&] {
            require(index == 0 && count == kInputs, count, " inputs, output ", index, "; expected ", int(kInputs), " and 0");
            DimsExprs out{};
            MsDeformAttnPlugin::out_dims(inputs, out, builder);
            return out;
        });
    }
    bool supportsFormatCombination(
        int32_t position, PluginTensorDesc const* tensors, int32_t inputs, int32_t outputs) noexcept override {
        return guarded("supportsFormatCombination", false, [&] {
            return inputs == kInputs && outputs == 1 && core_.supports(position, tensors[position]);
        });
    }
    // Returns nothing in this interface: what does not fit is told here, and fails in enqueue.
    void configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t) noexcept override {
        guarded("configurePlugin", 0, [&] {
            require(inputs == kInputs, inputs, " inputs; expected ", int(kInputs));
            Dims const dims[kInputs] = {in[0].desc.dims, in[1].desc.dims, in[2].desc.dims, in[3].desc.dims};
            MsDeformAttnPlugin::check_ranks(dims);
            return 0;
        });
    }
    size_t getWorkspaceSize(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) const noexcept override {
        return 0;
    }
    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void*,
        cudaStream_t stream) noexcept override {
        return guarded("enqueue", 1, [&] { return core_.enqueue(in, inputs, outputs, stream), 0; });
    }

    size_t getSerializationSize() const noexcept override { return sizeof(Serialized); }
    void serialize(void* buffer) const noexcept override {
        Serialized const content{1, core_};
        std::memcpy(buffer, &content, sizeof content);
    }

private:
    MsDeformAttnPlugin core_;
    std::string namespace_;
};

class CreatorV2 final : public IPluginCreator {
public:
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_.collection; }
    AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    // The registry tells under which namespace it keeps the creator, which plans then name.
    void setPluginNamespace(AsciiChar const* name) noexcept override {
        guarded("setPluginNamespace", 0, [&] { return namespace_ = name ? name : "", 0; });
    }
    IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const* fields) noexcept override {
        return guarded("createPlugin", static_cast<PluginV2*>(nullptr), [&] {
            return new PluginV2(MsDeformAttnPlugin::from_fields(fields), namespace_);
        });
    }
    IPluginV2* deserializePlugin(AsciiChar const*, void const* data, size_t length) noexcept override {
        return guarded("deserializePlugin", static_cast<PluginV2*>(nullptr), [&] {
            Serialized content;
            require(
                data != nullptr && length == sizeof content, length, " bytes of a serialized plugin; expected ",
                sizeof content);
            std::memcpy(&content, data, sizeof content);
            require(content.format == 1, "serialized in format ", content.format, "; expected 1");
            content.core.check();
            return new PluginV2(content.core, namespace_);
        });
    }

private:
    Fields fields_{nullptr};
    std::string namespace_ = kNamespace;
};

}  // namespace
}  // namespace d2_trt::plugin

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreator* const* getPluginCreators(std::int32_t& count) {
    static d2_trt::plugin::CreatorV2 creator;
    static nvinfer1::IPluginCreator* const creators[] = {&creator};
    count = 1;
    return creators;
}

#endif  // NV_TENSORRT_MAJOR < 10
