// The kernel of one layer with residual and LayerNorm after it, which is what follows attention:
//
//     out = norm(residual + L(x))
//
// Each part of a cluster makes its share of the columns, and keeps them: a LayerNorm needs no more of the others than mean
// and squares of their columns. Nothing else is waited for twice: what the kernel reads is asked for at its beginning, and
// the cluster meets once.
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

// The sum over lanes that have `columns` together, four each, in the first eight lanes.
__device__ __forceinline__ float sum_of_lanes(float value, int columns) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        if (lanes < 8 || lanes * 4 < columns) value += shuffle_xor(value, lanes);
    }
    return value;
}

// What a part knows of its columns of a row.
struct MlpStatistics {
    float mean, squares;  // of differences from the mean
};
static_assert(sizeof(MlpStatistics) == kMlpStatisticsBytes);

// Of a warp's row, for lanes whose columns are `quad` and 128 higher.
__device__ __forceinline__ MlpStatistics statistics_of(float const (&v)[kMlpQuads][4], int columns, int quad) {
    float sum = 0.0F, squares = 0.0F;
#pragma unroll
    for (int i = 0; i < kMlpQuads; ++i) {
        if (quad + i * 128 < columns) sum += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    }
    float const mean = sum_of_lanes(sum, columns) / columns;
#pragma unroll
    for (int i = 0; i < kMlpQuads; ++i) {
        if (quad + i * 128 >= columns) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) squares += (v[i][j] - mean) * (v[i][j] - mean);
    }
    return {mean, sum_of_lanes(squares, columns)};
}

// Of all columns of a row, from those of the parts, which have as many columns each. Means are taken as differences from the
// first one, so that large ones lose nothing.
__device__ __forceinline__ MlpStatistics joined(MlpStatistics const* of_parts, int parts, int columns) {
    MlpStatistics const first = of_parts[0];
    float squares = first.squares, sum = 0.0F, between = 0.0F;
#pragma unroll
    for (int part = 1; part < kMaxMlpParts; ++part) {
        if (part >= parts) continue;
        MlpStatistics const own = of_parts[part];
        float const away = own.mean - first.mean;
        squares += own.squares;
        sum += away;
        between += away * away;
    }
    float const mean = sum / parts;
    return {first.mean + mean, squares + fmaxf(between - sum * mean, 0.0F) * columns};
}

// What is added to a warp's sums of a row, of rows 16 below each other.
template <int kBlocks>
struct MlpTerms {
    uint4 residual[kBlocks][kMlpQuads] = {};
    float biases[kMlpQuads][4] = {};

    __device__ __forceinline__ void load(MlpProblem const& p, std::int64_t first_row, int rank, int warp, int lane) {
        int const channels = p.chain.widths[1], columns = p.plan.layers[0].columns, first = first_column(p, 0, rank);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            std::int64_t const row = first_row + block * 16 + warp;
#pragma unroll
            for (int i = 0; i < kMlpQuads; ++i) {
                int const column = lane * 4 + i * 128;
                if (row >= p.rows || column >= columns) continue;
                residual[block][i] = load_raw(p.residual, row * channels + first + column, p.residual_type);
            }
        }
        load_biases(biases, p, 0, 0, rank, lane);
    }
};

template <typename O, int kBlocks>
__device__ void projection_block(MlpProblem const& p) {
    int const thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int const parts = p.plan.parts, rank = static_cast<int>(blockIdx.x) % parts;
    bool const cluster = parts > 1;
    std::int64_t const first_row = static_cast<std::int64_t>(blockIdx.x) / parts * kBlocks * 16;
    MlpLayer const& layer = p.plan.layers[0];
    int const channels = p.chain.widths[1], columns = layer.columns, first = first_column(p, 0, rank), quad = lane * 4;
    unsigned char* const operands = shared_memory() + p.plan.operands[0];
    unsigned char* const partial = shared_memory() + p.plan.partial;
    auto* const statistics = reinterpret_cast<MlpStatistics*>(shared_memory() + p.plan.statistics);  // (rows, parts)

    if (cluster) cluster_arrive();  // nobody writes to a block that has not begun
    MlpQueue<2> queue;  // in a cluster of eight, 256 columns are a step of each warp
    MlpWork const work = work_of(p, 0, 0, rank, warp, lane);
    load_first(queue, work);
    // With more rows there are no registers for what is needed later, nor is there a hurry.
    constexpr bool kEarly = kBlocks == 1;
    MlpTerms<kBlocks> terms;
    MlpAffine<kMlpQuads> affine;
    auto const load_affine = [&] { affine.load(p.norm + first, p.norm + channels + first, columns, lane); };
    if (kEarly) {
        terms.load(p, first_row, rank, warp, lane);
        load_affine();
    }

    if (p.x_type == O::kElement) {
        int const pitch = p.chain.widths[0] * O::kBytes;
        std::int64_t const left = p.rows - first_row;
        MlpRowsOfX const rows{
            static_cast<unsigned char const*>(p.x) + first_row * pitch,
            left < kBlocks * 16 ? static_cast<int>(left) - 1 : kBlocks * 16 - 1, pitch};
        multiply_rows<O, kBlocks>(queue, work, rows, partial, lane);
    } else {
        read_rows<O, false>(p, first_row, rank, operands, warp, lane);
        sync_block();
        multiply_rows<O, kBlocks>(queue, work, MlpOperands{operands, p.plan.pitch[0]}, partial, lane);
    }
    if (!kEarly) terms.load(p, first_row, rank, warp, lane);
    sync_block();

    float v[kBlocks][kMlpQuads][4] = {};
    if (cluster) cluster_wait();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        int const row = block * 16 + warp;
#pragma unroll
        for (int i = 0; i < kMlpQuads; ++i) {
            if (quad + i * 128 >= columns) continue;
            float sum[4] = {terms.biases[i][0], terms.biases[i][1], terms.biases[i][2], terms.biases[i][3]};
            unsigned char const* const from = partial + row * kMlpPartialPitch + (quad + i * 128) * 4;
            for (int split = 0; split < layer.splits; ++split) add_four(sum, from + split * layer.turn * 4);
            widen_raw(terms.residual[block][i], p.residual_type, v[block][i]);
#pragma unroll
            for (int j = 0; j < 4; ++j) v[block][i][j] += sum[j];
        }
        MlpStatistics const own = statistics_of(v[block], columns, quad);
        MlpStatistics* const to = statistics + row * parts + rank;
        if (lane < parts) *(cluster ? peer_memory(to, lane) : to) = own;
    }
    if (!kEarly) load_affine();
    sync_parts(cluster);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        int const row = block * 16 + warp;
        if (first_row + row >= p.rows) continue;
        MlpStatistics const all = joined(statistics + row * parts, parts, columns);
        float const scale = 1.0F / sqrtf(all.squares / channels + p.epsilon);
#pragma unroll
        for (int i = 0; i < kMlpQuads; ++i) {
            if (quad + i * 128 >= columns) continue;
            float(&out)[4] = v[block][i];
#pragma unroll
            for (int j = 0; j < 4; ++j) out[j] = fmaf((out[j] - all.mean) * scale, affine.weight[i][j], affine.bias[i][j]);
            store_four(p.out, (first_row + row) * channels + first + quad + i * 128, p.out_type, out);
        }
    }
}

}  // namespace d2_trt
