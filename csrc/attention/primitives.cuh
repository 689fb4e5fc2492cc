// The instructions that the attention kernels are made of. Fragments are those of mma.m16n8k16 in the PTX ISA: in lane
// 4 g + t, the 16x16 matrix A is {row g, columns 2t, 2t+1}, {row g+8, same columns}, then both with columns 8 higher; the
// 16x8 matrix B is {rows 2t, 2t+1 of column g}, {rows 2t+8, 2t+9}; the 16x8 sums are {row g, columns 2t, 2t+1}, {row g+8}.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace d2_trt {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Two floats as two numbers of T in 32 bits, the first in the lower half.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<Half>(float low, float high) {
    __half2 const pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<std::uint32_t const*>(&pair);
}
template <>
__device__ __forceinline__ std::uint32_t pack<BFloat16>(float low, float high) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<std::uint32_t const*>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<Half>(std::uint32_t pair) {
    return __half22float2(*reinterpret_cast<__half2 const*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack<BFloat16>(std::uint32_t pair) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 const*>(&pair));
}

__device__ __forceinline__ float as_float(std::uint32_t bits) { return __uint_as_float(bits); }

// sum += A B
template <typename T>
__device__ __forceinline__ void multiply(
    float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
    std::uint32_t b1);
template <>
__device__ __forceinline__ void multiply<Half>(
    float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
    std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}
template <>
__device__ __forceinline__ void multiply<BFloat16>(
    float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
    std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// The low (0) or high (1) halves of two words, side by side.
__device__ __forceinline__ std::uint32_t halves(std::uint32_t first, std::uint32_t second, int which) {
    return __byte_perm(first, second, which ? 0x7632 : 0x5410);
}

// 2 ** x; 0 for minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <typename V>
__device__ __forceinline__ V shuffle_xor(V value, int lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// A bit for each lane.
__device__ __forceinline__ std::uint32_t ballot(bool holds) { return __ballot_sync(0xffffffffu, holds); }
__device__ __forceinline__ bool any_lane(bool holds) { return __any_sync(0xffffffffu, holds); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

// Copies 16 bytes to shared memory without waiting, or clears them, reading nothing.
__device__ __forceinline__ void copy_async(void* to, void const* from, bool clear) {
#if __CUDA_ARCH__ >= 800
    auto const shared = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(clear ? 0 : 16) : "memory");
#endif
}
// Ends a group of copies; there may be none in it.
__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for this thread's copies but those of the last `kLater` groups.
template <int kLater>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
#endif
}

// Memory that no kernel writes meanwhile, through the first-level cache.
template <typename V>
__device__ __forceinline__ V load(V const* from) {
    return __ldg(from);
}

}  // namespace d2_trt
