// Words of 16-bit numbers in registers, and what the attention kernels share.
#pragma once

#ifndef D2_TRT_EMULATED
#include "attention/primitives.cuh"
#endif

namespace d2_trt {

constexpr int kTileKeys = 32;
constexpr int kBlockRows = 16;

// Words from shared memory.
template <int kWords>
__device__ __forceinline__ void read_words(std::uint32_t (&words)[kWords], void const* from) {
    if constexpr (kWords == 1) {
        words[0] = *static_cast<std::uint32_t const*>(from);
    } else if constexpr (kWords == 2) {
        uint2 const w = *static_cast<uint2 const*>(from);
        words[0] = w.x, words[1] = w.y;
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            uint4 const w = static_cast<uint4 const*>(from)[i / 4];
            words[i] = w.x, words[i + 1] = w.y, words[i + 2] = w.z, words[i + 3] = w.w;
        }
    }
}

// Words from global memory, or zeros.
template <int kWords>
__device__ __forceinline__ void load_words(std::uint32_t (&words)[kWords], void const* from, bool valid) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    if (!valid) return;
    if constexpr (kWords == 1) {
        words[0] = load(static_cast<std::uint32_t const*>(from));
    } else if constexpr (kWords == 2) {
        uint2 const w = load(static_cast<uint2 const*>(from));
        words[0] = w.x, words[1] = w.y;
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            uint4 const w = load(static_cast<uint4 const*>(from) + i / 4);
            words[i] = w.x, words[i + 1] = w.y, words[i + 2] = w.z, words[i + 3] = w.w;
        }
    }
}

// words += more, each sum rounded to T.
template <typename T, int kWords>
__device__ __forceinline__ void add_words(std::uint32_t (&words)[kWords], std::uint32_t const (&more)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        float2 const a = unpack<T>(words[i]), b = unpack<T>(more[i]);
        words[i] = pack<T>(a.x + b.x, a.y + b.y);
    }
}

// Eight channels of a mask embedding as high + low, numbers of T, the rest being below what features resolve.
template <typename T>
__device__ __forceinline__ void high_and_low(
    float4 const& first, float4 const& second, std::uint32_t (&high)[4], std::uint32_t (&low)[4]) {
    float const values[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        high[i] = pack<T>(values[2 * i], values[2 * i + 1]);
        float2 const rounded = unpack<T>(high[i]);
        low[i] = pack<T>(values[2 * i] - rounded.x, values[2 * i + 1] - rounded.y);
    }
}

}  // namespace d2_trt
