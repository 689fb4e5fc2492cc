// Launchers of the post-processing kernels: from class and mask logits to panoptic ids, instance masks and their runs,
// and semantic scores. What they compute, and the order of the calls, is in mask2former/postprocessing_cuda.py.
//
// Every launcher only enqueues, after it has checked what the host can see: std::invalid_argument says which argument is not
// allowed, std::runtime_error that CUDA refuses. Pointers are to device memory unless said otherwise; `work` and `report` are
// laid out as in layout.h, one row of words() for each image.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "postprocess/layout.h"
#include "postprocess/sampling.cuh"

namespace d2_trt::postprocess {

// The best `topk` pairs of query and class of each image, without the class "no object": pairs (batch, topk), query *
// classes + class, and pair_scores (batch, topk), their probabilities. probs is (batch, queries, classes + 1).
void top_pairs(float const* probs, int batch, int queries, int classes, int topk, float* pair_scores, std::int64_t* pairs,
               cudaStream_t stream);

// What the class probabilities alone decide, for a batch.
struct SelectArgs {
    float const* probs;             // (batch, queries, classes + 1), the last class "no object"
    float const* pair_scores;       // (batch, topk), or null without instances
    std::int64_t const* pairs;      // (batch, topk): query * classes + class
    int batch, queries, classes, topk;
    bool panoptic;
    bool things_only;               // instances of other classes are left out
    float score_threshold;          // candidates for segments are above it
    std::int32_t* work;
    std::int32_t* report;
    float* instance_scores;         // (batch, topk): scores of the instances that stay, in order
    std::int64_t* instance_labels;  // (batch, topk)
};
void select(SelectArgs const& args, ThingClasses const& things, cudaStream_t stream);

// One image's masks and, for each mask, its plane's distance from the next in elements.
struct Masks {
    void const* data;
    DType dtype;
    std::int64_t query_stride;
};

int mask_tiles(Geometry const& geometry);

// Per pixel: the winning slot, and the bits of the masks; then each slot's counts and sums into `work`.
struct MaskArgs {
    Masks masks;
    Geometry geometry;
    int queries, topk;
    std::int32_t* work;                // of this image
    std::int32_t const* report;        // of this image
    std::int32_t* segment_map;         // (out_h, out_w): 1 + winning slot where its probability is >= 0.5; or null
    std::uint32_t* bits;               // (queries, out_h, ceil(out_w / 32)), by slot; or null without instances
    std::int32_t* partial_counts;      // (mask_tiles, kCounts, queries)
    std::uint64_t* partial_sums;       // (mask_tiles, queries)
};
void mask_pass(MaskArgs const& args, cudaStream_t stream);

// Segment ids from the areas, and the instances' scores, for a batch.
void decide(std::int32_t* work, std::int32_t* report, float* instance_scores, int batch, int queries, int topk,
            bool panoptic, double overlap_threshold, ThingClasses const& things, cudaStream_t stream);

// Slots to segment ids, in place.
void assign_ids(std::int32_t* segment_map, std::int64_t pixels, std::int32_t const* work, int queries,
                cudaStream_t stream);

// (instances, height, width) bool from the bits.
void expand_masks(std::uint32_t const* bits, std::int32_t const* report, int instances, int height, int width,
                  int queries, int topk, std::uint8_t* masks, cudaStream_t stream);

// Tight boxes (topk, 4) float32, x0 y0 x1 y1 with the far edges exclusive; zeros for an empty mask.
void mask_boxes(std::uint32_t const* bits, std::int32_t const* report, int height, int width, int queries, int topk,
                float* boxes, cudaStream_t stream);

// Boundaries of the masks' column-major runs: places y + x * height where a mask differs from the place before, which at
// the start counts as 0. They go to run_starts .. run_starts + run_counts of `boundaries`, as far as `capacity` holds
// them; total_runs counts them all, so that the host sees what it must provide.
void mask_runs(std::uint32_t const* bits, std::int32_t const* work, std::int32_t* report, std::int32_t* total_runs,
               int height, int width, int queries, int topk, std::int32_t* boundaries, std::int64_t capacity,
               cudaStream_t stream);

// COCO's compressed counts from the boundaries of one mask's runs, on the host: `count` from place `start` on, of the
// `capacity` that there are.
std::string encode_runs(
    std::int32_t const* boundaries, std::int64_t capacity, std::int64_t start, std::int64_t count, std::int64_t pixels);

// (classes, out_h, out_w) scores, or (out_h, out_w) labels of the highest; the other pointer is null.
struct SemanticArgs {
    Masks masks;
    Geometry geometry;
    float const* probs;  // (queries, classes + 1) of this image
    int queries, classes;
    float* scores;
    std::int64_t* labels;
    uint4* weights;  // semantic_weights_bytes() of scratch
};
std::int64_t semantic_weights_bytes(int queries, int classes);
void semantic(SemanticArgs const& args, cudaStream_t stream);

}  // namespace d2_trt::postprocess
