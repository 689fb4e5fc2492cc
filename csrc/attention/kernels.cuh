// The attention kernels, in terms of primitives.cuh alone: tests/native runs them on a CPU over emulated primitives.
//
// mask_kernel finds the keys that each query may attend to, 32 in a word. attention_kernel gives a block one head, up to
// 128 queries and a part of the keys, which it takes 32 at a time; a warp has 16 or 32 queries. combine_kernel adds up the
// parts. A sum over channels may take them in any order: lanes take neighbouring channels, 16 bytes an access, where the
// instruction's own order would need a transposition. Loops are rolled: a tile's code must stay in the instruction cache.
#pragma once

#ifndef D2_TRT_EMULATED
#include "attention/primitives.cuh"
#endif

namespace d2_trt {

constexpr int kTileKeys = 32;
constexpr int kBlockRows = 16;
constexpr int kMaskWarps = 4;
constexpr int kStages = 4;  // tiles of keys and values that are on their way or in use
constexpr int kCombineThreads = 512;

struct AttentionProblem {
    void const* q;
    void const* k;
    void const* v;
    float const* mask_embed;
    void const* features;
    void* out;
    std::uint32_t* allowed;  // (B, tiles, rows): a bit for each key of a tile
    float* partial;          // (B, Q, splits, heads * D): sums of the splits, not divided by their weights
    float2* stats;  // (B, Q, splits, heads): largest logit, and the sum of weights, negative where all keys were blocked
    std::int32_t queries, rows, keys, heads, mask_dim;  // rows: queries rounded up to blocks of 16
    std::int64_t q_stride, k_stride, v_stride;
    std::int32_t tiles, tiles_per_split, splits;
    float scale;  // of the logits, for powers of 2: log2(e) / sqrt(D)
};

// A tile of keys and values in shared memory, in bytes.
template <int D>
struct Tile {
    static constexpr int kWords = D / 8;        // words of a query's or key's channels that a lane holds
    static constexpr int kKPitch = D * 2;       // lanes read whole rows: no two in one bank
    static constexpr int kVPitch = D * 2 + 16;  // lanes read parts of every second row: shifted by four banks each
    static constexpr int kBytes = kTileKeys * (kKPitch + kVPitch);
};

// Blocks of 16 queries that a warp of attention_kernel has, warps of a block, and blocks on a multiprocessor.
template <int D, bool kMasked>
struct Shape {
    static constexpr int kBlocks = kMasked ? 2 : 1;
    static constexpr int kMaxWarps = kMasked ? 4 : 8;
    static constexpr int kResident = D == 64 ? (kMasked ? 2 : 1) : (kMasked ? 3 : 2);
};

// Shared memory of mask_kernel: the mask embeddings of `blocks` of 16 queries, in fragments.
__host__ __device__ inline int mask_shared_bytes(int blocks, int mask_dim) { return blocks * mask_dim * 64; }

// Words from shared memory.
template <int kWords>
__device__ __forceinline__ void read_words(std::uint32_t (&words)[kWords], void const* from) {
    if constexpr (kWords == 1) {
        words[0] = *static_cast<std::uint32_t const*>(from);
    } else if constexpr (kWords == 2) {
        uint2 const w = *static_cast<uint2 const*>(from);
        words[0] = w.x, words[1] = w.y;
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            uint4 const w = static_cast<uint4 const*>(from)[i / 4];
            words[i] = w.x, words[i + 1] = w.y, words[i + 2] = w.z, words[i + 3] = w.w;
        }
    }
}

// Words from global memory, or zeros.
template <int kWords>
__device__ __forceinline__ void load_words(std::uint32_t (&words)[kWords], void const* from, bool valid) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    if (!valid) return;
    if constexpr (kWords == 1) {
        words[0] = load(static_cast<std::uint32_t const*>(from));
    } else if constexpr (kWords == 2) {
        uint2 const w = load(static_cast<uint2 const*>(from));
        words[0] = w.x, words[1] = w.y;
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            uint4 const w = load(static_cast<uint4 const*>(from) + i / 4);
            words[i] = w.x, words[i + 1] = w.y, words[i + 2] = w.z, words[i + 3] = w.w;
        }
    }
}

