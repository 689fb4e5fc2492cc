// The kernel of csrc/mlp for chains, in terms of attention/primitives.cuh and cluster.cuh alone: tests/native runs it on a CPU
// over emulated ones. projection.cuh has that of one layer with residual and LayerNorm after it.
//
// A block's warps divide the columns of a layer, and its input channels where there are more warps than columns; sums of all
// of them meet in shared memory. Weights go to registers directly: each is used by one warp, for all rows of the tile. They
// depend on nothing, so that a warp asks for the first ones of the next layer before it waits for the others.
#pragma once

#include "mlp/operands.cuh"
#include "mlp/plan.h"
#ifndef D2_TRT_EMULATED
#include "mlp/cluster.cuh"
#endif

namespace d2_trt {

struct MlpProblem {
    MlpChain chain;
    MlpPlan plan;
    void const* x;
    void const* residual;  // with `after`
    uint4 const* weights;
    float const* biases;
    float const* norm;
    void* out;
    void* normed;
    std::int64_t rows;
    std::int32_t x_type, residual_type, out_type, normed_type;
    float epsilon;
};

// Steps of a warp's weights that are under way at a time, in a chain.
constexpr int kMlpAhead = 4;

// What a warp has of a turn of a layer: two tiles of columns and a split of the chunks.
struct MlpWork {
    uint4 const* from;  // the lane's words of the first tile and chunk
    int next_tile;      // words from a tile to the next
    int first_chunk, steps;
    int column;    // of the sums of all warps
    bool second;   // whether there is a second tile
};

// The part's first column of all that the layer gives.
__device__ __forceinline__ int first_column(MlpProblem const& p, int layer, int rank) {
    return mlp_sums(p.chain, layer) ? 0 : rank * p.plan.layers[layer].columns;
}

// The part's weights: its first tile and chunk.
__device__ __forceinline__ uint4 const* first_weights(MlpProblem const& p, int at, int rank) {
    MlpLayer const& layer = p.plan.layers[at];
    std::int64_t const chunk = mlp_sums(p.chain, at) ? rank * layer.chunks : 0;
    return p.weights + layer.weights +
           (static_cast<std::int64_t>(first_column(p, at, rank) / 8) * layer.row_chunks + chunk) * 32;
}

__device__ __forceinline__ MlpWork work_of(MlpProblem const& p, int at, int column, int rank, int warp, int lane) {
    MlpLayer const& layer = p.plan.layers[at];
    int const group = warp % layer.groups, split = warp / layer.groups, start = column + group * kMlpTiles * 8;
    MlpWork work;
    work.first_chunk = split * layer.steps;
    int const left = layer.chunks - work.first_chunk;
    work.steps = split >= layer.splits || start >= layer.columns ? 0 : left < layer.steps ? left : layer.steps;
    work.second = start + 8 < layer.columns;
    work.column = split * layer.turn + group * kMlpTiles * 8;
    work.next_tile = layer.row_chunks * 32;
    std::int64_t const tile = static_cast<std::int64_t>(start / 8) * layer.row_chunks;
    work.from = first_weights(p, at, rank) + (tile + work.first_chunk) * 32 + lane;
    return work;
}

template <int kAhead>
using MlpQueue = uint4[kAhead][kMlpTiles];

__device__ __forceinline__ void load_step(uint4 (&to)[kMlpTiles], MlpWork const& work, int step) {
    if (step >= work.steps) return;
    to[0] = load(work.from + step * 32);
    to[1] = work.second ? load(work.from + work.next_tile + step * 32) : uint4{0, 0, 0, 0};
}

template <int kAhead>
__device__ __forceinline__ void load_first(MlpQueue<kAhead>& queue, MlpWork const& work) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_step(queue[i], work, i);
}

// Operands of a tile's rows in shared memory: 16 bytes from byte `at` of a row on.
struct MlpOperands {
    unsigned char const* first;
    int pitch;

    __device__ __forceinline__ uint4 get(int row, int at) const {
        return *reinterpret_cast<uint4 const*>(first + row * pitch + at);
    }
};

