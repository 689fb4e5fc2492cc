// The TensorRT plugin of LayerNorm over the last dimension, of a tensor or of the sum of two.
//
// Inputs, all LINEAR: x (..., C); weight (C) and bias (C), float32; where residual_type is not -1, residual of x's shape.
// Output: LayerNorm(x + residual), of x's shape. Sum and statistics are float32 whatever the types.
#pragma once

#include "normalization/normalization.h"
#include "trt_plugin/plugin.h"

namespace d2_trt::plugin {

// The types are fixed when the plugin is made: TensorRT then converts in front of it, and has no choice to time.
struct LayerNormPlugin {
    static constexpr char const* kName = "D2TRTLayerNorm";
    static constexpr char const* kVersion = "1";
    enum Tensor : int { kX = 0, kWeight = 1, kBias = 2, kResidual = 3 };
    static constexpr std::int32_t kNone = -1;

    std::int32_t x_type = 0;
    std::int32_t residual_type = kNone;
    std::int32_t out_type = 0;
    float epsilon = 0.0F;

    static std::array<Field<LayerNormPlugin>, 4> fields() {
        return {
            {{"x_type", &LayerNormPlugin::x_type},
             {"residual_type", &LayerNormPlugin::residual_type},
             {"out_type", &LayerNormPlugin::out_type},
             {"epsilon", &LayerNormPlugin::epsilon}}};
    }

    void check() const {
        check_type("x_type", x_type);
        if (residual_type != kNone) check_type("residual_type", residual_type);
        check_type("out_type", out_type);
        require(epsilon >= 0.0F, "epsilon is ", epsilon, "; expected at least 0");
    }

    int inputs() const { return residual_type == kNone ? 3 : 4; }
    int outputs() const { return 1; }
    nvinfer1::DataType output_type(int) const { return trt_type(out_type); }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        if (at < 0 || at > inputs()) return false;
        std::int32_t const types[] = {x_type, 0, 0, at == inputs() ? out_type : residual_type, out_type};
        return is_linear(tensors[at], trt_type(types[at]));
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        require(in[kX].nbDims >= 1, "x has no dimension; expected at least 1");
        for (int i : {kWeight, kBias}) {
            require(in[i].nbDims == 1, i == kWeight ? "weight" : "bias", " has ", in[i].nbDims, " dimensions; expected 1");
        }
        if (residual_type != kNone) {
            require(
                in[kResidual].nbDims == in[kX].nbDims, "residual has ", in[kResidual].nbDims, " dimensions and x ",
                in[kX].nbDims, "; expected equal ones");
        }
    }

    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder&) const { *out = in[kX]; }

    std::size_t workspace(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*) const { return 0; }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void*, cudaStream_t stream) const {
        bool const added = residual_type != kNone;
        auto const& x = in[kX].dims;
        require(x.nbDims >= 1, "x has no dimension; expected at least 1");
        std::int64_t const channels = x.d[x.nbDims - 1];
        std::int64_t rows = 1;
        for (int i = 0; i < x.nbDims; ++i) {
            if (i + 1 < x.nbDims) rows *= x.d[i];
            require(
                !added || (in[kResidual].dims.nbDims == x.nbDims && in[kResidual].dims.d[i] == x.d[i]),
                "x and residual differ in dimension ", i, "; expected equal shapes");
        }
        for (int i : {kWeight, kBias}) {
            require(
                in[i].dims.nbDims == 1 && in[i].dims.d[0] == channels, i == kWeight ? "weight" : "bias", " has ",
                in[i].dims.d[0], " elements; expected the ", channels, " channels of x");
        }
        LayerNormTensors t;
        t.x = inputs[kX];
        t.weight = static_cast<float const*>(inputs[kWeight]);
        t.bias = static_cast<float const*>(inputs[kBias]);
        t.residual = added ? inputs[kResidual] : nullptr;
        t.out = outputs[0];
        t.x_type = static_cast<DType>(x_type);
        t.residual_type = added ? static_cast<DType>(residual_type) : DType::kFloat32;
        t.out_type = static_cast<DType>(out_type);
        layer_norm(t, rows, channels, epsilon, stream);
    }
};

}  // namespace d2_trt::plugin