// Copies the rows of a tile from global to shared memory, zeros for those past the last. `worker` of `workers` threads.
template <int kRowBytes>
__device__ __forceinline__ void copy_rows(
    unsigned char* to, int pitch, unsigned char const* from, std::int64_t stride_bytes, int rows, int worker, int workers) {
    constexpr int kPieces = kRowBytes / 16;
    for (int i = worker; i < kTileKeys * kPieces; i += workers) {
        int const row = i / kPieces, piece = i % kPieces;
        bool const past = row >= rows;
        copy_async(to + row * pitch + piece * 16, from + (past ? 0 : row * stride_bytes) + piece * 16, past);
    }
}

// Eight channels of a mask embedding as high + low, numbers of T, the rest being below what features resolve.
template <typename T>
__device__ __forceinline__ void high_and_low(
    float4 const& first, float4 const& second, std::uint32_t (&high)[4], std::uint32_t (&low)[4]) {
    float const values[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        high[i] = pack<T>(values[2 * i], values[2 * i + 1]);
        float2 const rounded = unpack<T>(high[i]);
        low[i] = pack<T>(values[2 * i] - rounded.x, values[2 * i + 1] - rounded.y);
    }
}

// Which keys queries may attend to. A block has kBlocks times 16 queries, a warp of it a tile of keys.
template <typename T, int kBlocks>
__global__ void __launch_bounds__(kMaskWarps * 32) mask_kernel(__grid_constant__ AttentionProblem const problem) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const g = lane / 4, t = lane % 4;
    int const channels = problem.mask_dim, pieces = channels / 32;
    int const first_row = static_cast<int>(blockIdx.y) * kBlocks * kBlockRows;
    std::int64_t const image = blockIdx.z;
    // (kBlocks, pieces, rows g or g + 8, high or low, lane): four words each, of the channels 8 t and on
    auto* const fragments = reinterpret_cast<uint4*>(shared_memory());
    float const* const embed = problem.mask_embed + image * problem.queries * channels;
#pragma unroll 2
    for (int item = warp; item < kBlocks * pieces; item += kMaskWarps) {
        int const row = first_row + item / pieces * kBlockRows + g;
        int const channel = item % pieces * 32 + 8 * t;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float4 values[2] = {};
            if (row + 8 * h < problem.queries) {
                auto const* const from =
                    reinterpret_cast<float4 const*>(embed + static_cast<std::int64_t>(row + 8 * h) * channels + channel);
                values[0] = load(from);
                values[1] = load(from + 1);
            }
            std::uint32_t high[4], low[4];
            high_and_low<T>(values[0], values[1], high, low);
            fragments[(item * 4 + 2 * h) * 32 + lane] = {high[0], high[1], high[2], high[3]};
            fragments[(item * 4 + 2 * h + 1) * 32 + lane] = {low[0], low[1], low[2], low[3]};
        }
    }
    sync_block();
    int const tile = static_cast<int>(blockIdx.x) * kMaskWarps + warp;
    if (tile >= problem.tiles) return;

    int const left = problem.keys - tile * kTileKeys;
    std::int64_t const key = image * problem.keys + static_cast<std::int64_t>(tile) * kTileKeys + g;
    auto const* const features = static_cast<unsigned char const*>(problem.features) + 2 * key * channels + 16 * t;
    std::uint32_t next[4][4];  // of key 8 j + g, channels 8 t and on
    auto const fetch = [&](int piece) {
#pragma unroll
        for (int j = 0; j < 4; ++j) load_words(next[j], features + 16 * j * channels + 64 * piece, 8 * j + g < left);
    };
    float logits[kBlocks][4][4] = {};
    fetch(0);
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
        std::uint32_t f[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) f[j][i] = next[j][i];
        }
        if (piece + 1 < pieces) fetch(piece + 1);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            std::uint32_t e[2][2][4];  // rows g and g + 8, high and low
#pragma unroll
            for (int i = 0; i < 4; ++i) read_words(e[i / 2][i % 2], fragments + ((b * pieces + piece) * 4 + i) * 32 + lane);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
#pragma unroll
                for (int s = 0; s < 4; s += 2) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        multiply<T>(
                            logits[b][j], e[0][part][s], e[1][part][s], e[0][part][s + 1], e[1][part][s + 1], f[j][s],
                            f[j][s + 1]);
                    }
                }
            }
        }
    }
    std::uint32_t const valid = left >= kTileKeys ? 0xffffffffu : (1u << left) - 1u;
    std::uint32_t* const allowed = problem.allowed + (image * problem.tiles + tile) * problem.rows;
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
            int const row = first_row + b * kBlockRows + 8 * h + g;
            if (t == 0 && row < problem.rows) allowed[row] = ~blocked & valid;
        }
    }
}

