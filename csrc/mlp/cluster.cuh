// What the blocks of a cluster do together (sm_90 and newer). Blocks that are launched without one call none of these.
#pragma once

#include <cstdint>

namespace d2_trt {

// The address of another block's shared memory that is at `own` in this one.
template <typename V>
__device__ __forceinline__ V* peer_memory(V* own, int rank) {
#if __CUDA_ARCH__ >= 900
    return static_cast<V*>(__cluster_map_shared_rank(static_cast<void*>(own), static_cast<unsigned>(rank)));
#else
    return own;
#endif
}

// All threads arrive, and each waits before it relies on what the others did before they arrived.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Brings 128 bytes of global memory to the second-level cache.
__device__ __forceinline__ void prefetch(void const* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

}  // namespace d2_trt
