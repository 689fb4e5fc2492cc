#include "window_attention/window_attention.h"

#include <algorithm>

#include "attention/launch.cuh"
#include "window_attention/kernel.cuh"

namespace d2_trt {
namespace {

template <typename T, int D, int kSteps>
__global__ void __launch_bounds__(kSteps * 32) window_attention_kernel(WindowAttentionProblem const p) {
    window_attention_block<T, D, kSteps>(p);
}

template <typename T, int D, int kSteps>
void launch(WindowAttentionProblem const& p, std::int64_t windows, cudaStream_t stream) {
    unsigned const grid = static_cast<unsigned>(windows * p.heads);
    int const warps = (p.window * p.window + 15) / 16;
    std::size_t const bytes = WindowTile<D, kSteps>::bytes(p.window);
    window_attention_kernel<T, D, kSteps><<<grid, warps * 32, bytes, stream>>>(p);
}

template <typename T, int D>
void launch_for_window(WindowAttentionProblem const& p, std::int64_t windows, cudaStream_t stream) {
    if (p.window <= 8) {
        launch<T, D, 4>(p, windows, stream);
    } else {
        launch<T, D, 9>(p, windows, stream);
    }
}

template <typename T>
void launch_for_dim(WindowAttentionProblem const& p, std::int64_t dim, std::int64_t windows, cudaStream_t stream) {
    if (dim == 16) {
        launch_for_window<T, 16>(p, windows, stream);
    } else {
        launch_for_window<T, 32>(p, windows, stream);
    }
}

}  // namespace

void window_attention(
    WindowAttentionTensors const& t, WindowAttentionSizes const& s, float scale, cudaStream_t stream) {
    require(
        t.type != DType::kFloat32, "window_attention: qkv is float32; expected float16 or bfloat16");
    require(
        window_attention_takes(s.window, s.dim), "window_attention: windows of ", s.window, " and heads of ", s.dim,
        " channels; expected 1 to ", kMaxWindow, " and 16 or 32");
    require(s.shift >= 0 && s.shift < s.window, "window_attention: shift is ", s.shift, "; expected 0 to ", s.window - 1);
    require(s.heads >= 1 && s.heads <= kMaxWindowHeads, "window_attention: ", s.heads, " heads; expected 1 to ", kMaxWindowHeads);
    require(
        s.batch >= 0 && s.height >= 0 && s.width >= 0 && s.height <= 1 << 20 && s.width <= 1 << 20 &&
            s.height * s.width <= INT32_MAX,
        "window_attention: a batch of ", s.batch, " maps of ", s.height, "x", s.width, "; expected sides of at most 2^20 and at most ",
        INT32_MAX, " pixels");
    std::int64_t const rows = (s.height + s.window - 1) / s.window, columns = (s.width + s.window - 1) / s.window;
    require(
        s.batch <= INT32_MAX && rows * columns <= INT32_MAX / (s.heads * std::max<std::int64_t>(s.batch, 1)),
        "window_attention: ", s.batch, " x ", rows * columns, " windows of ", s.heads, " heads; expected at most ", INT32_MAX);
    if (rows * columns * s.batch == 0) return;
    require_aligned(reinterpret_cast<std::uintptr_t>(t.qkv), 16, "window_attention: qkv");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.out), 16, "window_attention: out");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.qkv_bias), 4, "window_attention: qkv_bias");
    require_aligned(reinterpret_cast<std::uintptr_t>(t.bias), 4, "window_attention: bias");
    check_device(device(), "window_attention");

    WindowAttentionProblem p{};
    p.qkv = t.qkv;
    p.qkv_bias = t.qkv_bias;
    p.bias = t.bias;
    p.out = t.out;
    p.height = static_cast<std::int32_t>(s.height);
    p.width = static_cast<std::int32_t>(s.width);
    p.heads = static_cast<std::int32_t>(s.heads);
    p.window = static_cast<std::int32_t>(s.window);
    p.shift = static_cast<std::int32_t>(s.shift);
    p.rows = static_cast<std::int32_t>(rows);
    p.columns = static_cast<std::int32_t>(columns);
    p.scale = scale * kLog2E;
    if (t.type == DType::kFloat16) {
        launch_for_dim<Half>(p, s.dim, rows * columns * s.batch, stream);
    } else {
        launch_for_dim<BFloat16>(p, s.dim, rows * columns * s.batch, stream);
    }
    check_cuda(cudaGetLastError(), "window_attention");
}

}  // namespace d2_trt
