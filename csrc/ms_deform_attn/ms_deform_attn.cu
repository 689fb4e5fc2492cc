#include "ms_deform_attn/ms_deform_attn.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "ms_deform_attn/model_kernel.cuh"
#include "ms_deform_attn/sampling.cuh"

namespace d2_trt {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMinBlocks = 4;  // of an SM: 64 registers a thread, which hold two samples on their way without spilling
constexpr std::size_t kMaxSharedBytes = 46 << 10;  // any GPU grants a block 48 KiB unasked, the levels' tables included
// First pixel and two flags share 32 bits; the sum of a row and a step must not overflow either.
constexpr std::int64_t kMaxPixels = std::int64_t{1} << 29;

struct Problem {
    void const* value;
    void const* offsets;
    void const* logits;
    void* out;
    std::int32_t const* device_levels;  // (levels, 2), or null: then `sizes`
    std::int32_t sizes[kMaxLevels][2];
    std::int32_t levels, points, heads, dim, pixels;
    std::int64_t offsets_stride, logits_stride;  // between pixels
    std::int32_t tile_width_log2, tile_height_log2;
};

// For any sizes; model_kernel.cuh has the one for Mask2Former's own, which is faster.
//
// A block covers a tile of queries of one level for one head: neighbours look at the same values, which L1 then holds.
// `kLanes` lanes share a query. First they share the softmax and the locations, one sample each in turn, and leave the
// samples in shared memory; then each lane sums its own channels over all samples. kVector: the lanes have all channels
// of a head at once, 16 bytes each; else one channel each, and as many rounds as the head needs.
template <typename T, typename S, int kLanes, bool kVector>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) ms_deform_attn_kernel(__grid_constant__ Problem const problem) {
    using Lane = Channels<T, kVector>;
    using Raw = typename Lane::Raw;
    __shared__ Level levels[kMaxLevels];
    __shared__ float2 ratios[kMaxLevels];  // (x, y): pixels of a level for each pixel of the query's level
    __shared__ std::int32_t tiles;
    extern __shared__ __align__(16) unsigned char dynamic_shared[];

    int const thread = threadIdx.x;
    int const lane = thread % kLanes;
    int const slot = thread / kLanes;
    int const slots = blockDim.x / kLanes;
    unsigned const group =
        kLanes == 32 ? 0xffffffffu : ((1u << (kLanes % 32)) - 1u) << (thread % 32 / kLanes * kLanes);
    int const points = problem.points;
    int const count = problem.levels * points;
    int const stride = count | 1;  // odd, so that the groups of a warp read different banks
    float4* const weights = reinterpret_cast<float4*>(dynamic_shared) + slot * stride;
    std::uint32_t* const packed =
        reinterpret_cast<std::uint32_t*>(reinterpret_cast<float4*>(dynamic_shared) + slots * stride) + slot * stride;

    if (thread < problem.levels) {
        bool const on_device = problem.device_levels != nullptr;
        levels[thread].height = on_device ? __ldg(problem.device_levels + 2 * thread) : problem.sizes[thread][0];
        levels[thread].width = on_device ? __ldg(problem.device_levels + 2 * thread + 1) : problem.sizes[thread][1];
    }
    __syncthreads();
    if (thread == 0) {
        tiles = plan_levels(
            levels, problem.levels, problem.pixels, problem.tile_width_log2, problem.tile_height_log2);
    }
    __syncthreads();

    std::int64_t const image = static_cast<std::int64_t>(blockIdx.y) * problem.pixels;
    std::int64_t const image_values = image * problem.heads * problem.dim;
    T* const out = static_cast<T*>(problem.out) + image_values;
    if (tiles < 0) {
        std::int64_t const size = static_cast<std::int64_t>(problem.pixels) * problem.heads * problem.dim;
        std::int64_t const step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
        for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + thread; i < size; i += step) {
            out[i] = from_float<T>(nanf(""));
        }
        return;
    }
    T const* const value = static_cast<T const*>(problem.value) + image_values;
    S const* const offsets = static_cast<S const*>(problem.offsets) + image * problem.offsets_stride;
    S const* const logits = static_cast<S const*>(problem.logits) + image * problem.logits_stride;
    std::uint32_t const pixel_bytes = static_cast<std::uint32_t>(problem.heads) * problem.dim * sizeof(T);

    // The host launches as many blocks as there is work where it knows the levels, else about as many.
    std::uint32_t const work = static_cast<std::uint32_t>(tiles) * problem.heads;
    for (std::uint32_t item = blockIdx.x; item < work; item += gridDim.x) {
        int const head = item % problem.heads;
        int tile = item / problem.heads;
        int at = 0;
        while (tile >= levels[at].tile_end) ++at;
        if (at > 0) tile -= levels[at - 1].tile_end;
        Level const level = levels[at];
        __syncthreads();  // the item before still read ratios and samples
        if (thread < problem.levels) {
            ratios[thread] = {
                static_cast<float>(levels[thread].width) / static_cast<float>(level.width),
                static_cast<float>(levels[thread].height) / static_cast<float>(level.height)};
        }
        __syncthreads();

        int const columns = ((level.width - 1) >> problem.tile_width_log2) + 1;
        int const x = (tile % columns << problem.tile_width_log2) + (slot & ((1 << problem.tile_width_log2) - 1));
        int const y = (tile / columns << problem.tile_height_log2) + (slot >> problem.tile_width_log2);
        if (x >= level.width || y >= level.height) continue;
        std::int64_t const pixel = static_cast<std::int64_t>(level.start) + y * level.width + x;
        std::int64_t const row = pixel * problem.heads + head;

        S const* const row_logits = logits + pixel * problem.logits_stride + head * count;
        S const* const row_offsets = offsets + pixel * problem.offsets_stride + head * count * 2;
        float highest = -INFINITY;
        for (int i = lane; i < count; i += kLanes) highest = fmaxf(highest, to_float(row_logits[i]));
#pragma unroll
        for (int o = kLanes / 2; o > 0; o /= 2) highest = fmaxf(highest, __shfl_xor_sync(group, highest, o));
        float sum = 0.f;
        int sampled = 0;  // the level of sample i
        for (int i = lane, point = lane; i < count; i += kLanes, point += kLanes) {
            while (point >= points) point -= points, ++sampled;
            float const share = expf(to_float(row_logits[i]) - highest);
            float const px = sampling_location(x, ratios[sampled].x, to_float(row_offsets[2 * i]));
            float const py = sampling_location(y, ratios[sampled].y, to_float(row_offsets[2 * i + 1]));
            Sample const sample = bilinear_sample(levels[sampled], px, py, share);
            weights[i] = sample.weight;
            packed[i] = sample.packed;
            sum += share;
        }
#pragma unroll
        for (int o = kLanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(group, sum, o);
        __syncwarp(group);

        float const scale = 1.f / sum;  // of the softmax
        int channel = lane * Lane::kCount;
        do {
            if (!kVector && channel >= problem.dim) break;
            char const* const base = reinterpret_cast<char const*>(value + head * problem.dim + channel);
            float total[Lane::kCount] = {};
            for (int l = 0, i = 0; l < problem.levels; ++l) {
                std::uint64_t const row_bytes = static_cast<std::uint64_t>(levels[l].width) * pixel_bytes;
#pragma unroll 2
                for (int p = 0; p < points; ++p, ++i) {
                    float4 const weight = weights[i];
                    std::uint32_t const where = packed[i];
                    char const* const top = base + static_cast<std::uint64_t>(where >> 2) * pixel_bytes;
                    char const* const bottom = top + (where & 1u ? row_bytes : 0u);
                    std::uint32_t const right = where & 2u ? pixel_bytes : 0u;
                    Raw const raw[4] = {
                        __ldg(reinterpret_cast<Raw const*>(top)),
                        __ldg(reinterpret_cast<Raw const*>(top + right)),
                        __ldg(reinterpret_cast<Raw const*>(bottom)),
                        __ldg(reinterpret_cast<Raw const*>(bottom + right))};
                    float const corner[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        float x4[Lane::kCount];
                        Lane::unpack(raw[c], x4);
#pragma unroll
                        for (int k = 0; k < Lane::kCount; ++k) total[k] = fmaf(corner[c], x4[k], total[k]);
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < Lane::kCount; ++k) total[k] *= scale;
            *reinterpret_cast<Raw*>(out + row * problem.dim + channel) = Lane::pack(total);
            channel += kLanes;
        } while (!kVector);
    }
}

std::size_t shared_bytes(int threads, int lanes, std::int64_t count) {
    return static_cast<std::size_t>(threads / lanes) * (count | 1) * (sizeof(float4) + sizeof(std::uint32_t));
}

template <typename T, typename S, int kLanes, bool kVector>
void launch(Problem problem, std::int64_t batch, cudaStream_t stream) {
    int threads = kMaxThreads;
    std::int64_t const count = static_cast<std::int64_t>(problem.levels) * problem.points;
    while (threads > 32 && shared_bytes(threads, kLanes, count) > kMaxSharedBytes) threads /= 2;
    int slots_log2 = 0;
    while (2 << slots_log2 <= threads / kLanes) ++slots_log2;
    problem.tile_width_log2 = (slots_log2 + 1) / 2;
    problem.tile_height_log2 = slots_log2 / 2;

    std::int64_t tiles;
    if (problem.device_levels == nullptr) {
        Level levels[kMaxLevels];
        for (int i = 0; i < problem.levels; ++i) levels[i] = {problem.sizes[i][0], problem.sizes[i][1], 0, 0};
        tiles = plan_levels(
            levels, problem.levels, problem.pixels, problem.tile_width_log2, problem.tile_height_log2);
    } else {
        // With tiles that stick out of their level; what this misses, the blocks do in further rounds.
        tiles = (problem.pixels >> slots_log2) + (problem.pixels >> (slots_log2 + 3)) + 4 * problem.levels;
    }
    std::int64_t const blocks = std::min<std::int64_t>(tiles * problem.heads, std::numeric_limits<std::int32_t>::max());
    dim3 const grid(static_cast<unsigned>(blocks), static_cast<unsigned>(batch));
    ms_deform_attn_kernel<T, S, kLanes, kVector>
        <<<grid, threads, shared_bytes(threads, kLanes, count), stream>>>(problem);
    check_cuda(cudaGetLastError(), "ms_deform_attn");
}

template <typename T, typename S>
void launch_lanes(Problem const& problem, std::int64_t batch, cudaStream_t stream) {
    constexpr int kChannels = Channels<T, true>::kCount;
    std::int64_t const count = static_cast<std::int64_t>(problem.levels) * problem.points;
    int lanes = problem.dim % kChannels == 0 ? problem.dim / kChannels : 0;
    // Heads this narrow put many queries in a warp: with many samples each, they do not fit.
    if (lanes > 0 && lanes <= 2 && shared_bytes(32, lanes, count) > kMaxSharedBytes) lanes = 0;
    switch (lanes) {
        case 1: return launch<T, S, 1, true>(problem, batch, stream);
        case 2: return launch<T, S, 2, true>(problem, batch, stream);
        case 4: return launch<T, S, 4, true>(problem, batch, stream);
        case 8: return launch<T, S, 8, true>(problem, batch, stream);
        case 16: return launch<T, S, 16, true>(problem, batch, stream);
        case 32: return launch<T, S, 32, true>(problem, batch, stream);
        default: return launch<T, S, 8, false>(problem, batch, stream);
    }
}

bool model_kernel_takes(Problem const& problem, DType sampling_type) {
    return problem.heads == model_kernel::kHeads && problem.dim == model_kernel::kDim &&
           problem.levels == model_kernel::kLevels && problem.points == model_kernel::kPoints &&
           problem.pixels <= model_kernel::kMaxPixels && problem.offsets_stride % 2 == 0 &&
           reinterpret_cast<std::uintptr_t>(problem.offsets) % (2 * size_of(sampling_type)) == 0;
}

template <typename T, typename S>
void launch_model_kernel(Problem const& problem, std::int64_t batch, cudaStream_t stream) {
    model_kernel::Problem given{};
    given.value = problem.value;
    given.offsets = problem.offsets;
    given.logits = problem.logits;
    given.out = problem.out;
    given.device_levels = problem.device_levels;
    for (int i = 0; i < model_kernel::kLevels; ++i) {
        given.sizes[i][0] = problem.sizes[i][0];
        given.sizes[i][1] = problem.sizes[i][1];
    }
    given.pixels = problem.pixels;
    given.batch = static_cast<std::int32_t>(batch);
    given.offsets_stride = static_cast<std::uint32_t>(problem.offsets_stride / 2);
    given.logits_stride = static_cast<std::uint32_t>(problem.logits_stride);
    int device = 0, multiprocessors = 0;
    check_cuda(cudaGetDevice(&device), "ms_deform_attn");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "ms_deform_attn");
    model_kernel::kernel<T, S><<<multiprocessors, model_kernel::Choice<T>::kWarps * 32, 0, stream>>>(given);
    check_cuda(cudaGetLastError(), "ms_deform_attn");
}

template <typename T, typename S>
void launch_sizes(Problem const& problem, DType sampling_type, std::int64_t batch, cudaStream_t stream) {
    if (model_kernel_takes(problem, sampling_type)) return launch_model_kernel<T, S>(problem, batch, stream);
    launch_lanes<T, S>(problem, batch, stream);
}

template <typename T>
void launch_types(Problem const& problem, DType sampling_type, std::int64_t batch, cudaStream_t stream) {
    if (sampling_type == DType::kFloat32) return launch_sizes<T, float>(problem, sampling_type, batch, stream);
    if constexpr (!std::is_same_v<T, float>) return launch_sizes<T, T>(problem, sampling_type, batch, stream);
}

void run(
    MsDeformAttnTensors const& t, MsDeformAttnSizes const& s, std::int32_t const (*host_levels)[2],
    std::int32_t const* device_levels, cudaStream_t stream) {
    require(s.levels >= 1 && s.levels <= kMaxLevels, "ms_deform_attn: ", s.levels, " levels; expected 1 to ", kMaxLevels);
    require(s.points >= 1 && s.points <= kMaxPoints, "ms_deform_attn: ", s.points, " points; expected 1 to ", kMaxPoints);
    require(s.batch >= 0 && s.batch <= 65535, "ms_deform_attn: a batch of ", s.batch, "; expected 0 to 65535");
    require(s.heads >= 1 && s.dim >= 1, "ms_deform_attn: ", s.heads, " heads of ", s.dim, " channels; expected 1 or more");
    require(s.pixels >= 0 && s.pixels <= kMaxPixels, "ms_deform_attn: ", s.pixels, " pixels; expected 0 to ", kMaxPixels);
    std::int64_t const limit = std::numeric_limits<std::int32_t>::max();
    require(
        s.heads <= limit / std::max<std::int64_t>(s.pixels, 1) && s.dim <= limit / 4 / s.heads, "ms_deform_attn: ", s.pixels,
        " pixels, ", s.heads, " heads of ", s.dim, " channels; pixels * heads and 4 * heads * channels must stay below 2^31");
    std::int64_t const samples = s.heads * s.levels * s.points;
    require(
        s.offsets_stride >= 2 * samples && s.logits_stride >= samples && std::max(s.offsets_stride, s.logits_stride) <= limit,
        "ms_deform_attn: ", s.offsets_stride, " and ", s.logits_stride, " elements between the offsets and logits of pixels, which "
        "have ", 2 * samples, " and ", samples, "; expected no fewer, and less than 2^31");
    require(
        t.sampling_type == DType::kFloat32 || t.sampling_type == t.value_type,
        "ms_deform_attn: offsets and logits must be float32 or of the value's type");
    if (host_levels != nullptr) {
        std::int64_t held = 0;
        for (int i = 0; i < s.levels; ++i) {
            std::int64_t const height = host_levels[i][0], width = host_levels[i][1];
            require(height >= 0 && width >= 0, "ms_deform_attn: level ", i, " is ", height, "x", width);
            held += std::min(height * width, kMaxPixels + 1);
        }
        require(held == s.pixels, "ms_deform_attn: the levels hold ", held, " pixels, the value ", s.pixels);
    }
    if (s.batch == 0 || s.pixels == 0) return;
    require_aligned(reinterpret_cast<std::uintptr_t>(t.value), 16, "ms_deform_attn: value");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.out), 16, "ms_deform_attn: out");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.offsets), size_of(t.sampling_type), "ms_deform_attn: offsets");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.logits), size_of(t.sampling_type), "ms_deform_attn: logits");
    if (host_levels == nullptr) {
        require_aligned(reinterpret_cast<std::uintptr_t>(device_levels), 4, "ms_deform_attn: level_sizes");
    }

    Problem problem{};
    problem.value = t.value;
    problem.offsets = t.offsets;
    problem.logits = t.logits;
    problem.out = t.out;
    problem.device_levels = device_levels;
    for (int i = 0; host_levels != nullptr && i < s.levels; ++i) {
        problem.sizes[i][0] = host_levels[i][0];
        problem.sizes[i][1] = host_levels[i][1];
    }
    problem.levels = static_cast<std::int32_t>(s.levels);
    problem.points = static_cast<std::int32_t>(s.points);
    problem.heads = static_cast<std::int32_t>(s.heads);
    problem.dim = static_cast<std::int32_t>(s.dim);
    problem.pixels = static_cast<std::int32_t>(s.pixels);
    problem.offsets_stride = s.offsets_stride;
    problem.logits_stride = s.logits_stride;
    switch (t.value_type) {
        case DType::kFloat32: return launch_types<float>(problem, t.sampling_type, s.batch, stream);
        case DType::kFloat16: return launch_types<__half>(problem, t.sampling_type, s.batch, stream);
        case DType::kBFloat16: return launch_types<__nv_bfloat16>(problem, t.sampling_type, s.batch, stream);
    }
}

}  // namespace

void ms_deform_attn(
    MsDeformAttnTensors const& tensors, MsDeformAttnSizes const& sizes, std::int32_t const (*level_sizes)[2],
    cudaStream_t stream) {
    require(level_sizes != nullptr, "ms_deform_attn: no level sizes");
    run(tensors, sizes, level_sizes, nullptr, stream);
}

void ms_deform_attn_device_levels(
    MsDeformAttnTensors const& tensors, MsDeformAttnSizes const& sizes, std::int32_t const* level_sizes,
    cudaStream_t stream) {
    run(tensors, sizes, nullptr, level_sizes, stream);
}

}  // namespace d2_trt
