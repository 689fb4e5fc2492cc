// One pass over the masks that the panoptic and instance tasks need: each pixel's logits are interpolated in registers,
// turned into the winner, the instances' bits and the sums, and forgotten.
#include "postprocess/checks.h"
#include "postprocess/dispatch.cuh"
#include "postprocess/launch.cuh"

namespace d2_trt::postprocess {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 2;  // of pixels for each lane
constexpr int kTileWidth = 32;
constexpr int kTileHeight = kWarps * kRows;
constexpr int kThreads = 32 * kWarps;

// A tile's numbers for each slot, in shared memory. The sum of a tile, at most 512 * 2^24, is kept in two halves:
// 64-bit atomics on shared memory are loops.
struct TileSums {
    int* counts;  // (kCounts, queries)
    unsigned* low;
    unsigned* high;
};

template <typename T, bool kPads, bool kResizes>
__global__ void __launch_bounds__(kThreads, 3) mask_kernel(MaskArgs const args, T const* __restrict__ masks) {
    int const queries = args.queries, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Geometry const& g = args.geometry;
    int const slots = args.report[ReportLayout{queries, args.topk}.slots()];
    bool const panoptic = args.segment_map != nullptr;

    int* slot_query = dynamic_shared<int>();
    float* slot_score = reinterpret_cast<float*>(slot_query + queries);  // below 0: not a candidate segment
    int* slot_masked = reinterpret_cast<int*>(slot_score + queries);
    TileSums sums;
    sums.counts = slot_masked + queries;
    sums.low = reinterpret_cast<unsigned*>(sums.counts + kCounts * queries);
    sums.high = sums.low + queries;
    WorkLayout const at{queries};
    for (int s = threadIdx.x; s < slots; s += kThreads) {
        slot_query[s] = args.work[at.slot_query() + s];
        bool candidate = panoptic && args.work[at.slot_class() + s] >= 0;
        slot_score[s] = candidate ? reinterpret_cast<float const*>(args.work)[at.slot_score() + s] : -1.0f;
        slot_masked[s] = args.bits == nullptr ? 0 : args.work[at.slot_masked() + s];
        for (int c = 0; c < kCounts; ++c) sums.counts[c * queries + s] = 0;
        sums.low[s] = sums.high[s] = 0;
    }
    __syncthreads();

    // Lanes beyond the edge compute the last pixel's values and count nothing: all lanes must vote.
    int const x = blockIdx.x * kTileWidth + lane;
    int const y0 = blockIdx.y * kTileHeight + warp * kRows;
    int const words = (g.out_w + 31) / 32;
    AxisTaps const columns = column_taps<kPads, kResizes>(g, x < g.out_w ? x : g.out_w - 1);
    AxisTaps rows[kRows];
    bool valid[kRows];
    float best[kRows], best_prob[kRows];
    int winner[kRows];
    for (int r = 0; r < kRows; ++r) {
        int y = y0 + r;
        rows[r] = row_taps<kPads, kResizes>(g, y < g.out_h ? y : g.out_h - 1);
        scale_places(rows[r], g.mask_w);
        valid[r] = x < g.out_w && y < g.out_h;
        best[r] = -1.0f;
        best_prob[r] = 0.0f;
        winner[r] = -1;
    }

    RowWindow<3> window;
    bool const fits = window.template fit<kPads>(rows, kRows, g.mask_h, g.mask_w);
    for (int s = 0; s < slots; ++s) {
        T const* plane = masks + slot_query[s] * args.masks.query_stride;
        float const score = slot_score[s];
        bool const masked = slot_masked[s] != 0;
        unsigned fixed = 0;
        int positive = 0, inside = 0;
        float logits[kRows];
        if (fits) {
            ColumnSampler<T, kPads, kResizes, 3> const mask(plane, columns, window);
#pragma unroll
            for (int r = 0; r < kRows; ++r) logits[r] = mask.at(rows[r]);
        } else {
#pragma unroll
            for (int r = 0; r < kRows; ++r) logits[r] = sample<kPads, kResizes>(plane, rows[r], columns);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float const logit = logits[r];
            float prob = sigmoid(logit);
            if (masked) {
                bool hit = valid[r] && logit > 0.0f;
                unsigned word = __ballot_sync(kAllLanes, hit);
                fixed += hit ? static_cast<unsigned>(prob * kFixedPoint) : 0u;
                positive += __popc(word);
                if (lane == 0 && y0 + r < g.out_h) {
                    args.bits[(static_cast<std::int64_t>(s) * g.out_h + y0 + r) * words + blockIdx.x] = word;
                }
            }
            if (score >= 0.0f) {
                float value = product(score, prob);
                // The first of equal values wins, as in argmax.
                if (value > best[r]) {
                    best[r] = value;
                    best_prob[r] = prob;
                    winner[r] = s;
                }
                inside += __popc(__ballot_sync(kAllLanes, valid[r] && prob >= 0.5f));
            }
        }
        if (masked) {
            unsigned total = warp_sum(fixed);
            if (lane == 0 && positive > 0) {
                atomicAdd(&sums.counts[kPositive * queries + s], positive);
                atomicAdd(&sums.low[s], total & 0xffffu);
                atomicAdd(&sums.high[s], total >> 16);
            }
        }
        if (lane == 0 && inside > 0) atomicAdd(&sums.counts[kInside * queries + s], inside);
    }

    if (panoptic) {
        for (int r = 0; r < kRows; ++r) {
            if (!valid[r]) continue;
            bool inside = winner[r] >= 0 && best_prob[r] >= 0.5f;
            if (winner[r] >= 0) atomicAdd(&sums.counts[kWon * queries + winner[r]], 1);
            if (inside) atomicAdd(&sums.counts[kBoth * queries + winner[r]], 1);
            args.segment_map[static_cast<std::int64_t>(y0 + r) * g.out_w + x] = inside ? 1 + winner[r] : 0;
        }
    }
    __syncthreads();

    std::int64_t const tile = static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    for (int s = threadIdx.x; s < slots; s += kThreads) {
        for (int c = 0; c < kCounts; ++c) {
            args.partial_counts[(tile * kCounts + c) * queries + s] = sums.counts[c * queries + s];
        }
        args.partial_sums[tile * queries + s] = (static_cast<std::uint64_t>(sums.high[s]) << 16) + sums.low[s];
    }
}

// Sums over the tiles: 32 slots a block, 32 shares of the tiles.
__global__ void __launch_bounds__(1024)
    reduce_kernel(std::int32_t const* __restrict__ partial_counts, std::uint64_t const* __restrict__ partial_sums,
                  int tiles, std::int32_t* work, std::int32_t const* report, int queries, int topk) {
    __shared__ int counts[32][kCounts][32];
    __shared__ std::uint64_t sums[32][32];
    int const lane = threadIdx.x % 32, share = threadIdx.x / 32;
    int const s = blockIdx.x * 32 + lane;
    int const slots = report[ReportLayout{queries, topk}.slots()];
    if (static_cast<int>(blockIdx.x) * 32 >= slots) return;  // the whole block
    int count[kCounts] = {};
    std::uint64_t sum = 0;
    if (s < slots) {
#pragma unroll 2
        for (std::int64_t tile = share; tile < tiles; tile += 32) {
            for (int c = 0; c < kCounts; ++c) count[c] += partial_counts[(tile * kCounts + c) * queries + s];
            sum += partial_sums[tile * queries + s];
        }
    }
    for (int c = 0; c < kCounts; ++c) counts[share][c][lane] = count[c];
    sums[share][lane] = sum;
    __syncthreads();
    WorkLayout const at{queries};
    if (share < kCounts && s < slots) {
        int total = 0;
        for (int i = 0; i < 32; ++i) total += counts[i][share][lane];
        work[at.counts() + share * queries + s] = total;
    } else if (share == kCounts && s < slots) {
        std::uint64_t total = 0;
        for (int i = 0; i < 32; ++i) total += sums[i][lane];
        reinterpret_cast<std::uint64_t*>(work + at.sums())[s] = total;
    }
}

__global__ void assign_ids_kernel(std::int32_t* segment_map, std::int64_t pixels, std::int32_t const* __restrict__ work,
                                  int queries) {
    std::int32_t const* ids = work + WorkLayout{queries}.segment_ids();
    std::int64_t const step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t p = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; p < pixels; p += step) {
        segment_map[p] = ids[segment_map[p]];
    }
}

