// Launchers of the pre-processing kernels. Pointers are device memory of the stream's device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// Bytes that the scratch must have.
inline std::int64_t scratch_bytes(ResizeArgs const& args) {
    return args.channels * (args.vertical_first ? args.vertical.size * args.width
                                                : args.height * scratch_stride(args.horizontal.size));
}

// Pillow's Image.resize with BILINEAR: two passes, with bytes in between. Tables must fit the sizes: they are on the
// device and not checked. Throws std::invalid_argument for sizes and alignments that cannot be, and std::runtime_error
// where a launch is refused.
void resize_bilinear(ResizeArgs const& args, std::int64_t scratch_size, cudaStream_t stream);

}  // namespace d2_trt::preprocess
