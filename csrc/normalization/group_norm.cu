// GroupNorm of small maps in one launch, a block keeping a group in its registers; of others in three: moments of slices of
// each group, their union, and the normalised map. Moments are count, mean and sum of squared differences from it, merged as
// Chan et al. (1979) do: a large mean costs no digits.
#include <algorithm>

#include "normalization/elements.cuh"
#include "normalization/normalization.h"

namespace d2_trt {
namespace {

using namespace norm;

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // loads that a thread has under way
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr std::int64_t kMostSlices = 1024;
constexpr std::int64_t kFewSlices = 12;  // of a group, so that 32 groups make a wave
constexpr int kWholeThreads = 1024;      // that keep a group, kAhead times kWide elements each
constexpr std::int64_t kOneWave = 396;   // slices of a channels-last map at most: 3 for each of an H100's 132 processors
constexpr std::int64_t kMostChannelsLast = kWide * kThreads;

struct Moments {
    float count, mean, squares;
};

struct Arguments {
    GroupNormTensors t;
    std::int64_t pixels;
    std::int64_t slice;  // of a group for one block: chunks of kWide elements, or pixels where channels are last
    int channels, groups;
    int slices;
    int relu;
    float epsilon;
    Moments* partial;  // (batch * groups, slices)
    float2* stats;     // (batch * groups): mean, 1 / standard deviation
};

// kHalf: map and result are float16, which the compiler then knows.
template <bool kHalf>
__device__ inline Arguments known(Arguments a) {
    if constexpr (kHalf) a.t.x_type = a.t.out_type = DType::kFloat16;
    return a;
}

__device__ inline Moments merged(Moments const& a, Moments const& b) {
    if (a.count == 0.0F) return b;
    if (b.count == 0.0F) return a;
    float const count = a.count + b.count;
    float const delta = b.mean - a.mean, share = __fdividef(b.count, count);
    return {count, fmaf(delta, share, a.mean), a.squares + b.squares + delta * delta * a.count * share};
}

// Moments of the first `count` of eight values.
__device__ inline Moments moments_of(float const (&v)[kWide], int count) {
    float sum = 0.0F, squares = 0.0F;
#pragma unroll
    for (int i = 0; i < kWide; ++i) sum += i < count ? v[i] - v[0] : 0.0F;
    float const mean = __fdividef(sum, static_cast<float>(count));
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
        float const difference = i < count ? v[i] - v[0] - mean : 0.0F;
        squares = fmaf(difference, difference, squares);
    }
    return {static_cast<float>(count), v[0] + mean, squares};
}

__device__ inline Moments merged_over_warp(Moments m) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Moments const other{
            __shfl_down_sync(kAllLanes, m.count, offset), __shfl_down_sync(kAllLanes, m.mean, offset),
            __shfl_down_sync(kAllLanes, m.squares, offset)};
        m = merged(m, other);
    }
    return m;  // in lane 0
}

// The moments of a block's threads together, in its first thread. parts: one for each warp.
__device__ inline Moments merged_over_block(Moments m, Moments* parts) {
    m = merged_over_warp(m);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = m;
    __syncthreads();
    if (threadIdx.x < 32) {
        m = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : Moments{0.0F, 0.0F, 0.0F};
        m = merged_over_warp(m);
    }
    return m;
}

__device__ inline float2 stats_of(Moments const& m, float epsilon) {
    return make_float2(m.mean, rsqrtf(m.squares / m.count + epsilon));
}

__device__ inline float activated(float v, int relu) { return relu && v < 0.0F ? 0.0F : v; }  // NaN stays

