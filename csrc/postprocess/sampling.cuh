// A mask logit at a pixel of the output: the release's two bilinear steps, taken for one pixel in registers.
//
// The steps are those of F.interpolate(mode="bilinear", align_corners=False): from the mask to the padded image, and,
// cropped to the image, from there to the output. Every product and sum is rounded where PyTorch's CUDA kernel rounds
// it (its compiler contracts x*y + z*w to fma(x, y, z*w)), so that the results are PyTorch's bit for bit; they are
// spelled as fma here lest another compiler contracts them otherwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

namespace d2_trt::postprocess {

// Sizes in pixels. A step between equal sizes is the identity, as in postprocessing.py.
struct Geometry {
    int mask_h, mask_w;
    int image_h, image_w;  // of the image, without padding
    int out_h, out_w;
    float to_padded_y, to_padded_x;  // mask size / padded size, in float as PyTorch divides
    float to_out_y, to_out_x;        // image size / output size
    bool pads;                       // whether the first step changes the size
    bool resizes;                    // whether the second does
};

inline Geometry make_geometry(int mask_h, int mask_w, int padded_h, int padded_w, int image_h, int image_w, int out_h,
                              int out_w) {
    Geometry g{mask_h, mask_w, image_h, image_w, out_h, out_w, 1.0f, 1.0f, 1.0f, 1.0f, false, false};
    g.to_padded_y = static_cast<float>(mask_h) / static_cast<float>(padded_h);
    g.to_padded_x = static_cast<float>(mask_w) / static_cast<float>(padded_w);
    g.to_out_y = static_cast<float>(image_h) / static_cast<float>(out_h);
    g.to_out_x = static_cast<float>(image_w) / static_cast<float>(out_w);
    g.pads = mask_h != padded_h || mask_w != padded_w;
    g.resizes = image_h != out_h || image_w != out_w;
    return g;
}

__host__ __device__ inline float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return std::fmaf(a, b, c);
#endif
}

__host__ __device__ inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);  // never contracted
#else
    return a * b;
#endif
}

// (1 - weight) * a + weight * b
__host__ __device__ inline float blend(float a, float b, float weight) {
    return fused_multiply_add(1.0f - weight, a, product(weight, b));
}

// As 1 / (1 + exp(-x)), whose division is rounded to nearest too.
__host__ __device__ inline float sigmoid(float x) {
#ifdef __CUDA_ARCH__
    return __frcp_rn(1.0f + expf(-x));
#else
    return 1.0f / (1.0f + std::exp(-x));
#endif
}

// Where a pixel reads along one axis: two places of the cropped image, each of two places of the mask.
struct AxisTaps {
    int at[4];       // places in the mask: of the first place of the image, then of the second
    float inner[2];  // weight of the later of two places in the mask
    float outer;     // weight of the second place in the image
};

struct Interval {
    int first, second;
    float weight;
};

__host__ __device__ inline Interval interval(int position, float scale, int length) {
    float source = fused_multiply_add(scale, static_cast<float>(position) + 0.5f, -0.5f);
    source = source < 0.0f ? 0.0f : source;
    int first = static_cast<int>(source);
    float weight = source - static_cast<float>(first);
    // Rounding must not lead outside, however large the sizes.
    if (first > length - 1) first = length - 1;
    return {first, first + (first < length - 1 ? 1 : 0), weight};
}

template <bool kPads, bool kResizes>
__host__ __device__ inline AxisTaps axis_taps(int position, int mask_length, float to_padded, int image_length,
                                              float to_out) {
    AxisTaps taps{};
    int place[2] = {position, position};
    if (kResizes) {
        Interval outer = interval(position, to_out, image_length);
        place[0] = outer.first;
        place[1] = outer.second;
        taps.outer = outer.weight;
    }
    for (int i = 0; i < 2; ++i) {
        if (kPads) {
            Interval inner = interval(place[i], to_padded, mask_length);
            taps.at[2 * i] = inner.first;
            taps.at[2 * i + 1] = inner.second;
            taps.inner[i] = inner.weight;
        } else {
            taps.at[2 * i] = taps.at[2 * i + 1] = place[i];
        }
    }
    return taps;
}

template <bool kPads, bool kResizes>
__host__ __device__ inline AxisTaps row_taps(Geometry const& g, int y) {
    return axis_taps<kPads, kResizes>(y, g.mask_h, g.to_padded_y, g.image_h, g.to_out_y);
}

template <bool kPads, bool kResizes>
__host__ __device__ inline AxisTaps column_taps(Geometry const& g, int x) {
    return axis_taps<kPads, kResizes>(x, g.mask_w, g.to_padded_x, g.image_w, g.to_out_x);
}

// Turns the places of rows into offsets of their first elements.
__host__ __device__ inline void scale_places(AxisTaps& rows, int mask_w) {
    for (int& place : rows.at) place *= mask_w;
}

__host__ __device__ inline float load_float(float const* p) { return *p; }
__host__ __device__ inline float load_float(__half const* p) { return __half2float(*p); }
__host__ __device__ inline float load_float(__nv_bfloat16 const* p) { return __bfloat162float(*p); }

