#include "ms_deform_attn_backward/ms_deform_attn_backward.h"

#include <algorithm>

#include "common/check.h"
#include "ms_deform_attn/ms_deform_attn.h"
#include "ms_deform_attn_backward/kernel.cuh"

namespace d2_trt {
namespace {

static_assert(kBackwardMaxLevels == kMaxLevels);

template <typename Channels>
__global__ void __launch_bounds__(kBackwardThreads) kernel(__grid_constant__ MsDeformAttnBackwardProblem const problem) {
    ms_deform_attn_backward_block<Channels>(problem);
}

}  // namespace

void ms_deform_attn_backward(
    MsDeformAttnBackwardTensors const& t, MsDeformAttnBackwardSizes const& s, std::int32_t const (*level_sizes)[2],
    cudaStream_t stream) {
    char const* const name = "ms_deform_attn_backward";
    require(level_sizes != nullptr, name, ": no level sizes");
    require(s.levels >= 1 && s.levels <= kMaxLevels, name, ": ", s.levels, " levels; expected 1 to ", kMaxLevels);
    require(s.points >= 1 && s.points <= kMaxPoints, name, ": ", s.points, " points; expected 1 to ", kMaxPoints);
    require(
        s.batch >= 0 && s.heads >= 1 && s.dim >= 1 && s.batch <= INT32_MAX && s.heads <= INT32_MAX / s.dim, name, ": a batch of ",
        s.batch, ", ", s.heads, " heads of ", s.dim, " channels; expected a batch of 0 or more and 1 or more of the others");
    MsDeformAttnBackwardProblem problem{};
    std::int64_t held = 0;
    for (int i = 0; i < s.levels; ++i) {
        std::int64_t const height = level_sizes[i][0], width = level_sizes[i][1];
        require(height >= 0 && width >= 0, name, ": level ", i, " is ", height, "x", width);
        problem.sizes[i][0] = level_sizes[i][0], problem.sizes[i][1] = level_sizes[i][1];
        problem.starts[i] = static_cast<std::int32_t>(held);
        held += height * width;
        require(held <= INT32_MAX, name, ": the levels hold more than ", INT32_MAX, " pixels");
    }
    require(held == s.pixels, name, ": the levels hold ", held, " pixels, the value ", s.pixels);
    problem.rows = s.batch * s.pixels * s.heads;
    std::int64_t const of_block = kBackwardThreads / kBackwardLanes;
    std::int64_t const blocks = (problem.rows + of_block - 1) / of_block;
    require(blocks <= INT32_MAX, name, ": ", problem.rows, " queries of all heads; expected at most ", of_block * INT32_MAX);
    if (blocks == 0) return;
    auto const check = [](float const* tensor, char const* what) {
        require_aligned(reinterpret_cast<std::uintptr_t>(tensor), 16, what);
    };
    check(t.grad, "ms_deform_attn_backward: grad");
    check(t.value, "ms_deform_attn_backward: value");
    check(t.offsets, "ms_deform_attn_backward: offsets");
    check(t.logits, "ms_deform_attn_backward: logits");
    check(t.grad_value, "ms_deform_attn_backward: grad_value");
    check(t.grad_offsets, "ms_deform_attn_backward: grad_offsets");
    check(t.grad_logits, "ms_deform_attn_backward: grad_logits");
    problem.grad = t.grad;
    problem.value = t.value;
    problem.offsets = t.offsets;
    problem.logits = t.logits;
    problem.grad_value = t.grad_value;
    problem.grad_offsets = t.grad_offsets;
    problem.grad_logits = t.grad_logits;
    problem.levels = static_cast<std::int32_t>(s.levels);
    problem.points = static_cast<std::int32_t>(s.points);
    problem.heads = static_cast<std::int32_t>(s.heads);
    problem.dim = static_cast<std::int32_t>(s.dim);
    problem.pixels = static_cast<std::int32_t>(s.pixels);
    unsigned const grid = static_cast<unsigned>(blocks);
    if (s.dim % 4 == 0) {
        kernel<float4><<<grid, kBackwardThreads, 0, stream>>>(problem);
    } else {
        kernel<float><<<grid, kBackwardThreads, 0, stream>>>(problem);
    }
    check_cuda(cudaGetLastError(), name);
}

}  // namespace d2_trt