dim3 tile_grid(Geometry const& g) { return {ceil_div(g.out_w, kTileWidth), ceil_div(g.out_h, kTileHeight)}; }

}  // namespace

int mask_tiles(Geometry const& geometry) {
    dim3 const grid = tile_grid(geometry);
    return static_cast<int>(grid.x * grid.y);
}

void mask_pass(MaskArgs const& args, cudaStream_t stream) {
    check_geometry("mask_pass", args.geometry);
    check_queries("mask_pass", args.queries);
    check_topk("mask_pass", args.topk, 0, args.queries);
    check_masks("mask_pass", args.masks);
    check_work("mask_pass", args.work);
    check_pointer("mask_pass", "report", args.report);
    if (args.segment_map != nullptr) check_pointer("mask_pass", "segment_map", args.segment_map);
    if (args.bits != nullptr) check_pointer("mask_pass", "bits", args.bits);
    check_pointer("mask_pass", "partial_counts", args.partial_counts);
    check_pointer("mask_pass", "partial_sums", args.partial_sums);
    dim3 const grid = tile_grid(args.geometry);
    require(grid.y <= 65535, "mask_pass: the output is ", args.geometry.out_h, " pixels high; expected at most ",
            65535 * kTileHeight);
    std::size_t shared = (5 + kCounts) * sizeof(int) * static_cast<std::size_t>(args.queries);
    with_element_type(args.masks, [&](auto const* masks) {
        with_steps(args.geometry, [&](auto pads, auto resizes) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(masks)>>;
            launch("mask_pass", mask_kernel<T, decltype(pads)::value, decltype(resizes)::value>, grid, kThreads, shared,
                   stream, args, masks);
        });
    });
    launch("mask_pass reduction", reduce_kernel, ceil_div(args.queries, 32), 1024, 0, stream, args.partial_counts,
           args.partial_sums, static_cast<int>(grid.x * grid.y), args.work, args.report, args.queries, args.topk);
}

void assign_ids(std::int32_t* segment_map, std::int64_t pixels, std::int32_t const* work, int queries,
                cudaStream_t stream) {
    require(pixels >= 1 && pixels <= kMaxPixels, "assign_ids: ", pixels, " pixels; expected 1 to ", kMaxPixels);
    check_queries("assign_ids", queries);
    check_pointer("assign_ids", "segment_map", segment_map);
    check_work("assign_ids", work);
    launch("assign_ids", assign_ids_kernel, ceil_div(pixels, 4 * 256), 256, 0, stream, segment_map, pixels, work,
           queries);
}

}  // namespace d2_trt::postprocess
