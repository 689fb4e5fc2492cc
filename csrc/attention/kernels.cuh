// The attention kernels, in terms of primitives.cuh alone: tests/native runs them on a CPU over emulated primitives.
//
// mask_kernel (mask.cuh) finds the keys that each query may attend to, 32 in a word. attention_kernel gives a block one
// head, up to 128 queries and a part of the keys, which it takes 32 at a time; a warp has 16 or 32 queries. combine_kernel
// adds up the parts. A sum over channels may take them in any order: lanes take neighbouring channels, 16 bytes an access,
// where the instruction's own order would need a transposition. Loops are rolled: a tile's code must stay in the
// instruction cache.
#pragma once

#include "attention/fragments.cuh"

namespace d2_trt {

constexpr int kStages = 4;  // tiles of keys and values that are on their way or in use
constexpr int kCombineThreads = 512;
constexpr float kLowest = -3.0e38f;  // below every logit, for powers of 2

struct AttentionProblem {
    void const* q;
    void const* k;
    void const* v;
    void const* q_pos;  // (Q, heads * D), rows pos_stride apart, added to the queries of every image; or null
    void const* k_pos;  // the same of the keys, where they are not masked; or null
    void* out;
    std::uint32_t const* allowed;  // (B, tiles, rows): a bit for each key of a tile that the query may attend to
    unsigned char const* some;     // (B, rows, some_stride): of tiles together, whether there is such a key
    float* partial;                // (B, Q, splits, heads * D): sums of the splits, not divided by their weights
    float2* stats;                 // (B, Q, splits, heads): largest logit and sum of weights of a split
    std::int32_t queries, rows, keys, heads;
    std::int32_t some_stride;  // a multiple of 16
    std::int64_t q_stride, k_stride, v_stride, pos_stride;
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
    static constexpr int kWarps = kMasked ? 4 : 8;
    static constexpr int kResident = !kMasked ? 1 : D == 64 ? 2 : 3;
};

template <typename T, int D, bool kMasked>
__global__ void __launch_bounds__(Shape<D, kMasked>::kWarps * 32, Shape<D, kMasked>::kResident)
    attention_kernel(__grid_constant__ AttentionProblem const problem) {
    using Layout = Tile<D>;
    constexpr int kBlocks = Shape<D, kMasked>::kBlocks;
    constexpr int kWarps = Shape<D, kMasked>::kWarps;
    constexpr int kWords = Layout::kWords;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const g = lane / 4, t = lane % 4;
    int const head = static_cast<int>(blockIdx.y) % problem.heads;
    int const group = static_cast<int>(blockIdx.y) / problem.heads;
    int const first_row = (group * kWarps + warp) * kBlocks * kBlockRows;  // the warp's
    int const rows = problem.queries - first_row;                          // none or less where a warp only copies
    std::int64_t const image = blockIdx.z;
    int const split = blockIdx.x;
    int const first_tile = split * problem.tiles_per_split;
    int const last_tile = first_tile + problem.tiles_per_split;
    int const end_tile = last_tile < problem.tiles ? last_tile : problem.tiles;

    // Each thread copies the same 16 bytes or so of every tile: of keys, then of values.
    constexpr int kPieces = 4 * D, kCopies = (2 * kPieces + kWarps * 32 - 1) / (kWarps * 32);  // a row has D / 8 pieces
    static_assert(2 * kPieces % (kWarps * 32) == 0 || kCopies == 1, "all threads copy alike");
    unsigned char const* from[kCopies];
    int to[kCopies], row[kCopies];
    std::int64_t step[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
        int const piece = i * kWarps * 32 + static_cast<int>(threadIdx.x);
        bool const value = piece >= kPieces;
        std::int64_t const stride = 2 * (value ? problem.v_stride : problem.k_stride);
        row[i] = piece < 2 * kPieces ? piece % kPieces / (D / 8) : problem.keys;
        int const column = piece % (D / 8) * 16;
        to[i] = value ? kTileKeys * Layout::kKPitch + row[i] * Layout::kVPitch : row[i] * Layout::kKPitch;
        to[i] += column;
        std::int64_t const first = image * problem.keys + static_cast<std::int64_t>(first_tile) * kTileKeys + row[i];
        from[i] = static_cast<unsigned char const*>(value ? problem.v : problem.k) + first * stride + 2 * head * D + column;
        step[i] = kTileKeys * stride;
    }
    auto const copy_tile = [&](int tile) {
        if (tile < end_tile) {
            unsigned char* const stage = shared_memory() + tile % kStages * Layout::kBytes;
            int const left = problem.keys - tile * kTileKeys;
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                if (2 * kPieces >= kWarps * 32 || threadIdx.x < 2 * kPieces) {
                    copy_async(stage + to[i], from[i], row[i] >= left);
                }
                from[i] += step[i];
            }
        }
        end_copies();
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) copy_tile(first_tile + i);

