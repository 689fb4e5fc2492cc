// The TensorRT plugin of LayerNorm over the last dimension, of a tensor or of the sum of two.
//
// Inputs, all LINEAR: x (..., C); weight (C) and bias (C), float32; where residual_type is not -1, residual of x's shape; where
// position_type is not -1, position of x's shape but for its first dimension, the batch, which is 1. Outputs: LayerNorm(x +
// residual), and with a position the same plus that, both of x's shape and of out_type. Sums and statistics are float32
// whatever the types.
#pragma once

#include "normalization/normalization.h"
#include "trt_plugin/plugin.h"

namespace d2_trt::plugin {

// The types are fixed when the plugin is made: TensorRT then converts in front of it, and has no choice to time.
struct LayerNormPlugin {
    static constexpr char const* kName = "D2TRTLayerNorm";
    static constexpr char const* kVersion = "2";
    enum Tensor : int { kX = 0, kWeight = 1, kBias = 2 };  // then residual and position
    static constexpr std::int32_t kNone = -1;

    std::int32_t x_type = 0;
    std::int32_t residual_type = kNone;
    std::int32_t position_type = kNone;
    std::int32_t out_type = 0;
    float epsilon = 0.0F;

    static std::array<Field<LayerNormPlugin>, 5> fields() {
        return {
            {{"x_type", &LayerNormPlugin::x_type},
             {"residual_type", &LayerNormPlugin::residual_type},
             {"position_type", &LayerNormPlugin::position_type},
             {"out_type", &LayerNormPlugin::out_type},
             {"epsilon", &LayerNormPlugin::epsilon}}};
    }

    void check() const {
        check_type("x_type", x_type);
        if (has_residual()) check_type("residual_type", residual_type);
        if (has_position()) check_type("position_type", position_type);
        check_type("out_type", out_type);
        require(epsilon >= 0.0F, "epsilon is ", epsilon, "; expected at least 0");
    }

    bool has_residual() const { return residual_type != kNone; }
    bool has_position() const { return position_type != kNone; }
    int residual_at() const { return 3; }
    int position_at() const { return has_residual() ? 4 : 3; }

    int inputs() const { return 3 + has_residual() + has_position(); }
    int outputs() const { return has_position() ? 2 : 1; }
    nvinfer1::DataType output_type(int) const { return trt_type(out_type); }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        if (at < 0 || at >= inputs() + outputs()) return false;
        std::int32_t type = static_cast<std::int32_t>(DType::kFloat32);  // of weight and bias
        if (at >= inputs()) {
            type = out_type;
        } else if (at == kX) {
            type = x_type;
        } else if (has_position() && at == position_at()) {
            type = position_type;
        } else if (at > kBias) {
            type = residual_type;
        }
        return is_linear(tensors[at], trt_type(type));
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        require(in[kX].nbDims >= 1, "x has no dimension; expected at least 1");
        for (int i : {kWeight, kBias}) {
            require(in[i].nbDims == 1, i == kWeight ? "weight" : "bias", " has ", in[i].nbDims, " dimensions; expected 1");
        }
        for (int i = kBias + 1; i < inputs(); ++i) {
            require(
                in[i].nbDims == in[kX].nbDims, has_position() && i == position_at() ? "position" : "residual", " has ",
                in[i].nbDims, " dimensions and x ", in[kX].nbDims, "; expected equal ones");
        }
        require(!has_position() || in[kX].nbDims >= 2, "x has 1 dimension; with a position, expected at least 2");
    }

    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder&) const {
        for (int i = 0; i < outputs(); ++i) out[i] = in[kX];
    }

    std::size_t workspace(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*) const { return 0; }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void*, cudaStream_t stream) const {
        nvinfer1::Dims dims[kMaxTensors]{};
        for (int i = 0; i < this->inputs(); ++i) dims[i] = in[i].dims;
        check_ranks(dims);
        auto const& x = dims[kX];
        std::int64_t const channels = x.d[x.nbDims - 1];
        std::int64_t rows = 1, position_rows = 1;
        for (int i = 0; i < x.nbDims; ++i) {
            if (i + 1 < x.nbDims) rows *= x.d[i];
            if (i > 0 && i + 1 < x.nbDims) position_rows *= x.d[i];
            require(
                !has_residual() || dims[residual_at()].d[i] == x.d[i], "x and residual differ in dimension ", i,
                "; expected equal shapes");
            require(
                !has_position() || dims[position_at()].d[i] == (i == 0 ? 1 : x.d[i]), "position has ", dims[position_at()].d[i],
                " in dimension ", i, " and x ", x.d[i], "; expected 1 in the first, and equal others");
        }
        for (int i : {kWeight, kBias}) {
            require(
                dims[i].d[0] == channels, i == kWeight ? "weight" : "bias", " has ", dims[i].d[0],
                " elements; expected the ", channels, " channels of x");
        }
        LayerNormTensors t;
        t.x = inputs[kX];
        t.weight = static_cast<float const*>(inputs[kWeight]);
        t.bias = static_cast<float const*>(inputs[kBias]);
        t.residual = has_residual() ? inputs[residual_at()] : nullptr;
        t.out = outputs[0];
        t.x_type = static_cast<DType>(x_type);
        t.residual_type = has_residual() ? static_cast<DType>(residual_type) : DType::kFloat32;
        t.out_type = static_cast<DType>(out_type);
        if (has_position()) {
            t.position = inputs[position_at()];
            t.sum = outputs[1];
            t.position_rows = position_rows;
            t.position_type = static_cast<DType>(position_type);
        }
        layer_norm(t, rows, channels, epsilon, stream);
    }
};

}  // namespace d2_trt::plugin
