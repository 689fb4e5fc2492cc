// The attention kernels, in terms of primitives.cuh alone: tests/native runs them on a CPU over emulated primitives.
//
// A block has all queries of a group (up to kBlocks times 16 rows), a warp for each head, and a part of the keys, which it
// takes 32 at a time. Keys and values go through shared memory that one warp fills and reads, with 16 bytes an access; a
// sum over channels may take them in any order, so lanes take neighbouring channels where the instruction's own order would
// need a transposition. Queries and mask embeddings come from the first-level cache each time.
#pragma once

#ifndef D2_TRT_EMULATED
#include "attention/primitives.cuh"
#endif

namespace d2_trt {

constexpr int kTileKeys = 32;
constexpr int kBlockRows = 16;
constexpr int kMaxWarps = 8;
constexpr int kCombineThreads = 512;

struct AttentionProblem {
    void const* q;
    void const* k;
    void const* v;
    float const* mask_embed;
    void const* features;
    void* out;
    float* partial;  // (B, Q, splits, heads * D): sums of the splits, not divided by their weights
    float2* stats;   // (B, Q, splits, heads): largest logit, and the sum of weights, negative where all keys were blocked
    std::int32_t queries, keys, heads, mask_dim;
    std::int64_t q_stride, k_stride, v_stride;
    std::int32_t group_blocks;  // blocks of 16 rows of a group
    std::int32_t tiles, tiles_per_split, splits;
    float scale;  // of the logits, for powers of 2: log2(e) / sqrt(D)
};

// Layout of the shared memory, in bytes.
template <int D>
struct Tile {
    static constexpr int kWords = D / 8;       // words of a query's or key's channels that a lane holds
    static constexpr int kKPitch = D * 2;      // lanes read whole rows: no two in one bank
    static constexpr int kVPitch = D * 2 + 16;  // lanes read parts of every second row: shifted by four banks each
    static constexpr int kWarpBytes = kTileKeys * (kKPitch + kVPitch);
};

// From row to row of the features: an odd multiple of 64 bytes, so that two rows fill the banks.
__host__ __device__ inline int feature_pitch(int mask_dim) { return mask_dim * 2 | 64; }

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
__device__ __forceinline__ void copy_rows(
    unsigned char* to, int pitch, unsigned char const* from, std::int64_t stride_bytes, int row_bytes, int rows, int worker,
    int workers) {
    int const pieces = row_bytes / 16;
    for (int i = worker; i < kTileKeys * pieces; i += workers) {
        int const row = i / pieces, piece = i % pieces;
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

// Which of a tile's keys the 16 queries from `row` on may attend to: one bit a key, zero for queries past the last.
template <typename T>
__device__ __forceinline__ void find_allowed(
    AttentionProblem const& problem, std::int64_t image, int row, unsigned char const* features, int pitch,
    std::uint32_t valid, int lane, std::uint32_t* allowed) {
    int const g = lane / 4, t = lane % 4;
    int const channels = problem.mask_dim;
    bool const inside[2] = {row + g < problem.queries, row + g + 8 < problem.queries};
    float const* const embed = problem.mask_embed + (image * problem.queries + row + g) * channels + 8 * t;
    float4 next[2][2];
    auto const fetch = [&](int channel) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                next[h][i] = {0.f, 0.f, 0.f, 0.f};
                if (inside[h]) {
                    next[h][i] = load(reinterpret_cast<float4 const*>(embed + 8 * h * channels + channel) + i);
                }
            }
        }
    };
    float logits[4][4] = {};
    unsigned char const* const mine = features + g * pitch + 16 * t;
    fetch(0);
    for (int channel = 0; channel < channels; channel += 32) {
        std::uint32_t high[2][4], low[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) high_and_low<T>(next[h][0], next[h][1], high[h], low[h]);
        if (channel + 32 < channels) fetch(channel + 32);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            std::uint32_t f[4];
            read_words(f, mine + 8 * j * pitch + 2 * channel);
#pragma unroll
            for (int s = 0; s < 4; s += 2) {
                multiply<T>(logits[j], high[0][s], high[1][s], high[0][s + 1], high[1][s + 1], f[s], f[s + 1]);
                multiply<T>(logits[j], low[0][s], low[1][s], low[0][s + 1], low[1][s + 1], f[s], f[s + 1]);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        std::uint32_t blocked = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            blocked |= (logits[j][2 * h] < 0.f ? 1u : 0u) << (8 * j);
            blocked |= (logits[j][2 * h + 1] < 0.f ? 2u : 0u) << (8 * j);
        }
        blocked <<= 2 * t;
        blocked |= shuffle_xor(blocked, 1);
        blocked |= shuffle_xor(blocked, 2);
        if (t == 0) allowed[g + 8 * h] = inside[h] ? ~blocked & valid : 0u;
    }
}