// The products of a warp's weights, the first of which are on their way in `queue`, with all rows of the tile.
template <typename O, int kBlocks, int kAhead, typename Rows>
__device__ __forceinline__ void multiply_rows(
    MlpQueue<kAhead>& queue, MlpWork const& work, Rows const& rows, unsigned char* partial, int lane) {
    if (work.steps == 0) return;
    int const g = lane >> 2, t = lane & 3;
    float sums[kBlocks][kMlpTiles][4] = {};
    int const start = work.first_chunk * 64 + t * 16;
    for (int first = 0; first < work.steps; first += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            int const step = first + i;
            if (step >= work.steps) break;
            uint4 const weights[kMlpTiles] = {queue[i][0], queue[i][1]};
            load_step(queue[i], work, step + kAhead);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                uint4 const a = rows.get(block * 16 + g, start + step * 64);
                uint4 const b = rows.get(block * 16 + g + 8, start + step * 64);
#pragma unroll
                for (int tile = 0; tile < kMlpTiles; ++tile) O::multiply_chunk(sums[block][tile], a, b, weights[tile]);
            }
        }
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int tile = 0; tile < kMlpTiles; ++tile) {
            float const(&sum)[4] = sums[block][tile];
            unsigned char* const to = partial + (block * 16 + g) * kMlpPartialPitch + (work.column + tile * 8 + 2 * t) * 4;
            *reinterpret_cast<float2*>(to) = float2{sum[0], sum[1]};
            *reinterpret_cast<float2*>(to + 8 * kMlpPartialPitch) = float2{sum[2], sum[3]};
        }
    }
}

__device__ __forceinline__ void add_four(float (&v)[4], void const* from) {
    float4 const more = *static_cast<float4 const*>(from);
    v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
    return value;
}

// A LayerNorm's weight and bias of the channels of a lane: of lane l those from 4 l + 128 i on.
template <int kQuads>
struct MlpAffine {
    float weight[kQuads][4], bias[kQuads][4];

    __device__ __forceinline__ void load(float const* weights, float const* biases, int channels, int lane) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const channel = lane * 4 + i * 128;
            if (channel >= channels) continue;
            load_four(weights, channel, kElementFloat, weight[i]);
            load_four(biases, channel, kElementFloat, bias[i]);
        }
    }
};

// LayerNorm of a warp's row.
template <int kQuads>
__device__ __forceinline__ void normalize(
    float (&v)[kQuads][4], int channels, int lane, MlpAffine<kQuads> const& affine, float epsilon) {
    float sum = 0.0F, squares = 0.0F;
    float const share = 1.0F / channels;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        if (lane * 4 + i * 128 < channels) sum += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    }
    float const mean = sum_of_warp(sum) * share;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            v[i][j] -= mean;
            if (lane * 4 + i * 128 < channels) squares += v[i][j] * v[i][j];
        }
    }
    float const scale = 1.0F / sqrtf(sum_of_warp(squares) * share + epsilon);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = fmaf(v[i][j] * scale, affine.weight[i][j], affine.bias[i][j]);
    }
}

// The rows of x as operands of the first layer, normalised where kNormed; zeros below the last row.
template <typename O, bool kNormed>
__device__ void read_rows(MlpProblem const& p, std::int64_t first_row, int rank, unsigned char* operands, int warp, int lane) {
    constexpr int kQuads = kNormed ? 4 : 2;  // kMaxMlpNormBefore, kMaxMlpNormAfter
    int const channels = p.chain.widths[0];
    MlpAffine<kQuads> affine;
    if (kNormed) affine.load(p.norm, p.norm + channels, channels, lane);
    for (int row = warp; row < p.plan.blocks * 16; row += kMlpWarps) {
        unsigned char* const to = operands + row * p.plan.pitch[0];
        std::int64_t const at = (first_row + row) * channels;
        bool const inside = first_row + row < p.rows;
        float v[kQuads][4] = {};
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const channel = lane * 4 + i * 128;
            if (inside && channel < channels) load_four(p.x, at + channel, p.x_type, v[i]);
        }
        if (kNormed && inside) normalize(v, channels, lane, affine, p.epsilon);
        bool const keeps = kNormed && inside && p.normed != nullptr && row % p.plan.parts == rank;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const channel = lane * 4 + i * 128;
            if (channel >= channels) continue;
            O::put(to + channel * O::kBytes, v[i]);
            if (keeps) store_four(p.normed, at + channel, p.normed_type, v[i]);
        }
    }
}