template <typename T, int D, bool kMasked>
__global__ void __launch_bounds__(Shape<D, kMasked>::kMaxWarps * 32, Shape<D, kMasked>::kResident)
    attention_kernel(__grid_constant__ AttentionProblem const problem) {
    using Layout = Tile<D>;
    constexpr int kBlocks = Shape<D, kMasked>::kBlocks;
    constexpr int kWords = Layout::kWords;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int const g = lane / 4, t = lane % 4;
    int const head = static_cast<int>(blockIdx.y) % problem.heads;
    int const group = static_cast<int>(blockIdx.y) / problem.heads;
    int const first_row = (group * warps + warp) * kBlocks * kBlockRows;  // the warp's
    int const rows = problem.queries - first_row;                         // may be none
    std::int64_t const image = blockIdx.z;
    int const split = blockIdx.x;
    int const first_tile = split * problem.tiles_per_split;
    int const last_tile = first_tile + problem.tiles_per_split;
    int const end_tile = last_tile < problem.tiles ? last_tile : problem.tiles;

    auto const* const k =
        static_cast<unsigned char const*>(problem.k) + 2 * (image * problem.keys * problem.k_stride + head * D);
    auto const* const v =
        static_cast<unsigned char const*>(problem.v) + 2 * (image * problem.keys * problem.v_stride + head * D);
    auto const copy_tile = [&](int tile) {
        if (tile < end_tile) {
            unsigned char* const to = shared_memory() + tile % kStages * Layout::kBytes;
            std::int64_t const key = static_cast<std::int64_t>(tile) * kTileKeys;
            int const count = problem.keys - tile * kTileKeys;
            copy_rows<2 * D>(
                to, Layout::kKPitch, k + 2 * key * problem.k_stride, 2 * problem.k_stride, count, threadIdx.x, blockDim.x);
            copy_rows<2 * D>(
                to + kTileKeys * Layout::kKPitch, Layout::kVPitch, v + 2 * key * problem.v_stride, 2 * problem.v_stride,
                count, threadIdx.x, blockDim.x);
        }
        end_copies();
    };
    for (int i = 0; i < kStages - 1; ++i) copy_tile(first_tile + i);

    std::uint32_t queries[kBlocks][2][kWords];  // rows g and g + 8 of each block
    auto const* const q = static_cast<unsigned char const*>(problem.q) +
                          2 * ((image * problem.queries + first_row + g) * problem.q_stride + head * D) + 4 * kWords * t;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) load_words(queries[i / 2][i % 2], q + 16 * i * problem.q_stride, 8 * i + g < rows);

    // Of the same rows: sums of values, largest logit so far, sum of weights (a lane's own keys), and whether a key was seen
    // that the query may attend to. Until then all keys count, for a query that may attend nowhere.
    float sums[kBlocks][kWords][4] = {};
    float highest[kBlocks][2], total[kBlocks][2] = {};
    std::uint32_t seen = 0;
    std::uint32_t next[kBlocks][2] = {};  // allowed keys of the next tile
    auto const fetch = [&](int tile) {
        std::uint32_t const* const allowed = problem.allowed + (image * problem.tiles + tile) * problem.rows + first_row + g;
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) next[i / 2][i % 2] = 8 * i + g < rows ? load(allowed + 8 * i) : 0u;
    };
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
        bool const past = kMasked && 8 * i + g >= rows;  // such rows attend to nothing
        highest[i / 2][i % 2] = past ? 0.f : -INFINITY;
        seen |= (past ? 1u : 0u) << i;
    }
    if constexpr (kMasked) fetch(first_tile);