// Value of the padded image at place i of the rows and place j of the columns.
template <bool kPads, typename T>
__host__ __device__ inline float sample_padded(T const* __restrict__ plane, AxisTaps const& rows, AxisTaps const& columns,
                                               int i, int j) {
    T const* row0 = plane + rows.at[2 * i];
    int x0 = columns.at[2 * j];
    if (!kPads) return load_float(row0 + x0);
    T const* row1 = plane + rows.at[2 * i + 1];
    int x1 = columns.at[2 * j + 1];
    float top = blend(load_float(row0 + x0), load_float(row0 + x1), columns.inner[j]);
    float bottom = blend(load_float(row1 + x0), load_float(row1 + x1), columns.inner[j]);
    return blend(top, bottom, rows.inner[i]);
}

// The logit of one mask (mask_h, mask_w) at a pixel, given its taps; `rows` after scale_places.
template <bool kPads, bool kResizes, typename T>
__host__ __device__ inline float sample(T const* __restrict__ plane, AxisTaps const& rows, AxisTaps const& columns) {
    float value = sample_padded<kPads>(plane, rows, columns, 0, 0);
    if (!kResizes) return value;
    float right = sample_padded<kPads>(plane, rows, columns, 0, 1);
    float below = sample_padded<kPads>(plane, rows, columns, 1, 0);
    float across = sample_padded<kPads>(plane, rows, columns, 1, 1);
    return blend(blend(value, right, columns.outer), blend(below, across, columns.outer), rows.outer);
}

// Rows of a mask that a few consecutive rows of the output read, if they are few: those of an enlarged mask are. All are
// read at once, so that no read waits for another, and each once for all rows of the output. kSpan: how many.
template <int kSpan>
struct RowWindow {
    int first;  // place of the first row, after scale_places
    int step;   // to the next row
    int last;   // place of the mask's last row

    // Turns the places in `rows` (count, all after scale_places) into places in the window. False, and `rows` as they
    // were, where they do not fit.
    template <bool kPads>
    __host__ __device__ bool fit(AxisTaps* rows, int count, int mask_h, int mask_w) {
        first = rows[0].at[0];
        step = mask_w;
        last = (mask_h - 1) * mask_w;
        for (int r = 0; r < count; ++r) {
            for (int i = 0; i < 4; i += 2) {
                int const place = (rows[r].at[i] - first) / step;
                if (place < 0 || place > kSpan - (kPads ? 2 : 1)) return false;
            }
        }
        for (int r = 0; r < count; ++r) {
            for (int i = 0; i < 4; i += 2) rows[r].at[i] = (rows[r].at[i] - first) / step;
        }
        return true;
    }
};

// One mask along a column of output pixels, for rows that fit a window.
template <typename T, bool kPads, bool kResizes, int kSpan>
class ColumnSampler {
public:
    // `plane` is one mask (mask_h, mask_w).
    __host__ __device__ ColumnSampler(T const* __restrict__ plane, AxisTaps const& columns, RowWindow<kSpan> const& window)
        : columns_(columns) {
        T raw[kSpan][kTaps];
#pragma unroll
        for (int k = 0; k < kSpan; ++k) {
            int const place = window.first + k * window.step;
            T const* row = plane + (place < window.last ? place : window.last);
#pragma unroll
            for (int j = 0; j < kTaps; ++j) raw[k][j] = row[columns.at[kPads ? j : 2 * j]];
        }
#pragma unroll
        for (int k = 0; k < kSpan; ++k) {
#pragma unroll
            for (int j = 0; j < kPlaces; ++j) {
                rows_[k][j] = kPads ? blend(load_float(&raw[k][2 * j]), load_float(&raw[k][2 * j + 1]), columns.inner[j])
                                    : load_float(&raw[k][j]);
            }
        }
    }

    // The logit at a row of the output, given its taps after RowWindow::fit.
    __host__ __device__ float at(AxisTaps const& rows) const {
        float place[2][2];
#pragma unroll
        for (int i = 0; i < kPlaces; ++i) {
#pragma unroll
            for (int j = 0; j < kPlaces; ++j) {
                // Beyond the mask's last row the window repeats it, as the taps do.
                float const above = pick(rows.at[2 * i], rows_[0][j], rows_[1][j], rows_[2][j], rows_[kSpan - 1][j]);
                float const below = pick(rows.at[2 * i], rows_[1][j], rows_[2][j], rows_[kSpan - 1][j], 0.0f);
                place[i][j] = kPads ? blend(above, below, rows.inner[i]) : above;
            }
        }
        if (!kResizes) return place[0][0];
        return blend(blend(place[0][0], place[0][1], columns_.outer), blend(place[1][0], place[1][1], columns_.outer), rows.outer);
    }

private:
    static_assert(kSpan == 3 || kSpan == 4);
    // By value: an index into an array would put it into memory.
    __host__ __device__ static float pick(int which, float x0, float x1, float x2, float x3) {
        float const early = which == 0 ? x0 : x1, late = which == 2 ? x2 : x3;
        return which < 2 ? early : late;
    }

    static constexpr int kPlaces = kResizes ? 2 : 1;           // of the padded image, along an axis
    static constexpr int kTaps = kPads ? 2 * kPlaces : kPlaces;  // of the mask

    AxisTaps const& columns_;
    float rows_[kSpan][kPlaces];
};

}  // namespace d2_trt::postprocess
