// The product of mask embeddings with features, on tensor cores: as mask logits, or as a bit for each query and key that
// says whether its logit is not negative.
#pragma once

#include "attention/fragments.cuh"

namespace d2_trt {

constexpr int kMaskWarps = 4;
constexpr int kMaskStages = 4;  // pieces of 32 channels of features that are on their way or in use
constexpr int kMaskRows = 64;   // the rows of bits are a multiple of it

struct MaskProblem {
    float const* embed;      // (B, Q, channels) float32
    void const* features;    // (B, K, channels)
    float* logits;           // (B, Q, K) float32, or null: then bits are wanted
    std::uint32_t* allowed;  // (B, tiles, rows): a bit for each key of a tile
    unsigned char* some;     // (B, rows, some_stride): for each kMaskWarps tiles, whether there is such a bit
    std::int32_t queries, rows, keys, channels;  // rows: queries rounded up to a multiple of kMaskRows
    std::int32_t tiles, some_stride;             // of 32 keys; a multiple of 16
};

// Shared memory of mask_kernel: the embeddings of `blocks` of 16 queries, pieces of the warps' features, what they found.
constexpr int kPieceBytes = kTileKeys * 64;
__host__ __device__ inline int mask_shared_bytes(int blocks, int channels) {
    return blocks * channels * 64 + kMaskWarps * (kMaskStages * kPieceBytes + blocks * kBlockRows);
}

// A block has kBlocks times 16 queries, a warp of it a tile of 32 keys, then another.
template <typename T, int kBlocks, bool kBits>
__global__ void __launch_bounds__(kMaskWarps * 32) mask_kernel(__grid_constant__ MaskProblem const problem) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const g = lane / 4, t = lane % 4;
    int const channels = problem.channels, pieces = channels / 32;
    int const first_row = static_cast<int>(blockIdx.y) * kBlocks * kBlockRows;
    std::int64_t const image = blockIdx.z;
    // (kBlocks, pieces, first or second 16 channels, high or low, lane): the four words of a matrix A
    auto* const fragments = reinterpret_cast<uint4*>(shared_memory());
    unsigned char* const ring = shared_memory() + kBlocks * channels * 64 + warp * kMaskStages * kPieceBytes;
    unsigned char* const found = shared_memory() + kBlocks * channels * 64 + kMaskWarps * kMaskStages * kPieceBytes;
    int const groups = (problem.tiles + kMaskWarps - 1) / kMaskWarps;  // of tiles

    // A lane copies channels 8 t and on of keys g, g + 8, ...: what it alone reads, so that its own wait is enough. Where
    // there is no such key the address is of nothing, and is not read.
    std::int64_t const row_bytes = 2 * channels;
    auto const* from = static_cast<unsigned char const*>(problem.features) + 16 * t +
                       (image * problem.keys + (blockIdx.x * kMaskWarps + warp) * kTileKeys + g) * row_bytes;
    unsigned char* const to = ring + g * 64 + 16 * t;
    int copied_group = blockIdx.x, copied_piece = 0, copied = 0;  // what is to be copied next
    auto const copy_next = [&] {
        if (copied_group < groups) {
            int const left = problem.keys - (copied_group * kMaskWarps + warp) * kTileKeys - g;
            unsigned char* const stage = to + copied % kMaskStages * kPieceBytes;
#pragma unroll
            for (int j = 0; j < 4; ++j) copy_async(stage + 512 * j, from + 8 * j * row_bytes, 8 * j >= left);
            ++copied;
            from += 64;
            if (++copied_piece == pieces) {
                copied_piece = 0;
                copied_group += gridDim.x;
                from += static_cast<std::int64_t>(gridDim.x) * kMaskWarps * kTileKeys * row_bytes - row_bytes;
            }
        }
        end_copies();
    };
#pragma unroll 1
    for (int i = 0; i < kMaskStages - 1; ++i) copy_next();

