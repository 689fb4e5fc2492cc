// The two int32 tables of an image that the kernels share: `work` stays on the device, `report` goes to the host.
//
// A slot is a query that some task needs; slots are numbered in the queries' order, so that comparing slots is
// comparing queries.
#pragma once

#include <cuda_runtime.h>

namespace d2_trt::postprocess {

inline constexpr int kMaxQueries = 1024;
inline constexpr int kMaxClasses = 4096;

// Which contiguous class ids are things; a kernel's argument, so that no copy to the device is needed.
struct ThingClasses {
    unsigned words[kMaxClasses / 32];
    __host__ __device__ bool operator[](int category) const { return (words[category / 32] >> (category % 32)) & 1u; }
};

// Counts of pixels for each slot: won by it, of probability at least 0.5, both, and of logit above 0.
enum Count : int { kWon = 0, kInside = 1, kBoth = 2, kPositive = 3, kCounts = 4 };

struct WorkLayout {
    int queries;
    __host__ __device__ int slot_query() const { return 0; }
    __host__ __device__ int slot_class() const { return queries; }       // -1: not a candidate segment
    __host__ __device__ int slot_score() const { return 2 * queries; }   // float
    __host__ __device__ int slot_masked() const { return 3 * queries; }  // 1: instances need its mask
    __host__ __device__ int segment_ids() const { return 4 * queries; }  // of 1 + slot; [0] is 0
    __host__ __device__ int counts() const { return 5 * queries + 1; }   // (kCounts, queries)
    // (queries,) int64: sums of mask probabilities where the logit is above 0, in units of 2^-24.
    __host__ __device__ int sums() const { return (9 * queries + 2) / 2 * 2; }
    __host__ __device__ int words() const { return sums() + 2 * queries; }
};

struct ReportLayout {
    int queries, topk;
    __host__ __device__ int slots() const { return 0; }
    __host__ __device__ int instances() const { return 1; }
    __host__ __device__ int segments() const { return 2; }
    __host__ __device__ int runs() const { return 3; }  // run boundaries of the whole batch, in the first image's report
    __host__ __device__ int segment_classes() const { return 4; }                  // (queries,)
    __host__ __device__ int instance_slots() const { return 4 + queries; }         // (topk,)
    __host__ __device__ int run_starts() const { return 4 + queries + topk; }      // (queries,)
    __host__ __device__ int run_counts() const { return 4 + 2 * queries + topk; }  // (queries,)
    __host__ __device__ int words() const { return 4 + 3 * queries + topk; }
};

// Fixed point of a probability of at least 0.5: exact, since such a float is a multiple of 2^-24.
inline constexpr float kFixedPoint = 16777216.0f;

}  // namespace d2_trt::postprocess
