// The kernels of csrc/attention on a CPU: tests/mask2former/test_attention_kernel.py compiles and calls this.
#include <math.h>

#include <algorithm>

#include "emulation.h"

#include "attention/kernels.cuh"
#include "attention/mask.cuh"
#include "attention/plan.h"
#include "attention/resize.cuh"

namespace {

using namespace d2_trt;

struct Arguments {
    void const *q, *k, *v, *q_pos, *k_pos;
    float const* mask_embed;
    void const* features;
    void* out;
    std::int64_t batch, queries, keys, heads, dim, q_stride, k_stride, v_stride, pos_stride, mask_dim;
    std::int64_t multiprocessors, may_split, backwards;
};

template <typename T, int kBlocks, bool kBits>
void run_mask(MaskProblem const& p, std::int64_t batch, std::int64_t multiprocessors, bool backwards) {
    std::int64_t const rows = divide_up(kBits ? p.rows : p.queries, kBlocks * kBlockRows);
    Index const grid{int(mask_grid(p.tiles, kMaskWarps, rows * batch, multiprocessors)), int(rows), int(batch)};
    std::size_t const bytes = mask_shared_bytes(kBlocks, p.channels);
    emulation::run(grid, kMaskWarps * 32, bytes, backwards, [&] { mask_kernel<T, kBlocks, kBits>(p); });
}

template <typename T, int D, bool kMasked>
void run(Arguments const& a) {
    using Blocks = Shape<D, kMasked>;
    AttentionPlan const plan = plan_attention(
        a.batch, a.queries, a.keys, a.heads, Blocks::kWarps * Blocks::kBlocks * kBlockRows, a.may_split != 0,
        a.multiprocessors * Blocks::kResident);
    AttentionProblem p{};
    p.rows = divide_up(a.queries, kMaskRows) * kMaskRows;
    p.some_stride = divide_up(divide_up(plan.tiles, kMaskWarps), 16) * 16;
    std::vector<float> partial(a.batch * a.queries * plan.splits * a.heads * D, NAN);
    std::vector<float2> stats(a.batch * a.queries * plan.splits * a.heads, float2{NAN, NAN});
    std::vector<std::uint32_t> allowed(a.batch * plan.tiles * p.rows, 0x5a5a5a5a);
    std::vector<uint4> some(a.batch * p.rows * p.some_stride / 16, uint4{~0u, ~0u, ~0u, ~0u});
    p.q = a.q, p.k = a.k, p.v = a.v, p.q_pos = a.q_pos, p.k_pos = a.k_pos, p.out = a.out, p.pos_stride = a.pos_stride;
    p.partial = partial.data(), p.stats = stats.data(), p.allowed = allowed.data();
    p.some = reinterpret_cast<unsigned char*>(some.data());
    p.queries = a.queries, p.keys = a.keys, p.heads = a.heads;
    p.q_stride = a.q_stride, p.k_stride = a.k_stride, p.v_stride = a.v_stride;
    p.tiles = plan.tiles, p.tiles_per_split = plan.tiles_per_split, p.splits = plan.splits;
    p.scale = static_cast<float>(1.4426950408889634 / std::sqrt(double(D)));
    if (kMasked) {
        MaskProblem mask{};
        mask.embed = a.mask_embed, mask.features = a.features, mask.allowed = allowed.data();
        mask.some = reinterpret_cast<unsigned char*>(some.data());
        mask.queries = a.queries, mask.rows = p.rows, mask.keys = a.keys, mask.channels = a.mask_dim;
        mask.tiles = p.tiles, mask.some_stride = p.some_stride;
        auto* const chosen = mask_blocks(a.batch, a.queries, a.keys, kMaskWarps, a.multiprocessors) == 2
                                 ? &run_mask<T, 2, true>
                                 : &run_mask<T, 4, true>;
        chosen(mask, a.batch, a.multiprocessors, a.backwards != 0);
    }
    Index const grid{int(plan.splits), int(plan.groups * a.heads), int(a.batch)};
    std::size_t const bytes = kStages * Tile<D>::kBytes;
    emulation::run(grid, Blocks::kWarps * 32, bytes, a.backwards, [&] { attention_kernel<T, D, kMasked>(p); });
    if (plan.splits == 1) return;
    Index const rows{int(a.queries), int(a.heads / plan.combine_heads), int(a.batch)};
    std::size_t const combined = kCombineThreads * 16 + plan.combine_heads * (plan.splits + 1) * 4;
    emulation::run(rows, kCombineThreads, combined, a.backwards, [&] { combine_kernel<T>(p, D, plan.combine_heads); });
}

template <typename T, int D>
void run_masked(Arguments const& a) {
    a.mask_dim > 0 ? run<T, D, true>(a) : run<T, D, false>(a);
}

template <typename T>
void run_dim(Arguments const& a) {
    switch (a.dim) {
        case 8: return run_masked<T, 8>(a);
        case 16: return run_masked<T, 16>(a);
        case 32: return run_masked<T, 32>(a);
        default: return run_masked<T, 64>(a);
    }
}

}  // namespace

extern "C" void emulate_attention(Arguments const* arguments, int bfloat16) {
    bfloat16 ? run_dim<BFloat16>(*arguments) : run_dim<Half>(*arguments);
}

// What a call needs of the workspace, in splits of all images together, and what it is said to need at most.
extern "C" void plan_splits(
    std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t multiprocessors,
    std::int64_t* needed, std::int64_t* most) {
    AttentionPlan const plan = plan_attention(batch, queries, keys, heads, 128, true, 2 * multiprocessors);
    *needed = plan.splits == 1 ? 0 : plan.splits * batch;
    *most = most_splits(batch, keys, heads, 3 * multiprocessors);
}

extern "C" void emulate_mask_product(
    float const* embed, void const* features, float* logits, std::int64_t batch, std::int64_t queries, std::int64_t pixels,
    std::int64_t channels, std::int64_t multiprocessors, int bfloat16) {
    MaskProblem p{};
    p.embed = embed, p.features = features, p.logits = logits;
    p.queries = queries, p.keys = pixels, p.channels = channels, p.tiles = divide_up(pixels, kTileKeys);
    auto* const chosen = bfloat16 ? &run_mask<BFloat16, 4, false> : &run_mask<Half, 4, false>;
    chosen(p, batch, multiprocessors, false);
}

extern "C" void emulate_resize(
    void const* features, void* out, std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t channels,
    std::int64_t out_height, std::int64_t out_width, int bfloat16) {
    ResizeProblem const p{
        features, out, int(height), int(width), int(out_height), int(out_width), int(channels)};
    Index const grid{int(divide_up(out_height * out_width, kResizeThreads / 32)), int(batch), 1};
    emulation::run(grid, kResizeThreads, 0, false, [&] { bfloat16 ? resize_kernel<BFloat16>(p) : resize_kernel<Half>(p); });
}
