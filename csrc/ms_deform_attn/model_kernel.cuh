// The kernel for the sizes of Mask2Former's pixel decoder: 8 heads of 32 channels, 3 levels of 4 points each.
//
// It is laid out for the first-level cache. A line of 128 bytes holds two heads of 16-bit values, and neighbouring groups of
// lanes work on neighbouring heads, so that they read both halves of a line. And the cache should hold what a multiprocessor
// reads: its warps work on neighbouring pixels of few heads, through a share of the image that is in one piece.
#pragma once

#include <type_traits>

#include "ms_deform_attn/sampling.cuh"

namespace d2_trt::model_kernel {

constexpr int kHeads = 8, kDim = 32, kLevels = 3, kPoints = 4;
constexpr int kSamples = kLevels * kPoints;
constexpr int kRows = 8;                  // pairs of query and head that a warp works on at a time: a "unit"
constexpr int kRowStride = kSamples | 1;  // of samples in shared memory; odd, so that rows lie in different banks
constexpr int kBand = 8;                  // rows of units that are walked column by column
constexpr std::int64_t kMaxPixels = 1 << 20;  // of an image: the walk divides in float32

// A multiprocessor has one block. More samples on their way at once leave registers for fewer warps.
template <typename T>
struct Choice {  // 16-bit values: 72 registers a thread
    static constexpr int kUnitHeads = 2, kAtOnce = 2, kWarps = 28;
};
template <>
struct Choice<float> {  // 80 registers
    static constexpr int kUnitHeads = 1, kAtOnce = 4, kWarps = 24;
};

struct Problem {
    void const* value;
    void const* offsets;
    void const* logits;
    void* out;
    std::int32_t const* device_levels;  // (3, 2), or null: then `sizes`
    std::int32_t sizes[kLevels][2];
    std::int32_t pixels, batch;
    std::uint32_t offsets_stride, logits_stride;  // between pixels: in pairs (x, y), and in logits
};

// A sample, as phase one leaves it to phase two: its share of the sum, where it lies between four pixels, and the first of
// these, in units of 16 bytes of value.
struct Sample {
    float share, right, below;
    std::uint32_t place;
};

struct Level {
    std::int32_t width, height, start;
    std::int32_t columns, rows, end;     // units of the level across and down; one past its last unit among all
    float per_band, per_last_band;       // 1 / units of a band, 1 / rows of the last band
    float last_x, last_y;                // the last pixel
    float bound_x, bound_y;              // the first of two pixels is at most here, as a number above 2^23
    std::uint32_t to_right, to_below;    // between pixels, in units of 16 bytes; 0 where there is one column or row
    std::uint32_t row, bias;             // of a row of pixels; what `place` needs beside the products
    float ratio_x[kLevels], ratio_y[kLevels];  // pixels of another level for each of this one's
};

struct Plan {
    Level level[kLevels];
    std::int32_t units;  // of a head, or of two; -1 where the sizes do not hold the pixels
};

// 2^23 plus a whole number has that number in its last bits.
constexpr float kWhole = 8388608.f;
constexpr std::uint32_t kWholeBits = 0x4b000000u;

// By one warp. kPixel: units of 16 bytes of a pixel.
template <int kUnitWidth, int kUnitHeight, int kPixel>
__device__ __forceinline__ void make_plan(Problem const& problem, Plan& plan) {
    int const lane = threadIdx.x % 32, own = lane < kLevels ? lane : kLevels - 1;
    int height, width;
    if (problem.device_levels != nullptr) {
        height = __ldg(problem.device_levels + 2 * own), width = __ldg(problem.device_levels + 2 * own + 1);
    } else {
        height = own == 0 ? problem.sizes[0][0] : own == 1 ? problem.sizes[1][0] : problem.sizes[2][0];
        width = own == 0 ? problem.sizes[0][1] : own == 1 ? problem.sizes[1][1] : problem.sizes[2][1];
    }
    std::int64_t const area = static_cast<std::int64_t>(height) * width;
    bool const bad = height < 0 || width < 0 || area > problem.pixels;
    int const pixels = bad ? 0 : static_cast<int>(area);
    // A level of no pixels has no sides either, so that none of its samples lies beside the value.
    if (pixels == 0) height = width = 0;
    int const columns = pixels > 0 ? (width - 1) / kUnitWidth + 1 : 0;
    int const rows = pixels > 0 ? (height - 1) / kUnitHeight + 1 : 0;
    int start = 0, end = 0, all_pixels = 0, all_units = 0;
#pragma unroll
    for (int i = 0; i < kLevels; ++i) {
        if (i == own) start = all_pixels;
        all_pixels += __shfl_sync(0xffffffffu, pixels, i);
        all_units += __shfl_sync(0xffffffffu, columns * rows, i);
        if (i == own) end = all_units;
    }
    bool const wrong = __any_sync(0xffffffffu, bad) || all_pixels != problem.pixels;
    Level& level = plan.level[own];
#pragma unroll
    for (int i = 0; i < kLevels; ++i) {
        // An infinite ratio puts every sample of an empty level beyond its edges.
        int const other_pixels = __shfl_sync(0xffffffffu, pixels, i);
        float const other_width = static_cast<float>(__shfl_sync(0xffffffffu, width, i));
        float const other_height = static_cast<float>(__shfl_sync(0xffffffffu, height, i));
        if (lane < kLevels) {
            level.ratio_x[i] = other_pixels > 0 ? other_width / static_cast<float>(width) : INFINITY;
            level.ratio_y[i] = other_height / static_cast<float>(height);
        }
    }
    if (lane < kLevels) {
        level.width = width, level.height = height, level.start = start;
        level.columns = columns, level.rows = rows, level.end = end;
        int const last_band = rows % kBand != 0 ? rows % kBand : kBand;
        level.per_band = 1.f / static_cast<float>(max(columns, 1) * kBand), level.per_last_band = 1.f / static_cast<float>(last_band);
        level.last_x = static_cast<float>(max(width, 1) - 1), level.last_y = static_cast<float>(max(height, 1) - 1);
        level.bound_x = kWhole + static_cast<float>(max(width, 2) - 2);
        level.bound_y = kWhole + static_cast<float>(max(height, 2) - 2);
        level.row = static_cast<std::uint32_t>(width) * kPixel;
        level.to_right = width > 1 ? kPixel : 0u, level.to_below = height > 1 ? level.row : 0u;
        level.bias = static_cast<std::uint32_t>(pixels > 0 ? start : 0) * kPixel - kWholeBits * (level.row + kPixel);
    }
    if (lane == 0) plan.units = wrong ? -1 : all_units;
}

template <typename S>
struct Pair;
template <>
struct Pair<float> {
    using Raw = float2;
    static __device__ __forceinline__ float2 widen(Raw raw) { return raw; }
};
template <>
struct Pair<__half> {
    using Raw = __half2;
    static __device__ __forceinline__ float2 widen(Raw raw) { return __half22float2(raw); }
};
template <>
struct Pair<__nv_bfloat16> {
    using Raw = __nv_bfloat162;
    static __device__ __forceinline__ float2 widen(Raw raw) { return __bfloat1622float2(raw); }
};

// Of differences to the highest logit: an error of some 2^-21 does not show in 16-bit results.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
    if constexpr (std::is_same_v<T, float>) return expf(x);
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}

