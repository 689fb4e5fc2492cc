// The TensorRT plugin of attention inside the shifted windows of a map, from the projection to queries, keys and values on.
//
// Inputs, all LINEAR: qkv (B, H, W, 3 * C) of `type`; float32: qkv bias (3 * C), what the padding has, and relative position
// bias (heads, 2 * window - 1, 2 * window - 1). Output: (B, H, W, C) of `type`. See window_attention.h.
#pragma once

#include "trt_plugin/plugin.h"
#include "window_attention/window_attention.h"

namespace d2_trt::plugin {

struct WindowAttentionPlugin {
    static constexpr char const* kName = "D2TRTWindowAttention";
    static constexpr char const* kVersion = "1";
    enum Tensor : int { kQkv = 0, kQkvBias = 1, kBias = 2, kInputs = 3 };

    std::int32_t type = 1;  // float16 or bfloat16
    std::int32_t heads = 0;
    std::int32_t dim = 0;  // channels of a head
    std::int32_t window = 0;
    std::int32_t shift = 0;
    float scale = 0.0F;

    static std::array<Field<WindowAttentionPlugin>, 6> fields() {
        return {
            {{"type", &WindowAttentionPlugin::type},
             {"heads", &WindowAttentionPlugin::heads},
             {"dim", &WindowAttentionPlugin::dim},
             {"window", &WindowAttentionPlugin::window},
             {"shift", &WindowAttentionPlugin::shift},
             {"scale", &WindowAttentionPlugin::scale}}};
    }

    void check() const {
        require(type == 1 || type == 2, "type is ", type, "; expected 1 (float16) or 2 (bfloat16)");
        check_type("type", type);
        require(heads >= 1 && heads <= kMaxWindowHeads, "heads is ", heads, "; expected 1 to ", kMaxWindowHeads);
        require(
            window_attention_takes(window, dim), "windows of ", window, " and heads of ", dim, " channels; expected 1 to ",
            kMaxWindow, " and 16 or 32");
        require(shift >= 0 && shift < window, "shift is ", shift, "; expected 0 to ", window - 1);
    }

    int inputs() const { return kInputs; }
    int outputs() const { return 1; }
    nvinfer1::DataType output_type(int) const { return trt_type(type); }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        if (at < 0 || at > kInputs) return false;
        bool const bias = at == kQkvBias || at == kBias;
        return is_linear(tensors[at], bias ? nvinfer1::DataType::kFLOAT : trt_type(type));
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        constexpr std::int32_t kRanks[kInputs] = {4, 1, 3};
        constexpr char const* kNames[kInputs] = {"qkv", "qkv bias", "bias"};
        for (int i = 0; i < kInputs; ++i) {
            require(in[i].nbDims == kRanks[i], kNames[i], " has ", in[i].nbDims, " dimensions; expected ", kRanks[i]);
        }
    }

    // (B, H, W, C)
    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& builder) const {
        require(in[kQkv].nbDims == 4, "qkv has ", in[kQkv].nbDims, " dimensions; expected 4");
        *out = in[kQkv];
        out->d[3] = builder.constant(heads * dim);
        require(out->d[3] != nullptr, "TensorRT makes no dimension heads * D");
    }

    std::size_t workspace(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*) const { return 0; }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void*, cudaStream_t stream) const {
        nvinfer1::Dims const dims[kInputs] = {in[0].dims, in[1].dims, in[2].dims};
        check_ranks(dims);
        auto const& qkv = dims[kQkv].d;
        auto const& bias = dims[kBias].d;
        std::int32_t const wide = 3 * heads * dim, span = 2 * window - 1;
        require(
            qkv[3] == wide && dims[kQkvBias].d[0] == wide, "qkv has ", qkv[3], " channels and its bias ", dims[kQkvBias].d[0],
            "; expected ", wide);
        require(
            bias[0] == heads && bias[1] == span && bias[2] == span, "bias is ", bias[0], "x", bias[1], "x", bias[2],
            "; expected ", heads, "x", span, "x", span);
        WindowAttentionSizes sizes;
        sizes.batch = qkv[0];
        sizes.height = qkv[1];
        sizes.width = qkv[2];
        sizes.heads = heads;
        sizes.dim = dim;
        sizes.window = window;
        sizes.shift = shift;
        WindowAttentionTensors tensors;
        tensors.qkv = inputs[kQkv];
        tensors.qkv_bias = static_cast<float const*>(inputs[kQkvBias]);
        tensors.bias = static_cast<float const*>(inputs[kBias]);
        tensors.out = outputs[0];
        tensors.type = static_cast<DType>(type);
        window_attention(tensors, sizes, scale, stream);
    }
};

}  // namespace d2_trt::plugin