constexpr int kMlpQuads = kMlpColumns / 128;  // of a lane, in a turn

// The biases of a lane's columns of a turn.
__device__ __forceinline__ void load_biases(
    float (&biases)[kMlpQuads][4], MlpProblem const& p, int at, int column, int rank, int lane) {
    MlpLayer const& layer = p.plan.layers[at];
#pragma unroll
    for (int i = 0; i < kMlpQuads; ++i) {
        int const quad = lane * 4 + i * 128;
        if (quad >= layer.turn || column + quad >= layer.columns) continue;
        load_four(p.biases + layer.biases + first_column(p, at, rank), column + quad, kElementFloat, biases[i]);
    }
}

// What follows the sums of a turn's columns, unless they are summed over the parts: bias, then either ReLU and the operands
// of the next layer, or the result.
template <typename O>
__device__ void finish_columns(
    MlpProblem const& p, int at, int column, float const (&biases)[kMlpQuads][4], std::int64_t first_row, int rank,
    unsigned char const* partial, unsigned char* operands, int pitch, bool everywhere, int warp, int lane) {
    MlpLayer const& layer = p.plan.layers[at];
    bool const last = at == p.chain.layers - 1;
    for (int row = warp; row < p.plan.blocks * 16; row += kMlpWarps) {
#pragma unroll
        for (int i = 0; i < kMlpQuads; ++i) {
            int const quad = lane * 4 + i * 128;
            if (quad >= layer.turn || column + quad >= layer.columns) continue;
            float v[4] = {biases[i][0], biases[i][1], biases[i][2], biases[i][3]};
            unsigned char const* const from = partial + row * kMlpPartialPitch + quad * 4;
            for (int split = 0; split < layer.splits; ++split) add_four(v, from + split * layer.turn * 4);
            if (last) {
                if (first_row + row >= p.rows) continue;
                std::int64_t const start = (first_row + row) * p.chain.widths[p.chain.layers];
                store_four(p.out, start + first_column(p, at, rank) + column + quad, p.out_type, v);
                continue;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] = fmaxf(v[j], 0.0F);
            if (!everywhere) {
                O::put(operands + row * pitch + (column + quad) * O::kBytes, v);
                continue;
            }
            unsigned char* const to = operands + row * pitch + (first_column(p, at, rank) + column + quad) * O::kBytes;
            for (int part = 0; part < p.plan.parts; ++part) O::put(peer_memory(to, part), v);
        }
    }
}

__device__ __forceinline__ void sync_parts(bool cluster) {
    if (cluster) {
        cluster_arrive();
        cluster_wait();
    } else {
        sync_block();
    }
}

// out = norm(residual + bias + the parts' sums): a warp for each of the part's share of the rows.
__device__ inline void finish_rows(
    MlpProblem const& p, int at, std::int64_t first_row, int rank, unsigned char* partial, int warp, int lane) {
    MlpLayer const& layer = p.plan.layers[at];
    int const channels = layer.columns, parts = p.plan.parts;
    float biases[kMlpQuads][4] = {};
    load_biases(biases, p, at, 0, rank, lane);
    MlpAffine<kMlpQuads> affine;
    affine.load(p.norm, p.norm + channels, channels, lane);
    float v[kMlpQuads][4] = {};
    auto const load_row = [&](int row) {
#pragma unroll
        for (int i = 0; i < kMlpQuads; ++i) {
            int const channel = lane * 4 + i * 128;
            if (channel >= channels) continue;
            load_four(p.residual, (first_row + row) * channels + channel, p.residual_type, v[i]);
        }
    };
    int const step = kMlpWarps * parts;
    int const below = p.rows - first_row < p.plan.blocks * 16 ? static_cast<int>(p.rows - first_row) : p.plan.blocks * 16;
    int row = rank + warp * parts;
    if (row < below) load_row(row);
    sync_parts(parts > 1);
    while (row < below) {
#pragma unroll
        for (int i = 0; i < kMlpQuads; ++i) {
            int const channel = lane * 4 + i * 128;
            if (channel >= channels) continue;
            float sum[4] = {biases[i][0], biases[i][1], biases[i][2], biases[i][3]};
            for (int part = 0; part < parts; ++part) {
                unsigned char const* const of_part = parts > 1 ? peer_memory(partial, part) : partial;
                unsigned char const* const from = of_part + row * kMlpPartialPitch + channel * 4;
                for (int split = 0; split < layer.splits; ++split) add_four(sum, from + split * layer.turn * 4);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) v[i][j] += sum[j];
        }
        normalize(v, channels, lane, affine, p.epsilon);
#pragma unroll
        for (int i = 0; i < kMlpQuads; ++i) {
            int const channel = lane * 4 + i * 128;
            if (channel < channels) store_four(p.out, (first_row + row) * channels + channel, p.out_type, v[i]);
        }
        row += step;
        if (row < below) load_row(row);
    }
    if (parts > 1) sync_parts(true);  // others may read this block's sums until then
}

