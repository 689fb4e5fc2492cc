// What the blocks of a cluster do together (sm_90 and newer). Blocks that are launched without one call none of these.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Whether blocks can send to each other's mailboxes; the compiler knows how from CUDA 12.1 on.
#define D2_TRT_MAILBOXES (__CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010)

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

// All threads arrive, and each waits before it relies on what the others did before they arrived; of a relaxed arrival it
// learns no more than that they have begun. Any other waits for all that the thread wrote, wherever it is.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
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

// Bytes that other blocks, or this one, send to a place of this block's shared memory: whoever waits for all of them may read
// them, and nobody waits for anything else.
using Mailbox = std::uint64_t;

__device__ __forceinline__ std::uint32_t shared_address(void const* own) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(own));
}

// By one thread, before it arrives; others send to a mailbox, and wait for it, once they have waited for that.
__device__ __forceinline__ void open_mailbox(Mailbox* box, int bytes) {
#if D2_TRT_MAILBOXES
    auto const at = shared_address(box);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}

// To the places of another block that are at `to` and `box` in this one.
__device__ __forceinline__ void send(float2* to, float2 const& value, Mailbox* box, int rank) {
#if D2_TRT_MAILBOXES
    std::uint32_t place, counter;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(box)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(place), "f"(value.x),
        "f"(value.y), "r"(counter)
        : "memory");
#endif
}

__device__ __forceinline__ void await_mailbox(Mailbox* box) {
#if D2_TRT_MAILBOXES
    std::uint32_t done = 0;
    do {
        asm volatile(
            "{\n"
            ".reg .pred complete;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], 0;\n"
            "selp.u32 %0, 1, 0, complete;\n"
            "}"
            : "=r"(done)
            : "r"(shared_address(box))
            : "memory");
    } while (done == 0);
#endif
}

// Brings 128 bytes of global memory to the second-level cache.
__device__ __forceinline__ void prefetch(void const* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

}  // namespace d2_trt