    std::uint32_t queries[kBlocks][2][kWords];  // rows g and g + 8 of each block
    auto const* const q = static_cast<unsigned char const*>(problem.q) +
                          2 * ((image * problem.queries + first_row + g) * problem.q_stride + head * D) + 4 * kWords * t;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) load_words(queries[i / 2][i % 2], q + 16 * i * problem.q_stride, 8 * i + g < rows);
    int const own = 2 * head * D + 4 * kWords * t;  // bytes before a lane's channels of a row
    if (problem.q_pos != nullptr) {
        auto const* const pos =
            static_cast<unsigned char const*>(problem.q_pos) + 2 * (first_row + g) * problem.pos_stride + own;
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
            std::uint32_t words[kWords];
            load_words(words, pos + 16 * i * problem.pos_stride, 8 * i + g < rows);
            add_words<T>(queries[i / 2][i % 2], words);
        }
    }
    auto const* const k_pos = static_cast<unsigned char const*>(problem.k_pos) + 2 * g * problem.pos_stride + own;

    // Of the same rows: keys of the next tile that they may attend to, and whether they may attend to all, for want of any.
    std::uint32_t next[kBlocks][2] = {};
    std::uint32_t free_rows = 0;
    std::uint32_t const* allowed = nullptr;
    auto const fetch = [&] {
        if (rows <= 0) return;
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) next[i / 2][i % 2] = load(allowed + 8 * i);
        allowed += problem.rows;
    };
    if constexpr (kMasked) {
        static_assert(kBlocks * kBlockRows == 32, "a lane for each row");
        allowed = problem.allowed + (image * problem.tiles + first_tile) * problem.rows + first_row + g;
        fetch();
        uint4 any = {0, 0, 0, 0};
        if (lane < rows) {
            std::int64_t const at = (image * problem.rows + first_row + lane) * problem.some_stride;
            auto const* const some = reinterpret_cast<uint4 const*>(problem.some + at);
#pragma unroll 4
            for (int i = 0; i < problem.some_stride / 16; ++i) {
                uint4 const part = load(some + i);
                any.x |= part.x, any.y |= part.y, any.z |= part.z, any.w |= part.w;
            }
        }
        free_rows = ballot(lane < rows && (any.x | any.y | any.z | any.w) == 0) >> g;
    }
    // Sums of values, largest logit so far, sum of weights (a lane's own keys).
    float sums[kBlocks][kWords][4] = {};
    float highest[kBlocks][2], total[kBlocks][2] = {};
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) highest[i / 2][i % 2] = kLowest;

#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; ++tile) {
        int const left = problem.keys - tile * kTileKeys;
        std::uint32_t const valid = left >= kTileKeys ? 0xffffffffu : (1u << left) - 1u;
        [[maybe_unused]] std::uint32_t positions[4][kWords];  // of key 8 j + g, as `words` below
        if constexpr (!kMasked) {
            if (problem.k_pos != nullptr) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    int const key = tile * kTileKeys + 8 * j;
                    load_words(positions[j], k_pos + 2 * key * problem.pos_stride, key + g < problem.keys);
                }
            }
        }
        wait_copies<kStages - 2>();
        sync_block();  // the tile is there, and nobody reads the one before
        copy_tile(tile + kStages - 1);

        std::uint32_t use[kBlocks][2];
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
            use[i / 2][i % 2] = !kMasked || (free_rows & 1u << 8 * i) ? valid : next[i / 2][i % 2];
        }
        if constexpr (kMasked) {
            if (tile + 1 < end_tile) fetch();
            if (!any_lane((use[0][0] | use[0][1] | use[1][0] | use[1][1]) != 0)) continue;
        } else if (rows <= 0) {
            continue;
        }

        unsigned char const* const keys = shared_memory() + tile % kStages * Layout::kBytes;
        unsigned char const* const values = keys + kTileKeys * Layout::kKPitch;
        float logits[kBlocks][4][4] = {};  // of keys 8 j + {2t, 2t+1}, rows g and g + 8
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            std::uint32_t words[kWords];  // key 8 j + g, channels 2 kWords t and on
            read_words(words, keys + (8 * j + g) * Layout::kKPitch + 4 * kWords * t);
            if constexpr (!kMasked) {
                if (problem.k_pos != nullptr) add_words<T>(words, positions[j]);
            }
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
                float* const to = problem.partial + slot * channels + channel;
                if constexpr (kWords == 1) {
                    *reinterpret_cast<float2*>(to) = {mine[0], mine[1]};
                } else {
#pragma unroll
                    for (int i = 0; i < 2 * kWords; i += 4) {
                        *reinterpret_cast<float4*>(to + i) = {mine[i], mine[i + 1], mine[i + 2], mine[i + 3]};
                    }
                }
                if (t == 0) problem.stats[slot * problem.heads + head] = {highest[b][h], weights};
            }
        }
    }
}

