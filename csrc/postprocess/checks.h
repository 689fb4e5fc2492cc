// What the launchers of this family ask of their arguments before they launch anything.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "postprocess/layout.h"
#include "postprocess/postprocess.h"

namespace d2_trt::postprocess {

// Kernels count a mask's pixels, and those of the tile that the last one is in, in 31 bits.
inline constexpr std::int64_t kMaxPixels = (std::int64_t{1} << 31) - 129;
inline constexpr std::int64_t kMaxQueryStride = std::int64_t{1} << 40;

// Throws unless the pointer is to elements of T, or to as many bytes as one read or write of the kernels takes.
template <typename T>
inline void check_pointer(char const* what, char const* name, T const* pointer, std::size_t bytes = sizeof(T)) {
    require(pointer != nullptr, what, ": ", name, " is a null pointer");
    require(
        reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0, what, ": ", name, " is not aligned to ", bytes, " bytes");
}

// `work` also holds sums of 64 bits.
inline void check_work(char const* what, std::int32_t const* work) { check_pointer(what, "work", work, sizeof(std::int64_t)); }

inline void check_batch(char const* what, int batch) {
    require(batch >= 1, what, ": a batch of ", batch, "; expected at least 1");
}

inline void check_queries(char const* what, int queries) {
    require(queries >= 1 && queries <= kMaxQueries, what, ": ", queries, " queries; expected 1 to ", kMaxQueries);
}

inline void check_classes(char const* what, int classes) {
    require(classes >= 1 && classes <= kMaxClasses, what, ": ", classes, " classes; expected 1 to ", kMaxClasses);
}

// The instances of an image: pairs of a query, which is already checked, and one of `classes`.
inline void check_topk(char const* what, int topk, int least, int queries, int classes = kMaxClasses) {
    require(
        topk >= least && topk <= queries * classes, what, ": topk is ", topk, "; expected ", least, " to ", queries * classes,
        " for ", queries, " queries");
}

inline void check_size(char const* what, char const* name, std::int64_t height, std::int64_t width) {
    require(
        height >= 1 && width >= 1 && height <= kMaxPixels / width, what, ": ", name, " of ", height, "x", width,
        " (height x width); expected at least 1x1 and at most ", kMaxPixels, " pixels");
}

inline void check_geometry(char const* what, Geometry const& g) {
    check_size(what, "masks", g.mask_h, g.mask_w);
    check_size(what, "an image", g.image_h, g.image_w);
    check_size(what, "an output", g.out_h, g.out_w);
}

inline void check_masks(char const* what, Masks const& masks) {
    check_pointer(what, "pred_masks", static_cast<char const*>(masks.data), size_of(masks.dtype));
    require(
        masks.query_stride >= 0 && masks.query_stride <= kMaxQueryStride, what, ": masks are ", masks.query_stride,
        " elements apart; expected 0 to 2^40");
}

}  // namespace d2_trt::postprocess
