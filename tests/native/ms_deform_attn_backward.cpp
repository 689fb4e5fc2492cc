// The kernel of csrc/ms_deform_attn_backward on a CPU: tests/mask2former/test_ms_deform_attn_backward.py compiles and calls this.
#include <math.h>

#include <algorithm>

#include "emulation.h"

namespace d2_trt {
// Lanes take turns: nothing comes between reading and writing.
inline void add_at(float* to, float x) { *to += x; }
inline void add_at(float4* to, float4 x) { to->x += x.x, to->y += x.y, to->z += x.z, to->w += x.w; }
}  // namespace d2_trt

#include "ms_deform_attn_backward/kernel.cuh"

extern "C" void emulate_ms_deform_attn_backward(float* const* tensors, std::int32_t const* sizes, std::int32_t const* levels) {
    using namespace d2_trt;
    MsDeformAttnBackwardProblem p{};
    p.grad = tensors[0], p.value = tensors[1], p.offsets = tensors[2], p.logits = tensors[3];
    p.grad_value = tensors[4], p.grad_offsets = tensors[5], p.grad_logits = tensors[6];
    int const batch = sizes[0];
    p.heads = sizes[1], p.dim = sizes[2], p.levels = sizes[3], p.points = sizes[4];
    for (int i = 0; i < p.levels; ++i) {
        p.sizes[i][0] = levels[2 * i], p.sizes[i][1] = levels[2 * i + 1];
        p.starts[i] = p.pixels;
        p.pixels += levels[2 * i] * levels[2 * i + 1];
    }
    p.rows = static_cast<std::int64_t>(batch) * p.pixels * p.heads;
    int const of_block = kBackwardThreads / kBackwardLanes;
    Index const grid{static_cast<int>((p.rows + of_block - 1) / of_block), 1, 1};
    bool const backwards = sizes[5] != 0;
    if (p.dim % 4 == 0) {
        emulation::run(grid, kBackwardThreads, 0, backwards, [&] { ms_deform_attn_backward_block<float4>(p); });
    } else {
        emulation::run(grid, kBackwardThreads, 0, backwards, [&] { ms_deform_attn_backward_block<float>(p); });
    }
}
