// Where the addresses that come through the Python door point to. TensorRT's plugins do not ask: its tensors are where they
// must be.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/check.h"

namespace d2_trt {

struct Argument {
    char const* name;
    std::uintptr_t address;
};

// Throws std::invalid_argument where an address is not in memory of the current device, which is the stream's. Null pointers
// are passed over, since some arguments may be null; so is everything where there is no device: the launch says so.
inline void require_device_memory(char const* function, std::initializer_list<Argument> arguments) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) {
        cudaGetLastError();  // forget it, lest the next check takes it for its own
        return;
    }
    for (Argument const& argument : arguments) {
        if (argument.address == 0) continue;
        cudaPointerAttributes found{};
        cudaError_t const error = cudaPointerGetAttributes(&found, reinterpret_cast<void const*>(argument.address));
        if (error == cudaErrorInvalidValue) {
            cudaGetLastError();
            found.type = cudaMemoryTypeUnregistered;
        } else {
            check_cuda(error, function);
        }
        bool const on_device = found.type == cudaMemoryTypeDevice, managed = found.type == cudaMemoryTypeManaged;
        if (managed || (on_device && found.device == device)) continue;
        std::string const where =
            on_device ? "memory of CUDA device " + std::to_string(found.device) : std::string("host memory");
        require(
            false, function, ": ", argument.name, " is an address in ", where, "; expected memory of CUDA device ", device,
            ", the current one");
    }
}

}  // namespace d2_trt
