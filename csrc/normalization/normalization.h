// LayerNorm and GroupNorm with float32 statistics, and what is fused with them; normalisation of images.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace d2_trt {

// All in device memory, C-contiguous, none overlapping `out`, each aligned to its element. Where all are aligned to 16 bytes
// and `channels` is a multiple of 8, the kernels read 16 bytes at a time; else they are slower.
struct LayerNormTensors {
    void const* x = nullptr;         // (rows, channels), x_type
    void const* residual = nullptr;  // null, or (rows, channels), residual_type
    float const* weight = nullptr;   // (channels)
    float const* bias = nullptr;     // (channels)
    void* out = nullptr;             // (rows, channels), out_type
    void const* position = nullptr;  // null, or (position_rows, channels), position_type
    void* sum = nullptr;             // null where position is, else (rows, channels), out_type
    std::int64_t position_rows = 0;  // of which `rows` is a multiple: they repeat from image to image
    DType x_type = DType::kFloat32;
    DType residual_type = DType::kFloat32;
    DType out_type = DType::kFloat32;
    DType position_type = DType::kFloat32;
};

// out = LayerNorm(x + residual) over the channels of each row (Ba et al. 2016), and sum = the same + position; the sums and
// all statistics in float32, each output rounded once.
// Throws std::invalid_argument where sizes or alignments are not allowed, std::runtime_error where CUDA refuses.
void layer_norm(LayerNormTensors const& tensors, std::int64_t rows, std::int64_t channels, float epsilon, cudaStream_t stream);

enum class MapLayout : int {
    kPlanar = 0,       // (batch, channels, pixels)
    kChannelsLast = 1  // (batch, pixels, channels); channels / groups a multiple of 8, channels at most 2048, aligned to 16
};

struct GroupNormSizes {
    std::int64_t batch = 0;
    std::int64_t channels = 0;
    std::int64_t pixels = 0;  // H * W
    std::int64_t groups = 0;
};

// All in device memory, C-contiguous, none overlapping `out`.
struct GroupNormTensors {
    void const* x = nullptr;  // x_type
    float const* weight = nullptr;
    float const* bias = nullptr;
    void* out = nullptr;        // as x, out_type
    void* workspace = nullptr;  // group_norm_workspace bytes, aligned to 16
    DType x_type = DType::kFloat32;
    DType out_type = DType::kFloat32;
    MapLayout layout = MapLayout::kPlanar;
};

// Whether kChannelsLast is to be had.
bool group_norm_takes_channels_last(std::int64_t channels, std::int64_t groups);

// Scratch bytes for a layout; never fewer for larger batches or maps.
std::size_t group_norm_workspace(GroupNormSizes const& sizes, MapLayout layout);

// out = GroupNorm(x) (Wu and He 2018), then ReLU where asked for. Partial moments of many blocks are merged in a fixed order:
// the same input gives the same bits.
// Throws std::invalid_argument where sizes or alignments are not allowed, std::runtime_error where CUDA refuses.
void group_norm(GroupNormTensors const& tensors, GroupNormSizes const& sizes, float epsilon, bool relu, cudaStream_t stream);

struct ImageSizes {
    std::int64_t batch = 0;
    std::int64_t channels = 0;
    std::int64_t pixels = 0;        // H * W
    std::int64_t pixel_stride = 0;  // of the result, in elements; 0: planar
};

// All in device memory, C-contiguous, none overlapping `out`, each aligned to its element; `out` to 16 bytes where the pixel
// stride is 4 or 8.
struct NormalizeImagesTensors {
    float const* images = nullptr;  // (batch, channels, pixels)
    float const* mean = nullptr;    // (channels)
    float const* std = nullptr;     // (channels)
    void* out = nullptr;            // (batch, channels, pixels) or (batch, pixels, pixel_stride), out_type
    DType out_type = DType::kFloat32;
};

// Whether the result may have so many elements from pixel to pixel: 0, or at least the channels and 4 or 8, or as many as there
// are channels, up to 8.
bool normalize_images_takes_stride(std::int64_t channels, std::int64_t stride);

// out = (images - mean) / std for each channel, every operation rounded to float32 as PyTorch does, then to out_type. Channels
// past the images' own are zeros.
// Throws std::invalid_argument where sizes or alignments are not allowed, std::runtime_error where CUDA refuses.
void normalize_images(NormalizeImagesTensors const& tensors, ImageSizes const& sizes, cudaStream_t stream);

}  // namespace d2_trt
