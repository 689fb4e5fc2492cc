// Element types that cross the C++ door, by the names that Python gives them.
#pragma once

#include <string>

#include "common/check.h"

namespace d2_trt {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline DType dtype_from_name(std::string const& name, char const* what) {
    if (name == "float32") return DType::kFloat32;
    if (name == "float16") return DType::kFloat16;
    require(name == "bfloat16", what, " has dtype ", name, "; expected float32, float16 or bfloat16");
    return DType::kBFloat16;
}

inline std::size_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

}  // namespace d2_trt
