// Multi-scale deformable attention of the pixels of a feature pyramid over that pyramid, in one kernel: softmax, sampling
// locations, bilinear samples and their weighted sum (Deformable DETR, Zhu et al. 2021, equation 3).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace d2_trt {

constexpr int kMaxLevels = 8;
constexpr int kMaxPoints = 16;

// The queries are the pixels of all levels, so that there are as many as values.
struct MsDeformAttnSizes {
    std::int64_t batch = 0;
    std::int64_t pixels = 0;  // S, of all levels together
    std::int64_t heads = 0;
    std::int64_t dim = 0;  // D, channels of a head
    std::int64_t levels = 0;
    std::int64_t points = 0;  // of a level
    // Elements from the offsets or logits of one pixel to those of the next, of the next image after the last: more than a
    // pixel has where they are columns of a wider tensor.
    std::int64_t offsets_stride = 0;
    std::int64_t logits_stride = 0;
};

// All in device memory, C-contiguous but for these strides, none overlapping `out`.
struct MsDeformAttnTensors {
    void const* value = nullptr;    // (B, S, heads, D), value_type, aligned to 16 bytes
    void const* offsets = nullptr;  // (B, S, heads, levels, points, 2), sampling_type: (x, y) in pixels of the level sampled
    void const* logits = nullptr;   // (B, S, heads, levels * points), sampling_type: before the softmax
    void* out = nullptr;            // (B, S, heads * D), value_type, aligned to 16 bytes
    DType value_type = DType::kFloat32;
    DType sampling_type = DType::kFloat32;  // float32, or value_type
};

// Level sizes from the host: (height, width) of each level, S pixels together; levels may be empty.
// Throws std::invalid_argument where sizes, types or alignments are not allowed, std::runtime_error where CUDA refuses.
void ms_deform_attn(
    MsDeformAttnTensors const& tensors, MsDeformAttnSizes const& sizes, std::int32_t const (*level_sizes)[2], cudaStream_t stream);

// Level sizes from the device: (levels, 2) int32, which the kernel reads. Where they do not hold S pixels, every output
// is NaN and nothing outside of the tensors is read.
void ms_deform_attn_device_levels(
    MsDeformAttnTensors const& tensors, MsDeformAttnSizes const& sizes, std::int32_t const* level_sizes, cudaStream_t stream);

}  // namespace d2_trt
