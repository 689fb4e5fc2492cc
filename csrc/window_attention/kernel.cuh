// The kernel of Swin's window attention, in terms of attention/primitives.cuh alone: tests/native runs it on a CPU over
// emulated primitives.
//
// A block has one head of one window, a warp for each 16 of its queries. The window is cut out of the map, the map shifted and
// padded by address arithmetic alone. Keys and values go through shared memory; logits never leave the registers.
#pragma once

#ifndef D2_TRT_EMULATED
#include "attention/primitives.cuh"
#endif

namespace d2_trt {

struct WindowAttentionProblem {
    void const* qkv;        // (B, H, W, 3, heads, D)
    float const* qkv_bias;  // (3, heads, D): what a pixel of the padding has
    float const* bias;      // (heads, 2 * window - 1, 2 * window - 1), by relative position
    void* out;              // (B, H, W, heads, D)
    std::int32_t height, width, heads;
    std::int32_t window, shift;
    std::int32_t rows, columns;  // of windows
    float scale;                 // of the logits, for powers of 2: log2(e) times the model's
};

constexpr float kLog2E = 1.44269504088896340736F;
// What the model adds to logits between regions that only the cyclic shift brought together.
constexpr float kApart = -100.0F * kLog2E;

// Layout of the shared memory: keys, values, position of each pixel in the map, its offset in the bias, its region, the bias.
template <int D, int kSteps>
struct WindowTile {
    static constexpr int kPixels = kSteps * 16;
    static constexpr int kPitch = D * 2 + 16;  // rows are shifted by four banks each
    static constexpr int kValues = kPixels * kPitch;
    static constexpr int kPositions = 2 * kValues;
    static constexpr int kOffsets = kPositions + kPixels * 4;
    static constexpr int kRegions = kOffsets + kPixels * 4;
    static constexpr int kBias = kRegions + kPixels * 4;
    static __host__ __device__ int bytes(int window) { return kBias + (2 * window - 1) * (2 * window - 1) * 4; }
};

// One of the two sides of the shifted, padded map in three regions: before the last windows, in them before the shift, after.
__device__ __forceinline__ int region_of(int position, int size, int window, int shift) {
    return (position >= size - window) + (position >= size - shift);
}

// Eight channels of a pixel, or of the padding.
template <typename T>
__device__ __forceinline__ uint4 load_channels(void const* base, std::int64_t at, float const* bias, int channel) {
    if (at >= 0) return load(static_cast<uint4 const*>(base) + (at + channel) / 8);
    float const* const b = bias + channel;
    return uint4{
        pack<T>(load(b), load(b + 1)), pack<T>(load(b + 2), load(b + 3)), pack<T>(load(b + 4), load(b + 5)),
        pack<T>(load(b + 6), load(b + 7))};
}

template <typename T, int D, int kSteps>
__device__ void window_attention_block(WindowAttentionProblem const& p) {
    using Tile = WindowTile<D, kSteps>;
    unsigned char* const shared = shared_memory();
    auto* const positions = reinterpret_cast<std::int32_t*>(shared + Tile::kPositions);
    auto* const offsets = reinterpret_cast<std::int32_t*>(shared + Tile::kOffsets);
    auto* const regions = reinterpret_cast<std::int32_t*>(shared + Tile::kRegions);
    auto* const bias = reinterpret_cast<float*>(shared + Tile::kBias);

    int const thread = threadIdx.x, threads = blockDim.x;
    // Heads of a window one after another: they share lines of memory.
    int const head = static_cast<int>(blockIdx.x) % p.heads, window = static_cast<int>(blockIdx.x) / p.heads;
    int const image = window / (p.rows * p.columns), in_image = window % (p.rows * p.columns);
    int const first_row = in_image / p.columns * p.window, first_column = in_image % p.columns * p.window;
    int const pixels = p.window * p.window, span = 2 * p.window - 1;
    int const channels = p.heads * D;

    for (int i = thread; i < Tile::kPixels; i += threads) {
        int const row = i / p.window, column = i % p.window;
        int const y = first_row + row, x = first_column + column;  // in the shifted map
        int const size_y = p.rows * p.window, size_x = p.columns * p.window;
        int const from_y = y + p.shift < size_y ? y + p.shift : y + p.shift - size_y;
        int const from_x = x + p.shift < size_x ? x + p.shift : x + p.shift - size_x;
        bool const inside = i < pixels && from_y < p.height && from_x < p.width;
        positions[i] = inside ? from_y * p.width + from_x : -1;
        offsets[i] = row * span + column;
        regions[i] = region_of(y, size_y, p.window, p.shift) * 3 + region_of(x, size_x, p.window, p.shift);
    }
    for (int i = thread; i < span * span; i += threads) bias[i] = load(p.bias + head * span * span + i) * kLog2E;
    sync_block();

    std::int64_t const base = static_cast<std::int64_t>(image) * p.height * p.width;
    constexpr int kChunks = D / 8;
    for (int i = thread; i < 2 * Tile::kPixels * kChunks; i += threads) {
        int const pixel = i / kChunks % Tile::kPixels, chunk = i % kChunks, which = i / (Tile::kPixels * kChunks);
        uint4 words{0, 0, 0, 0};
        if (pixel < pixels) {
            int const channel = (1 + which) * channels + head * D + chunk * 8;
            std::int64_t const at = positions[pixel] < 0 ? -1 : (base + positions[pixel]) * 3 * channels;
            words = load_channels<T>(p.qkv, at, p.qkv_bias, channel);
        }
        *reinterpret_cast<uint4*>(shared + which * Tile::kValues + pixel * Tile::kPitch + chunk * 16) = words;
    }

    // Of the lane: rows g and g + 8 of the warp's queries, and columns 2t and 2t + 1 of every eight.
    int const lane = thread % 32, g = lane >> 2, t = lane & 3;
    int const query[2] = {thread / 32 * 16 + g, thread / 32 * 16 + g + 8};
    std::int32_t at[2];
    std::uint32_t q[2][D / 16][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        at[r] = positions[query[r]];
        // Queries of the padding have no result.
        std::int64_t const start = (base + (at[r] < 0 ? 0 : at[r])) * 3 * channels + head * D;
        auto const* const from = static_cast<std::uint32_t const*>(p.qkv) + start / 2;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            q[r][k][0] = at[r] < 0 ? 0 : load(from + k * 8 + t);
            q[r][k][1] = at[r] < 0 ? 0 : load(from + k * 8 + 4 + t);
        }
    }
    sync_block();