// kBlocks: the largest number of blocks of 16 queries.
template <typename T, int D, int kBlocks, bool kMasked>
__global__ void __launch_bounds__(kMaxWarps * 32) attention_kernel(__grid_constant__ AttentionProblem const problem) {
    using Layout = Tile<D>;
    constexpr int kWords = Layout::kWords;
    static_assert(kBlocks <= 16, "a bit for each row that a lane holds");
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int const g = lane / 4, t = lane % 4;
    int const head_groups = problem.heads / warps;
    int const head = static_cast<int>(blockIdx.y) % head_groups * warps + warp;
    int const first_row = static_cast<int>(blockIdx.y) / head_groups * problem.group_blocks * kBlockRows;
    int const rows = problem.queries - first_row;
    int const row_blocks = (rows + kBlockRows - 1) / kBlockRows;
    int const blocks = row_blocks < problem.group_blocks ? row_blocks : problem.group_blocks;
    std::int64_t const image = blockIdx.z;
    int const split = blockIdx.x;
    int const first_tile = split * problem.tiles_per_split;
    int const last_tile = first_tile + problem.tiles_per_split;
    int const end_tile = last_tile < problem.tiles ? last_tile : problem.tiles;

    unsigned char* const own = shared_memory() + warp * Layout::kWarpBytes;
    unsigned char* const own_values = own + kTileKeys * Layout::kKPitch;
    unsigned char* const features = shared_memory() + warps * Layout::kWarpBytes;
    int const pitch = kMasked ? feature_pitch(problem.mask_dim) : 0;
    auto* const allowed = reinterpret_cast<std::uint32_t*>(features + kTileKeys * pitch);

    auto const* const k =
        static_cast<unsigned char const*>(problem.k) + 2 * (image * problem.keys * problem.k_stride + head * D);
    auto const* const v =
        static_cast<unsigned char const*>(problem.v) + 2 * (image * problem.keys * problem.v_stride + head * D);
    auto const copy_keys = [&](int tile) {
        std::int64_t const key = static_cast<std::int64_t>(tile) * kTileKeys;
        int const count = problem.keys - tile * kTileKeys;
        copy_rows(own, Layout::kKPitch, k + 2 * key * problem.k_stride, 2 * problem.k_stride, 2 * D, count, lane, 32);
        copy_rows(own_values, Layout::kVPitch, v + 2 * key * problem.v_stride, 2 * problem.v_stride, 2 * D, count, lane, 32);
    };
    auto const copy_features = [&](int tile) {
        std::int64_t const row = image * problem.keys + static_cast<std::int64_t>(tile) * kTileKeys;
        int const bytes = 2 * problem.mask_dim;
        copy_rows(
            features, pitch, static_cast<unsigned char const*>(problem.features) + row * bytes, bytes, bytes,
            problem.keys - tile * kTileKeys, threadIdx.x, blockDim.x);
    };
    auto const* const q = static_cast<unsigned char const*>(problem.q) +
                          2 * ((image * problem.queries + first_row + g) * problem.q_stride + head * D) + 4 * kWords * t;

    // Of row g and row g + 8 of each block: sums of values, largest logit so far, sum of weights (a lane's own keys), and
    // whether a key was seen that the query may attend to. Until then all keys count, for a query that may attend nowhere.
    float sums[kBlocks][kWords][4] = {};
    float highest[kBlocks][2], total[kBlocks][2] = {};
    std::uint32_t seen = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            bool const past = kMasked && b * kBlockRows + g + 8 * h >= rows;  // such rows attend to nothing
            highest[b][h] = past ? 0.f : -INFINITY;
            seen |= (past ? 1u : 0u) << (2 * b + h);
        }
    }

    copy_keys(first_tile);
    if constexpr (kMasked) copy_features(first_tile);
    for (int tile = first_tile; tile < end_tile; ++tile) {
        int const left = problem.keys - tile * kTileKeys;
        std::uint32_t const valid = left >= kTileKeys ? 0xffffffffu : (1u << left) - 1u;
        bool const more = tile + 1 < end_tile;
        wait_copies();
        if constexpr (kMasked) {
            sync_block();  // the features are there, and nobody reads the bits of the tile before
            for (int b = warp; b < blocks; b += warps) {
                find_allowed<T>(
                    problem, image, first_row + b * kBlockRows, features, pitch, valid, lane, allowed + b * kBlockRows);
            }
            sync_block();
            if (more) copy_features(tile + 1);
        } else {
            sync_warp();
        }

        std::uint32_t key_words[4][kWords];         // key 8 j + g, channels 2 kWords t and on
        std::uint32_t value_words[2][kWords][2];    // keys 16 s + {2t, 2t+1}, {2t+8, 2t+9}; channel kWords g + j
#pragma unroll
        for (int j = 0; j < 4; ++j) read_words(key_words[j], own + (8 * j + g) * Layout::kKPitch + 4 * kWords * t);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                unsigned char const* const row = own_values + (16 * s + 8 * i + 2 * t) * Layout::kVPitch + 2 * kWords * g;
                if constexpr (kWords == 1) {
                    std::uint32_t const first = *reinterpret_cast<std::uint16_t const*>(row);
                    std::uint32_t const second = *reinterpret_cast<std::uint16_t const*>(row + Layout::kVPitch);
                    value_words[s][0][i] = halves(first, second, 0);
                } else {
                    std::uint32_t first[kWords / 2], second[kWords / 2];
                    read_words(first, row);
                    read_words(second, row + Layout::kVPitch);
#pragma unroll
                    for (int j = 0; j < kWords; ++j) value_words[s][j][i] = halves(first[j / 2], second[j / 2], j % 2);
                }
            }
        }
        sync_warp();
        if (more) copy_keys(tile + 1);

