// LayerNorm of rows: rows of up to 1024 channels stay in the registers of (part of) a warp, longer ones take a block each.
#include <algorithm>
#include <climits>

#include "normalization/elements.cuh"
#include "normalization/normalization.h"

namespace d2_trt {
namespace {

using namespace norm;

constexpr int kThreads = 128;
constexpr int kLongThreads = 256;
constexpr int kLongestInRegisters = 1024;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Arguments {
    LayerNormTensors t;
    std::int64_t rows;
    int channels;
    int lanes;  // of a warp, for one row: a power of two
    float epsilon;
    float share;  // 1 / channels
};

__device__ inline float sum_over(float value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

__device__ inline void load_raw_pair(LayerNormTensors const& t, std::int64_t at, Raw& x, Raw& residual) {
    x = load_raw(t.x, at, t.x_type);
    if (t.residual != nullptr) residual = load_raw(t.residual, at, t.residual_type);
}

__device__ inline void add_raw_pair(LayerNormTensors const& t, Raw const& x, Raw const& residual, float (&v)[kWide]) {
    to_floats(x, t.x_type, v);
    if (t.residual == nullptr) return;
    float added[kWide];
    to_floats(residual, t.residual_type, added);
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] += added[i];
}

// Elements of x + residual from `at` on.
template <bool kVector>
__device__ inline void load_sum(LayerNormTensors const& t, std::int64_t at, int count, float (&v)[kWide]) {
    if constexpr (kVector) {
        Raw x, residual;
        load_raw_pair(t, at, x, residual);
        add_raw_pair(t, x, residual, v);
    } else {
        load_some(t.x, at, count, t.x_type, v);
        if (t.residual == nullptr) return;
        float added[kWide];
        load_some(t.residual, at, count, t.residual_type, added);
#pragma unroll
        for (int i = 0; i < kWide; ++i) v[i] += added[i];
    }
}

// First element of a row's position.
__device__ inline std::int64_t position_of(LayerNormTensors const& t, std::int64_t row, int channels) {
    return t.position != nullptr ? row % t.position_rows * channels : 0;
}

// Writes weight * normalized + bias of channels from `channel` on, and where there is a position the same with that added.
template <bool kVector>
__device__ inline void store_affine(
    LayerNormTensors const& t, std::int64_t row_start, std::int64_t position_start, int channel, int count,
    float (&normalized)[kWide]) {
    float weight[kWide], bias[kWide];
    if constexpr (kVector) {
        to_floats(load_raw(t.weight, channel, DType::kFloat32), DType::kFloat32, weight);
        to_floats(load_raw(t.bias, channel, DType::kFloat32), DType::kFloat32, bias);
    } else {
        load_some(t.weight, channel, count, DType::kFloat32, weight);
        load_some(t.bias, channel, count, DType::kFloat32, bias);
    }
#pragma unroll
    for (int i = 0; i < kWide; ++i) normalized[i] = fmaf(normalized[i], weight[i], bias[i]);
    if constexpr (kVector) {
        store_wide(t.out, row_start + channel, t.out_type, normalized);
    } else {
        store_some(t.out, row_start + channel, count, t.out_type, normalized);
    }
    if (t.position == nullptr) return;
    float position[kWide];
    if constexpr (kVector) {
        to_floats(load_raw(t.position, position_start + channel, t.position_type), t.position_type, position);
    } else {
        load_some(t.position, position_start + channel, count, t.position_type, position);
    }
#pragma unroll
    for (int i = 0; i < kWide; ++i) normalized[i] += position[i];
    if constexpr (kVector) {
        store_wide(t.sum, row_start + channel, t.out_type, normalized);
    } else {
        store_some(t.sum, row_start + channel, count, t.out_type, normalized);
    }
}

__device__ inline int count_from(int channel, int channels) { return max(0, min(kWide, channels - channel)); }

// Each `lanes` lanes take a row. Values are taken relative to the row's first, so that a large mean costs no digits; the
// variance is that of the differences from the mean, in a second pass over the registers.
// kHalf: all tensors are float16, which the compiler then knows.
template <int kChunks, bool kVector, bool kHalf>
__global__ void __launch_bounds__(kThreads) layer_norm_short(Arguments const given) {
    Arguments a = given;
    if constexpr (kHalf) a.t.x_type = a.t.residual_type = a.t.out_type = a.t.position_type = DType::kFloat16;
    int const rows_at_once = kThreads / a.lanes;
    int const lane = threadIdx.x % a.lanes;
    std::int64_t const warp_row = static_cast<std::int64_t>(threadIdx.x / 32) * (32 / a.lanes);
    // The warp's lanes loop together: those beyond the last row take part in the sums only.
    for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * rows_at_once + warp_row; first < a.rows;
         first += static_cast<std::int64_t>(gridDim.x) * rows_at_once) {
        std::int64_t const row = first + threadIdx.x % 32 / a.lanes;
        std::int64_t const start = row * a.channels;
        float v[kChunks][kWide];
        int count[kChunks];
        Raw x[kChunks], residual[kChunks];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            int const channel = (c * a.lanes + lane) * kWide;
            count[c] = row < a.rows ? count_from(channel, a.channels) : 0;
            if (kVector && count[c] > 0) load_raw_pair(a.t, start + channel, x[c], residual[c]);
        }
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            if (count[c] == 0) continue;
            if constexpr (kVector) {
                add_raw_pair(a.t, x[c], residual[c], v[c]);
            } else {
                load_sum<kVector>(a.t, start + (c * a.lanes + lane) * kWide, count[c], v[c]);
            }
        }
        float const pivot = __shfl_sync(kAllLanes, count[0] > 0 ? v[0][0] : 0.0F, 0, a.lanes);
        float sum = 0.0F;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            if (count[c] == 0) continue;
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
                if (kVector || i < count[c]) sum += v[c][i] -= pivot;
            }
        }
        float const mean = sum_over(sum, a.lanes) * a.share;
        float squares = 0.0F;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            if (count[c] == 0) continue;
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
                if (kVector || i < count[c]) {
                    v[c][i] -= mean;
                    squares = fmaf(v[c][i], v[c][i], squares);
                }
            }
        }
        float const scale = rsqrtf(sum_over(squares, a.lanes) * a.share + a.epsilon);
        std::int64_t const position_start = position_of(a.t, row, a.channels);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            if (count[c] == 0) continue;
