// The kernel of one layer with residual and LayerNorm after it, which is what follows attention:
//
//     out = norm(residual + L(x))
//
// Each part of a cluster makes its share of the columns, and keeps them: a LayerNorm needs no more of the others than mean
// and squares of their columns, which they send. What the kernel reads is asked for at its beginning, as far as there are
// registers. After the product a row is the work of as many lanes as its columns need, four columns each and eight lanes at
// least, and up to 32 columns 16 rows are that of four warps: the fewer warps, the fewer instructions.
#pragma once

#include "mlp/kernel.cuh"

namespace d2_trt {

// Operands of a tile's rows as they lie in x. What is read for rows below the last is that one's, and not used.
struct MlpRowsOfX {
    unsigned char const* first;
    int last, pitch;

    __device__ __forceinline__ uint4 get(int row, int at) const {
        return load(reinterpret_cast<uint4 const*>(first + ((row < last ? row : last) * pitch + at)));
    }
};

// What a part knows of its columns of a row.
struct MlpStatistics {
    float mean, squares;  // of differences from the mean
};
static_assert(sizeof(float2) == kMlpStatisticsBytes && sizeof(Mailbox) <= kMlpMailboxBytes);

__device__ __forceinline__ float sum_of_lanes(float value, int lanes) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        if (other < lanes) value += shuffle_xor(value, other);
    }
    return value;
}

// Of a row that `lanes` have, each the columns from `column` on. share: the inverse of the columns' number.
template <int kQuads>
__device__ __forceinline__ MlpStatistics statistics_of(
    float const (&v)[kQuads][4], int columns, float share, int column, int lanes) {
    float sum = 0.0F, squares = 0.0F;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        if (column + i * 128 < columns) sum += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    }
    float const mean = sum_of_lanes(sum, lanes) * share;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        if (column + i * 128 >= columns) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) squares += (v[i][j] - mean) * (v[i][j] - mean);
    }
    return {mean, sum_of_lanes(squares, lanes)};
}

// Of all columns of a row, from those of the parts, which have as many columns each. Means are taken as differences from the
// first one, so that large ones lose nothing. share: the inverse of the parts' number.
__device__ __forceinline__ MlpStatistics joined(float2 const* of_parts, int parts, float share, int columns) {
    float2 const first = of_parts[0];
    float squares = first.y, sum = 0.0F, between = 0.0F;
#pragma unroll
    for (int part = 1; part < kMaxMlpParts; ++part) {
        if (part >= parts) continue;
        float2 const own = of_parts[part];
        float const away = own.x - first.x;
        squares += own.y;
        sum += away;
        between += away * away;
    }
    float const mean = sum * share;
    return {first.x + mean, squares + fmaxf(between - sum * mean, 0.0F) * columns};
}

// The rows that a thread has a part of, `step` rows from each other, and its columns: four from `column` on, and four from
// 128 columns further on.
struct MlpShare {
    int lanes;  // of a row: 8, 16 or 32
    int row, step, column;

    __device__ MlpShare(int columns, int thread) {
        int const shift = columns > 64 ? 5 : columns > 32 ? 4 : 3;
        lanes = 1 << shift;
        row = thread >> shift;
        step = kMlpWarps * 32 >> shift;
        column = (thread & (lanes - 1)) * 4;
    }
};

// What is added to the sums of a thread's rows.
template <int kBlocks, int kQuads>
struct MlpTerms {
    uint4 residual[kBlocks][kQuads] = {};
    float biases[kQuads][4] = {};

    __device__ __forceinline__ void load(MlpProblem const& p, MlpShare const& share, std::int64_t first_row, int first) {
        int const channels = p.chain.widths[1], columns = p.plan.layers[0].columns;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const column = share.column + i * 128;
            if (column >= columns) continue;
#pragma unroll
            for (int round = 0; round < kBlocks; ++round) {
                int const in_tile = share.row + round * share.step;
                std::int64_t const row = first_row + in_tile;
                if (in_tile >= kBlocks * 16 || row >= p.rows) continue;
                residual[round][i] = load_raw(p.residual, row * channels + first + column, p.residual_type);
            }
            load_four(p.biases + first, column, kElementFloat, biases[i]);
        }
    }
};

template <int kQuads>
struct MlpScale {
    float weight[kQuads][4], bias[kQuads][4];

    __device__ __forceinline__ void load(MlpProblem const& p, MlpShare const& share, int first) {
        int const channels = p.chain.widths[1], columns = p.plan.layers[0].columns;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const column = share.column + i * 128;
            if (column >= columns) continue;
            load_four(p.norm + first, column, kElementFloat, weight[i]);
            load_four(p.norm + channels + first, column, kElementFloat, bias[i]);
        }
    }
};