#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; ++tile) {
        int const left = problem.keys - tile * kTileKeys;
        std::uint32_t const valid = left >= kTileKeys ? 0xffffffffu : (1u << left) - 1u;
        wait_copies<kStages - 2>();
        sync_block();  // the tile is there, and nobody reads the one before
        copy_tile(tile + kStages - 1);

        std::uint32_t use[kBlocks][2];
        bool some = false;
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
            std::uint32_t& word = use[i / 2][i % 2];
            word = valid;
            if constexpr (kMasked) {
                std::uint32_t const bit = 1u << i;
                std::uint32_t const allowed = next[i / 2][i % 2];
                if (seen & bit) {
                    word = allowed;
                } else if (allowed != 0) {  // what was summed so far was not allowed
                    word = allowed;
                    seen |= bit;
                    highest[i / 2][i % 2] = -INFINITY;
                }
                some = some || word != 0;
            }
        }
        if constexpr (kMasked) {
            if (tile + 1 < end_tile) fetch(tile + 1);
            if (!any_lane(some)) continue;
        }

        unsigned char const* const keys = shared_memory() + tile % kStages * Layout::kBytes;
        unsigned char const* const values = keys + kTileKeys * Layout::kKPitch;
        float logits[kBlocks][4][4] = {};  // of keys 8 j + {2t, 2t+1}, rows g and g + 8
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            std::uint32_t words[kWords];  // key 8 j + g, channels 2 kWords t and on
            read_words(words, keys + (8 * j + g) * Layout::kKPitch + 4 * kWords * t);
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                if constexpr (kWords == 1) {
                    multiply<T>(logits[b][j], queries[b][0][0], queries[b][1][0], 0, 0, words[0], 0);
                } else {
#pragma unroll
                    for (int s = 0; s < kWords; s += 2) {
                        multiply<T>(
                            logits[b][j], queries[b][0][s], queries[b][1][s], queries[b][0][s + 1], queries[b][1][s + 1],
                            words[s], words[s + 1]);
                    }
                }
            }
        }
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                std::uint32_t const mine = use[b][h] >> (2 * t);
                float largest = -INFINITY;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& logit = logits[b][j][2 * h + i];
                        logit = mine & (1u << (8 * j + i)) ? logit : -INFINITY;
                        largest = fmaxf(largest, logit);
                    }
                }
                largest = fmaxf(largest, shuffle_xor(largest, 1));
                largest = fmaxf(largest, shuffle_xor(largest, 2));
                float const before = highest[b][h];
                float const now = fmaxf(before, largest * problem.scale);
                highest[b][h] = now;
                shrink[h] = exp2_fast(before - now);
                float weights = 0.f;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& logit = logits[b][j][2 * h + i];
                        logit = exp2_fast(fmaf(logit, problem.scale, -now));
                        weights += logit;
                    }
                }
                total[b][h] = total[b][h] * shrink[h] + weights;
            }
#pragma unroll
            for (int j = 0; j < kWords; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[b][j][i] *= shrink[i / 2];
            }
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            std::uint32_t weights[kBlocks][4];
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float const(&pair)[4] = logits[b][2 * s + i / 2];
                    weights[b][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
                }
            }
            std::uint32_t columns[kWords][2];  // keys 16 s + {2t, 2t+1}, {2t+8, 2t+9}; channel kWords g + j
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                unsigned char const* const row = values + (16 * s + 8 * i + 2 * t) * Layout::kVPitch + 2 * kWords * g;
                if constexpr (kWords == 1) {
                    std::uint32_t const first = *reinterpret_cast<std::uint16_t const*>(row);
                    std::uint32_t const second = *reinterpret_cast<std::uint16_t const*>(row + Layout::kVPitch);
                    columns[0][i] = halves(first, second, 0);
                } else {
                    std::uint32_t first[kWords / 2], second[kWords / 2];
                    read_words(first, row);
                    read_words(second, row + Layout::kVPitch);
#pragma unroll
                    for (int j = 0; j < kWords; ++j) columns[j][i] = halves(first[j / 2], second[j / 2], j % 2);
                }
            }
#pragma unroll
            for (int j = 0; j < kWords; ++j) {
#pragma unroll
                for (int b = 0; b < kBlocks; ++b) {
                    multiply<T>(
                        sums[b][j], weights[b][0], weights[b][1], weights[b][2], weights[b][3], columns[j][0],
                        columns[j][1]);
                }
            }
        }
    }

    int const channels = problem.heads * D;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float weights = total[b][h];
            weights += shuffle_xor(weights, 1);
            weights += shuffle_xor(weights, 2);
            int const row = b * kBlockRows + 8 * h + g;
            if (row >= rows) continue;
            float mine[2 * kWords];  // channels 2 kWords t and on
