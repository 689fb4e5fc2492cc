// How the work of an attention is divided among blocks: host arithmetic alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace d2_trt {

struct AttentionPlan {
    std::int64_t warps = 0;         // of a block, a head each
    std::int64_t head_groups = 0;   // heads / warps
    std::int64_t groups = 0;        // of queries
    std::int64_t group_blocks = 0;  // blocks of 16 queries of a group
    std::int64_t tiles = 0;         // of 32 keys
    std::int64_t splits = 0;        // of the keys
    std::int64_t tiles_per_split = 0;
};

// Blocks that leave no multiprocessor idle as long as there are keys to split and queries to group.
// max_blocks: blocks of 16 queries that the kernel holds.
inline AttentionPlan plan_attention(
    std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t max_blocks,
    bool may_split, std::int64_t multiprocessors) {
    auto const divide = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    AttentionPlan plan;
    plan.warps = std::min<std::int64_t>(heads, 8);
    plan.head_groups = heads / plan.warps;
    plan.tiles = divide(keys, 32);
    std::int64_t const blocks = divide(queries, 16);
    auto const group = [&](std::int64_t size) {
        plan.groups = divide(blocks, size);
        plan.group_blocks = divide(blocks, plan.groups);
        plan.groups = divide(blocks, plan.group_blocks);
    };
    group(max_blocks);
    std::int64_t const others = batch * plan.head_groups;
    // Smaller groups read keys, values and features more often, which pays where multiprocessors would be idle.
    while (plan.group_blocks > 1 && divide(blocks, divide(plan.group_blocks, 2)) * plan.tiles * others <= multiprocessors) {
        group(divide(plan.group_blocks, 2));
    }
    std::int64_t const wanted = may_split ? std::max<std::int64_t>(1, multiprocessors / (others * plan.groups)) : 1;
    plan.tiles_per_split = divide(plan.tiles, std::min(wanted, plan.tiles));
    plan.splits = divide(plan.tiles, plan.tiles_per_split);
    return plan;
}

// Splits of all images together that plan_attention never exceeds, for these sizes and all smaller ones: an image has no
// more than tiles, and all of them no more than multiprocessors, but one each.
inline std::int64_t most_splits(std::int64_t batch, std::int64_t keys, std::int64_t multiprocessors) {
    return std::min((keys + 31) / 32 * batch, std::max(multiprocessors, batch));
}

}  // namespace d2_trt
