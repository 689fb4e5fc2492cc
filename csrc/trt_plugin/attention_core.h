// The TensorRT plugin of the transformer decoder's attention: masked attention to pixels, and self-attention of queries.
//
// Masked, all LINEAR: queries (B, Q, C); their positions (1, Q, C), which are added; keys (B, K, n * C) and values (B, K,
// n * C) of n layers side by side, of which `part` says whose they are; mask embedding (B, Q, mask_dim) float32; mask
// features (B, K, mask_dim). Not masked: queries, keys and values side by side (B, Q, 3 * C); positions of queries and keys
// side by side (1, Q, 2 * C). Output: (B, Q, C). All of `type` but the mask embedding; C is heads * D.
#pragma once

#include "attention/attention.h"
#include "trt_plugin/plugin.h"

namespace d2_trt::plugin {

struct AttentionPlugin {
    static constexpr char const* kName = "D2TRTAttention";
    static constexpr char const* kVersion = "1";
    enum Tensor : int { kQ = 0, kPos = 1, kK = 2, kV = 3, kMaskEmbed = 4, kFeatures = 5, kMaskedInputs = 6 };

    std::int32_t type = 1;  // float16 or bfloat16
    std::int32_t heads = 0;
    std::int32_t masked = 0;
    std::int32_t part = 0;

    static std::array<Field<AttentionPlugin>, 4> fields() {
        return {
            {{"type", &AttentionPlugin::type},
             {"heads", &AttentionPlugin::heads},
             {"masked", &AttentionPlugin::masked},
             {"part", &AttentionPlugin::part}}};
    }

    void check() const {
        require(type == 1 || type == 2, "type is ", type, "; expected 1 (float16) or 2 (bfloat16)");
        check_type("type", type);
        require(heads >= 1 && heads <= kMaxHeads, "heads is ", heads, "; expected 1 to ", kMaxHeads);
        require(masked == 0 || masked == 1, "masked is ", masked, "; expected 0 or 1");
        require(part >= 0 && (masked == 1 || part == 0), "part is ", part, "; expected 0 or more, and 0 where not masked");
    }

    int inputs() const { return masked ? kMaskedInputs : 2; }
    int outputs() const { return 1; }
    nvinfer1::DataType output_type(int) const { return trt_type(type); }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        if (at < 0 || at > inputs()) return false;
        bool const embed = masked && at == kMaskEmbed;
        return is_linear(tensors[at], embed ? nvinfer1::DataType::kFLOAT : trt_type(type));
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        constexpr char const* kNames[kMaskedInputs] = {
            "queries", "positions", "keys", "values", "mask embedding", "mask features"};
        for (int i = 0; i < inputs(); ++i) {
            require(in[i].nbDims == 3, kNames[i], " have ", in[i].nbDims, " dimensions; expected 3");
        }
    }

    // (B, Q, C)
    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& builder) const {
        require(in[kQ].nbDims == 3, "queries have ", in[kQ].nbDims, " dimensions; expected 3");
        out->nbDims = 3;
        out->d[0] = in[kQ].d[0];
        out->d[1] = in[kQ].d[1];
        out->d[2] = in[kQ].d[2];
        if (masked) return;
        nvinfer1::IDimensionExpr const* const three = builder.constant(3);
        require(three != nullptr, "TensorRT makes no constant dimension");
        out->d[2] = builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *in[kQ].d[2], *three);
        require(out->d[2] != nullptr, "TensorRT makes no dimension C");
    }

    std::size_t workspace(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*) const {
        return attention_workspace(sizes(in));
    }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) const {
        AttentionSizes const given = sizes(in);
        AttentionTensors tensors;
        tensors.type = static_cast<DType>(type);
        tensors.out = outputs[0];
        tensors.workspace = workspace;
        tensors.q = inputs[kQ];
        tensors.q_pos = inputs[kPos];
        std::int64_t const channels = given.heads * given.dim;
        if (masked) {
            tensors.k = columns(inputs[kK], part * channels);
            tensors.v = columns(inputs[kV], part * channels);
            tensors.mask_embed = static_cast<float const*>(inputs[kMaskEmbed]);
            tensors.features = inputs[kFeatures];
        } else {
            tensors.k = columns(inputs[kQ], channels);
            tensors.v = columns(inputs[kQ], 2 * channels);
            tensors.k_pos = columns(inputs[kPos], channels);
        }
        attention(tensors, given, stream);
    }

private:
    static void const* columns(void const* rows, std::int64_t first) {
        return static_cast<unsigned char const*>(rows) + 2 * first;  // of two bytes each
    }

    AttentionSizes sizes(nvinfer1::PluginTensorDesc const* in) const {
        nvinfer1::Dims dims[kMaskedInputs];
        for (int i = 0; i < inputs(); ++i) dims[i] = in[i].dims;
        check_ranks(dims);
        auto const& q = dims[kQ].d;
        require(
            masked ? q[2] % heads == 0 : q[2] % (3 * heads) == 0, q[2], " channels of queries; expected a multiple of ",
            masked ? heads : 3 * heads);
        AttentionSizes sizes;
        sizes.batch = q[0];
        sizes.queries = q[1];
        sizes.heads = heads;
        sizes.q_stride = q[2];
        auto const& pos = dims[kPos].d;
        sizes.pos_stride = pos[2];
        std::int64_t const wanted = masked ? q[2] : q[2] / 3 * 2;
        require(
            pos[0] == 1 && pos[1] == q[1] && pos[2] == wanted, "positions are ", pos[0], "x", pos[1], "x", pos[2],
            "; expected 1x", q[1], "x", wanted);
        if (!masked) {
            sizes.keys = q[1];
            sizes.dim = q[2] / (3 * heads);
            sizes.k_stride = sizes.v_stride = q[2];
            return sizes;
        }
        auto const& k = dims[kK].d;
        auto const& v = dims[kV].d;
        auto const& embed = dims[kMaskEmbed].d;
        auto const& features = dims[kFeatures].d;
        sizes.keys = k[1];
        sizes.dim = q[2] / heads;
        sizes.k_stride = k[2];
        sizes.v_stride = v[2];
        sizes.mask_dim = embed[2];
        require(
            k[0] == q[0] && v[0] == q[0] && embed[0] == q[0] && features[0] == q[0],
            "the batch of queries, keys, values, mask embedding and mask features is ", q[0], ", ", k[0], ", ", v[0], ", ",
            embed[0], ", ", features[0]);
        require(
            v[1] == k[1] && features[1] == k[1], k[1], " keys, ", v[1], " values and ", features[1],
            " mask features; expected equally many");
        require(embed[1] == q[1], q[1], " queries and ", embed[1], " mask embeddings; expected equally many");
        require(
            features[2] == embed[2] && embed[2] > 0, embed[2], " channels of mask embeddings and ", features[2],
            " of mask features; expected equally many");
        require(
            k[2] >= (part + 1) * q[2] && v[2] >= (part + 1) * q[2], "keys and values have ", k[2], " and ", v[2],
            " channels; part ", part, " of ", q[2], " needs ", (part + 1) * q[2]);
        return sizes;
    }
};

}  // namespace d2_trt::plugin
