// Launchers of the pre-processing kernels. Pointers are device memory of the stream's device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "preprocess/resize_math.h"

namespace d2_trt::preprocess {

struct ResizeArgs {
    std::uint8_t const* image;  // (height, width, channels), contiguous
    std::int64_t height;
    std::int64_t width;
    int channels;           // 1 or 3
    bool reverse_channels;  // the last channel comes first
    bool vertical_first;    // the order of the passes, which their rounding makes visible
    AxisTable horizontal;
    AxisTable vertical;
    // What the first pass writes. Horizontal first: (channels, height, scratch_stride(horizontal.size)), of which each row's first
    // horizontal.size bytes count. Vertical first: (vertical.size, width, channels).
    std::uint8_t* scratch;
    std::uint8_t* out;  // (channels, vertical.size, horizontal.size), contiguous
};

// Bytes from row to row of what a horizontal first pass writes: a multiple of 4, so that columns are read by fours.
inline std::int64_t scratch_stride(std::int64_t width) { return (width + 3) / 4 * 4; }

// Pixels along an axis: Pillow tells places of the image as float32, which holds whole numbers up to here.
constexpr std::int64_t kMaxSide = std::int64_t{1} << 24;

// Bytes that the scratch must have. Throws std::invalid_argument for sizes that cannot be.
inline std::int64_t scratch_bytes(ResizeArgs const& args) {
    auto const check = [](char const* name, std::int64_t height, std::int64_t width) {
        require(
            height >= 1 && height <= kMaxSide && width >= 1 && width <= kMaxSide, "resize_bilinear: ", name, " is ", height, "x",
            width, " (height x width); expected 1 to ", kMaxSide, " each");
    };
    check("size", args.height, args.width);
    check("out_size", args.vertical.size, args.horizontal.size);
    require(
        args.channels == 1 || args.channels == 3, "resize_bilinear: an image of ", args.channels, " channels; expected 1 or 3");
    return args.channels * (args.vertical_first ? args.vertical.size * args.width
                                                : args.height * scratch_stride(args.horizontal.size));
}

// Pillow's Image.resize with BILINEAR: two passes, with bytes in between. Tables must fit the sizes: they are on the
// device and not checked. Throws std::invalid_argument for sizes and alignments that cannot be, and std::runtime_error
// where a launch is refused.
void resize_bilinear(ResizeArgs const& args, std::int64_t scratch_size, cudaStream_t stream);

}  // namespace d2_trt::preprocess
