// Images less their mean, over their standard deviation, in the type and layout that the first convolution reads.
#include <climits>

#include "normalization/elements.cuh"
#include "normalization/normalization.h"

namespace d2_trt {
namespace {

using namespace norm;

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // pixels, or eights of pixels of a plane, that a thread has under way

struct Arguments {
    NormalizeImagesTensors t;
    std::int64_t pixels;
    int channels;
    int parts;  // blocks for a plane, or for an image where channels are last
};

// As PyTorch rounds it, whatever the compiler is told of fast arithmetic.
__device__ inline float normalized(float x, float mean, float deviation) {
    return __fdiv_rn(__fsub_rn(x, mean), deviation);
}

// A block takes part of a plane.
template <bool kVector>
__global__ void __launch_bounds__(kThreads) to_planar(Arguments const a) {
    std::int64_t const plane = blockIdx.x / a.parts;
    int const channel = static_cast<int>(plane % a.channels);
    float const mean = a.t.mean[channel], deviation = a.t.std[channel];
    std::int64_t const base = plane * a.pixels;
    std::int64_t const chunks = (a.pixels + kWide - 1) / kWide;
    std::int64_t const first = static_cast<std::int64_t>(blockIdx.x % a.parts) * kThreads * kAhead + threadIdx.x;
    Raw raw[kAhead];
    if constexpr (kVector) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            std::int64_t const at = first + i * kThreads;
            if (at < chunks) raw[i] = load_raw(a.t.images, base + at * kWide, DType::kFloat32);
        }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        std::int64_t const at = first + i * kThreads;
        if (at >= chunks) break;
        int const count = static_cast<int>(min(std::int64_t{kWide}, a.pixels - at * kWide));
        float v[kWide];
        if constexpr (kVector) {
            to_floats(raw[i], DType::kFloat32, v);
        } else {
            load_some(a.t.images, base + at * kWide, count, DType::kFloat32, v);
        }
#pragma unroll
        for (int j = 0; j < kWide; ++j) v[j] = normalized(v[j], mean, deviation);
        if constexpr (kVector) {
            store_wide(a.t.out, base + at * kWide, a.t.out_type, v);
        } else {
            store_some(a.t.out, base + at * kWide, count, a.t.out_type, v);
        }
    }
}

// The channels of a pixel. kStride: elements from pixel to pixel; 0: as many as there are channels.
template <int kStride>
__device__ inline void store_pixel(NormalizeImagesTensors const& t, std::int64_t pixel, int channels, float const (&v)[kWide]) {
    if constexpr (kStride == kWide) {
        store_wide(t.out, pixel * kWide, t.out_type, v);
    } else if constexpr (kStride == 4) {
        if (t.out_type == DType::kFloat32) {
            static_cast<float4*>(t.out)[pixel] = make_float4(v[0], v[1], v[2], v[3]);
        } else {
            static_cast<uint2*>(t.out)[pixel] = make_uint2(pack(v[0], v[1], t.out_type), pack(v[2], v[3], t.out_type));
        }
    } else {
        store_some(t.out, pixel * channels, channels, t.out_type, v);
    }
}

// A block takes part of an image, a thread whole pixels.
template <int kStride>
__global__ void __launch_bounds__(kThreads) to_channels_last(Arguments const a) {
    std::int64_t const image = blockIdx.x / a.parts;
    std::int64_t const first = static_cast<std::int64_t>(blockIdx.x % a.parts) * kThreads * kAhead + threadIdx.x;
    float const* const planes = a.t.images + image * a.channels * a.pixels;
    float v[kAhead][kWide];
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            std::int64_t const at = first + i * kThreads;
            v[i][c] = c < a.channels && at < a.pixels ? __ldg(planes + c * a.pixels + at) : 0.0F;
        }
    }
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
        if (c >= a.channels) break;
        float const mean = a.t.mean[c], deviation = a.t.std[c];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) v[i][c] = normalized(v[i][c], mean, deviation);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        std::int64_t const at = first + i * kThreads;
        if (at < a.pixels) store_pixel<kStride>(a.t, image * a.pixels + at, a.channels, v[i]);
    }
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool normalize_images_takes_stride(std::int64_t channels, std::int64_t stride) {
    return stride == 0 || (channels <= stride && (stride == 4 || stride == kWide || (stride == channels && stride < kWide)));
}

void normalize_images(NormalizeImagesTensors const& t, ImageSizes const& sizes, cudaStream_t stream) {
    require(
        sizes.batch >= 0 && sizes.pixels >= 0 && sizes.batch <= 1 << 20 && sizes.pixels <= std::int64_t{1} << 32,
        "normalize_images: ", sizes.batch, " images of ", sizes.pixels, " pixels; expected up to 2^20 and 2^32");
    require(
        sizes.channels >= 1 && sizes.channels <= 1 << 10, "normalize_images: ", sizes.channels,
        " channels; expected 1 to 2^10");
    require(
        normalize_images_takes_stride(sizes.channels, sizes.pixel_stride), "normalize_images: ", sizes.pixel_stride,
        " elements from pixel to pixel for ", sizes.channels, " channels; expected 0, 4 or 8, or as many as there are channels, "
        "at most 8");
    if (sizes.batch == 0 || sizes.pixels == 0) return;
    bool const planar = sizes.pixel_stride == 0;
    bool const padded = sizes.pixel_stride == 4 || sizes.pixel_stride == kWide;
    require_aligned(reinterpret_cast<std::uintptr_t>(t.images), 4, "normalize_images: images");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.mean), 4, "normalize_images: mean");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.std), 4, "normalize_images: std");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.out), padded ? 16 : size_of(t.out_type), "normalize_images: out");
    Arguments a{};
    a.t = t;
    a.pixels = sizes.pixels;
    a.channels = static_cast<int>(sizes.channels);
    std::int64_t const parts = ceil_div(planar ? ceil_div(sizes.pixels, kWide) : sizes.pixels, kThreads * kAhead);
    std::int64_t const blocks = sizes.batch * (planar ? sizes.channels : 1) * parts;
    require(blocks <= INT_MAX, "normalize_images: the images need more than ", INT_MAX, " blocks");
    a.parts = static_cast<int>(parts);
    bool const vector = sizes.pixels % kWide == 0 && aligned_to_16(t.images, t.out);
    auto const kernel = planar                        ? (vector ? &to_planar<true> : &to_planar<false>)
                        : sizes.pixel_stride == kWide ? &to_channels_last<kWide>
                        : sizes.pixel_stride == 4     ? &to_channels_last<4>
                                                      : &to_channels_last<0>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
    check_cuda(cudaGetLastError(), "normalize_images");
}

}  // namespace d2_trt