// kQuads: of a lane, 1 where a part has kMlpNarrow columns or fewer, else 2.
template <typename O, int kBlocks, int kQuads>
__device__ void projection_block(MlpProblem const& p) {
    int const thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int const parts = p.plan.parts, block = static_cast<int>(blockIdx.x), tile = block / parts, rank = block - tile * parts;
    bool const cluster = parts > 1;
    std::int64_t const first_row = std::int64_t{tile} * kBlocks * 16;
    MlpLayer const& layer = p.plan.layers[0];
    int const channels = p.chain.widths[1], columns = layer.columns, first = rank * columns;
    unsigned char* const shared = shared_memory();
    unsigned char* const partial = shared + p.plan.partial;
    auto* const mailbox = reinterpret_cast<Mailbox*>(shared + p.plan.statistics);
    auto* const statistics = reinterpret_cast<float2*>(shared + p.plan.statistics + kMlpMailboxBytes);  // (rows, parts)

    if (cluster) {
        if (thread == 0) open_mailbox(mailbox, kBlocks * 16 * parts * kMlpStatisticsBytes);
        cluster_arrive_relaxed();  // nobody sends to a mailbox that is not open
    }
    MlpQueue<2> queue;  // in a cluster of eight, 256 columns are a step of each warp
    MlpWork const work = work_of(p, 0, 0, rank, warp, lane);
    load_first(queue, work);
    MlpShare const share(columns, thread);
    bool const finishes = share.row < kBlocks * 16;  // the whole warp
    MlpTerms<kBlocks, kQuads> terms;
    MlpScale<kQuads> scale;
    constexpr bool kEarly = kBlocks * kQuads <= 2;
    if (kEarly && finishes) {
        terms.load(p, share, first_row, first);
        scale.load(p, share, first);
    }

    if (p.x_type == O::kElement) {
        int const pitch = p.chain.widths[0] * O::kBytes;
        std::int64_t const left = p.rows - first_row;
        MlpRowsOfX const rows{
            static_cast<unsigned char const*>(p.x) + first_row * pitch,
            left < kBlocks * 16 ? static_cast<int>(left) - 1 : kBlocks * 16 - 1, pitch};
        multiply_rows<O, kBlocks>(queue, work, rows, partial, lane);
    } else {
        unsigned char* const operands = shared + p.plan.operands[0];
        read_rows<O, false>(p, first_row, rank, operands, warp, lane);
        sync_block();
        multiply_rows<O, kBlocks>(queue, work, MlpOperands{operands, p.plan.pitch[0]}, partial, lane);
    }
    if (!kEarly && finishes) terms.load(p, share, first_row, first);
    float const of_columns = 1.0F / columns, of_parts = 1.0F / parts, of_channels = of_columns * of_parts;
    if (cluster) cluster_wait();
    sync_block();
    if (!finishes) return;

    float v[kBlocks][kQuads][4] = {};
    MlpStatistics own[kBlocks] = {};
#pragma unroll
    for (int round = 0; round < kBlocks; ++round) {
        int const row = share.row + round * share.step;
        if (row >= kBlocks * 16) continue;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const column = share.column + i * 128;
            if (column >= columns) continue;
            float sum[4] = {terms.biases[i][0], terms.biases[i][1], terms.biases[i][2], terms.biases[i][3]};
            unsigned char const* const from = partial + row * kMlpPartialPitch + column * 4;
            for (int split = 0; split < layer.splits; ++split) add_four(sum, from + split * layer.turn * 4);
            widen_raw(terms.residual[round][i], p.residual_type, v[round][i]);
#pragma unroll
            for (int j = 0; j < 4; ++j) v[round][i][j] += sum[j];
        }
        own[round] = statistics_of<kQuads>(v[round], columns, of_columns, share.column, share.lanes);
        int const to = share.column / 4;  // of the lanes of a row, each sends to one part
        if (cluster && to < parts) send(statistics + row * parts + rank, {own[round].mean, own[round].squares}, mailbox, to);
    }
    if (!kEarly) scale.load(p, share, first);
    if (cluster) await_mailbox(mailbox);
#pragma unroll
    for (int round = 0; round < kBlocks; ++round) {
        int const row = share.row + round * share.step;
        if (row >= kBlocks * 16 || first_row + row >= p.rows) continue;
        MlpStatistics const all = cluster ? joined(statistics + row * parts, parts, of_parts, columns) : own[round];
        float const factor = 1.0F / sqrtf(all.squares * of_channels + p.epsilon);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const column = share.column + i * 128;
            if (column >= columns) continue;
            float(&out)[4] = v[round][i];
#pragma unroll
            for (int j = 0; j < 4; ++j) out[j] = fmaf((out[j] - all.mean) * factor, scale.weight[i][j], scale.bias[i][j]);
            store_four(p.out, (first_row + row) * channels + first + column, p.out_type, out);
        }
    }
}

}  // namespace d2_trt