// What a block reads of parameters to the second-level cache.
__device__ inline void prefetch_parameters(MlpProblem const& p, int rank, int warp, int lane) {
    for (int at = 0; at < p.chain.layers; ++at) {
        MlpLayer const& layer = p.plan.layers[at];
        auto const* const from = reinterpret_cast<unsigned char const*>(first_weights(p, at, rank));
        float const* const biases = p.biases + layer.biases + first_column(p, at, rank);
        if (warp == at) {
            for (int line = lane; line < (layer.columns + 31) / 32; line += 32) prefetch(biases + line * 32);
        }
        for (int tile = warp; tile < layer.columns / 8; tile += kMlpWarps) {
            unsigned char const* const start = from + static_cast<std::int64_t>(tile) * layer.row_chunks * 512;
            for (int line = lane; line < layer.chunks * 4; line += 32) prefetch(start + line * 128);
        }
    }
}

template <typename O, int kBlocks>
__device__ void mlp_block(MlpProblem const& p) {
    int const thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    bool const cluster = p.plan.parts > 1;
    int const rank = static_cast<int>(blockIdx.x) % p.plan.parts;
    std::int64_t const first_row = static_cast<std::int64_t>(blockIdx.x) / p.plan.parts * kBlocks * 16;
    unsigned char* const shared = shared_memory();
    unsigned char* const partial = shared + p.plan.partial;
    auto const operands = [&](int layer) { return shared + (layer % 2 == 0 ? p.plan.operands[0] : p.plan.operands[1]); };
    auto const pitch = [&](int layer) { return layer % 2 == 0 ? p.plan.pitch[0] : p.plan.pitch[1]; };

    if (cluster) cluster_arrive_relaxed();  // nobody writes to a block that has not begun
    MlpQueue<kMlpAhead> queue;
    MlpWork work = work_of(p, 0, 0, rank, warp, lane);
    load_first(queue, work);
    prefetch_parameters(p, rank, warp, lane);
    if (p.chain.after) {
        read_rows<O, false>(p, first_row, rank, operands(0), warp, lane);
    } else {
        read_rows<O, true>(p, first_row, rank, operands(0), warp, lane);
    }
    sync_block();
    if (cluster) cluster_wait();

    for (int at = 0, column = 0;;) {
        multiply_rows<O, kBlocks>(queue, work, MlpOperands{operands(at), pitch(at)}, partial, lane);
        if (mlp_sums(p.chain, at)) {  // in one turn
            finish_rows(p, at, first_row, rank, partial, warp, lane);
            return;
        }
        float biases[kMlpQuads][4] = {};
        load_biases(biases, p, at, column, rank, lane);
        bool const ends = column + p.plan.layers[at].turn >= p.plan.layers[at].columns;
        int const next = ends ? at + 1 : at, next_column = ends ? 0 : column + p.plan.layers[at].turn;
        if (next < p.chain.layers) {
            work = work_of(p, next, next_column, rank, warp, lane);
            load_first(queue, work);
        }
        sync_block();
        bool const everywhere = cluster && !mlp_sums(p.chain, at + 1);  // what the last layer sums stays where it is
        finish_columns<O>(
            p, at, column, biases, first_row, rank, partial, operands(at + 1), pitch(at + 1), everywhere, warp, lane);
        if (next == p.chain.layers) return;
        sync_parts(ends && everywhere);
        at = next;
        column = next_column;
    }
}

}  // namespace d2_trt
