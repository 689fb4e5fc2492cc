// The TensorRT plugin of linear layers with ReLU between them, and LayerNorm before or after them.
//
// Inputs, all LINEAR: x (..., C) of `x_type`; packed weights (words), int32, as mlp.h says; float32: biases of all layers, one
// after another (N), and weight and bias of the LayerNorm (2, C); where `residual_type` is not -1, the residual of that type and
// of x's shape. Outputs: (..., out) of `out_type`; where `normed_type` is not -1, norm(x) (..., C) of that type.
//
// `type` is that of the products: float32 (0) computes them from pairs of bfloat16, more exactly than TF32.
#pragma once

#include "mlp/mlp.h"
#include "trt_plugin/plugin.h"

namespace d2_trt::plugin {

struct MlpPlugin {
    static constexpr char const* kName = "D2TRTMlp";
    static constexpr char const* kVersion = "2";
    static constexpr std::int32_t kNone = -1;
    enum Tensor : int { kX = 0, kWeights = 1, kBiases = 2, kNorm = 3, kResidual = 4 };  // the last where there is one

    std::int32_t type = 0;
    std::int32_t x_type = 0;
    std::int32_t residual_type = kNone;
    std::int32_t out_type = 0;
    std::int32_t normed_type = kNone;
    std::int32_t layers = 0;
    std::int32_t channels = 0;  // C
    std::int32_t hidden = 0;    // channels between layers
    std::int32_t out = 0;
    std::int32_t after = 0;  // 1: norm(residual + layers(x)), the residual being x where there is none; 0: layers(norm(x))
    float epsilon = 0.0F;

    static std::array<Field<MlpPlugin>, 11> fields() {
        return {
            {{"type", &MlpPlugin::type},
             {"x_type", &MlpPlugin::x_type},
             {"residual_type", &MlpPlugin::residual_type},
             {"out_type", &MlpPlugin::out_type},
             {"normed_type", &MlpPlugin::normed_type},
             {"layers", &MlpPlugin::layers},
             {"channels", &MlpPlugin::channels},
             {"hidden", &MlpPlugin::hidden},
             {"out", &MlpPlugin::out},
             {"after", &MlpPlugin::after},
             {"epsilon", &MlpPlugin::epsilon}}};
    }

    MlpSizes sizes() const {
        MlpSizes s;
        s.layers = layers;
        for (int i = 0; i <= layers; ++i) s.widths[i] = i == 0 ? channels : i == layers ? out : hidden;
        s.after = after == 1;
        return s;
    }

    void check() const {
        require(type >= 0 && type <= 2, "type is ", type, "; expected 0 (float32), 1 (float16) or 2 (bfloat16)");
        check_type("x_type", x_type);
        if (has_residual()) check_type("residual_type", residual_type);
        check_type("out_type", out_type);
        if (normed_type != kNone) check_type("normed_type", normed_type);
        require(after == 0 || after == 1, "after is ", after, "; expected 0 or 1");
        require(normed_type == kNone || after == 0, "normed_type is ", normed_type, "; expected -1 where after is 1");
        require(!has_residual() || after == 1, "residual_type is ", residual_type, "; expected -1 where after is 0");
        require(layers >= 1 && layers <= kMaxMlpLayers, "layers is ", layers, "; expected 1 to ", kMaxMlpLayers);
        require(
            mlp_takes(sizes(), static_cast<DType>(type)), layers, " layers from ", channels, " over ", hidden, " to ", out,
            " channels have no code");
        require(epsilon >= 0.0F, "epsilon is ", epsilon, "; expected at least 0");
    }

    bool has_residual() const { return residual_type != kNone; }

    int inputs() const { return kResidual + has_residual(); }
    int outputs() const { return normed_type == kNone ? 1 : 2; }
    nvinfer1::DataType output_type(int output) const { return trt_type(output == 0 ? out_type : normed_type); }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        if (at < 0 || at >= inputs() + outputs()) return false;
        auto const wanted = [&] {
            if (at >= inputs()) return output_type(at - inputs());
            if (at == kX) return trt_type(x_type);
            if (at == kResidual) return trt_type(residual_type);
            return at == kWeights ? nvinfer1::DataType::kINT32 : nvinfer1::DataType::kFLOAT;
        };
        return is_linear(tensors[at], wanted());
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        require(in[kX].nbDims >= 1, "x has no dimension; expected at least 1");
        std::int32_t const ranks[] = {0, 1, 1, 2, in[kX].nbDims};
        constexpr char const* kNames[] = {"x", "weights", "biases", "norm", "residual"};
        for (int i = kWeights; i < inputs(); ++i) {
            require(in[i].nbDims == ranks[i], kNames[i], " has ", in[i].nbDims, " dimensions; expected ", ranks[i]);
        }
    }

    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* given, nvinfer1::IExprBuilder& builder) const {
        require(in[kX].nbDims >= 1, "x has no dimension; expected at least 1");
        for (int i = 0; i < outputs(); ++i) given[i] = in[kX];
        given[0].d[in[kX].nbDims - 1] = builder.constant(out);
        require(given[0].d[in[kX].nbDims - 1] != nullptr, "TensorRT makes no dimension of the channels");
    }

    std::size_t workspace(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*) const { return 0; }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void*, cudaStream_t stream) const {
        nvinfer1::Dims dims[kMaxTensors]{};
        for (int i = 0; i < this->inputs(); ++i) dims[i] = in[i].dims;
        check_ranks(dims);
        MlpSizes s = sizes();
        auto const& x = dims[kX];
        s.rows = 1;
        for (int i = 0; i + 1 < x.nbDims; ++i) s.rows *= x.d[i];
        require(x.d[x.nbDims - 1] == channels, "x has ", x.d[x.nbDims - 1], " channels; expected ", channels);
        auto const words = mlp_weight_bytes(s, static_cast<DType>(type)) / 4;
        require(dims[kWeights].d[0] == words, "weights has ", dims[kWeights].d[0], " words; expected ", words);
        require(
            dims[kBiases].d[0] == mlp_biases(s), "biases has ", dims[kBiases].d[0], " elements; expected ", mlp_biases(s));
        require(
            dims[kNorm].d[0] == 2 && dims[kNorm].d[1] == channels, "norm is ", dims[kNorm].d[0], "x", dims[kNorm].d[1],
            "; expected 2x", channels);
        for (int i = 0; has_residual() && i < x.nbDims; ++i) {
            require(dims[kResidual].d[i] == x.d[i], "x and residual differ in dimension ", i, "; expected equal shapes");
        }
        MlpTensors t;
        t.x = inputs[kX];
        t.weights = inputs[kWeights];
        t.biases = static_cast<float const*>(inputs[kBiases]);
        t.norm = static_cast<float const*>(inputs[kNorm]);
        t.residual = has_residual() ? inputs[kResidual] : nullptr;
        t.out = outputs[0];
        t.normed = normed_type == kNone ? nullptr : outputs[1];
        t.type = static_cast<DType>(type);
        t.x_type = static_cast<DType>(x_type);
        t.residual_type = has_residual() ? static_cast<DType>(residual_type) : DType::kFloat32;
        t.out_type = static_cast<DType>(out_type);
        t.normed_type = normed_type == kNone ? DType::kFloat32 : static_cast<DType>(normed_type);
        mlp(t, s, epsilon, stream);
    }
};

}  // namespace d2_trt::plugin