// A block takes a whole group of at most kWholeThreads * kAhead vectors of kWide elements.
template <bool kLast, bool kHalf>
__global__ void __launch_bounds__(kWholeThreads) whole_group(Arguments const given) {
    Arguments const a = known<kHalf>(given);
    __shared__ Moments parts[kWholeThreads / 32];
    __shared__ float2 shared_stats;
    int const in_group = a.channels / a.groups, columns = in_group / kWide, pixels = static_cast<int>(a.pixels);
    int const vectors = in_group * pixels / kWide;
    int const group = static_cast<int>(blockIdx.x) % a.groups;
    std::int64_t const image = static_cast<int>(blockIdx.x) / a.groups;
    std::int64_t const base = image * a.pixels * a.channels + group * in_group * (kLast ? std::int64_t{1} : a.pixels);
    auto const place = [&](int i) {
        return base + (kLast ? static_cast<std::int64_t>(i / columns) * a.channels + i % columns * kWide : i * kWide);
    };
    Raw raw[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
        int const i = threadIdx.x + k * blockDim.x;
        if (i < vectors) raw[k] = load_raw(a.t.x, place(i), a.t.x_type);
    }
    Moments m{0.0F, 0.0F, 0.0F};
    float v[kWide];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
        if (threadIdx.x + k * blockDim.x >= vectors) break;
        to_floats(raw[k], a.t.x_type, v);
        m = merged(m, moments_of(v, kWide));
    }
    m = merged_over_block(m, parts);
    if (threadIdx.x == 0) shared_stats = stats_of(m, a.epsilon);
    __syncthreads();
    float2 const stats = shared_stats;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
        int const i = threadIdx.x + k * blockDim.x;
        if (i >= vectors) break;
        // Channels change from element to element, or after `left` elements.
        int channel = group * in_group + (kLast ? i % columns * kWide : i * kWide / pixels);
        int left = kLast ? 1 : pixels - i * kWide % pixels;
        float scale = stats.y * a.t.weight[channel], shift = a.t.bias[channel];
        to_floats(raw[k], a.t.x_type, v);
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            v[j] = activated(fmaf(v[j] - stats.x, scale, shift), a.relu);
            if (--left == 0 && j + 1 < kWide) {
                ++channel;
                left = kLast ? 1 : pixels;
                scale = stats.y * a.t.weight[channel];
                shift = a.t.bias[channel];
            }
        }
        store_wide(a.t.out, place(i), a.t.out_type, v);
    }
}

// A group is contiguous: channels / groups planes. A block takes one of its slices.
template <bool kVector, bool kHalf>
__global__ void __launch_bounds__(kThreads) moments_planar(Arguments const given) {
    Arguments const a = known<kHalf>(given);
    __shared__ Moments parts[kThreads / 32];
    std::int64_t const group = blockIdx.x / a.slices;
    std::int64_t const elements = a.channels / a.groups * a.pixels;
    std::int64_t const base = group * elements;
    std::int64_t const begin = blockIdx.x % a.slices * a.slice;
    std::int64_t const end = min(begin + a.slice, (elements + kWide - 1) / kWide);
    Moments m{0.0F, 0.0F, 0.0F};
    for (std::int64_t chunk = begin + threadIdx.x; chunk < end; chunk += kThreads * kAhead) {
        float v[kWide];
        if constexpr (kVector) {
            Raw raw[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                std::int64_t const at = chunk + i * kThreads;
                if (at < end) raw[i] = load_raw(a.t.x, base + at * kWide, a.t.x_type);
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (chunk + i * kThreads >= end) break;
                to_floats(raw[i], a.t.x_type, v);
                m = merged(m, moments_of(v, kWide));
            }
        } else {
            for (std::int64_t at = chunk; at < min(end, chunk + kThreads * kAhead); at += kThreads) {
                int const count = static_cast<int>(min(std::int64_t{kWide}, elements - at * kWide));
                load_some(a.t.x, base + at * kWide, count, a.t.x_type, v);
                m = merged(m, moments_of(v, count));
            }
        }
    }
    m = merged_over_block(m, parts);
    if (threadIdx.x == 0) a.partial[blockIdx.x] = m;
}

