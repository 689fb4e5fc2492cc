// How rows, columns and shared memory of a chain of linear layers are divided; plain C++, for the launcher and for tests.
#pragma once

#include <algorithm>
#include <cstdint>

namespace d2_trt {

constexpr int kMlpWarps = 16;
constexpr int kMlpTiles = 2;                                  // tiles of 8 columns that a warp has at a time
constexpr int kMlpColumns = kMlpWarps * kMlpTiles * 8;        // columns that a block has at a time
constexpr int kMlpPartialPitch = (kMlpColumns + 8) * 4;       // bytes; rows are shifted by eight banks each
constexpr int kMlpStatisticsBytes = 8;                        // of a row's columns in a part: two floats
constexpr int kMlpMailboxBytes = 16;
constexpr int kMaxMlpLayers = 4;
constexpr int kMaxMlpParts = 8;                               // a cluster of more blocks is not portable

struct MlpChain {
    std::int32_t layers;
    std::int32_t widths[kMaxMlpLayers + 1];
    bool after;           // residual and LayerNorm after the layers
    std::int32_t bytes;   // of an operand's channel in shared memory
    std::int32_t chunk;   // channels of a step
};

// Whether it is one layer with residual and LayerNorm after it, as after attention: projection.cuh.
constexpr bool mlp_is_projection(MlpChain const& chain) { return chain.after && chain.layers == 1; }

// Whether a layer's columns are summed over the parts, each of which has its share of the input channels.
constexpr bool mlp_sums(MlpChain const& chain, int layer) {
    return chain.after && chain.layers > 1 && layer == chain.layers - 1;
}

// A layer as one part has it. Its columns are done in turns of at most kMlpColumns; in a turn, groups of two tiles of columns
// and splits of its chunks are a warp's each.
struct MlpLayer {
    std::int64_t weights;     // words of 16 bytes before the layer's
    std::int32_t biases;      // before the layer's
    std::int32_t row_chunks;  // of all input channels
    std::int32_t chunks;      // of the part
    std::int32_t columns;     // of the part
    std::int32_t turn;        // columns of a turn
    std::int32_t groups, splits, steps;  // steps: chunks of a split
};

// Columns of a projection's part up to which a row's lanes have four each; of more they have eight.
constexpr int kMlpNarrow = 128;

// The parts are blocks of a cluster. Of all layers but those that are summed each part makes its share of the columns. All get
// all of them, but what a summed layer reads stays where it is made, and so do the columns of a projection, whose rows'
// statistics alone are exchanged.
struct MlpPlan {
    std::int32_t parts = 1;
    std::int32_t blocks = 1;      // of 16 rows, in a tile
    std::int32_t tiles = 0;       // of rows
    std::int32_t pitch[2] = {};   // bytes from row to row of operands, of the even layers and the odd ones
    std::int32_t operands[2] = {};
    std::int32_t partial = 0;
    std::int32_t statistics = 0;  // of a projection: their mailbox, then they
    std::int32_t bytes = 0;       // of shared memory
    MlpLayer layers[kMaxMlpLayers] = {};
};

inline bool mlp_divides(MlpChain const& chain, int parts) {
    for (int layer = 0; layer < chain.layers; ++layer) {
        if (mlp_sums(chain, layer)) continue;
        bool const stays = mlp_sums(chain, layer + 1);
        if (chain.widths[layer + 1] % (parts * (stays ? chain.chunk : 8)) != 0) return false;
    }
    return true;
}

// Shared memory of a plan's parts and blocks. Rows are 64 bytes more than a multiple of 128, so that two rows at a time are
// read from all banks.
inline void mlp_layout(MlpChain const& chain, MlpPlan& plan) {
    std::int32_t const rows = plan.blocks * 16;
    std::int32_t widest[2] = {0, 0};
    for (int layer = 0; layer < chain.layers; ++layer) {
        std::int32_t const share = mlp_sums(chain, layer) ? plan.parts : 1;
        widest[layer % 2] = std::max(widest[layer % 2], chain.widths[layer] / share);
    }
    std::int32_t at = 0;
    for (int i = 0; i < 2; ++i) {
        plan.pitch[i] = (widest[i] * chain.bytes + 63) / 128 * 128 + 64;
        plan.operands[i] = at;
        at += widest[i] == 0 ? 0 : rows * plan.pitch[i];
    }
    plan.partial = at;
    plan.statistics = at + rows * kMlpPartialPitch;
    plan.bytes = plan.statistics;
    if (mlp_is_projection(chain)) plan.bytes += kMlpMailboxBytes + rows * plan.parts * kMlpStatisticsBytes;
}

inline void mlp_divide(MlpChain const& chain, MlpPlan& plan) {
    std::int64_t weights = 0;
    std::int32_t biases = 0;
    for (int i = 0; i < chain.layers; ++i) {
        bool const summed = mlp_sums(chain, i);
        std::int32_t const in = chain.widths[i], out = chain.widths[i + 1];
        MlpLayer& layer = plan.layers[i];
        layer.weights = weights;
        layer.biases = biases;
        layer.row_chunks = in / chain.chunk;
        layer.chunks = layer.row_chunks / (summed ? plan.parts : 1);
        layer.columns = out / (summed ? 1 : plan.parts);
        std::int32_t const tiles = layer.columns / 8, turns = (layer.columns + kMlpColumns - 1) / kMlpColumns;
        layer.groups = ((tiles + turns - 1) / turns + kMlpTiles - 1) / kMlpTiles;
        layer.turn = layer.groups * kMlpTiles * 8;
        layer.splits = std::min(kMlpWarps / layer.groups, layer.chunks);
        layer.steps = (layer.chunks + layer.splits - 1) / layer.splits;
        layer.splits = (layer.chunks + layer.steps - 1) / layer.steps;
        weights += std::int64_t{in} * out * chain.bytes / 16;
        biases += out;
    }
}

// As many rows in a tile as leave a multiprocessor for every block, or as many as fit: weights are read once for each tile.
inline MlpPlan mlp_plan(MlpChain const& chain, std::int64_t rows, int parts, int multiprocessors, int shared_bytes) {
    MlpPlan plan;
    plan.parts = parts;
    for (int blocks = 1; blocks <= 4; blocks *= 2) {
        MlpPlan larger = plan;
        larger.blocks = blocks;
        mlp_layout(chain, larger);
        if (blocks > 1 && larger.bytes > shared_bytes) break;
        plan = larger;
        plan.tiles = static_cast<std::int32_t>((rows + blocks * 16 - 1) / (blocks * 16));
        if (std::int64_t{plan.tiles} * parts <= multiprocessors) break;
    }
    mlp_divide(chain, plan);
    return plan;
}

}  // namespace d2_trt
