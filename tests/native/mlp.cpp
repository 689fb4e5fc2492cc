// The kernel of csrc/mlp on a CPU: tests/mask2former/mlp_emulation.py compiles and calls this.
#include <math.h>

#include <algorithm>

#include "emulation.h"

#include "mlp/kernel.cuh"
#include "mlp/projection.cuh"

namespace {

using namespace d2_trt;

template <typename O, int kBlocks>
void run(MlpProblem const& p, bool backwards) {
    Index const grid{p.plan.tiles * p.plan.parts, 1, 1};
    auto const block = [&] {
        if (!mlp_is_projection(p.chain)) return mlp_block<O, kBlocks>(p);
        p.plan.layers[0].columns <= kMlpNarrow ? projection_block<O, kBlocks, 1>(p) : projection_block<O, kBlocks, 2>(p);
    };
    emulation::run(grid, kMlpWarps * 32, p.plan.bytes, backwards, block, p.plan.parts);
}

template <typename O>
int run_plan(MlpProblem& p, std::int32_t const* sizes) {
    p.chain.bytes = O::kBytes, p.chain.chunk = O::kChunk;
    int const parts = sizes[0], multiprocessors = sizes[1], shared_bytes = sizes[2];
    if (!mlp_divides(p.chain, parts)) return 0;
    p.plan = mlp_plan(p.chain, p.rows, parts, multiprocessors, shared_bytes);
    switch (p.plan.blocks) {
        case 1: run<O, 1>(p, sizes[3] != 0); break;
        case 2: run<O, 2>(p, sizes[3] != 0); break;
        default: run<O, 4>(p, sizes[3] != 0); break;
    }
    return p.plan.blocks;
}

}  // namespace

// The blocks of 16 rows in a tile; 0 where the parts do not divide the layers.
// sizes: parts, multiprocessors, bytes of shared memory, backwards, type, types of x, residual, out and normed, after, rows,
// layers, widths.
extern "C" int emulate_mlp(
    void const* x, void const* weights, float const* biases, float const* norm, void const* residual, void* out,
    void* normed, std::int32_t const* sizes, float epsilon) {
    MlpProblem p{};
    p.x = x, p.residual = residual, p.weights = static_cast<uint4 const*>(weights), p.biases = biases, p.norm = norm;
    p.out = out, p.normed = normed;
    p.x_type = sizes[5], p.residual_type = sizes[6], p.out_type = sizes[7], p.normed_type = sizes[8];
    p.chain.after = sizes[9] != 0;
    p.rows = sizes[10];
    p.chain.layers = sizes[11];
    std::copy(sizes + 12, sizes + 13 + p.chain.layers, p.chain.widths);
    p.epsilon = epsilon;
    auto const say = [](void const* tensor, std::int64_t bytes) {
        emulation::readable.emplace_back(static_cast<char const*>(tensor), static_cast<std::size_t>(bytes));
    };
    auto const bytes_of = [](int type) { return type == kElementFloat ? 4 : 2; };
    std::int64_t const first = p.chain.widths[0], last = p.chain.widths[p.chain.layers];
    std::int64_t parameters = 0, columns = 0;
    for (int i = 0; i < p.chain.layers; ++i) {
        parameters += std::int64_t{p.chain.widths[i]} * p.chain.widths[i + 1];
        columns += p.chain.widths[i + 1];
    }
    say(x, p.rows * first * bytes_of(p.x_type));
    say(weights, parameters * bytes_of(sizes[4]));
    say(biases, columns * 4);
    say(norm, 2 * first * 4);
    if (residual != nullptr) say(residual, p.rows * last * bytes_of(p.residual_type));
    int blocks = 0;
    switch (sizes[4]) {
        case 0: blocks = run_plan<Operands<Split>>(p, sizes); break;
        case 1: blocks = run_plan<Operands<Half>>(p, sizes); break;
        default: blocks = run_plan<Operands<BFloat16>>(p, sizes); break;
    }
    emulation::readable.clear();  // other kernels' libraries have the same variable
    return blocks;
}