// Threads are (rows, channels / kWide): a thread keeps its channels and goes over pixels.
template <bool kHalf>
__global__ void __launch_bounds__(kThreads) moments_channels_last(Arguments const given) {
    Arguments const a = known<kHalf>(given);
    extern __shared__ Moments moments[];
    int const columns = a.channels / kWide;
    int const rows = blockDim.x / columns;
    int const column = threadIdx.x % columns;
    std::int64_t const image = blockIdx.x / a.slices;
    std::int64_t const base = image * a.pixels * a.channels + column * kWide;
    std::int64_t const begin = blockIdx.x % a.slices * a.slice;
    std::int64_t const end = min(begin + a.slice, a.pixels);
    Moments m{0.0F, 0.0F, 0.0F};
    for (std::int64_t pixel = begin + threadIdx.x / columns; pixel < end; pixel += rows * kAhead) {
        Raw raw[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (pixel + i * rows < end) raw[i] = load_raw(a.t.x, base + (pixel + i * rows) * a.channels, a.t.x_type);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (pixel + i * rows >= end) break;
            float v[kWide];
            to_floats(raw[i], a.t.x_type, v);
            m = merged(m, moments_of(v, kWide));
        }
    }
    moments[threadIdx.x] = m;
    __syncthreads();
    int const per_group = columns / a.groups;
    for (int group = threadIdx.x; group < a.groups; group += blockDim.x) {
        Moments total{0.0F, 0.0F, 0.0F};
        for (int row = 0; row < rows; ++row) {
            for (int i = 0; i < per_group; ++i) {
                total = merged(total, moments[row * columns + group * per_group + i]);
            }
        }
        a.partial[(image * a.groups + group) * a.slices + blockIdx.x % a.slices] = total;
    }
}

// A warp for each group of each image.
__global__ void __launch_bounds__(32) merge_moments(Arguments const a) {
    Moments m{0.0F, 0.0F, 0.0F};
    for (int i = threadIdx.x; i < a.slices; i += 32) {
        m = merged(m, a.partial[static_cast<std::int64_t>(blockIdx.x) * a.slices + i]);
    }
    m = merged_over_warp(m);
    if (threadIdx.x == 0) a.stats[blockIdx.x] = stats_of(m, a.epsilon);
}

// A block takes part of a plane.
template <bool kVector, bool kHalf>
__global__ void __launch_bounds__(kThreads) normalize_planar(Arguments const given, int const parts) {
    Arguments const a = known<kHalf>(given);
    std::int64_t const plane = blockIdx.x / parts;
    int const channel = static_cast<int>(plane % a.channels);
    float2 const stats = a.stats[plane / a.channels * a.groups + channel / (a.channels / a.groups)];
    float const scale = stats.y * a.t.weight[channel], shift = a.t.bias[channel];
    std::int64_t const base = plane * a.pixels;
    std::int64_t const chunks = (a.pixels + kWide - 1) / kWide;
    std::int64_t const first = static_cast<std::int64_t>(blockIdx.x % parts) * kThreads * kAhead + threadIdx.x;
    Raw raw[kAhead];
    if constexpr (kVector) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            std::int64_t const at = first + i * kThreads;
            if (at < chunks) raw[i] = load_raw(a.t.x, base + at * kWide, a.t.x_type);
        }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        std::int64_t const at = first + i * kThreads;
        if (at >= chunks) break;
        int const count = static_cast<int>(min(std::int64_t{kWide}, a.pixels - at * kWide));
        float v[kWide];
        if constexpr (kVector) {
            to_floats(raw[i], a.t.x_type, v);
        } else {
            load_some(a.t.x, base + at * kWide, count, a.t.x_type, v);
        }
