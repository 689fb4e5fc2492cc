// The arithmetic of ms_deform_attn.cu, one element at a time, for the device and for checks on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ms_deform_attn/ms_deform_attn.h"

#define D2_TRT_HD __host__ __device__ __forceinline__

namespace d2_trt {

#ifndef __CUDA_ARCH__
using std::max;
using std::min;
#endif

// A level of the pyramid, and how the kernel covers its pixels with tiles of queries.
struct Level {
    std::int32_t height, width;
    std::int32_t start;     // first of its pixels among all
    std::int32_t tile_end;  // one past its last tile among all
};

// Fills in `start` and `tile_end`. Returns the number of tiles of all levels, or -1 where the sizes do not hold `pixels`
// pixels: the one check between sizes that only the device knows and reads outside of the tensors.
D2_TRT_HD std::int32_t plan_levels(
    Level* levels, int count, std::int64_t pixels, int tile_width_log2, int tile_height_log2) {
    std::int64_t start = 0;
    std::int64_t tiles = 0;
    for (int i = 0; i < count; ++i) {
        Level& level = levels[i];
        if (level.height < 0 || level.width < 0) return -1;
        std::int64_t const area = static_cast<std::int64_t>(level.height) * level.width;
        if (area > pixels - start) return -1;
        level.start = static_cast<std::int32_t>(start);
        if (area > 0) {
            std::int64_t const rows = ((level.height - 1) >> tile_height_log2) + 1;
            std::int64_t const columns = ((level.width - 1) >> tile_width_log2) + 1;
            tiles += rows * columns;
        }
        level.tile_end = static_cast<std::int32_t>(tiles);
        start += area;
    }
    return start == pixels ? static_cast<std::int32_t>(tiles) : -1;
}

// Pixels that one bilinear sample reads, (y0, x0) and those to the right and below, all inside of the level, and their
// weights in the order (y0, x0), (y0, x1), (y1, x0), (y1, x1), 0 where the sample has no such pixel.
struct Sample {
    float4 weight;
    std::uint32_t packed;  // (first pixel << 2) | (x1 > x0) << 1 | (y1 > y0)
};

// The sample at (x, y), in pixels of the level with (0, 0) at the centre of its first; beyond its edges are zeros, and a
// location that is no number is beyond them.
D2_TRT_HD Sample bilinear_sample(Level const& level, float x, float y, float scale) {
    Sample sample{{0.f, 0.f, 0.f, 0.f}, 0u};
    bool const inside = x > -1.f && y > -1.f && x < static_cast<float>(level.width) && y < static_cast<float>(level.height);
    if (!inside || level.width == 0 || level.height == 0) return sample;
    float const floor_x = floorf(x), floor_y = floorf(y);
    int const x0 = static_cast<int>(floor_x), y0 = static_cast<int>(floor_y);
    float const right = x - floor_x, below = y - floor_y;
    float const wx0 = x0 >= 0 ? 1.f - right : 0.f;
    float const wx1 = x0 + 1 < level.width ? right : 0.f;
    float const wy0 = y0 >= 0 ? scale * (1.f - below) : 0.f;
    float const wy1 = y0 + 1 < level.height ? scale * below : 0.f;
    sample.weight = {wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1};
    // Clamped, so that what has no weight can be read nevertheless. At x0 == -1 both columns are the first one.
    int const left = min(max(x0, 0), level.width - 1);
    int const top = min(max(y0, 0), level.height - 1);
    std::uint32_t const step_x = x0 >= 0 && x0 + 1 < level.width;
    std::uint32_t const step_y = y0 >= 0 && y0 + 1 < level.height;
    sample.packed = (static_cast<std::uint32_t>(level.start + top * level.width + left) << 2) | (step_x << 1) | step_y;
    return sample;
}

// Pixel `query` of a level of `query_size` pixels lies at (query + 0.5) / query_size; in pixels of a level of
// `query_size * ratio`, with 0 at the centre of the first and `offset` added:
D2_TRT_HD float sampling_location(int query, float ratio, float offset) {
    return fmaf(static_cast<float>(query) + 0.5f, ratio, offset - 0.5f);
}

D2_TRT_HD float to_float(float x) { return x; }
D2_TRT_HD float to_float(__half x) { return __half2float(x); }
D2_TRT_HD float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
D2_TRT_HD T from_float(float x);
template <>
D2_TRT_HD float from_float<float>(float x) { return x; }
template <>
D2_TRT_HD __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
D2_TRT_HD __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// What one lane reads of a pixel at a time: one channel, or 16 bytes of channels.
template <typename T, bool kVector>
struct Channels {
    static constexpr int kCount = 1;
    using Raw = T;
    D2_TRT_HD static void unpack(Raw raw, float (&x)[1]) { x[0] = to_float(raw); }
    D2_TRT_HD static Raw pack(float const (&x)[1]) { return from_float<T>(x[0]); }
};

template <>
struct Channels<float, true> {
    static constexpr int kCount = 4;
    using Raw = uint4;
    D2_TRT_HD static float as_float(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
        return __uint_as_float(bits);
#else
        float x;
        __builtin_memcpy(&x, &bits, 4);
        return x;
#endif
    }
    D2_TRT_HD static std::uint32_t as_bits(float x) {
#ifdef __CUDA_ARCH__
        return __float_as_uint(x);
#else
        std::uint32_t bits;
        __builtin_memcpy(&bits, &x, 4);
        return bits;
#endif
    }
    D2_TRT_HD static void unpack(Raw raw, float (&x)[4]) {
        x[0] = as_float(raw.x), x[1] = as_float(raw.y), x[2] = as_float(raw.z), x[3] = as_float(raw.w);
    }
    D2_TRT_HD static Raw pack(float const (&x)[4]) {
        return {as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])};
    }
};

template <typename T>
struct Channels<T, true> {  // __half, __nv_bfloat16
    static constexpr int kCount = 8;
    using Raw = uint4;
    struct alignas(4) Two {
        T low, high;
    };
    D2_TRT_HD static void unpack(Raw raw, float (&x)[8]) {
        std::uint32_t const words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Two two;
            memcpy(&two, &words[i], 4);
            x[2 * i] = to_float(two.low), x[2 * i + 1] = to_float(two.high);
        }
    }
    D2_TRT_HD static Raw pack(float const (&x)[8]) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Two const two{from_float<T>(x[2 * i]), from_float<T>(x[2 * i + 1])};
            memcpy(&words[i], &two, 4);
        }
        return {words[0], words[1], words[2], words[3]};
    }
};

}  // namespace d2_trt