// Along one axis: the first of two pixels, as the last bits of a number above 2^23, how far the sample lies from it towards
// the second, and its weight, which is below 1 beyond the edges' pixels, and 0 where it has none or is no number.
struct Between {
    std::uint32_t first;
    float fraction, weight;
};
__device__ __forceinline__ Between between(float x, float last, float bound) {
    float const inside = fminf(fmaxf(x, 0.f), last);
    float const first = fminf(__fadd_rd(inside, kWhole), bound);
    return {__float_as_uint(first), inside - (first - kWhole), __saturatef(1.f - fabsf(x - inside))};
}

__device__ __forceinline__ uint4 const* advanced(uint4 const* from, std::uint32_t count) {
    uint4 const* to;
    asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(to) : "r"(count), "l"(from));
    return to;
}

// Adds a level's samples at this lane's channels. kToRight: units of 16 bytes to the next pixel, known when compiling
// but for levels of one column, where it is 0.
template <typename T, int kToRight, int kAtOnce>
__device__ __forceinline__ void add_level(
    uint4 const* value, Sample const* samples, std::uint32_t to_below, float (&total)[16 / sizeof(T)]) {
    constexpr int kCount = 16 / sizeof(T);
#pragma unroll
    for (int first = 0; first < kPoints; first += kAtOnce) {
        Sample sample[kAtOnce];
        uint4 raw[kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            *reinterpret_cast<float4*>(&sample[i]) = *reinterpret_cast<float4 const*>(samples + first + i);
            uint4 const* const above = advanced(value, sample[i].place);
            uint4 const* const below = advanced(value, sample[i].place + to_below);
            raw[i][0] = __ldg(above), raw[i][1] = __ldg(above + kToRight);
            raw[i][2] = __ldg(below), raw[i][3] = __ldg(below + kToRight);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            float const below = sample[i].share * sample[i].below, above = sample[i].share - below;
            float const right_above = above * sample[i].right, right_below = below * sample[i].right;
            float const weight[4] = {above - right_above, right_above, below - right_below, right_below};
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                float x[kCount];
                Channels<T, true>::unpack(raw[i][c], x);
#pragma unroll
                for (int k = 0; k < kCount; ++k) total[k] = fmaf(weight[c], x[k], total[k]);
            }
        }
    }
}

