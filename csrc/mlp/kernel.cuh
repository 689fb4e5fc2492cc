// The kernel of csrc/mlp, in terms of attention/primitives.cuh and cluster.cuh alone: tests/native runs it on a CPU over
// emulated ones.
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
    uint4 const* weights;
    float const* biases;
    float const* norm;
    void* out;
    void* normed;
    std::int64_t rows;
    std::int32_t x_type, out_type, normed_type;
    float epsilon;
};

// Steps of a warp's weights that are under way at a time.
constexpr int kMlpAhead = 4;

// What a block has to do in one layer, and where its weights are.
template <typename O>
struct MlpLayer {
    uint4 const* weights;  // of its first tile and chunk
    float const* bias;     // of its first column
    int row_chunks;        // of all input channels: from a tile to the next
    int chunks, columns;   // its own
    int first_column;
    bool summed, last;     // summed over the parts

    __device__ MlpLayer(MlpProblem const& p, int layer, int rank) {
        std::int64_t before = 0;
        int biases = 0;
        for (int i = 0; i < layer; ++i) {
            before += static_cast<std::int64_t>(p.chain.widths[i]) * p.chain.widths[i + 1];
            biases += p.chain.widths[i + 1];
        }
        last = layer == p.chain.layers - 1;
        summed = last && p.chain.after;
        row_chunks = p.chain.widths[layer] / O::kChunk;
        chunks = summed ? row_chunks / p.plan.parts : row_chunks;
        columns = summed ? p.chain.widths[layer + 1] : p.chain.widths[layer + 1] / p.plan.parts;
        first_column = summed ? 0 : rank * columns;
        std::int64_t const skipped = static_cast<std::int64_t>(first_column / 8) * row_chunks + (summed ? rank * chunks : 0);
        weights = p.weights + before * O::kBytes / 16 + skipped * 32;
        bias = p.biases + biases + first_column;
    }
};

// What a warp has of up to kMlpColumns columns of a layer: two tiles of columns and a share of the chunks.
struct MlpWork {
    uint4 const* from;  // the lane's words of the first tile and chunk
    int next_tile;      // words from a tile to the next
    int first_chunk, steps;
    int column;         // of the sums of all warps
    bool second;        // whether there is a second tile
    int width, splits;  // columns of the sums of a split, and number of splits

    template <typename O>
    __device__ MlpWork(MlpLayer<O> const& layer, int first_column, int warp, int lane) {
        int const left = (layer.columns - first_column) / 8, tiles = left < kMlpColumns / 8 ? left : kMlpColumns / 8;
        int const groups = (tiles + kMlpTiles - 1) / kMlpTiles;
        splits = kMlpWarps / groups < layer.chunks ? kMlpWarps / groups : layer.chunks;
        width = groups * kMlpTiles * 8;
        int const group = warp % groups, split = warp / groups, tile = group * kMlpTiles;
        first_chunk = layer.chunks * split / splits;
        steps = split < splits ? layer.chunks * (split + 1) / splits - first_chunk : 0;
        second = tile + 1 < tiles;
        column = split * width + tile * 8;
        next_tile = layer.row_chunks * 32;
        std::int64_t const start = static_cast<std::int64_t>(first_column / 8 + tile) * layer.row_chunks + first_chunk;
        from = layer.weights + start * 32 + lane;
    }
};

using MlpQueue = uint4[kMlpAhead][kMlpTiles];

__device__ __forceinline__ void load_step(uint4 (&to)[kMlpTiles], MlpWork const& work, int step) {
    if (step >= work.steps) return;
    to[0] = load(work.from + step * 32);
    to[1] = work.second ? load(work.from + work.next_tile + step * 32) : uint4{0, 0, 0, 0};
}

__device__ __forceinline__ void load_first(MlpQueue& queue, MlpWork const& work) {
#pragma unroll
    for (int i = 0; i < kMlpAhead; ++i) load_step(queue[i], work, i);
}

