// The best pairs of query and class, in the order that torch.topk(sorted=False) gives them on a GPU: those above the last
// one's score as they come, then as many of its equals as there is room for.
#include "postprocess/checks.h"
#include "postprocess/launch.cuh"
#include "postprocess/postprocess.h"

namespace d2_trt::postprocess {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// Of an image: probabilities by pair, query * classes + class, without the last class of each query.
struct Pairs {
    float const* probs;
    int classes, count;

    __device__ unsigned operator[](int pair) const {
        // Probabilities are not negative: their bits are in their order.
        return __float_as_uint(__ldg(probs + pair + pair / classes));
    }
};

// The count of set flags of the threads before this one, and of all. Every thread must call it.
__device__ int rank_in_block(bool flag, int* warp_counts, int& total) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned const ballot = __ballot_sync(kAllLanes, flag);
    __syncthreads();  // the last call's readers are done
    if (lane == 0) warp_counts[warp] = __popc(ballot);
    __syncthreads();
    int const counts = warp_counts[lane];
    total = static_cast<int>(warp_sum(counts));
    int const before = static_cast<int>(warp_sum(lane < warp ? counts : 0));
    return before + __popc(ballot & ((1u << lane) - 1u));
}

// One block for each image.
__global__ void __launch_bounds__(kThreads)
    top_pairs_kernel(float const* all_probs, int queries, int classes, int topk, float* all_scores, std::int64_t* all_pairs) {
    static_assert(kWarps == 32);  // a warp's lanes hold the counts of all warps
    __shared__ int histogram[kDigits];
    __shared__ int warp_counts[kWarps];
    __shared__ unsigned chosen;   // digits of the last pair's score that are known
    __shared__ int wanted;        // how many pairs with these digits are among the best
    Pairs const pairs{all_probs + static_cast<std::int64_t>(blockIdx.x) * queries * (classes + 1), classes, queries * classes};
    float* scores = all_scores + static_cast<std::int64_t>(blockIdx.x) * topk;
    std::int64_t* out = all_pairs + static_cast<std::int64_t>(blockIdx.x) * topk;
    if (threadIdx.x == 0) {
        chosen = 0;
        wanted = topk;
    }

    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
        if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
        __syncthreads();
        unsigned const known = shift + kDigitBits < 32 ? ~0u << (shift + kDigitBits) : 0u, prefix = chosen;
        for (int i = threadIdx.x; i < pairs.count; i += kThreads) {
            unsigned const bits = pairs[i];
            if ((bits & known) == prefix) atomicAdd(&histogram[(bits >> shift) % kDigits], 1);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // From the highest digit down: a lane has eight of them.
            constexpr int kOwn = kDigits / 32;
            int const highest = kDigits - 1 - static_cast<int>(threadIdx.x) * kOwn;
            int own = 0;
            for (int d = 0; d < kOwn; ++d) own += histogram[highest - d];
            int through = own;
            for (int step = 1; step < 32; step *= 2) {
                int const other = __shfl_up_sync(kAllLanes, through, step);
                if (static_cast<int>(threadIdx.x) >= step) through += other;
            }
            int rest = wanted - (through - own);
            __syncwarp();
            if (rest > 0 && rest <= own) {
                int d = highest;
                while (rest > histogram[d]) rest -= histogram[d--];
                chosen = prefix | static_cast<unsigned>(d) << shift;
                wanted = rest;
            }
        }
        __syncthreads();
    }

    unsigned const last = chosen;
    int const equals = wanted, above = topk - equals;
    int placed = 0, equal_placed = 0;
    for (int base = 0; base < pairs.count && (placed < above || equal_placed < equals); base += kThreads) {
        int const i = base + static_cast<int>(threadIdx.x);
        unsigned const bits = i < pairs.count ? pairs[i] : 0u;
        bool const is_above = i < pairs.count && bits > last, is_equal = i < pairs.count && bits == last;
        int total = 0, equal_total = 0;
        int const rank = placed + rank_in_block(is_above, warp_counts, total);
        int const equal_rank = equal_placed + rank_in_block(is_equal, warp_counts, equal_total);
        int const place = is_above ? rank : above + equal_rank;
        if (is_above || (is_equal && equal_rank < equals)) {
            scores[place] = __uint_as_float(bits);
            out[place] = i;
        }
        placed += total;
        equal_placed += equal_total;
    }
}

}  // namespace

void top_pairs(float const* probs, int batch, int queries, int classes, int topk, float* pair_scores, std::int64_t* pairs,
               cudaStream_t stream) {
    check_batch("top_pairs", batch);
    check_queries("top_pairs", queries);
    check_classes("top_pairs", classes);
    check_topk("top_pairs", topk, 1, queries, classes);
    check_pointer("top_pairs", "probs", probs);
    check_pointer("top_pairs", "pair_scores", pair_scores);
    check_pointer("top_pairs", "pairs", pairs);
    launch("top_pairs", top_pairs_kernel, batch, kThreads, 0, stream, probs, queries, classes, topk, pair_scores, pairs);
}

}  // namespace d2_trt::postprocess
