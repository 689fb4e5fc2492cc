// How channels lie in shared memory and in the packed weights, and what multiplies them.
//
// In a matrix product the order of the channels that are summed over is free, as long as both operands have it. A lane of
// mma.m16n8k16 takes its channels here from 16 bytes in one piece: of an operand's row in shared memory as of a weight's.
#pragma once

#include <cstdint>
#include <type_traits>

#ifndef D2_TRT_EMULATED
#include "attention/primitives.cuh"
#endif

namespace d2_trt {

// Numbers of DType (common/dtype.h).
enum Element : std::int32_t { kElementFloat = 0, kElementHalf = 1, kElementBFloat16 = 2 };

// Operands in half precision: 16 bytes hold eight channels, and 64 bytes, of four lanes, are two products deep.
template <typename T>
struct Operands {
    static constexpr int kBytes = 2;   // of a channel
    static constexpr int kChunk = 32;  // channels of 64 bytes
    // Of tensors whose channels are operands as they lie in memory.
    static constexpr std::int32_t kElement = std::is_same<T, Half>::value ? kElementHalf : kElementBFloat16;

    static __device__ __forceinline__ void put(unsigned char* to, float const (&v)[4]) {
        *reinterpret_cast<uint2*>(to) = uint2{pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
    }
    // a, b: rows g and g + 8 of the operand, w: column g of the weights.
    static __device__ __forceinline__ void multiply_chunk(float (&sum)[4], uint4 const& a, uint4 const& b, uint4 const& w) {
        multiply<T>(sum, a.x, b.x, a.y, b.y, w.x, w.y);
        multiply<T>(sum, a.z, b.z, a.w, b.w, w.z, w.w);
    }
};

// Marks float32 operands, which are multiplied as sums of two bfloat16: 16 bits and float32's range.
struct Split {};

template <>
struct Operands<Split> {
    static constexpr int kBytes = 4;
    static constexpr int kChunk = 16;
    static constexpr std::int32_t kElement = -1;  // of none

    static __device__ __forceinline__ void put(unsigned char* to, float const (&v)[4]) {
        std::uint32_t const high[2] = {pack<BFloat16>(v[0], v[1]), pack<BFloat16>(v[2], v[3])};
        float2 const first = unpack<BFloat16>(high[0]), second = unpack<BFloat16>(high[1]);
        *reinterpret_cast<uint4*>(to) = uint4{
            high[0], high[1], pack<BFloat16>(v[0] - first.x, v[1] - first.y),
            pack<BFloat16>(v[2] - second.x, v[3] - second.y)};
    }
    // The product of the two low parts is below what is left out anyway.
    static __device__ __forceinline__ void multiply_chunk(float (&sum)[4], uint4 const& a, uint4 const& b, uint4 const& w) {
        multiply<BFloat16>(sum, a.z, b.z, a.w, b.w, w.x, w.y);
        multiply<BFloat16>(sum, a.x, b.x, a.y, b.y, w.z, w.w);
        multiply<BFloat16>(sum, a.x, b.x, a.y, b.y, w.x, w.y);
    }
};

__device__ __forceinline__ void widen_pairs(uint2 const& pairs, std::int32_t type, float (&v)[4]) {
    float2 const first = type == kElementHalf ? unpack<Half>(pairs.x) : unpack<BFloat16>(pairs.x);
    float2 const second = type == kElementHalf ? unpack<Half>(pairs.y) : unpack<BFloat16>(pairs.y);
    v[0] = first.x, v[1] = first.y, v[2] = second.x, v[3] = second.y;
}

// Four channels from `at`, a multiple of 4, on.
__device__ __forceinline__ void load_four(void const* base, std::int64_t at, std::int32_t type, float (&v)[4]) {
    if (type == kElementFloat) {
        float4 const from = load(static_cast<float4 const*>(base) + at / 4);
        v[0] = from.x, v[1] = from.y, v[2] = from.z, v[3] = from.w;
        return;
    }
    widen_pairs(load(static_cast<uint2 const*>(base) + at / 4), type, v);
}

// The same in two steps, between which other work does not wait for what is loaded.
__device__ __forceinline__ uint4 load_raw(void const* base, std::int64_t at, std::int32_t type) {
    if (type == kElementFloat) return load(static_cast<uint4 const*>(base) + at / 4);
    uint2 const pairs = load(static_cast<uint2 const*>(base) + at / 4);
    return uint4{pairs.x, pairs.y, 0, 0};
}
__device__ __forceinline__ void widen_raw(uint4 const& raw, std::int32_t type, float (&v)[4]) {
    if (type == kElementFloat) {
        v[0] = as_float(raw.x), v[1] = as_float(raw.y), v[2] = as_float(raw.z), v[3] = as_float(raw.w);
    } else {
        widen_pairs(uint2{raw.x, raw.y}, type, v);
    }
}

__device__ __forceinline__ void store_four(void* base, std::int64_t at, std::int32_t type, float const (&v)[4]) {
    if (type == kElementFloat) {
        static_cast<float4*>(base)[at / 4] = float4{v[0], v[1], v[2], v[3]};
    } else if (type == kElementHalf) {
        static_cast<uint2*>(base)[at / 4] = uint2{pack<Half>(v[0], v[1]), pack<Half>(v[2], v[3])};
    } else {
        static_cast<uint2*>(base)[at / 4] = uint2{pack<BFloat16>(v[0], v[1]), pack<BFloat16>(v[2], v[3])};
    }
}

}  // namespace d2_trt
