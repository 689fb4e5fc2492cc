// Pillow's bilinear resize. Two passes over a photograph move some 10 MB: both are short next to their launches, so that
// neither is tiled in shared memory.
#include "common/check.h"
#include "preprocess/preprocess.h"

namespace d2_trt::preprocess {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kMostRows = 65535;  // of a grid; further rows are taken in turns

struct Horizontal {
    std::uint8_t const* pixels;  // (rows, width, channels)
    std::int64_t rows;
    std::int64_t width;
    bool reverse_channels;
    AxisTable table;
    std::uint8_t* out;  // (channels, rows, stride)
    std::int64_t stride;
};

struct Vertical {
    std::uint8_t const* planes;  // (planes, rows, stride), of which each row's first `width` bytes count
    std::int64_t rows;
    std::int64_t width;
    std::int64_t stride;
    AxisTable table;
    std::uint8_t* out;  // (planes, table.size, width)
};

// A thread makes one pixel of one row, and puts its channels into their planes.
template <int Channels>
__global__ void __launch_bounds__(kThreads) horizontal_pass(Horizontal args) {
    std::int64_t const column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (column >= args.table.size) return;
    for (std::int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
        std::uint8_t pixel[Channels];
        resample_row<Channels>(args.pixels + row * args.width * Channels, args.table, column, pixel);
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
            int const plane = args.reverse_channels ? Channels - 1 - c : c;
            args.out[(plane * args.rows + row) * args.stride + column] = pixel[c];
        }
    }
}

// A thread makes four neighbouring bytes of one row of one plane.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads) vertical_pass(Vertical args) {
    std::int64_t const column = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
    if (column >= args.width) return;
    std::int64_t const valid = args.width - column, height = args.table.size;
    std::uint8_t const* plane = args.planes + blockIdx.z * args.rows * args.stride;
    for (std::int64_t row = blockIdx.y; row < height; row += gridDim.y) {
        std::uint8_t four[4];
        resample_columns<Aligned>(plane, args.stride, args.table, row, column, valid, four);
        std::uint8_t* out = args.out + (blockIdx.z * height + row) * args.width + column;
        if (valid >= 4 && reinterpret_cast<std::uintptr_t>(out) % 4 == 0) {
            *reinterpret_cast<uchar4*>(out) = make_uchar4(four[0], four[1], four[2], four[3]);
        } else {
            for (int i = 0; i < 4 && i < valid; ++i) out[i] = four[i];
        }
    }
}

unsigned blocks(std::int64_t threads) {
    std::int64_t const count = (threads + kThreads - 1) / kThreads;
    require(count <= 0x7fffffff, "a row of ", threads, " threads is too long for a grid");
    return static_cast<unsigned>(count);
}

unsigned rows_of_grid(std::int64_t rows) { return static_cast<unsigned>(rows < kMostRows ? rows : kMostRows); }

void launch(Horizontal const& pass, int channels, cudaStream_t stream) {
    dim3 const grid(blocks(pass.table.size), rows_of_grid(pass.rows));
    if (channels == 3) {
        horizontal_pass<3><<<grid, kThreads, 0, stream>>>(pass);
    } else {
        horizontal_pass<1><<<grid, kThreads, 0, stream>>>(pass);
    }
    check_cuda(cudaGetLastError(), "horizontal pass of the resize");
}

void launch(Vertical const& pass, int planes, cudaStream_t stream) {
    dim3 const grid(blocks((pass.width + 3) / 4), rows_of_grid(pass.table.size), planes);
    if (reinterpret_cast<std::uintptr_t>(pass.planes) % 4 == 0 && pass.stride % 4 == 0) {
        vertical_pass<true><<<grid, kThreads, 0, stream>>>(pass);
    } else {
        vertical_pass<false><<<grid, kThreads, 0, stream>>>(pass);
    }
    check_cuda(cudaGetLastError(), "vertical pass of the resize");
}

}  // namespace

void resize_bilinear(ResizeArgs const& args, std::int64_t scratch_size, cudaStream_t stream) {
    std::int64_t const needed = scratch_bytes(args);
    auto const check = [](void const* pointer, std::size_t bytes, char const* name) {
        require_aligned(reinterpret_cast<std::uintptr_t>(pointer), bytes, name);
    };
    check(args.image, 1, "resize_bilinear: image");
    check(args.horizontal.rows, sizeof(std::int32_t), "resize_bilinear: horizontal");
    check(args.vertical.rows, sizeof(std::int32_t), "resize_bilinear: vertical");
    check(args.scratch, 4, "resize_bilinear: scratch");
    check(args.out, 1, "resize_bilinear: out");
    require(
        scratch_size >= needed, "resize_bilinear: scratch_size is ", scratch_size, "; expected at least ", needed, " bytes");

    if (args.vertical_first) {
        std::int64_t const row = args.width * args.channels;
        launch(Vertical{args.image, args.height, row, row, args.vertical, args.scratch}, 1, stream);
        launch(Horizontal{args.scratch, args.vertical.size, args.width, args.reverse_channels, args.horizontal, args.out,
                          args.horizontal.size},
               args.channels, stream);
    } else {
        std::int64_t const stride = scratch_stride(args.horizontal.size);
        launch(Horizontal{args.image, args.height, args.width, args.reverse_channels, args.horizontal, args.scratch,
                          stride},
               args.channels, stream);
        launch(Vertical{args.scratch, args.height, args.horizontal.size, stride, args.vertical, args.out},
               args.channels, stream);
    }
}

}  // namespace d2_trt::preprocess