#pragma unroll
            for (int i = 0; i < kWide; ++i) v[c][i] *= scale;
            store_affine<kVector>(a.t, start, position_start, (c * a.lanes + lane) * kWide, count[c], v[c]);
        }
    }
}

__device__ inline float sum_over_block(float value) {
    __shared__ float parts[kLongThreads / 32];
    value = sum_over(value, 32);
    __syncthreads();  // of an earlier sum
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0F;
    for (float part : parts) value += part;
    return value;
}

// A block takes a row, and reads it three times; the second and third time it comes from a cache.
template <bool kVector>
__global__ void __launch_bounds__(kLongThreads) layer_norm_long(Arguments const a) {
    for (std::int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        std::int64_t const start = row * a.channels, position_start = position_of(a.t, row, a.channels);
        float pivot = load_one(a.t.x, start, a.t.x_type);
        if (a.t.residual != nullptr) pivot += load_one(a.t.residual, start, a.t.residual_type);
        float v[kWide], sum = 0.0F, squares = 0.0F;
        for (int channel = threadIdx.x * kWide; channel < a.channels; channel += kLongThreads * kWide) {
            int const count = count_from(channel, a.channels);
            load_sum<kVector>(a.t, start + channel, count, v);
#pragma unroll
            for (int i = 0; i < kWide; ++i) sum += i < count ? v[i] - pivot : 0.0F;
        }
        float const mean = sum_over_block(sum) * a.share;
        for (int channel = threadIdx.x * kWide; channel < a.channels; channel += kLongThreads * kWide) {
            int const count = count_from(channel, a.channels);
            load_sum<kVector>(a.t, start + channel, count, v);
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
                float const difference = i < count ? v[i] - pivot - mean : 0.0F;
                squares = fmaf(difference, difference, squares);
            }
        }
        float const scale = rsqrtf(sum_over_block(squares) * a.share + a.epsilon);
        for (int channel = threadIdx.x * kWide; channel < a.channels; channel += kLongThreads * kWide) {
            int const count = count_from(channel, a.channels);
            load_sum<kVector>(a.t, start + channel, count, v);
#pragma unroll
            for (int i = 0; i < kWide; ++i) v[i] = (v[i] - pivot - mean) * scale;
            store_affine<kVector>(a.t, start, position_start, channel, count, v);
        }
    }
}

