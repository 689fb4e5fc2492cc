// The gradients of multi-scale deformable attention, in terms of attention/primitives.cuh and `add_at` alone: tests/native runs
// them on a CPU over emulated primitives.
//
// Eight lanes share a row, a query of one head. For a sample of weight a that reads the value s,
//     d/d value = a * (share of the corner) * grad,  d/d offset = a * grad . ds/d(x, y),  d/d a = grad . s
// and the softmax turns the last into d/d logit = a (d/d a - sum over samples of a * d/d a). What corners of other rows add to
// the same pixel is summed in no fixed order.
#pragma once

#ifndef D2_TRT_EMULATED
#include "attention/primitives.cuh"
#endif

namespace d2_trt {

constexpr int kBackwardMaxLevels = 8;
constexpr int kBackwardLanes = 8;
constexpr int kBackwardThreads = 256;

struct MsDeformAttnBackwardProblem {
    float const* grad;     // (B, S, heads, D)
    float const* value;    // (B, S, heads, D)
    float const* offsets;  // (B, S, heads, levels, points, 2)
    float const* logits;   // (B, S, heads, levels * points)
    float* grad_value;     // these three as the inputs; zeros before
    float* grad_offsets;
    float* grad_logits;
    std::int64_t rows;     // B * S * heads
    std::int32_t sizes[kBackwardMaxLevels][2];  // height, width
    std::int32_t starts[kBackwardMaxLevels];    // first pixel of a level
    std::int32_t levels, points, heads, dim, pixels;
};

#ifndef D2_TRT_EMULATED
__device__ __forceinline__ void add_at(float* to, float x) { atomicAdd(to, x); }
__device__ __forceinline__ void add_at(float4* to, float4 x) {
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
    atomicAdd(to, x);
#else
    float* const at = reinterpret_cast<float*>(to);
    atomicAdd(at, x.x), atomicAdd(at + 1, x.y), atomicAdd(at + 2, x.z), atomicAdd(at + 3, x.w);
#endif
}
#endif

__device__ __forceinline__ float scaled(float x, float by) { return x * by; }
__device__ __forceinline__ float4 scaled(float4 x, float by) { return {x.x * by, x.y * by, x.z * by, x.w * by}; }
__device__ __forceinline__ float dot(float x, float y) { return x * y; }
__device__ __forceinline__ float dot(float4 x, float4 y) { return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w; }

__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int lanes = kBackwardLanes / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}

// Channels: float4 where heads have a multiple of four, else float. A lane has every eighth.
template <typename Channels>
__device__ __forceinline__ void ms_deform_attn_backward_block(MsDeformAttnBackwardProblem const& p) {
    constexpr int kChannels = sizeof(Channels) / sizeof(float);
    int const lane = threadIdx.x % kBackwardLanes;
    std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kBackwardThreads / kBackwardLanes) + threadIdx.x / kBackwardLanes;
    bool const live = row < p.rows;  // the others keep step and write nothing
    if (!live) row = p.rows - 1;
    int const head = static_cast<int>(row % p.heads);
    std::int64_t const query = row / p.heads;  // among those of all images
    int const pixel = static_cast<int>(query % p.pixels);
    int at = 0;
    while (pixel >= p.starts[at] + p.sizes[at][0] * p.sizes[at][1]) ++at;
    int const local = pixel - p.starts[at], height = p.sizes[at][0], width = p.sizes[at][1];
    float const query_x = static_cast<float>(local % width) + 0.5F, query_y = static_cast<float>(local / width) + 0.5F;

    int const count = p.levels * p.points;
    float const* const logits = p.logits + row * count;
    float const* const offsets = p.offsets + row * count * 2;
    float* const grad_logits = p.grad_logits + row * count;
    float* const grad_offsets = p.grad_offsets + row * count * 2;
    float highest = -INFINITY;
    for (int i = lane; i < count; i += kBackwardLanes) highest = fmaxf(highest, load(logits + i));
