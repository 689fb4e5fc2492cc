// Attention inside shifted windows of a map (Swin Transformer, Liu et al. 2021): cyclic shift, padding, window partition,
// softmax(q k^T * scale + relative position bias + mask) v and all the way back, in one kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace d2_trt {

constexpr int kMaxWindow = 12;
constexpr int kMaxWindowHeads = 65535;

// Whether there is code for windows of this side and heads of this many channels.
constexpr bool window_attention_takes(std::int64_t window, std::int64_t dim) {
    return window >= 1 && window <= kMaxWindow && (dim == 16 || dim == 32);
}

struct WindowAttentionSizes {
    std::int64_t batch = 0;
    std::int64_t height = 0;
    std::int64_t width = 0;
    std::int64_t heads = 0;
    std::int64_t dim = 0;     // D, channels of a head: 16 or 32
    std::int64_t window = 0;  // side, in pixels
    std::int64_t shift = 0;   // 0 to window - 1
};

// All in device memory, C-contiguous, none overlapping `out`.
struct WindowAttentionTensors {
    void const* qkv = nullptr;        // (B, H, W, 3, heads, D), type, aligned to 16 bytes
    float const* qkv_bias = nullptr;  // (3, heads, D): queries, keys and values of the padding at the bottom and the right
    float const* bias = nullptr;      // (heads, 2 * window - 1, 2 * window - 1), by the query's position minus the key's
    void* out = nullptr;              // (B, H, W, heads, D), type, aligned to 16 bytes
    DType type = DType::kFloat16;     // float16 or bfloat16; products and softmax are float32
};

// Throws std::invalid_argument where sizes, types or alignments are not allowed, std::runtime_error where CUDA refuses.
void window_attention(
    WindowAttentionTensors const& tensors, WindowAttentionSizes const& sizes, float scale, cudaStream_t stream);

}  // namespace d2_trt
