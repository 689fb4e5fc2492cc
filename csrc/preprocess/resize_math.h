// Pillow's 8-bit resampling arithmetic (src/libImaging/Resample.c), pixel by pixel; no CUDA needed to read or test it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define D2_TRT_BOTH __host__ __device__ inline
#else
#define D2_TRT_BOTH inline
#endif

namespace d2_trt::preprocess {

// Weights are fixed-point numbers with this many bits after the point: 32, less 8 of a pixel and 2 of headroom.
constexpr int kPrecisionBits = 32 - 8 - 2;
// A sum starts at a half, so that the shift at its end rounds.
constexpr std::int32_t kHalf = 1 << (kPrecisionBits - 1);

// One axis' table, int32, made by mask2former/data/gpu_resize.py: for each output place, rows of `size` numbers:
// the first pixel that it reads, how many it reads, then the weight of each.
struct AxisTable {
    std::int32_t const* rows;
    std::int64_t size;  // of the output, along this axis
};

D2_TRT_BOTH std::int32_t first_pixel(AxisTable const& table, std::int64_t place) { return table.rows[place]; }

D2_TRT_BOTH std::int32_t pixel_count(AxisTable const& table, std::int64_t place) {
    return table.rows[table.size + place];
}

D2_TRT_BOTH std::int32_t weight(AxisTable const& table, std::int64_t place, int tap) {
    return table.rows[(2 + tap) * table.size + place];
}

// Bilinear weights are not negative and sum to 2^22 within a few units, so that no sum leaves 0 .. 2^31.
D2_TRT_BOTH std::uint8_t to_byte(std::int32_t sum) {
    std::int32_t value = sum >> kPrecisionBits;
    return static_cast<std::uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// One pixel of an output row, for all channels, from a row of interleaved pixels.
template <int Channels>
D2_TRT_BOTH void resample_row(std::uint8_t const* row, AxisTable const& table, std::int64_t column,
                              std::uint8_t (&result)[Channels]) {
    std::uint8_t const* pixel = row + static_cast<std::int64_t>(first_pixel(table, column)) * Channels;
    int const count = pixel_count(table, column);
    std::int32_t sums[Channels];
    for (int c = 0; c < Channels; ++c) sums[c] = kHalf;
    for (int tap = 0; tap < count; ++tap, pixel += Channels) {
        std::int32_t const w = weight(table, column, tap);
        for (int c = 0; c < Channels; ++c) sums[c] += pixel[c] * w;
    }
    for (int c = 0; c < Channels; ++c) result[c] = to_byte(sums[c]);
}

// Four neighbouring bytes, the first in the lowest bits. Aligned ones are read at once, and may then lie beyond the
// row's end as long as its stride holds them; of others, `valid` are read.
template <bool Aligned>
D2_TRT_BOTH std::uint32_t four_bytes(std::uint8_t const* bytes, std::int64_t valid) {
    if constexpr (Aligned) return *reinterpret_cast<std::uint32_t const*>(bytes);
    std::uint32_t four = 0;
    for (int i = 0; i < 4 && i < valid; ++i) four |= static_cast<std::uint32_t>(bytes[i]) << (8 * i);
    return four;
}

// Four neighbouring bytes of an output row, each from its column of a plane (rows `stride` apart).
template <bool Aligned>
D2_TRT_BOTH void resample_columns(std::uint8_t const* plane, std::int64_t stride, AxisTable const& table,
                                  std::int64_t row, std::int64_t column, std::int64_t valid,
                                  std::uint8_t (&result)[4]) {
    std::uint8_t const* bytes = plane + first_pixel(table, row) * stride + column;
    int const count = pixel_count(table, row);
    std::int32_t sums[4] = {kHalf, kHalf, kHalf, kHalf};
    for (int tap = 0; tap < count; ++tap, bytes += stride) {
        std::int32_t const w = weight(table, row, tap);
        std::uint32_t const four = four_bytes<Aligned>(bytes, valid);
        for (int i = 0; i < 4; ++i) sums[i] += static_cast<std::int32_t>((four >> (8 * i)) & 0xff) * w;
    }
    for (int i = 0; i < 4; ++i) result[i] = to_byte(sums[i]);
}

}  // namespace d2_trt::preprocess

#undef D2_TRT_BOTH