    float const* const embed = problem.embed + image * problem.queries * channels;
#pragma unroll 4
    for (int item = warp; item < kBlocks * pieces; item += kMaskWarps) {
        int const row = first_row + item / pieces * kBlockRows + g;
        int const channel = item % pieces * 32 + 8 * t;
        std::uint32_t high[2][4], low[2][4];  // rows g and g + 8
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float4 values[2] = {};
            if (row + 8 * h < problem.queries) {
                auto const* const from =
                    reinterpret_cast<float4 const*>(embed + static_cast<std::int64_t>(row + 8 * h) * channels + channel);
                values[0] = load(from);
                values[1] = load(from + 1);
            }
            high_and_low<T>(values[0], values[1], high[h], low[h]);
        }
        uint4* const to = fragments + item * 4 * 32 + lane;
        to[0] = {high[0][0], high[1][0], high[0][1], high[1][1]};
        to[32] = {low[0][0], low[1][0], low[0][1], low[1][1]};
        to[64] = {high[0][2], high[1][2], high[0][3], high[1][3]};
        to[96] = {low[0][2], low[1][2], low[0][3], low[1][3]};
    }
    sync_block();

    int used = 0;
#pragma unroll 1
    for (int group = blockIdx.x; group < groups; group += gridDim.x) {
        int const tile = group * kMaskWarps + warp;
        int const left = problem.keys - tile * kTileKeys;
        float logits[kBlocks][4][4] = {};  // of keys 8 j + {2t, 2t+1}, rows g and g + 8
#pragma unroll 1
        for (int piece = 0; piece < pieces; ++piece, ++used) {
            wait_copies<kMaskStages - 2>();
            std::uint32_t f[4][4];  // of key 8 j + g, channels 8 t and on
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                read_words(f[j], ring + used % kMaskStages * kPieceBytes + (8 * j + g) * 64 + 16 * t);
            }
            copy_next();
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    std::uint32_t e[4];
                    read_words(e, fragments + ((b * pieces + piece) * 4 + i) * 32 + lane);
                    int const s = i / 2 * 2;
#pragma unroll
                    for (int j = 0; j < 4; ++j) multiply<T>(logits[b][j], e[0], e[1], e[2], e[3], f[j][s], f[j][s + 1]);
                }
            }
        }
        if constexpr (kBits) {
            std::uint32_t const valid = left >= kTileKeys ? 0xffffffffu : left > 0 ? (1u << left) - 1u : 0u;
            std::uint32_t* const allowed = problem.allowed + (image * problem.tiles + tile) * problem.rows + first_row;
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    std::uint32_t blocked = 0;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        blocked |= (logits[b][j][2 * h] < 0.f ? 1u : 0u) << (8 * j);
                        blocked |= (logits[b][j][2 * h + 1] < 0.f ? 2u : 0u) << (8 * j);
                    }
                    blocked <<= 2 * t;
                    blocked |= shuffle_xor(blocked, 1);
                    blocked |= shuffle_xor(blocked, 2);
                    int const row = b * kBlockRows + 8 * h + g;
                    std::uint32_t const word = first_row + row < problem.queries ? ~blocked & valid : 0u;
                    if (t == 0) {
                        if (left > 0) allowed[row] = word;
                        found[warp * kBlocks * kBlockRows + row] = word != 0;
                    }
                }
            }
            sync_block();
            int const row = threadIdx.x;
            if (row < kBlocks * kBlockRows) {
                unsigned char any = 0;
#pragma unroll
                for (int i = 0; i < kMaskWarps; ++i) any |= found[i * kBlocks * kBlockRows + row];
                unsigned char* const some = problem.some + (image * problem.rows + first_row + row) * problem.some_stride;
                some[group] = any;
                if (group + 1 == groups) {
                    for (int i = groups; i < problem.some_stride; ++i) some[i] = 0;
                }
            }
            sync_block();
        } else {
            bool const even = problem.keys % 2 == 0;  // two logits then share an aligned eight bytes
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    int const row = first_row + b * kBlockRows + 8 * h + g;
                    if (row >= problem.queries) continue;
                    float* const to = problem.logits + (image * problem.queries + row) * problem.keys +
                                      static_cast<std::int64_t>(tile) * kTileKeys + 2 * t;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        float const first = logits[b][j][2 * h], second = logits[b][j][2 * h + 1];
                        int const after = left - 8 * j - 2 * t;  // keys that are left, from the first on
                        if (even && after >= 2) {
                            *reinterpret_cast<float2*>(to + 8 * j) = {first, second};
                        } else {
                            if (after >= 1) to[8 * j] = first;
                            if (after >= 2) to[8 * j + 1] = second;
                        }
                    }
                }
            }
        }
    }
}

}  // namespace d2_trt