unsigned grid_for(std::int64_t blocks) {
    return static_cast<unsigned>(std::min<std::int64_t>(blocks, std::int64_t{1} << 24));  // the kernels loop over the rest
}

template <bool kVector, bool kHalf>
void launch(Arguments& a, cudaStream_t stream) {
    if (a.channels > kLongestInRegisters) {
        layer_norm_long<kVector><<<grid_for(a.rows), kLongThreads, 0, stream>>>(a);
        return;
    }
    // As few lanes without work as possible, and then as few chunks a lane: 96 channels are 4 lanes with 3 chunks of 8.
    int const wanted = (a.channels + kWide - 1) / kWide;
    int chunks = 4, most = INT_MAX;
    for (int c = 1; c <= 4; ++c) {
        int lanes = 4;
        while (lanes < 32 && lanes * c < wanted) lanes *= 2;
        if (lanes * c >= wanted && lanes * c < most) {
            chunks = c, a.lanes = lanes, most = lanes * c;
        }
    }
    int const rows_at_once = kThreads / a.lanes;
    unsigned const grid = grid_for((a.rows + rows_at_once - 1) / rows_at_once);
    auto const kernel = chunks == 1   ? &layer_norm_short<1, kVector, kHalf>
                        : chunks == 2 ? &layer_norm_short<2, kVector, kHalf>
                        : chunks == 3 ? &layer_norm_short<3, kVector, kHalf>
                                      : &layer_norm_short<4, kVector, kHalf>;
    kernel<<<grid, kThreads, 0, stream>>>(a);
}

}  // namespace

void layer_norm(LayerNormTensors const& t, std::int64_t rows, std::int64_t channels, float epsilon, cudaStream_t stream) {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    require(channels >= 1 && channels <= kMost, "layer_norm: ", channels, " channels; expected 1 to ", kMost);
    require(
        rows >= 0 && rows <= (std::int64_t{1} << 60) / channels, "layer_norm: ", rows, " rows of ", channels,
        " channels; expected 0 to 2^60 elements");
    require(epsilon >= 0.0F, "layer_norm: epsilon is ", epsilon, "; expected at least 0");
    if (rows == 0) return;
    require_aligned(reinterpret_cast<std::uintptr_t>(t.x), size_of(t.x_type), "layer_norm: x");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.out), size_of(t.out_type), "layer_norm: out");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.weight), sizeof(float), "layer_norm: weight");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.bias), sizeof(float), "layer_norm: bias");
    require(
        reinterpret_cast<std::uintptr_t>(t.residual) % size_of(t.residual_type) == 0,
        "layer_norm: residual is not aligned to ", size_of(t.residual_type), " bytes");
    require(
        (t.position == nullptr) == (t.sum == nullptr), "layer_norm: a position without a sum, or a sum without a position");
    if (t.position != nullptr) {
        require(
            t.position_rows >= 1 && rows % t.position_rows == 0, "layer_norm: ", t.position_rows, " rows of positions for ", rows,
            " rows; expected a divisor of them");
        require_aligned(reinterpret_cast<std::uintptr_t>(t.position), size_of(t.position_type), "layer_norm: position");
        require_aligned(reinterpret_cast<std::uintptr_t>(t.sum), size_of(t.out_type), "layer_norm: sum");
    }
    Arguments a{t, rows, static_cast<int>(channels), 32, epsilon, 1.0F / static_cast<float>(channels)};
    bool const half = t.x_type == DType::kFloat16 && t.out_type == DType::kFloat16 &&
                      (t.residual == nullptr || t.residual_type == DType::kFloat16) &&
                      (t.position == nullptr || t.position_type == DType::kFloat16);
    if (channels % kWide != 0 || !aligned_to_16(t.x, t.residual, t.weight, t.bias, t.out, t.position, t.sum)) {
        launch<false, false>(a, stream);
    } else if (half) {
        launch<true, true>(a, stream);
    } else {
        launch<true, false>(a, stream);
    }
    check_cuda(cudaGetLastError(), "layer_norm");
}

}  // namespace d2_trt
