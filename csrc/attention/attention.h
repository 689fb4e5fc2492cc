// Multi-head attention of few queries over many keys, on tensor cores. Masked attention's mask is made here too: a query
// attends where its mask logit, the product of its mask embedding with a key's features, is not negative; a query that may
// attend nowhere attends everywhere (Mask2Former, Cheng et al. 2022, equation 2). Between kernels it is a bit for each query
// and key, whatever the number of heads.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace d2_trt {

constexpr int kMaxHeads = 256;
constexpr int kMaxMaskDim = 512;
constexpr int kMaskDimStep = 32;  // mask_dim is a multiple of it

// Rows of q, k and v may be parts of wider rows, such as the result of one linear layer for all three: the strides are
// from row to row, in elements; an image has as many rows as there are queries or keys.
struct AttentionSizes {
    std::int64_t batch = 0;
    std::int64_t queries = 0;
    std::int64_t keys = 0;
    std::int64_t heads = 0;     // 1 to kMaxHeads
    std::int64_t dim = 0;       // D, channels of a head: 8, 16, 32 or 64
    std::int64_t q_stride = 0;  // at least heads * dim, multiples of 8
    std::int64_t k_stride = 0;
    std::int64_t v_stride = 0;
    std::int64_t pos_stride = 0;  // as the others; 0 where there are no positions
    std::int64_t mask_dim = 0;    // channels of mask embedding and features; 0: no mask
};

// All in device memory. All but mask_embed and workspace are of `type`, float16 or bfloat16. Addresses are multiples of 16
// bytes.
struct AttentionTensors {
    void const* q = nullptr;             // (B, Q, heads * D), rows q_stride apart
    void const* k = nullptr;             // (B, K, heads * D), rows k_stride apart
    void const* v = nullptr;             // (B, K, heads * D), rows v_stride apart
    void const* q_pos = nullptr;         // (Q, heads * D), rows pos_stride apart: added to q of every image; may be null
    void const* k_pos = nullptr;         // (K, heads * D), likewise for k where there is no mask; may be null
    float const* mask_embed = nullptr;   // (B, Q, mask_dim) float32 within the range of `type`, contiguous; null: no mask
    void const* features = nullptr;      // (B, K, mask_dim), contiguous; null: no mask
    void* out = nullptr;                 // (B, Q, heads * D), contiguous
    void* workspace = nullptr;           // as much as attention_workspace says; may be null where that is 0
    DType type = DType::kFloat16;
};

// Bytes of workspace that no call with at most these sizes exceeds, on any device.
// Throws std::invalid_argument where the sizes are not allowed, or the current device has no such instructions (compute capability
// below 8.0).
std::size_t attention_workspace(AttentionSizes const& sizes);

// Softmax of q k^T / sqrt(D) over the keys a query may attend to, times v. Products accumulate in float32; the softmax is
// computed in float32, its weights are rounded to `type` before they multiply v. The mask embedding enters as the sum of
// two numbers of `type`, so that mask logits are as exact as the features. The same input gives the same bits on one kind
// of GPU.
// Throws std::invalid_argument where sizes, types or alignments are not allowed, std::runtime_error where CUDA refuses.
void attention(AttentionTensors const& tensors, AttentionSizes const& sizes, cudaStream_t stream);

}  // namespace d2_trt