// The products of a warp's weights, the first of which are on their way in `queue`, with all rows of the tile.
template <typename O, int kBlocks>
__device__ __forceinline__ void multiply_rows(
    MlpQueue& queue, MlpWork const& work, unsigned char const* operands, int pitch, unsigned char* partial, int lane) {
    if (work.steps == 0) return;
    int const g = lane >> 2, t = lane & 3;
    float sums[kBlocks][kMlpTiles][4] = {};
    unsigned char const* const row = operands + g * pitch + work.first_chunk * 64 + t * 16;
    for (int first = 0; first < work.steps; first += kMlpAhead) {
#pragma unroll
        for (int i = 0; i < kMlpAhead; ++i) {
            int const step = first + i;
            if (step >= work.steps) break;
            uint4 const weights[kMlpTiles] = {queue[i][0], queue[i][1]};
            load_step(queue[i], work, step + kMlpAhead);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                unsigned char const* const at = row + block * 16 * pitch + step * 64;
                uint4 const a = *reinterpret_cast<uint4 const*>(at), b = *reinterpret_cast<uint4 const*>(at + 8 * pitch);
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

// LayerNorm of a warp's row of `channels`: lane l has those from 4 l + 128 i on.
template <int kQuads>
__device__ __forceinline__ void normalize(float (&v)[kQuads][4], int channels, int lane, float const* norm, float epsilon) {
    float sum = 0.0F, squares = 0.0F;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        if (lane * 4 + i * 128 < channels) sum += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    }
    float const mean = sum_of_warp(sum) / channels;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            v[i][j] -= mean;
            if (lane * 4 + i * 128 < channels) squares += v[i][j] * v[i][j];
        }
    }
    float const scale = 1.0F / sqrtf(sum_of_warp(squares) / channels + epsilon);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        int const channel = lane * 4 + i * 128;
        if (channel >= channels) continue;
        float weight[4], bias[4];
        load_four(norm, channel, kElementFloat, weight);
        load_four(norm, channels + channel, kElementFloat, bias);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = fmaf(v[i][j] * scale, weight[j], bias[j]);
    }
}

// The rows of x, normalised or as they are, as operands of the first layer; zeros below the last row.
template <typename O>
__device__ void read_rows(MlpProblem const& p, std::int64_t first_row, int rank, unsigned char* operands, int warp, int lane) {
    constexpr int kQuads = 4;  // kMaxMlpNormBefore
    int const channels = p.chain.widths[0];
    for (int row = warp; row < p.plan.blocks * 16; row += kMlpWarps) {
        unsigned char* const to = operands + row * p.plan.pitch[0];
        std::int64_t const at = (first_row + row) * channels;
        bool const inside = first_row + row < p.rows;
        for (int start = 0; start < channels; start += kQuads * 128) {
            float v[kQuads][4] = {};
#pragma unroll
            for (int i = 0; i < kQuads; ++i) {
                int const channel = start + lane * 4 + i * 128;
                if (inside && channel < channels) load_four(p.x, at + channel, p.x_type, v[i]);
            }
            if (!p.chain.after && inside) normalize(v, channels, lane, p.norm, p.epsilon);
#pragma unroll
            for (int i = 0; i < kQuads; ++i) {
                int const channel = start + lane * 4 + i * 128;
                if (channel >= channels) continue;
                O::put(to + channel * O::kBytes, v[i]);
                bool const mine = p.normed != nullptr && row % p.plan.parts == rank;
                if (mine && inside) store_four(p.normed, at + channel, p.normed_type, v[i]);
            }
        }
    }
}