// A warp takes a unit: 8 queries for one head, or 4 for two. First, 4 lanes for each row of query and head share its
// softmax and locations, a point of each level each, and leave the samples in shared memory; then lanes sum 16 bytes of
// channels each over all samples of a row. kUnitHeads: 2 for 16-bit values, 1 for float32, whose heads have whole lines.
template <typename T, typename S>
__global__ void __launch_bounds__(Choice<T>::kWarps * 32, 1) kernel(__grid_constant__ Problem const problem) {
    constexpr int kUnitHeads = Choice<T>::kUnitHeads, kAtOnce = Choice<T>::kAtOnce, kWarps = Choice<T>::kWarps;
    constexpr int kLanes = kDim * sizeof(T) / 16;  // for the channels of a head
    constexpr int kPixel = kHeads * kLanes;
    constexpr int kGroups = kHeads / kUnitHeads;
    constexpr int kUnitWidth = 4, kUnitHeight = kRows / kUnitHeads / kUnitWidth;
    using Two = typename Pair<S>::Raw;
    __shared__ Plan plan;
    __shared__ __align__(16) Sample all_samples[kWarps][kRows * kRowStride];
    int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) make_plan<kUnitWidth, kUnitHeight, kPixel>(problem, plan);
    __syncthreads();
    std::size_t const image_rows = static_cast<std::size_t>(problem.pixels) * kHeads;
    if (plan.units < 0) {
        std::size_t const size = problem.batch * image_rows * kDim, step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
        for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
            static_cast<T*>(problem.out)[i] = from_float<T>(nanf(""));
        }
        return;
    }

    // The block's share of each image's units, which are numbered group of heads by group of heads.
    int const units = plan.units;
    std::int64_t const all = static_cast<std::int64_t>(units) * kGroups;
    int const share_start = static_cast<int>(all * blockIdx.x / gridDim.x);
    int const share = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x) - share_start;
    if (share == 0) return;

    int image = 0, item = warp;  // of the unit that is loaded next
    int group, at, x0, y0;
    auto const find = [&] {
        while (item >= share) item -= share, ++image;
        int unit = share_start + item;
        for (group = 0; unit >= units; ++group) unit -= units;
        at = unit < plan.level[0].end ? 0 : unit < plan.level[1].end ? 1 : 2;
        Level const& level = plan.level[at];
        int const local = unit - (level.end - level.columns * level.rows);
        int const band = static_cast<int>((static_cast<float>(local) + 0.5f) * level.per_band);
        int const rest = local - band * level.columns * kBand;
        bool const whole = level.rows - band * kBand >= kBand;
        int const rows = whole ? kBand : level.rows - band * kBand;
        int const column =
            static_cast<int>((static_cast<float>(rest) + 0.5f) * (whole ? 1.f / kBand : level.per_last_band));
        x0 = column * kUnitWidth, y0 = (band * kBand + rest - column * rows) * kUnitHeight;
    };
    int const row = lane / 4, point = lane % 4;
    int const row_query = row / kUnitHeads, row_head = row % kUnitHeads;
    S raw_logits[kLevels];
    Two raw_offsets[kLevels];
    auto const load = [&] {
        Level const& level = plan.level[at];
        int const x = min(x0 + row_query % kUnitWidth, level.width - 1);
        int const y = min(y0 + row_query / kUnitWidth, level.height - 1);
        std::size_t const pixel = static_cast<std::size_t>(image) * problem.pixels + (level.start + y * level.width + x);
        int const first = (group * kUnitHeads + row_head) * kSamples + point;
        S const* const logits = static_cast<S const*>(problem.logits) + pixel * problem.logits_stride + first;
        Two const* const offsets = static_cast<Two const*>(problem.offsets) + pixel * problem.offsets_stride + first;
#pragma unroll
        for (int l = 0; l < kLevels; ++l) {
            raw_logits[l] = __ldg(logits + l * kPoints);
            raw_offsets[l] = __ldg(offsets + l * kPoints);
        }
    };

    Sample* const samples = all_samples[warp];
    find();
    if (image >= problem.batch) return;
    load();
    while (true) {
        float logit[kLevels];
#pragma unroll
        for (int l = 0; l < kLevels; ++l) logit[l] = to_float(raw_logits[l]);
        float highest = fmaxf(fmaxf(logit[0], logit[1]), logit[2]);
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
#pragma unroll
        for (int l = 0; l < kLevels; ++l) logit[l] = exponential<T>(logit[l] - highest);
        float sum = logit[0] + logit[1] + logit[2];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        float const scale = __frcp_rn(sum);
        Level const& query_level = plan.level[at];
        int const x = x0 + row_query % kUnitWidth, y = y0 + row_query / kUnitWidth;
        __syncwarp();  // the unit before is summed
#pragma unroll
        for (int l = 0; l < kLevels; ++l) {
            Level const& level = plan.level[l];
            float2 const offset = Pair<S>::widen(raw_offsets[l]);
            Between const along = between(sampling_location(x, query_level.ratio_x[l], offset.x), level.last_x, level.bound_x);
            Between const down = between(sampling_location(y, query_level.ratio_y[l], offset.y), level.last_y, level.bound_y);
            float const weight = logit[l] * scale * (along.weight * down.weight);
            Sample const sample{
                weight, along.fraction, down.fraction, down.first * level.row + along.first * kPixel + level.bias};
            *reinterpret_cast<float4*>(samples + row * kRowStride + l * kPoints + point) =
                *reinterpret_cast<float4 const*>(&sample);
        }
        __syncwarp();

        // The next unit's inputs are on their way while this one is summed.
        int const unit_image = image, first_head = group * kUnitHeads, unit_at = at, unit_x = x0, unit_y = y0;
        item += kWarps;
        find();
        bool const more = image < problem.batch;
        if (more) load();
        uint4 const* const value = static_cast<uint4 const*>(problem.value) + unit_image * image_rows * kLanes;
        uint4* const out = static_cast<uint4*>(problem.out) + unit_image * image_rows * kLanes;
#pragma unroll 1
        for (int r = lane / kLanes; r < kRows; r += 32 / kLanes) {
            int const lane_place = (first_head + r % kUnitHeads) * kLanes + lane % kLanes;
            float total[16 / sizeof(T)] = {};
#pragma unroll 1
            for (int l = 0; l < kLevels; ++l) {
                Sample const* const of_level = samples + r * kRowStride + l * kPoints;
                std::uint32_t const to_below = plan.level[l].to_below;
                if (plan.level[l].to_right != 0) {
                    add_level<T, kPixel, kAtOnce>(value + lane_place, of_level, to_below, total);
                } else {
                    add_level<T, 0, 1>(value + lane_place, of_level, to_below, total);
                }
            }
            Level const& level = plan.level[unit_at];
            int const qx = unit_x + r / kUnitHeads % kUnitWidth, qy = unit_y + r / kUnitHeads / kUnitWidth;
            if (qx < level.width && qy < level.height) {
                out[(level.start + qy * level.width + qx) * kPixel + lane_place] = Channels<T, true>::pack(total);
            }
        }
        if (!more) return;
    }
}

}  // namespace d2_trt::model_kernel
