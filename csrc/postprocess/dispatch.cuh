// From what is known when a kernel is called to what is known when it is compiled.
#pragma once

#include <type_traits>

#include "postprocess/postprocess.h"

namespace d2_trt::postprocess {

// Calls call(pointer) with the masks' pointer in its own type.
template <typename Call>
inline void with_element_type(Masks const& masks, Call&& call) {
    switch (masks.dtype) {
        case DType::kFloat32: return call(static_cast<float const*>(masks.data));
        case DType::kFloat16: return call(static_cast<__half const*>(masks.data));
        case DType::kBFloat16: return call(static_cast<__nv_bfloat16 const*>(masks.data));
    }
}

// Calls call(pads, resizes) with the two as integral constants.
template <typename Call>
__host__ __device__ inline void with_steps(Geometry const& g, Call&& call) {
    if (g.pads) {
        if (g.resizes) {
            call(std::true_type{}, std::true_type{});
        } else {
            call(std::true_type{}, std::false_type{});
        }
    } else if (g.resizes) {
        call(std::false_type{}, std::true_type{});
    } else {
        call(std::false_type{}, std::false_type{});
    }
}

}  // namespace d2_trt::postprocess