    float logits[2 * kSteps][4];
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
        float sum[4] = {0.0F, 0.0F, 0.0F, 0.0F};
        auto const* const key = reinterpret_cast<std::uint32_t const*>(shared + (n * 8 + g) * Tile::kPitch);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            multiply<T>(sum, q[0][k][0], q[1][k][0], q[0][k][1], q[1][k][1], key[k * 8 + t], key[k * 8 + 4 + t]);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            int const column = n * 8 + 2 * t + c;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float logit = -INFINITY;
                if (column < pixels && query[r] < pixels) {
                    int const centre = (p.window - 1) * (span + 1);
                    logit = fmaf(sum[2 * r + c], p.scale, bias[offsets[query[r]] - offsets[column] + centre]);
                    if (p.shift > 0 && regions[query[r]] != regions[column]) logit += kApart;
                }
                logits[n][2 * r + c] = logit;
                largest[r] = fmaxf(largest[r], logit);
            }
        }
    }
    float total[2] = {0.0F, 0.0F};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        for (int lanes = 1; lanes < 4; lanes *= 2) largest[r] = fmaxf(largest[r], shuffle_xor(largest[r], lanes));
        if (largest[r] == -INFINITY) largest[r] = 0.0F;  // a row beyond the window
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float const weight = exp2_fast(logits[n][2 * r + c] - largest[r]);
                logits[n][2 * r + c] = weight;
                total[r] += weight;
            }
        }
        for (int lanes = 1; lanes < 4; lanes *= 2) total[r] += shuffle_xor(total[r], lanes);
    }

    float out[D / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        std::uint32_t const a0 = pack<T>(logits[2 * k][0], logits[2 * k][1]);
        std::uint32_t const a1 = pack<T>(logits[2 * k][2], logits[2 * k][3]);
        std::uint32_t const a2 = pack<T>(logits[2 * k + 1][0], logits[2 * k + 1][1]);
        std::uint32_t const a3 = pack<T>(logits[2 * k + 1][2], logits[2 * k + 1][3]);
        unsigned char const* const rows = shared + Tile::kValues + (k * 16 + 2 * t) * Tile::kPitch;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            unsigned char const* const from = rows + (n * 8 + g) / 2 * 4;
            auto const word = [&](int row) { return *reinterpret_cast<std::uint32_t const*>(from + row * Tile::kPitch); };
            std::uint32_t const b0 = halves(word(0), word(1), g & 1);
            std::uint32_t const b1 = halves(word(8), word(9), g & 1);
            multiply<T>(out[n], a0, a1, a2, a3, b0, b1);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (at[r] < 0) continue;
        float const share = 1.0F / total[r];
        std::int64_t const start = (base + at[r]) * channels + head * D;
        auto* const to = static_cast<std::uint32_t*>(p.out) + start / 2;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) to[n * 4 + t] = pack<T>(out[n][2 * r] * share, out[n][2 * r + 1] * share);
    }
}

}  // namespace d2_trt
