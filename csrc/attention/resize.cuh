// Mask features resized to several levels, channels last, in one kernel.
#pragma once

#include "attention/fragments.cuh"

namespace d2_trt {

constexpr int kMaxMaskLevels = 4;
constexpr int kResizeThreads = 256;

struct ResizeProblem {
    void const* features;              // (B, height, width, channels)
    void* levels[kMaxMaskLevels];      // (B, heights[i], widths[i], channels)
    std::int32_t heights[kMaxMaskLevels], widths[kMaxMaskLevels];
    std::int32_t count, height, width, channels;
    std::int32_t pixels;  // of all levels together, of one image
};

struct Neighbours {
    int first, second;
    float share;  // of the second
};

// Bilinear resizing with corners not aligned, as torch.nn.functional.interpolate computes it.
__device__ __forceinline__ Neighbours neighbours(int at, int size, int from) {
    float const source = fmaxf(static_cast<float>(from) / static_cast<float>(size) * (at + 0.5f) - 0.5f, 0.f);
    int const first = static_cast<int>(source) < from - 1 ? static_cast<int>(source) : from - 1;
    return {first, first + (first < from - 1 ? 1 : 0), source - first};
}

// A warp has a pixel of a level, a lane eight channels of it.
template <typename T>
__global__ void __launch_bounds__(kResizeThreads) resize_kernel(__grid_constant__ ResizeProblem const problem) {
    int const lane = threadIdx.x % 32;
    int pixel = static_cast<int>(blockIdx.x) * (kResizeThreads / 32) + static_cast<int>(threadIdx.x) / 32;
    if (pixel >= problem.pixels) return;
    std::int64_t const image = blockIdx.y;
    int level = 0;
    while (pixel >= problem.heights[level] * problem.widths[level]) {
        pixel -= problem.heights[level] * problem.widths[level];
        ++level;
    }
    int const height = problem.heights[level], width = problem.widths[level];
    Neighbours const y = neighbours(pixel / width, height, problem.height);
    Neighbours const x = neighbours(pixel % width, width, problem.width);
    int const pieces = problem.channels / 8;
    auto const* const from = static_cast<uint4 const*>(problem.features) + image * problem.height * problem.width * pieces;
    auto* const to = static_cast<uint4*>(problem.levels[level]) + (image * height * width + pixel) * pieces;
    for (int piece = lane; piece < pieces; piece += 32) {
        auto const corner = [&](int row, int column) {
            return load(from + (static_cast<std::int64_t>(row) * problem.width + column) * pieces + piece);
        };
        uint4 const corners[4] = {
            corner(y.first, x.first), corner(y.first, x.second), corner(y.second, x.first), corner(y.second, x.second)};
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 values[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                uint4 const& w = corners[c];
                values[c] = unpack<T>(i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w);
            }
            auto const mix = [&](float a, float b, float c, float d) {
                float const top = (1.f - x.share) * a + x.share * b, bottom = (1.f - x.share) * c + x.share * d;
                return (1.f - y.share) * top + y.share * bottom;
            };
            words[i] = pack<T>(
                mix(values[0].x, values[1].x, values[2].x, values[3].x),
                mix(values[0].y, values[1].y, values[2].y, values[3].y));
        }
        to[piece] = {words[0], words[1], words[2], words[3]};
    }
}

}  // namespace d2_trt
