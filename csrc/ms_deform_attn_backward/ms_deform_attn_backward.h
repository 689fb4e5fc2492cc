// Gradients of multi-scale deformable attention (csrc/ms_deform_attn), in float32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace d2_trt {

struct MsDeformAttnBackwardSizes {
    std::int64_t batch = 0;
    std::int64_t pixels = 0;  // S, of all levels together
    std::int64_t heads = 0;
    std::int64_t dim = 0;     // D, channels of a head
    std::int64_t levels = 0;  // 1 to kMaxLevels
    std::int64_t points = 0;  // of a level, 1 to kMaxPoints
};

// All float32, in device memory, C-contiguous and aligned to 16 bytes; the gradients overlap nothing.
struct MsDeformAttnBackwardTensors {
    float const* grad = nullptr;     // (B, S, heads * D), of the output
    float const* value = nullptr;    // (B, S, heads, D)
    float const* offsets = nullptr;  // (B, S, heads, levels, points, 2)
    float const* logits = nullptr;   // (B, S, heads, levels * points)
    float* grad_value = nullptr;     // as value; the kernel adds to it
    float* grad_offsets = nullptr;   // as offsets
    float* grad_logits = nullptr;    // as logits
};

// level_sizes: (height, width) of each level, S pixels together; levels may be empty.
// Throws std::invalid_argument where sizes or alignments are not allowed, std::runtime_error where CUDA refuses.
void ms_deform_attn_backward(
    MsDeformAttnBackwardTensors const& tensors, MsDeformAttnBackwardSizes const& sizes, std::int32_t const (*level_sizes)[2],
    cudaStream_t stream);

}  // namespace d2_trt
