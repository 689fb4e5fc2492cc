// Checks at the C++ door: what came, what is allowed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace d2_trt {

// Throws std::invalid_argument (ValueError in Python) with the parts of the message joined.
template <typename... Parts>
inline void require(bool holds, Parts const&... parts) {
    if (holds) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

// Throws std::runtime_error (RuntimeError in Python) if the launch before it was refused.
inline void check_cuda(cudaError_t error, char const* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
    }
}

inline void require_aligned(std::uintptr_t pointer, std::size_t bytes, char const* name) {
    require(pointer != 0, name, " is a null pointer");
    require(pointer % bytes == 0, name, " is not aligned to ", bytes, " bytes");
}

}  // namespace d2_trt