#pragma unroll
            for (int j = 0; j < kWords; ++j) {
                mine[j] = sums[b][j][2 * h];
                mine[kWords + j] = sums[b][j][2 * h + 1];
            }
            std::int64_t const at = image * problem.queries + first_row + row;
            int const channel = head * D + 2 * kWords * t;
            if (problem.splits == 1) {
                float const divided = 1.f / weights;
                std::uint32_t words[kWords];
#pragma unroll
                for (int i = 0; i < kWords; ++i) words[i] = pack<T>(mine[2 * i] * divided, mine[2 * i + 1] * divided);
                auto* const to = reinterpret_cast<std::uint32_t*>(
                    static_cast<unsigned char*>(problem.out) + 2 * (at * channels + channel));
                if constexpr (kWords == 1) {
                    *to = words[0];
                } else if constexpr (kWords == 2) {
                    *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
                } else {
#pragma unroll
                    for (int i = 0; i < kWords; i += 4) {
                        *reinterpret_cast<uint4*>(to + i) = {words[i], words[i + 1], words[i + 2], words[i + 3]};
                    }
                }
            } else {
                std::int64_t const slot = at * problem.splits + split;
                auto* const to = reinterpret_cast<float2*>(problem.partial + slot * channels + channel);
#pragma unroll
                for (int i = 0; i < kWords; ++i) to[i] = {mine[2 * i], mine[2 * i + 1]};
                bool const counts = !kMasked || (seen >> (2 * b + h) & 1u);
                if (t == 0) problem.stats[slot * problem.heads + head] = {highest[b][h], counts ? weights : -weights};
            }
        }
    }
}

// One query of one image and `head_count` heads: the splits' sums together. Splits without a key that the query may attend
// to count only where all are such.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(__grid_constant__ AttentionProblem const problem, int dim, int head_count) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const splits = problem.splits;
    auto* const sums = reinterpret_cast<float4*>(shared_memory());  // one a thread
    auto* const factors = reinterpret_cast<float*>(sums + kCombineThreads);  // (head_count, splits)
    auto* const divisors = factors + head_count * splits;                    // (head_count)
    std::int64_t const row = static_cast<std::int64_t>(blockIdx.z) * problem.queries + blockIdx.x;
    int const first_head = blockIdx.y * head_count;
    if (warp < head_count) {
        float2 const* const stats = problem.stats + row * splits * problem.heads + first_head + warp;
        float all = -INFINITY, allowed = -INFINITY;  // largest logits
#pragma unroll 1
        for (int s = lane; s < splits; s += 32) {
            float2 const stat = stats[static_cast<std::int64_t>(s) * problem.heads];
            all = fmaxf(all, stat.x);
            if (stat.y > 0.f) allowed = fmaxf(allowed, stat.x);
        }
        for (int o = 16; o > 0; o /= 2) {
            all = fmaxf(all, shuffle_xor(all, o));
            allowed = fmaxf(allowed, shuffle_xor(allowed, o));
        }
        bool const some = allowed > -INFINITY;
        float const highest = some ? allowed : all;
        float weights = 0.f;
#pragma unroll 1
        for (int s = lane; s < splits; s += 32) {
            float2 const stat = stats[static_cast<std::int64_t>(s) * problem.heads];
            float const factor = stat.y > 0.f || !some ? exp2_fast(stat.x - highest) : 0.f;
            factors[warp * splits + s] = factor;
            weights += factor * fabsf(stat.y);
        }
        for (int o = 16; o > 0; o /= 2) weights += shuffle_xor(weights, o);
        if (lane == 0) divisors[warp] = weights;
    }
    sync_block();
    int const channels = problem.heads * dim;
    int const columns = head_count * dim / 4;
    int const workers = kCombineThreads / columns;  // of a column of four channels
    int const column = threadIdx.x % columns, worker = threadIdx.x / columns;
    int const head = column * 4 / dim;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    if (worker < workers) {
        auto const* const from =
            reinterpret_cast<float4 const*>(problem.partial + row * splits * channels + first_head * dim) + column;
#pragma unroll 4
        for (int s = worker; s < splits; s += workers) {
            float const factor = factors[head * splits + s];
            float4 const part = from[static_cast<std::int64_t>(s) * (channels / 4)];
            // A split that does not count may hold what is not finite.
            if (factor != 0.f) {
                sum.x = fmaf(factor, part.x, sum.x);
                sum.y = fmaf(factor, part.y, sum.y);
                sum.z = fmaf(factor, part.z, sum.z);
                sum.w = fmaf(factor, part.w, sum.w);
            }
        }
        sums[threadIdx.x] = sum;
    }
    sync_block();
    if (worker != 0) return;
    for (int i = 1; i < workers; ++i) {
        float4 const part = sums[i * columns + column];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    float const divided = 1.f / divisors[head];
    auto* const to =
        static_cast<unsigned char*>(problem.out) + 2 * (row * channels + first_head * dim + 4 * column);
    *reinterpret_cast<uint2*>(to) = {
        pack<T>(sum.x * divided, sum.y * divided), pack<T>(sum.z * divided, sum.w * divided)};
}

}  // namespace d2_trt
