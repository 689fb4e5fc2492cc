// Eight elements at a time, of a type that is known when the kernel runs: branches on it are the same for all threads, and a
// kernel serves all combinations of types. Loading and converting are apart, so that several loads are under way together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace d2_trt::norm {

constexpr int kWide = 8;  // elements that a thread takes at a time

struct Raw {
    uint4 low, high;  // 16-bit types fill `low` alone
};

// kWide elements from `at` on, which is a multiple of kWide; the base is aligned to 16 bytes.
__device__ inline Raw load_raw(void const* base, std::int64_t at, DType type) {
    Raw raw;
    if (type == DType::kFloat32) {
        uint4 const* const p = static_cast<uint4 const*>(base) + at / 4;
        raw.low = __ldg(p);
        raw.high = __ldg(p + 1);
    } else {
        raw.low = __ldg(static_cast<uint4 const*>(base) + at / 8);
        raw.high = make_uint4(0, 0, 0, 0);
    }
    return raw;
}

__device__ inline void to_floats(Raw const& raw, DType type, float (&v)[kWide]) {
    unsigned const words[4] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w};
    if (type == DType::kFloat32) {
        unsigned const more[4] = {raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = __uint_as_float(words[i]);
            v[i + 4] = __uint_as_float(more[i]);
        }
    } else if (type == DType::kFloat16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
            v[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // bfloat16 is the upper half of a float
            v[2 * i] = __uint_as_float(words[i] << 16);
            v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}

__device__ inline float load_one(void const* base, std::int64_t at, DType type) {
    if (type == DType::kFloat32) return static_cast<float const*>(base)[at];
    if (type == DType::kFloat16) return __half2float(static_cast<__half const*>(base)[at]);
    return __bfloat162float(static_cast<__nv_bfloat16 const*>(base)[at]);
}

__device__ inline unsigned pack(float low, float high, DType type) {
    if (type == DType::kFloat16) {
        return __half_as_ushort(__float2half_rn(low)) | static_cast<unsigned>(__half_as_ushort(__float2half_rn(high))) << 16;
    }
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}

__device__ inline void store_wide(void* base, std::int64_t at, DType type, float const (&v)[kWide]) {
    if (type == DType::kFloat32) {
        float4* const p = static_cast<float4*>(base) + at / 4;
        p[0] = make_float4(v[0], v[1], v[2], v[3]);
        p[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
        static_cast<uint4*>(base)[at / 8] =
            make_uint4(pack(v[0], v[1], type), pack(v[2], v[3], type), pack(v[4], v[5], type), pack(v[6], v[7], type));
    }
}

__device__ inline void store_one(void* base, std::int64_t at, DType type, float v) {
    if (type == DType::kFloat32) {
        static_cast<float*>(base)[at] = v;
    } else if (type == DType::kFloat16) {
        static_cast<__half*>(base)[at] = __float2half_rn(v);
    } else {
        static_cast<__nv_bfloat16*>(base)[at] = __float2bfloat16_rn(v);
    }
}

// The first `count` of eight elements from `at` on, one by one; the others are 0.
__device__ inline void load_some(void const* base, std::int64_t at, int count, DType type, float (&v)[kWide]) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = i < count ? load_one(base, at + i, type) : 0.0F;
}

__device__ inline void store_some(void* base, std::int64_t at, int count, DType type, float const (&v)[kWide]) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
        if (i < count) store_one(base, at + i, type, v[i]);
    }
}

// Whether 16 bytes can be read at a time of tensors at these addresses.
template <typename... Pointers>
bool aligned_to_16(Pointers... pointers) {
    return (... && (reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0));
}

}  // namespace d2_trt::norm
