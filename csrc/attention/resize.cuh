// Mask features resized to a level, channels last.
#pragma once

#include "attention/fragments.cuh"

namespace d2_trt {

constexpr int kResizeThreads = 256;

struct ResizeProblem {
    void const* features;  // (B, height, width, channels)
    void* out;             // (B, out_height, out_width, channels)
    std::int32_t height, width, out_height, out_width, channels;
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

// A warp has a pixel, a lane eight channels of it.
template <typename T>
__global__ void __launch_bounds__(kResizeThreads) resize_kernel(__grid_constant__ ResizeProblem const problem) {
    int const lane = threadIdx.x % 32;
    int const pixel = static_cast<int>(blockIdx.x) * (kResizeThreads / 32) + static_cast<int>(threadIdx.x) / 32;
    int const pixels = problem.out_height * problem.out_width;
    if (pixel >= pixels) return;
    std::int64_t const image = blockIdx.y;
    Neighbours const y = neighbours(pixel / problem.out_width, problem.out_height, problem.height);
    Neighbours const x = neighbours(pixel % problem.out_width, problem.out_width, problem.width);
    int const pieces = problem.channels / 8;
    auto const* const from = static_cast<uint4 const*>(problem.features) + image * problem.height * problem.width * pieces;
    auto* const to = static_cast<uint4*>(problem.out) + (image * pixels + pixel) * pieces;
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