#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            if (b >= blocks) break;
            std::uint32_t queries[2][kWords];  // rows g, g + 8
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                load_words(
                    queries[h], q + 2 * (b * kBlockRows + 8 * h) * problem.q_stride, b * kBlockRows + 8 * h + g < rows);
            }
            std::uint32_t use[2] = {valid, valid};
            if constexpr (kMasked) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    std::uint32_t const bit = 1u << (2 * b + h);
                    std::uint32_t const word = allowed[b * kBlockRows + g + 8 * h];
                    if (seen & bit) {
                        use[h] = word;
                    } else if (word != 0) {  // what was summed so far was not allowed
                        use[h] = word;
                        seen |= bit;
                        highest[b][h] = -INFINITY;
                    }
                }
                if (!any_lane((use[0] | use[1]) != 0)) continue;
            }

            float logits[4][4] = {};  // of keys 8 j + {2t, 2t+1}, rows g and g + 8
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (kWords == 1) {
                    multiply<T>(logits[j], queries[0][0], queries[1][0], 0, 0, key_words[j][0], 0);
                } else {
#pragma unroll
                    for (int s = 0; s < kWords; s += 2) {
                        multiply<T>(
                            logits[j], queries[0][s], queries[1][s], queries[0][s + 1], queries[1][s + 1], key_words[j][s],
                            key_words[j][s + 1]);
                    }
                }
            }
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                std::uint32_t const mine = use[h] >> (2 * t);
                float largest = -INFINITY;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& logit = logits[j][2 * h + i];
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
                        float& logit = logits[j][2 * h + i];
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
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                std::uint32_t weights[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float const(&pair)[4] = logits[2 * s + i / 2];
                    weights[i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
                }
#pragma unroll
                for (int j = 0; j < kWords; ++j) {
                    std::uint32_t const(&column)[2] = value_words[s][j];
                    multiply<T>(sums[b][j], weights[0], weights[1], weights[2], weights[3], column[0], column[1]);
                }
            }
        }
    }

    int const channels = problem.heads * D;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        if (b >= blocks) break;
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
#pragma unroll 8
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
