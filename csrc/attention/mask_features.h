// The mask features, channels last, as the transformer decoder needs them: resized to the levels that its queries attend
// to, and multiplied with mask embeddings for the masks themselves.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace d2_trt {

// Mask logits (B, Q, pixels) float32: embed (B, Q, channels) float32 times features (B, pixels, channels) of `type`, float16
// or bfloat16. Sums are in float32; the embedding enters as the sum of two numbers of `type`. channels: a multiple of
// kMaskDimStep up to kMaxMaskDim (attention.h). All contiguous and aligned to 16 bytes.
// Throws std::invalid_argument where sizes, types or alignments are not allowed, std::runtime_error where CUDA refuses.
void mask_product(
    float const* embed, void const* features, float* logits, DType type, std::int64_t batch, std::int64_t queries,
    std::int64_t pixels, std::int64_t channels, cudaStream_t stream);

struct ResizeSizes {
    std::int64_t batch = 0, channels = 0;    // channels: a multiple of 8
    std::int64_t height = 0, width = 0;      // of the features
    std::int64_t out_height = 0, out_width = 0;
};

// features (B, height, width, channels) resized bilinearly with corners not aligned: out is (B, out_height * out_width,
// channels). Weights and sums are in float32. Both of `type`, contiguous and aligned to 16 bytes. Throws as mask_product.
void resize_mask_features(
    void const* features, void* out, DType type, ResizeSizes const& sizes, cudaStream_t stream);

}  // namespace d2_trt