// What follows the sums of up to kMlpColumns columns from `first_column` of the block's on, unless they are summed over the
// parts: bias, then either ReLU and the operands of the next layer, or the result.
template <typename O>
__device__ void finish_columns(
    MlpProblem const& p, MlpLayer<O> const& layer, MlpWork const& work, int first_column, std::int64_t first_row,
    unsigned char const* partial, unsigned char* operands, int pitch, bool everywhere) {
    int const left = layer.columns - first_column, columns = left < kMlpColumns ? left : kMlpColumns;
    int const quads = columns / 4, total = p.plan.blocks * 16 * quads;
    for (int i = threadIdx.x; i < total; i += kMlpWarps * 32) {
        int const row = i / quads, quad = i % quads * 4, column = first_column + quad;
        float v[4];
        load_four(layer.bias, column, kElementFloat, v);
        unsigned char const* const from = partial + row * kMlpPartialPitch + quad * 4;
        for (int split = 0; split < work.splits; ++split) add_four(v, from + split * work.width * 4);
        if (layer.last) {
            if (first_row + row >= p.rows) continue;
            std::int64_t const at = (first_row + row) * p.chain.widths[p.chain.layers];
            store_four(p.out, at + layer.first_column + column, p.out_type, v);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = fmaxf(v[j], 0.0F);
        if (!everywhere) {
            O::put(operands + row * pitch + column * O::kBytes, v);
            continue;
        }
        unsigned char* const to = operands + row * pitch + (layer.first_column + column) * O::kBytes;
        for (int part = 0; part < p.plan.parts; ++part) O::put(peer_memory(to, part), v);
    }
}

// out = norm(x + bias + the parts' sums): a warp for each of the part's share of the rows.
__device__ inline void finish_rows(
    MlpProblem const& p, float const* bias, MlpWork const& work, std::int64_t first_row, int rank, unsigned char* partial,
    int warp, int lane) {
    constexpr int kQuads = 2;  // kMaxMlpNormAfter
    int const channels = p.chain.widths[p.chain.layers];
    for (int row = rank + warp * p.plan.parts; row < p.plan.blocks * 16; row += kMlpWarps * p.plan.parts) {
        if (first_row + row >= p.rows) break;
        std::int64_t const at = (first_row + row) * channels;
        float v[kQuads][4] = {};
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const channel = lane * 4 + i * 128;
            if (channel >= channels) continue;
            float offset[4];
            load_four(p.x, at + channel, p.x_type, v[i]);
            load_four(bias, channel, kElementFloat, offset);
            for (int part = 0; part < p.plan.parts; ++part) {
                unsigned char const* const of_part = p.plan.parts > 1 ? peer_memory(partial, part) : partial;
                unsigned char const* const from = of_part + row * kMlpPartialPitch + channel * 4;
                for (int split = 0; split < work.splits; ++split) add_four(offset, from + split * work.width * 4);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) v[i][j] += offset[j];
        }
        normalize(v, channels, lane, p.norm, p.epsilon);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
            int const channel = lane * 4 + i * 128;
            if (channel < channels) store_four(p.out, at + channel, p.out_type, v[i]);
        }
    }
}

// A block's part of all layers to the second-level cache.
template <typename O>
__device__ void prefetch_weights(MlpProblem const& p, int rank) {
    for (int i = 0; i < p.chain.layers; ++i) {
        MlpLayer<O> const layer(p, i, rank);
        int const lines = layer.chunks * 4, total = layer.columns / 8 * lines;
        auto const* const from = reinterpret_cast<unsigned char const*>(layer.weights);
        for (int at = threadIdx.x; at < total; at += kMlpWarps * 32) {
            prefetch(from + static_cast<std::int64_t>(at / lines) * layer.row_chunks * 512 + at % lines * 128);
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

    if (cluster) cluster_arrive();  // nobody writes to a block that has not begun
    MlpQueue queue;
    MlpLayer<O> layer(p, 0, rank);
    MlpWork work(layer, 0, warp, lane);
    load_first(queue, work);
    prefetch_weights<O>(p, rank);
    read_rows<O>(p, first_row, rank, operands(0), warp, lane);
    sync_block();
    if (cluster) cluster_wait();

    for (int at = 0, column = 0;;) {
        multiply_rows<O, kBlocks>(queue, work, operands(at), pitch(at), partial, lane);
        MlpLayer<O> const done = layer;
        MlpWork const was = work;
        int const done_column = column, next = at + 1;
        bool const layer_ends = column + kMlpColumns >= layer.columns;
        bool const stays = p.chain.after && at == p.chain.layers - 2;
        column = layer_ends ? 0 : column + kMlpColumns;
        at += layer_ends;
        if (at < p.chain.layers) {
            if (layer_ends) layer = MlpLayer<O>(p, at, rank);
            work = MlpWork(layer, column, warp, lane);
            load_first(queue, work);
        }
        if (done.summed) {  // in one go: it has no more than kMlpColumns columns
            cluster ? (cluster_arrive(), cluster_wait()) : sync_block();
            finish_rows(p, done.bias, was, first_row, rank, partial, warp, lane);
            if (cluster) cluster_arrive(), cluster_wait();  // others may read this block's sums until then
            return;
        }
        sync_block();
        finish_columns(
            p, done, was, done_column, first_row, partial, operands(next), pitch(next), cluster && !stays);
        if (at == p.chain.layers) return;
        if (cluster && layer_ends && !stays) {
            cluster_arrive();
            cluster_wait();
        } else {
            sync_block();
        }
    }
}

}  // namespace d2_trt
