// From the instances' bits, rows of 32 pixels a word, to bool masks, boxes and run boundaries.
#include "postprocess/checks.h"
#include "postprocess/launch.cuh"
#include "postprocess/postprocess.h"

namespace d2_trt::postprocess {
namespace {

constexpr int kExpandThreads = 256;
constexpr int kBoxThreads = 256;
constexpr int kRunThreads = 1024;  // a column of pixels each
constexpr int kBytes = 16;         // of a mask, written at once

// A thread writes 16 bytes of the masks taken as one array, wherever rows and masks end in them.
__global__ void __launch_bounds__(kExpandThreads)
    expand_kernel(std::uint32_t const* __restrict__ bits, std::int32_t const* __restrict__ slots, std::int64_t total,
                  int height, int width, std::uint8_t* masks) {
    std::int64_t const start = (static_cast<std::int64_t>(blockIdx.x) * kExpandThreads + threadIdx.x) * kBytes;
    if (start >= total) return;
    int const words = (width + 31) / 32;
    std::int64_t const pixels = static_cast<std::int64_t>(height) * width;
    int instance = static_cast<int>(start / pixels);
    int const pixel = static_cast<int>(start % pixels);
    int y = pixel / width, x = pixel % width;
    std::uint32_t const* row = bits + (static_cast<std::int64_t>(slots[instance]) * height + y) * words;
    std::uint32_t word = row[x / 32];
    int const length = total - start < kBytes ? static_cast<int>(total - start) : kBytes;
    unsigned packed[kBytes / 4] = {};
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
        if (i < length) {
            packed[i / 4] |= ((word >> (x % 32)) & 1u) << (8 * (i % 4));
            ++x;
            if (x == width) {
                x = 0;
                if (++y == height) {
                    y = 0;
                    ++instance;
                }
                if (i + 1 < length) {
                    row = bits + (static_cast<std::int64_t>(slots[instance]) * height + y) * words;
                    word = row[0];
                }
            } else if (x % 32 == 0) {
                word = row[x / 32];
            }
        }
    }
    if (length == kBytes) {
        *reinterpret_cast<uint4*>(masks + start) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    } else {
#pragma unroll
        for (int i = 0; i < kBytes; ++i) {
            if (i < length) masks[start + i] = static_cast<std::uint8_t>(packed[i / 4] >> (8 * (i % 4)));
        }
    }
}

// One block for each instance.
__global__ void __launch_bounds__(kBoxThreads)
    box_kernel(std::uint32_t const* __restrict__ bits, std::int32_t const* __restrict__ report, ReportLayout const told,
               int height, int width, float* boxes) {
    int const instance = blockIdx.x;
    if (instance >= report[told.instances()]) return;
    __shared__ int box[4];  // least x and y, one beyond the largest x and y
    if (threadIdx.x < 4) box[threadIdx.x] = threadIdx.x == 0 ? width : threadIdx.x == 1 ? height : 0;
    __syncthreads();
    int const words = (width + 31) / 32, total = words * height;
    std::uint32_t const* mask = bits + static_cast<std::int64_t>(report[told.instance_slots() + instance]) * total;
    int x0 = width, y0 = height, x1 = 0, y1 = 0;
    for (int i = threadIdx.x; i < total; i += kBoxThreads) {
        std::uint32_t word = mask[i];
        if (word == 0) continue;
        int y = i / words, x = 32 * (i % words);
        x0 = min(x0, x + __ffs(word) - 1);
        x1 = max(x1, x + 32 - __clz(word));
        y0 = min(y0, y);
        y1 = max(y1, y + 1);
    }
    if (x1 > 0) {
        atomicMin(&box[0], x0);
        atomicMin(&box[1], y0);
        atomicMax(&box[2], x1);
        atomicMax(&box[3], y1);
    }
    __syncthreads();
    if (threadIdx.x < 4) {
        boxes[4 * static_cast<std::int64_t>(instance) + threadIdx.x] =
            box[2] > 0 ? static_cast<float>(box[threadIdx.x]) : 0.0f;
    }
}

struct Column {
    std::uint32_t const* words;  // of the column's first row
    int stride, height, bit;
    bool before;  // the pixel before the column's first, in column-major order

    template <typename Visit>
    __device__ void walk(Visit&& visit) const {
        bool last = before;
#pragma unroll 4
        for (int y = 0; y < height; ++y) {
            bool pixel = (words[static_cast<std::int64_t>(y) * stride] >> bit) & 1u;
            if (pixel != last) visit(y);
            last = pixel;
        }
    }

    __device__ int boundaries() const {
        int count = 0;
        walk([&](int) { ++count; });
        return count;
    }
};

// Sum over the block's threads before this one; `total` is over all. Every thread must call it.
__device__ int exclusive_sum(int value, int* warp_sums, int& total) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int inclusive = value;
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(kAllLanes, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    __syncthreads();  // the last call's readers are done
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < kRunThreads / 32; ++w) {
        if (w < warp) before += warp_sums[w];
        total += warp_sums[w];
    }
    return before + inclusive - value;
}

