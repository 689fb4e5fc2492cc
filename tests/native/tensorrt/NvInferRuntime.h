// TensorRT's interfaces as far as csrc/trt_plugin implements or calls them, declared here for tests/d2_trt/test_plugin_sources.py:
// it compiles the plugins where there are no headers of TensorRT. Signatures are those of versions 8.6 and 10 to 11; the
// order of the functions is not, so that nothing that is compiled with this can run in a TensorRT.
//
// NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR and NV_TENSORRT_PATCH come from the command line.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

namespace nvinfer1 {

using AsciiChar = char;
using std::int32_t;
using std::size_t;

#if NV_TENSORRT_MAJOR >= 10
using Extent = std::int64_t;
enum class DataType : int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64, kINT4 };
#else
using Extent = std::int32_t;
enum class DataType : int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8 };
#endif
enum class TensorFormat : int32_t {
    kLINEAR, kCHW2, kHWC8, kCHW4, kCHW16, kCHW32, kDHWC8, kCDHW32, kHWC, kDLA_LINEAR, kDLA_HWC4, kHWC16, kDHWC
};
enum class PluginFieldType : int32_t { kFLOAT16, kFLOAT32, kFLOAT64, kINT8, kINT16, kINT32, kCHAR, kDIMS, kUNKNOWN };
enum class DimensionOperation : int32_t { kSUM, kPROD, kMAX, kMIN, kSUB, kEQUAL, kLESS, kFLOOR_DIV, kCEIL_DIV };

struct Dims {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    Extent d[MAX_DIMS];
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max;
#if NV_TENSORRT_MAJOR >= 10
    Dims opt;
#endif
};

struct PluginField {
    AsciiChar const* name = nullptr;
    void const* data = nullptr;
    PluginFieldType type = PluginFieldType::kUNKNOWN;
    int32_t length = 0;
    PluginField() = default;
    PluginField(AsciiChar const* name_, void const* data_, PluginFieldType type_, int32_t length_)
        : name(name_), data(data_), type(type_), length(length_) {}
};

struct PluginFieldCollection {
    int32_t nbFields;
    PluginField const* fields;
};

class IDimensionExpr;

struct DimsExprs {
    int32_t nbDims;
    IDimensionExpr const* d[Dims::MAX_DIMS];
};

class IExprBuilder {
public:
    virtual IDimensionExpr const* constant(Extent value) noexcept = 0;
    virtual IDimensionExpr const* operation(
        DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second) noexcept = 0;

protected:
    virtual ~IExprBuilder() noexcept = default;
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual void log(Severity severity, AsciiChar const* message) noexcept = 0;

protected:
    virtual ~ILogger() = default;
};

class ILoggerFinder {
public:
    virtual ILogger* findLogger() = 0;

protected:
    virtual ~ILoggerFinder() = default;
};

#if NV_TENSORRT_MAJOR < 10

class IPluginV2 {
public:
    virtual AsciiChar const* getPluginType() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual int32_t initialize() noexcept = 0;
    virtual void terminate() noexcept = 0;
    virtual size_t getSerializationSize() const noexcept = 0;
    virtual void serialize(void* buffer) const noexcept = 0;
    virtual void destroy() noexcept = 0;
    virtual void setPluginNamespace(AsciiChar const* name) noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;

protected:
    virtual ~IPluginV2() noexcept = default;
};

class IPluginV2DynamicExt : public IPluginV2 {
public:
    virtual IPluginV2DynamicExt* clone() const noexcept = 0;
    virtual DataType getOutputDataType(int32_t index, DataType const* inputs, int32_t count) const noexcept = 0;
    virtual DimsExprs getOutputDimensions(
        int32_t index, DimsExprs const* inputs, int32_t count, IExprBuilder& builder) noexcept = 0;
    virtual bool supportsFormatCombination(
        int32_t position, PluginTensorDesc const* tensors, int32_t inputs, int32_t outputs) noexcept = 0;
    virtual void configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out, int32_t outputs) noexcept = 0;
    virtual size_t getWorkspaceSize(
        PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out, int32_t outputs) const noexcept = 0;
    virtual int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept = 0;
};

class IPluginCreator {
public:
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
    virtual IPluginV2* createPlugin(AsciiChar const* name, PluginFieldCollection const* fields) noexcept = 0;
    virtual IPluginV2* deserializePlugin(AsciiChar const* name, void const* data, size_t length) noexcept = 0;
    virtual void setPluginNamespace(AsciiChar const* name) noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
    virtual ~IPluginCreator() = default;
};

#else

enum class PluginCapabilityType : int32_t { kCORE, kBUILD, kRUNTIME };
enum class TensorRTPhase : int32_t { kBUILD, kRUNTIME };

class IPluginResourceContext;

class IPluginCapability {
public:
    virtual ~IPluginCapability() noexcept = default;
};

class IPluginV3 {
public:
    virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
    virtual IPluginV3* clone() noexcept = 0;
    virtual ~IPluginV3() noexcept = default;
};

class IPluginV3OneCore : public IPluginCapability {
public:
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
public:
    virtual int32_t configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out, int32_t outputs) noexcept = 0;
    virtual int32_t getOutputDataTypes(
        DataType* types, int32_t outputs, DataType const* input_types, int32_t inputs) const noexcept = 0;
    virtual int32_t getOutputShapes(
        DimsExprs const* in, int32_t inputs, DimsExprs const* shape_inputs, int32_t shape_count, DimsExprs* out, int32_t outputs,
        IExprBuilder& builder) noexcept = 0;
    virtual bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs, int32_t outputs) noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual size_t getWorkspaceSize(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept {
        return 0;
    }
};

class IPluginV3OneRuntime : public IPluginCapability {
public:
    virtual int32_t onShapeChange(
        PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out, int32_t outputs) noexcept = 0;
    virtual int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept = 0;
    virtual IPluginV3* attachToContext(IPluginResourceContext* context) noexcept = 0;
    virtual PluginFieldCollection const* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface {
public:
    virtual ~IPluginCreatorInterface() noexcept = default;
};

class IPluginCreatorV3One : public IPluginCreatorInterface {
public:
    virtual IPluginV3* createPlugin(
        AsciiChar const* name, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept = 0;
    virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

#endif

}  // namespace nvinfer1