// One query of one image and `head_count` heads: the splits' sums together.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(__grid_constant__ AttentionProblem const problem, int dim, int head_count) {
    constexpr int kAhead = 6;  // sums that a thread loads before it knows what they are worth
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const splits = problem.splits;
    auto* const sums = reinterpret_cast<float4*>(shared_memory());           // one a thread
    auto* const factors = reinterpret_cast<float*>(sums + kCombineThreads);  // (head_count, splits)
    auto* const divisors = factors + head_count * splits;                    // (head_count)
    std::int64_t const row = static_cast<std::int64_t>(blockIdx.z) * problem.queries + blockIdx.x;
    int const first_head = blockIdx.y * head_count;
    int const channels = problem.heads * dim;
    int const columns = head_count * dim / 4;
    int const workers = kCombineThreads / columns;  // of a column of four channels
    int const column = threadIdx.x % columns, worker = threadIdx.x / columns;
    int const head = column * 4 / dim;
    auto const* from =
        reinterpret_cast<float4 const*>(problem.partial + row * splits * channels + first_head * dim) + column;
    bool const works = worker < workers;
    std::int64_t const step = static_cast<std::int64_t>(workers) * (channels / 4);
    from += static_cast<std::int64_t>(worker) * (channels / 4);
    float4 ahead[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i, from += step) {
        if (works && worker + i * workers < splits) ahead[i] = load(from);
    }
    if (warp < head_count) {
        float2 const* const stats = problem.stats + row * splits * problem.heads + first_head + warp;
        float highest = kLowest, weights = 0.f;  // of the lane's splits
#pragma unroll 1
        for (int s = lane; s < splits; s += 32) {
            float2 const stat = load(stats + static_cast<std::int64_t>(s) * problem.heads);
            float const now = fmaxf(highest, stat.x);
            weights = weights * exp2_fast(highest - now) + stat.y * exp2_fast(stat.x - now);
            highest = now;
        }
        float all = highest;
#pragma unroll
        for (int o = 16; o > 0; o /= 2) all = fmaxf(all, shuffle_xor(all, o));
        weights *= exp2_fast(highest - all);
#pragma unroll 1
        for (int s = lane; s < splits; s += 32) {
            factors[warp * splits + s] = exp2_fast(load(stats + static_cast<std::int64_t>(s) * problem.heads).x - all);
        }
#pragma unroll
        for (int o = 16; o > 0; o /= 2) weights += shuffle_xor(weights, o);
        if (lane == 0) divisors[warp] = weights;
    }
    sync_block();
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    auto const add = [&](float factor, float4 const& part) {
        sum.x = fmaf(factor, part.x, sum.x);
        sum.y = fmaf(factor, part.y, sum.y);
        sum.z = fmaf(factor, part.z, sum.z);
        sum.w = fmaf(factor, part.w, sum.w);
    };
    if (works) {
        float const* factor = factors + head * splits + worker;
#pragma unroll
        for (int i = 0; i < kAhead; ++i, factor += workers) {
            if (worker + i * workers < splits) add(*factor, ahead[i]);
        }
#pragma unroll 1
        for (int s = worker + kAhead * workers; s < splits; s += workers, factor += workers, from += step) {
            add(*factor, load(from));
        }
        sums[threadIdx.x] = sum;
    }
    sync_block();
    if (worker != 0) return;
#pragma unroll 1
    for (int i = 1; i < workers; ++i) add(1.f, sums[i * columns + column]);
    float const divided = 1.f / divisors[head];
    auto* const to =
        static_cast<unsigned char*>(problem.out) + 2 * (row * channels + first_head * dim + 4 * column);
    *reinterpret_cast<uint2*>(to) = {
        pack<T>(sum.x * divided, sum.y * divided), pack<T>(sum.z * divided, sum.w * divided)};
}

}  // namespace d2_trt
