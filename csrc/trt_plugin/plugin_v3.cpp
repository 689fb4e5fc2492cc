// The plugin as IPluginV3, for TensorRT 10 and newer.
#include "trt_plugin/ms_deform_attn_core.h"

#if NV_TENSORRT_MAJOR >= 10

namespace d2_trt::plugin {
namespace {

using namespace nvinfer1;

class PluginV3 final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit PluginV3(MsDeformAttnPlugin const& core) : core_(core) {}
    PluginV3(PluginV3 const&) = delete;  // fields_ points into core_
    PluginV3& operator=(PluginV3 const&) = delete;

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override {
        return guarded("clone", static_cast<PluginV3*>(nullptr), [&] { return new PluginV3(core_); });
    }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const*, int32_t inputs) const noexcept override {
        return guarded("getOutputDataTypes", 1, [&] {
            require(inputs == kInputs && outputs == 1, inputs, " inputs and ", outputs, " outputs; expected ", int(kInputs), ", 1");
            types[0] = core_.out_type();
            return 0;
        });
    }
    int32_t getOutputShapes(
        DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
        IExprBuilder& builder) noexcept override {
        return guarded("getOutputShapes", 1, [&] {
            require(count == kInputs, count, " inputs; expected ", int(kInputs));
            MsDeformAttnPlugin::out_dims(inputs, outputs[0], builder);
            return 0;
        });
    }
    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs, int32_t outputs) noexcept override {
        return guarded("supportsFormatCombination", false, [&] {
            return inputs == kInputs && outputs == 1 && core_.supports(position, tensors[position].desc);
        });
    }
    int32_t configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return guarded("configurePlugin", 1, [&] {
            require(inputs == kInputs, inputs, " inputs; expected ", int(kInputs));
            Dims const dims[kInputs] = {in[0].desc.dims, in[1].desc.dims, in[2].desc.dims, in[3].desc.dims};
            MsDeformAttnPlugin::check_ranks(dims);
            return 0;
        });
    }

    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override { return 0; }
    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void*,
        cudaStream_t stream) noexcept override {
        return guarded("enqueue", 1, [&] { return core_.enqueue(in, inputs, outputs, stream), 0; });
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields_.collection; }

private:
    MsDeformAttnPlugin core_;
    Fields fields_{&core_};
};

class CreatorV3 final : public IPluginCreatorV3One {
public:
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_.collection; }
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        return guarded("createPlugin", static_cast<PluginV3*>(nullptr), [&] {
            return new PluginV3(MsDeformAttnPlugin::from_fields(fields));
        });
    }

private:
    Fields fields_{nullptr};
};

}  // namespace
}  // namespace d2_trt::plugin

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    static d2_trt::plugin::CreatorV3 creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

#endif  // NV_TENSORRT_MAJOR >= 10
