// How the work of an attention is divided among blocks: host arithmetic alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace d2_trt {

struct AttentionPlan {
    std::int64_t groups = 0;  // of queries: blocks for all queries of a head and a part of the keys
    std::int64_t tiles = 0;   // of 32 keys
    std::int64_t tiles_per_split = 0;
    std::int64_t splits = 0;         // of the keys
    std::int64_t combine_heads = 0;  // of a block of combine_kernel, at most 8
};

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Splits that fill the GPU as long as there are tiles.
// block_queries: queries of a block of attention_kernel. slots: blocks that the GPU runs at once.
inline AttentionPlan plan_attention(
    std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t block_queries,
    bool may_split, std::int64_t slots) {
    AttentionPlan plan;
    plan.groups = divide_up(queries, block_queries);
    plan.tiles = divide_up(keys, 32);
    std::int64_t const wanted = may_split ? std::max<std::int64_t>(1, slots / (batch * heads * plan.groups)) : 1;
    plan.tiles_per_split = divide_up(plan.tiles, std::min(wanted, plan.tiles));
    plan.splits = divide_up(plan.tiles, plan.tiles_per_split);
    plan.combine_heads = std::min<std::int64_t>(heads, 8);
    while (heads % plan.combine_heads != 0) --plan.combine_heads;
    return plan;
}

// Splits of all images together that plan_attention never exceeds, for these sizes and all smaller ones.
inline std::int64_t most_splits(std::int64_t batch, std::int64_t keys, std::int64_t heads, std::int64_t slots) {
    return std::min(divide_up(keys, 32) * batch, std::max(slots / heads, batch));
}

// How many blocks of 16 queries a block of mask_kernel has: two where that makes no more blocks than there are
// multiprocessors, else four.
inline std::int64_t mask_blocks(
    std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t warps, std::int64_t multiprocessors) {
    std::int64_t const blocks = divide_up(divide_up(keys, 32), warps) * divide_up(queries, 32) * batch;
    return blocks <= multiprocessors ? 2 : 4;
}

// Blocks of mask_kernel side by side, each of `warps` tiles at a time, of as many as the GPU runs at once (two on each
// multiprocessor). others: blocks for other queries and images.
inline std::int64_t mask_grid(std::int64_t tiles, std::int64_t warps, std::int64_t others, std::int64_t multiprocessors) {
    return std::min(divide_up(tiles, warps), std::max<std::int64_t>(1, 2 * multiprocessors / others));
}

}  // namespace d2_trt
