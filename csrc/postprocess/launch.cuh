// How the kernels of this family are launched, and the few warp helpers that they share.
#pragma once

#include <cuda_runtime.h>

#include "common/check.h"

namespace d2_trt::postprocess {

template <typename... Params, typename... Args>
inline void launch(char const* what, void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t stream, Args... args) {
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
    check_cuda(cudaGetLastError(), what);
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ inline T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the lanes of a warp, in every lane.
__device__ inline unsigned warp_sum(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_add_sync(kAllLanes, value);
#else
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
#endif
}

inline unsigned ceil_div(long long a, long long b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace d2_trt::postprocess