// One block for each slot; its threads walk down a column of pixels each.
__global__ void __launch_bounds__(kRunThreads)
    runs_kernel(std::uint32_t const* __restrict__ bits, std::int32_t const* __restrict__ work, std::int32_t* report,
                std::int32_t* total_runs, int height, int width, int queries, ReportLayout const told,
                std::int32_t* boundaries, std::int64_t capacity) {
    int const slot = blockIdx.x;
    if (slot >= report[told.slots()] || work[WorkLayout{queries}.slot_masked() + slot] == 0) return;
    __shared__ int warp_sums[kRunThreads / 32];
    __shared__ std::int64_t start;
    int const words = (width + 31) / 32;
    std::uint32_t const* mask = bits + static_cast<std::int64_t>(slot) * height * words;
    auto column = [&](int x) {
        std::uint32_t const* last_row = mask + static_cast<std::int64_t>(height - 1) * words;
        bool before = x > 0 && ((last_row[(x - 1) / 32] >> ((x - 1) % 32)) & 1u);
        return Column{mask + x / 32, words, height, x % 32, before};
    };

    int total = 0;
    for (int base = 0; base < width; base += kRunThreads) {
        int x = base + static_cast<int>(threadIdx.x), strip = 0;
        exclusive_sum(x < width ? column(x).boundaries() : 0, warp_sums, strip);
        total += strip;
    }
    if (threadIdx.x == 0) {
        // Where a mask's runs lie depends on the order of the blocks, what they are does not.
        start = atomicAdd(total_runs, total);
        report[told.run_starts() + slot] = static_cast<std::int32_t>(start);
        report[told.run_counts() + slot] = total;
    }
    __syncthreads();
    if (start + total > capacity) return;  // the host sees it in total_runs
    std::int64_t next = start;
    for (int base = 0; base < width; base += kRunThreads) {
        int x = base + static_cast<int>(threadIdx.x), strip = 0;
        int own = x < width ? column(x).boundaries() : 0;
        std::int64_t place = next + exclusive_sum(own, warp_sums, strip);
        if (own > 0) column(x).walk([&](int y) { boundaries[place++] = x * height + y; });
        next += strip;
    }
}

}  // namespace

void expand_masks(std::uint32_t const* bits, std::int32_t const* report, int instances, int height, int width,
                  int queries, int topk, std::uint8_t* masks, cudaStream_t stream) {
    check_size("expand_masks", "masks", height, width);
    check_queries("expand_masks", queries);
    check_topk("expand_masks", topk, 1, queries);
    require(instances >= 1 && instances <= topk, "expand_masks: ", instances, " instances; expected 1 to ", topk);
    check_pointer("expand_masks", "bits", bits);
    check_pointer("expand_masks", "report", report);
    check_pointer("expand_masks", "masks", masks, kBytes);
    std::int64_t const total = static_cast<std::int64_t>(instances) * height * width;
    constexpr std::int64_t kMost = std::int64_t{INT32_MAX} * kBytes * kExpandThreads;
    require(
        total <= kMost, "expand_masks: ", instances, " masks of ", height, "x", width, " (height x width); expected at most ",
        kMost, " pixels together");
    launch("expand_masks", expand_kernel, ceil_div(total, kBytes * kExpandThreads), kExpandThreads, 0, stream, bits,
           report + ReportLayout{queries, topk}.instance_slots(), total, height, width, masks);
}

void mask_boxes(std::uint32_t const* bits, std::int32_t const* report, int height, int width, int queries, int topk,
                float* boxes, cudaStream_t stream) {
    check_size("mask_boxes", "masks", height, width);
    check_queries("mask_boxes", queries);
    check_topk("mask_boxes", topk, 1, queries);
    check_pointer("mask_boxes", "bits", bits);
    check_pointer("mask_boxes", "report", report);
    check_pointer("mask_boxes", "boxes", boxes);
    launch("mask_boxes", box_kernel, topk, kBoxThreads, 0, stream, bits, report, ReportLayout{queries, topk}, height,
           width, boxes);
}

void mask_runs(std::uint32_t const* bits, std::int32_t const* work, std::int32_t* report, std::int32_t* total_runs,
               int height, int width, int queries, int topk, std::int32_t* boundaries, std::int64_t capacity,
               cudaStream_t stream) {
    check_size("mask_runs", "masks", height, width);
    check_queries("mask_runs", queries);
    check_topk("mask_runs", topk, 1, queries);
    require(
        capacity >= 0 && capacity <= INT32_MAX, "mask_runs: room for ", capacity, " boundaries; expected 0 to ", INT32_MAX);
    check_pointer("mask_runs", "bits", bits);
    check_work("mask_runs", work);
    check_pointer("mask_runs", "report", report);
    check_pointer("mask_runs", "total_runs", total_runs);
    if (capacity > 0) check_pointer("mask_runs", "boundaries", boundaries);
    launch("mask_runs", runs_kernel, queries, kRunThreads, 0, stream, bits, work, report, total_runs, height, width,
           queries, ReportLayout{queries, topk}, boundaries, capacity);
}

}  // namespace d2_trt::postprocess
