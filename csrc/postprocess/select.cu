// Which queries the tasks need, and, once their areas are known, which of them become segments.
#include "postprocess/checks.h"
#include "postprocess/launch.cuh"
#include "postprocess/postprocess.h"

namespace d2_trt::postprocess {
namespace {

constexpr int kSelectThreads = 512;
constexpr int kDecideThreads = 256;

// Among the set flags of a warp: how many come before this lane.
__device__ int rank_in_warp(unsigned ballot, int lane) { return __popc(ballot & ((1u << lane) - 1u)); }

// One block for each image.
__global__ void __launch_bounds__(kSelectThreads) select_kernel(SelectArgs const args, ThingClasses const things) {
    int const queries = args.queries, classes = args.classes, topk = args.topk;
    int const image = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    WorkLayout const at{queries};
    ReportLayout const told{queries, topk};
    std::int32_t* work = args.work + static_cast<std::int64_t>(image) * at.words();
    std::int32_t* report = args.report + static_cast<std::int64_t>(image) * told.words();

    int* category = dynamic_shared<int>();  // (queries,): of a candidate segment, else -1
    float* score = reinterpret_cast<float*>(category + queries);
    int* masked = reinterpret_cast<int*>(score + queries);
    int* slot = masked + queries;
    for (int q = threadIdx.x; q < queries; q += blockDim.x) masked[q] = 0;
    for (int i = threadIdx.x; i < told.words(); i += blockDim.x) report[i] = 0;
    __syncthreads();

    for (int q = warp; q < queries; q += warps) {
        float best = -1.0f;
        int best_class = classes;
        if (args.panoptic) {
            float const* row = args.probs + (static_cast<std::int64_t>(image) * queries + q) * (classes + 1);
            for (int c = lane; c <= classes; c += 32) {
                if (row[c] > best) {
                    best = row[c];
                    best_class = c;
                }
            }
            // The first of equal classes wins, as in torch.max.
            for (int step = 16; step > 0; step /= 2) {
                float other = __shfl_xor_sync(kAllLanes, best, step);
                int other_class = __shfl_xor_sync(kAllLanes, best_class, step);
                if (other > best || (other == best && other_class < best_class)) {
                    best = other;
                    best_class = other_class;
                }
            }
        }
        if (lane == 0) {
            bool keep = args.panoptic && best_class != classes && best > args.score_threshold;
            category[q] = keep ? best_class : -1;
            score[q] = best;
        }
    }
    std::int64_t const* pairs = args.pairs == nullptr ? nullptr : args.pairs + static_cast<std::int64_t>(image) * topk;
    if (pairs != nullptr) {
        for (int r = threadIdx.x; r < topk; r += blockDim.x) {
            int q = static_cast<int>(pairs[r] / classes), c = static_cast<int>(pairs[r] % classes);
            if (!args.things_only || things[c]) masked[q] = 1;  // several threads may write the same 1
        }
    }
    __syncthreads();

    // Compaction in order by one warp; the second one waits for the slots.
    if (warp == 0) {
        int count = 0;
        for (int base = 0; base < queries; base += 32) {
            int q = base + lane;
            bool needed = q < queries && (category[q] >= 0 || masked[q] != 0);
            unsigned ballot = __ballot_sync(kAllLanes, needed);
            if (needed) {
                int s = count + rank_in_warp(ballot, lane);
                slot[q] = s;
                work[at.slot_query() + s] = q;
                work[at.slot_class() + s] = category[q];
                reinterpret_cast<float*>(work)[at.slot_score() + s] = score[q];
                work[at.slot_masked() + s] = masked[q];
            }
            count += __popc(ballot);
        }
        if (lane == 0) report[told.slots()] = count;
    }
    __syncthreads();
    if (warp == 0 && pairs != nullptr) {
        std::int64_t const row = static_cast<std::int64_t>(image) * topk;
        int count = 0;
        for (int base = 0; base < topk; base += 32) {
            int r = base + lane;
            std::int64_t pair = r < topk ? pairs[r] : 0;
            int q = static_cast<int>(pair / classes), c = static_cast<int>(pair % classes);
            bool stays = r < topk && (!args.things_only || things[c]);
            unsigned ballot = __ballot_sync(kAllLanes, stays);
            if (stays) {
                int i = count + rank_in_warp(ballot, lane);
                report[told.instance_slots() + i] = slot[q];
                args.instance_scores[row + i] = args.pair_scores[row + r];
                args.instance_labels[row + i] = c;
            }
            count += __popc(ballot);
        }
        if (lane == 0) report[told.instances()] = count;
    }
}

// The release's rules in parallel. One block for each image; a thread looks after some slots.
__global__ void __launch_bounds__(kDecideThreads)
    decide_kernel(std::int32_t* all_work, std::int32_t* all_reports, float* all_scores, int queries, int topk,
                  bool panoptic, double overlap_threshold, ThingClasses const things) {
    WorkLayout const at{queries};
    ReportLayout const told{queries, topk};
    std::int32_t* work = all_work + static_cast<std::int64_t>(blockIdx.x) * at.words();
    std::int32_t* report = all_reports + static_cast<std::int64_t>(blockIdx.x) * told.words();
    int const slots = report[told.slots()], instances = report[told.instances()];
    std::int32_t const* counts = work + at.counts();

    if (panoptic) {
        enum State : int { kDropped = 0, kOpens = 1, kJoins = 2 };
        int* category = dynamic_shared<int>();  // (slots,): of the slots that stay visible, else -1
        int* opens = category + queries;        // whether the slot opens a segment or joins one of its class
        for (int s = threadIdx.x; s < slots; s += blockDim.x) {
            int won = counts[kWon * queries + s], inside = counts[kInside * queries + s];
            bool visible = counts[kBoth * queries + s] > 0 &&
                           static_cast<double>(won) / static_cast<double>(inside) >= overlap_threshold;
            category[s] = visible ? work[at.slot_class() + s] : -1;
        }
        __syncthreads();
        for (int s = threadIdx.x; s < slots; s += blockDim.x) {
            int state = kDropped;
            if (category[s] >= 0) {
                state = kOpens;
                // Stuff of one class is one segment, the first's.
                for (int t = 0; t < s && !things[category[s]] && state == kOpens; ++t) {
                    if (category[t] == category[s]) state = kJoins;
                }
            }
            opens[s] = state;
        }
        __syncthreads();
        for (int s = threadIdx.x; s < slots; s += blockDim.x) {
            int id = 0;
            if (opens[s] != kDropped) {
                // The segment's opener, and 1 + the openers before it.
                int opener = s;
                if (opens[s] == kJoins) {
                    for (opener = 0; category[opener] != category[s];) ++opener;
                }
                id = 1;
                for (int t = 0; t < opener; ++t) id += opens[t] == kOpens;
                if (opener == s) report[told.segment_classes() + id - 1] = category[s];
            }
            work[at.segment_ids() + 1 + s] = id;
        }
        if (threadIdx.x == 0) {
            int count = 0;
            for (int t = 0; t < slots; ++t) count += opens[t] == kOpens;
            work[at.segment_ids()] = 0;
            report[told.segments()] = count;
        }
    }
    std::uint64_t const* sums = reinterpret_cast<std::uint64_t const*>(work + at.sums());
    float* scores = all_scores == nullptr ? nullptr : all_scores + static_cast<std::int64_t>(blockIdx.x) * topk;
    for (int i = threadIdx.x; i < instances; i += blockDim.x) {
        int s = report[told.instance_slots() + i];
        float total = static_cast<float>(static_cast<double>(sums[s]) / kFixedPoint);
        float mask_score = total / (static_cast<float>(counts[kPositive * queries + s]) + 1e-6f);
        scores[i] *= mask_score;
    }
}

}  // namespace

void select(SelectArgs const& args, ThingClasses const& things, cudaStream_t stream) {
    check_batch("select", args.batch);
    check_queries("select", args.queries);
    check_classes("select", args.classes);
    check_topk("select", args.topk, 0, args.queries, args.classes);
    check_pointer("select", "probs", args.probs);
    check_work("select", args.work);
    check_pointer("select", "report", args.report);
    if (args.topk > 0) {
        check_pointer("select", "pair_scores", args.pair_scores);
        check_pointer("select", "pairs", args.pairs);
        check_pointer("select", "instance_scores", args.instance_scores);
        check_pointer("select", "instance_labels", args.instance_labels);
    }
    std::size_t shared = 4 * sizeof(int) * static_cast<std::size_t>(args.queries);
    launch("select", select_kernel, args.batch, kSelectThreads, shared, stream, args, things);
}

void decide(std::int32_t* work, std::int32_t* report, float* instance_scores, int batch, int queries, int topk,
            bool panoptic, double overlap_threshold, ThingClasses const& things, cudaStream_t stream) {
    check_batch("decide", batch);
    check_queries("decide", queries);
    check_topk("decide", topk, 0, queries);
    check_work("decide", work);
    check_pointer("decide", "report", report);
    if (topk > 0) check_pointer("decide", "instance_scores", instance_scores);
    std::size_t shared = 2 * sizeof(int) * static_cast<std::size_t>(queries);
    launch("decide", decide_kernel, batch, kDecideThreads, shared, stream, work, report, instance_scores, queries, topk,
           panoptic, overlap_threshold, things);
}

}  // namespace d2_trt::postprocess
