// The kernel of csrc/window_attention on a CPU: tests/mask2former/test_window_attention.py compiles and calls this.
#include <math.h>

#include <algorithm>

#include "emulation.h"

#include "window_attention/kernel.cuh"

namespace {

using namespace d2_trt;

template <typename T, int D, int kSteps>
void run(WindowAttentionProblem const& p, int batch, bool backwards) {
    Index const grid{batch * p.rows * p.columns * p.heads, 1, 1};
    int const warps = (p.window * p.window + 15) / 16;
    std::size_t const bytes = WindowTile<D, kSteps>::bytes(p.window);
    emulation::run(grid, warps * 32, bytes, backwards, [&] { window_attention_block<T, D, kSteps>(p); });
}

template <typename T>
void run_sizes(WindowAttentionProblem const& p, int dim, int batch, bool backwards) {
    if (p.window <= 8) {
        dim == 16 ? run<T, 16, 4>(p, batch, backwards) : run<T, 32, 4>(p, batch, backwards);
    } else {
        dim == 16 ? run<T, 16, 9>(p, batch, backwards) : run<T, 32, 9>(p, batch, backwards);
    }
}

}  // namespace

extern "C" void emulate_window_attention(
    void const* qkv, float const* qkv_bias, float const* bias, void* out, std::int32_t const* sizes, float scale,
    int bfloat16) {
    WindowAttentionProblem p{};
    p.qkv = qkv, p.qkv_bias = qkv_bias, p.bias = bias, p.out = out;
    int const batch = sizes[0], dim = sizes[4];
    p.height = sizes[1], p.width = sizes[2], p.heads = sizes[3], p.window = sizes[5], p.shift = sizes[6];
    p.rows = (p.height + p.window - 1) / p.window, p.columns = (p.width + p.window - 1) / p.window;
    p.scale = scale * kLog2E;
    if (bfloat16) {
        run_sizes<BFloat16>(p, dim, batch, sizes[7] != 0);
    } else {
        run_sizes<Half>(p, dim, batch, sizes[7] != 0);
    }
}