#pragma unroll
        for (int j = 0; j < kWide; ++j) v[j] = activated(fmaf(v[j] - stats.x, scale, shift), a.relu);
        if constexpr (kVector) {
            store_wide(a.t.out, base + at * kWide, a.t.out_type, v);
        } else {
            store_some(a.t.out, base + at * kWide, count, a.t.out_type, v);
        }
    }
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads) normalize_channels_last(Arguments const given) {
    Arguments const a = known<kHalf>(given);
    int const columns = a.channels / kWide;
    int const rows = blockDim.x / columns;
    int const channel = threadIdx.x % columns * kWide;
    std::int64_t const image = blockIdx.x / a.slices;
    float2 const stats = a.stats[image * a.groups + channel / (a.channels / a.groups)];
    float scale[kWide], shift[kWide];
    to_floats(load_raw(a.t.weight, channel, DType::kFloat32), DType::kFloat32, scale);
    to_floats(load_raw(a.t.bias, channel, DType::kFloat32), DType::kFloat32, shift);
#pragma unroll
    for (int i = 0; i < kWide; ++i) scale[i] *= stats.y;
    std::int64_t const base = image * a.pixels * a.channels + channel;
    std::int64_t const begin = blockIdx.x % a.slices * a.slice;
    std::int64_t const end = min(begin + a.slice, a.pixels);
    for (std::int64_t pixel = begin + threadIdx.x / columns; pixel < end; pixel += rows * kAhead) {
        Raw raw[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (pixel + i * rows < end) raw[i] = load_raw(a.t.x, base + (pixel + i * rows) * a.channels, a.t.x_type);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (pixel + i * rows >= end) break;
            float v[kWide];
            to_floats(raw[i], a.t.x_type, v);
#pragma unroll
            for (int j = 0; j < kWide; ++j) v[j] = activated(fmaf(v[j] - stats.x, scale[j], shift[j]), a.relu);
            store_wide(a.t.out, base + (pixel + i * rows) * a.channels, a.t.out_type, v);
        }
    }
}

struct Plan {
    std::int64_t most;    // slices of a map of this size or a smaller one
    std::int64_t slices;  // of this map
    std::int64_t slice;   // see Arguments
    int threads;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Slices for all of a GPU's processors where the map is large enough, and no more than there is work for. A workspace for
// `most` slices suffices for smaller maps and batches too.
Plan plan_for(GroupNormSizes const& s, MapLayout layout) {
    Plan plan;
    if (layout == MapLayout::kPlanar) {
        std::int64_t const chunks = ceil_div(s.channels / s.groups * s.pixels, kWide);
        plan.most = std::max(std::min(ceil_div(chunks, kThreads), kFewSlices), ceil_div(chunks, kThreads * kAhead));
        plan.most = std::clamp<std::int64_t>(plan.most, 1, kMostSlices);
        plan.slice = ceil_div(chunks, plan.most);
        plan.slices = plan.most;
        plan.threads = kThreads;
        return plan;
    }
    int const columns = static_cast<int>(s.channels / kWide);
    int const rows = kThreads / columns;
    plan.most = std::clamp<std::int64_t>(ceil_div(s.pixels, rows), 1, kOneWave);
    plan.slice = ceil_div(ceil_div(s.pixels, plan.most), rows) * rows;
    plan.slices = std::max<std::int64_t>(ceil_div(s.pixels, std::max<std::int64_t>(plan.slice, 1)), 1);
    plan.threads = rows * columns;
    return plan;
}

void check(GroupNormSizes const& s, MapLayout layout) {
    require(
        s.groups >= 1 && s.channels >= s.groups && s.channels % s.groups == 0 && s.channels <= 1 << 20, "group_norm: ",
        s.channels, " channels in ", s.groups, " groups; expected a multiple of the groups, at most 2^20");
    require(
        s.batch >= 0 && s.pixels >= 0 && s.batch <= 1 << 20 && s.pixels <= std::int64_t{1} << 32, "group_norm: ", s.batch,
        " images of ", s.pixels, " pixels; expected up to 2^20 and 2^32");
    if (layout == MapLayout::kChannelsLast) {
        require(
            group_norm_takes_channels_last(s.channels, s.groups), "group_norm: ", s.channels, " channels in ",
            s.groups, " groups; with channels last, expected groups of a multiple of ", kWide, " channels, at most ",
            kMostChannelsLast, " together");
    }
}

}  // namespace

bool group_norm_takes_channels_last(std::int64_t channels, std::int64_t groups) {
    return channels / groups % kWide == 0 && channels <= kMostChannelsLast;
}

std::size_t group_norm_workspace(GroupNormSizes const& sizes, MapLayout layout) {
    check(sizes, layout);
    std::size_t const groups = static_cast<std::size_t>(sizes.batch * sizes.groups);
    return groups * (sizeof(float2) + static_cast<std::size_t>(plan_for(sizes, layout).most) * sizeof(Moments));
}