#pragma unroll
    for (int lanes = kBackwardLanes / 2; lanes > 0; lanes /= 2) highest = fmaxf(highest, shuffle_xor(highest, lanes));
    float sum = 0.F;
    for (int i = lane; i < count; i += kBackwardLanes) sum += expf(load(logits + i) - highest);
    float const scale = 1.F / sum_of_lanes(sum);

    int const step = p.heads * p.dim / kChannels;  // from pixel to pixel
    std::int64_t const first = ((query - pixel) * p.heads + head) * p.dim;  // of the image and the head
    auto const* const value = reinterpret_cast<Channels const*>(p.value + first);
    auto* const grad_value = reinterpret_cast<Channels*>(p.grad_value + first);
    auto const* const grad = reinterpret_cast<Channels const*>(p.grad + row * p.dim);
    float weighted = 0.F;
    for (int level = 0, i = 0; level < p.levels; ++level) {
        int const h = p.sizes[level][0], w = p.sizes[level][1];
        float const ratio_x = static_cast<float>(w) / width, ratio_y = static_cast<float>(h) / height;
        for (int point = 0; point < p.points; ++point, ++i) {
            float const weight = expf(load(logits + i) - highest) * scale;
            float const x = fmaf(query_x, ratio_x, load(offsets + 2 * i) - 0.5F);
            float const y = fmaf(query_y, ratio_y, load(offsets + 2 * i + 1) - 0.5F);
            float of_weight = 0.F, of_x = 0.F, of_y = 0.F;
            // A location that is no number is outside.
            if (x > -1.F && y > -1.F && x < static_cast<float>(w) && y < static_cast<float>(h)) {
                float const left = floorf(x), top = floorf(y);
                float const right_share = x - left, bottom_share = y - top;
                float const left_share = 1.F - right_share, top_share = 1.F - bottom_share;
                int const x0 = static_cast<int>(left), y0 = static_cast<int>(top);
                bool const has[4] = {
                    x0 >= 0 && y0 >= 0, x0 + 1 < w && y0 >= 0, x0 >= 0 && y0 + 1 < h, x0 + 1 < w && y0 + 1 < h};
                float const share[4] = {
                    left_share * top_share, right_share * top_share, left_share * bottom_share, right_share * bottom_share};
                float const along_x[4] = {-top_share, top_share, -bottom_share, bottom_share};
                float const along_y[4] = {-left_share, -right_share, left_share, right_share};
                std::int64_t const corner = static_cast<std::int64_t>(p.starts[level]) + y0 * w + x0;
                std::int64_t const where[4] = {
                    corner * step, (corner + 1) * step, (corner + w) * step, (corner + w + 1) * step};
                for (int c = lane; c * kChannels < p.dim; c += kBackwardLanes) {
                    Channels const g = load(grad + c);
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        if (!has[k]) continue;
                        float const product = dot(g, load(value + where[k] + c));
                        of_weight = fmaf(share[k], product, of_weight);
                        of_x = fmaf(along_x[k], product, of_x);
                        of_y = fmaf(along_y[k], product, of_y);
                        if (live) add_at(grad_value + where[k] + c, scaled(g, weight * share[k]));
                    }
                }
            }
            of_weight = sum_of_lanes(of_weight), of_x = sum_of_lanes(of_x), of_y = sum_of_lanes(of_y);
            weighted = fmaf(weight, of_weight, weighted);
            if (live && lane == i % kBackwardLanes) {
                grad_offsets[2 * i] = weight * of_x;
                grad_offsets[2 * i + 1] = weight * of_y;
                grad_logits[i] = of_weight;  // this lane reads it again below
            }
        }
    }
    if (!live) return;
    for (int i = lane; i < count; i += kBackwardLanes) {
        grad_logits[i] = expf(load(logits + i) - highest) * scale * (grad_logits[i] - weighted);
    }
}

}  // namespace d2_trt
