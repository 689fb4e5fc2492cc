// What the launchers of csrc/attention share.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>

#include "common/check.h"

namespace d2_trt {

constexpr int kMaxDevices = 64;

struct Device {
    int index = 0, multiprocessors = 0, shared_bytes = 0, major = 0;
};

// Facts of the current device, asked for once.
inline Device const& device() {
    static std::array<Device, kMaxDevices> known;
    static std::array<std::once_flag, kMaxDevices> asked;
    int index = 0;
    check_cuda(cudaGetDevice(&index), "attention: no device");
    require(index < kMaxDevices, "attention: device ", index, "; expected one below ", kMaxDevices);
    std::call_once(asked[index], [&] {
        auto const ask = [&](cudaDeviceAttr what) {
            int value = 0;
            check_cuda(cudaDeviceGetAttribute(&value, what, index), "attention: no such device attribute");
            return value;
        };
        known[index] = {
            index, ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            ask(cudaDevAttrComputeCapabilityMajor)};
    });
    return known[index];
}

inline void check_device(Device const& on, char const* what) {
    require(on.major >= 8, what, ": needs a GPU of compute capability 8.0 or higher; this is ", on.major, ".x");
}

// Opens the shared memory that the kernel needs: what a device has open for it only grows, also where several threads ask
// for different sizes.
template <typename Kernel>
void open_shared(Kernel* kernel, int bytes, Device const& on, std::atomic<int> (&opened)[kMaxDevices]) {
    require(
        bytes <= on.shared_bytes, "attention: needs ", bytes, " bytes of shared memory; a block of this GPU may have ",
        on.shared_bytes);
    if (opened[on.index].load(std::memory_order_acquire) >= bytes) return;
    static std::mutex opening;
    std::lock_guard<std::mutex> const lock(opening);
    if (opened[on.index].load(std::memory_order_relaxed) >= bytes) return;
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "attention: shared memory is refused");
    opened[on.index].store(bytes, std::memory_order_release);
}

inline unsigned count(std::int64_t n) { return static_cast<unsigned>(n); }

}  // namespace d2_trt