void group_norm(GroupNormTensors const& t, GroupNormSizes const& sizes, float epsilon, bool relu, cudaStream_t stream) {
    check(sizes, t.layout);
    require(epsilon >= 0.0F, "group_norm: epsilon is ", epsilon, "; expected at least 0");
    if (sizes.batch == 0 || sizes.pixels == 0) return;
    bool const last = t.layout == MapLayout::kChannelsLast;
    require_aligned(reinterpret_cast<std::uintptr_t>(t.x), last ? 16 : size_of(t.x_type), "group_norm: x");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.out), last ? 16 : size_of(t.out_type), "group_norm: out");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.weight), last ? 16 : 4, "group_norm: weight");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.bias), last ? 16 : 4, "group_norm: bias");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.workspace), 16, "group_norm: workspace");
    Plan const plan = plan_for(sizes, t.layout);
    std::int64_t const groups = sizes.batch * sizes.groups;
    Arguments a{};
    a.t = t;
    a.pixels = sizes.pixels;
    a.slice = plan.slice;
    a.slices = static_cast<int>(plan.slices);
    a.channels = static_cast<int>(sizes.channels);
    a.groups = static_cast<int>(sizes.groups);
    a.relu = relu;
    a.epsilon = epsilon;
    a.stats = static_cast<float2*>(t.workspace);
    a.partial = reinterpret_cast<Moments*>(a.stats + groups);

    std::int64_t const parts = ceil_div(ceil_div(sizes.pixels, kWide), kThreads * kAhead);
    std::int64_t const blocks = last ? sizes.batch * plan.slices : groups * plan.slices;
    std::int64_t const planes = sizes.batch * sizes.channels * parts;
    require(std::max(blocks, planes) <= INT32_MAX, "group_norm: the map needs more than ", INT32_MAX, " blocks");
    // Sixteen bytes at a time where every group, or every plane, starts at a multiple of them.
    bool const vector = sizes.pixels % kWide == 0 && aligned_to_16(t.x, t.out);
    bool const vector_moments = sizes.channels / sizes.groups * sizes.pixels % kWide == 0 && aligned_to_16(t.x);
    bool const half = t.x_type == DType::kFloat16 && t.out_type == DType::kFloat16;
    std::int64_t const elements = sizes.channels / sizes.groups * sizes.pixels;
    if (elements <= kWholeThreads * kAhead * kWide && vector_moments && aligned_to_16(t.out)) {
        int const threads = static_cast<int>(std::min<std::int64_t>(ceil_div(elements / kWide, 32) * 32, kWholeThreads));
        auto const kernel = last ? (half ? &whole_group<true, true> : &whole_group<true, false>)
                                 : (half ? &whole_group<false, true> : &whole_group<false, false>);
        kernel<<<static_cast<unsigned>(groups), threads, 0, stream>>>(a);
    } else if (last) {
        unsigned const grid = static_cast<unsigned>(blocks);
        auto const moments = half ? &moments_channels_last<true> : &moments_channels_last<false>;
        auto const normalize = half ? &normalize_channels_last<true> : &normalize_channels_last<false>;
        moments<<<grid, plan.threads, plan.threads * sizeof(Moments), stream>>>(a);
        merge_moments<<<static_cast<unsigned>(groups), 32, 0, stream>>>(a);
        normalize<<<grid, plan.threads, 0, stream>>>(a);
    } else {
        auto const moments = !vector_moments ? &moments_planar<false, false>
                             : half          ? &moments_planar<true, true>
                                             : &moments_planar<true, false>;
        auto const normalize = !vector ? &normalize_planar<false, false>
                               : half  ? &normalize_planar<true, true>
                                       : &normalize_planar<true, false>;
        moments<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
        merge_moments<<<static_cast<unsigned>(groups), 32, 0, stream>>>(a);
        normalize<<<static_cast<unsigned>(planes), kThreads, 0, stream>>>(a, static_cast<int>(parts));
    }
    check_cuda(cudaGetLastError(), "group_norm");
}

}  // namespace d2_trt
