// The plugins as IPluginV3, for TensorRT 10 and newer; see plugin.h.
#include "trt_plugin/plugins.h"

#if NV_TENSORRT_MAJOR >= 10

namespace d2_trt::plugin {
namespace {

using namespace nvinfer1;

template <typename Core>
class PluginV3 final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit PluginV3(Core const& core) : core_(core) {}
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
        return guarded<Core>("clone", static_cast<PluginV3*>(nullptr), [&] { return new PluginV3(core_); });
    }

    AsciiChar const* getPluginName() const noexcept override { return Core::kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return Core::kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return core_.outputs(); }
    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const*, int32_t inputs) const noexcept override {
        return guarded<Core>("getOutputDataTypes", 1, [&] {
            require_counts(core_, inputs, outputs);
            for (int32_t i = 0; i < outputs; ++i) types[i] = core_.output_type(i);
            return 0;
        });
    }
    int32_t getOutputShapes(
        DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out, int32_t outputs,
        IExprBuilder& builder) noexcept override {
        return guarded<Core>("getOutputShapes", 1, [&] {
            require_counts(core_, inputs, outputs);
            core_.output_dims(in, out, builder);
            return 0;
        });
    }
    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs, int32_t outputs) noexcept override {
        return guarded<Core>("supportsFormatCombination", false, [&] {
            require_counts(core_, inputs, outputs);
            if (position < 0 || position >= inputs + outputs) return false;
            PluginTensorDesc descs[kMaxTensors];
            for (int32_t i = 0; i <= position; ++i) descs[i] = tensors[i].desc;
            return core_.supports(position, descs);
        });
    }
    int32_t configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t outputs) noexcept override {
        return guarded<Core>("configurePlugin", 1, [&] { return check_inputs(core_, in, inputs, outputs), 0; });
    }
    size_t getWorkspaceSize(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out,
        int32_t outputs) const noexcept override {
        return guarded<Core>("getWorkspaceSize", size_t{0}, [&] {
            require_counts(core_, inputs, outputs);
            PluginTensorDesc descs[kMaxTensors];
            for (int32_t i = 0; i < inputs + outputs; ++i) {
                DynamicPluginTensorDesc const& tensor = i < inputs ? in[i] : out[i - inputs];
                descs[i] = tensor.desc;
                descs[i].dims = tensor.max;
            }
            return core_.workspace(descs, descs + inputs);
        });
    }

    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override { return 0; }
    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept override {
        return guarded<Core>(
            "enqueue", 1, [&] { return core_.enqueue(in, out, inputs, outputs, workspace, stream), 0; });
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return fields_.get(); }

private:
    Core core_;
    FieldCollection<Core> fields_{&core_};
};

template <typename Core>
class CreatorV3 final : public IPluginCreatorV3One {
public:
    AsciiChar const* getPluginName() const noexcept override { return Core::kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return Core::kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
    PluginFieldCollection const* getFieldNames() noexcept override { return fields_.get(); }
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        return guarded<Core>("createPlugin", static_cast<PluginV3<Core>*>(nullptr), [&] {
            return new PluginV3<Core>(core_from_fields<Core>(fields));
        });
    }

private:
    FieldCollection<Core> fields_{nullptr};
};

template <typename... Cores>
IPluginCreatorInterface* const* creators_of(PluginList<Cores...>, std::int32_t& count) {
    static std::tuple<CreatorV3<Cores>...> creators;
    static std::array<IPluginCreatorInterface*, sizeof...(Cores)> const pointers = std::apply(
        [](auto&... creator) { return std::array<IPluginCreatorInterface*, sizeof...(Cores)>{&creator...}; }, creators);
    count = sizeof...(Cores);
    return pointers.data();
}

}  // namespace
}  // namespace d2_trt::plugin

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    return d2_trt::plugin::creators_of(d2_trt::plugin::Plugins{}, count);
}

#endif  // NV_TENSORRT_MAJOR >= 10
