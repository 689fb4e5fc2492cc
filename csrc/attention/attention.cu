#include "attention/attention.h"

#include <algorithm>
#include <cmath>

#include "attention/kernels.cuh"
#include "attention/launch.cuh"
#include "attention/mask.cuh"
#include "attention/plan.h"

namespace d2_trt {
namespace {

constexpr std::int64_t kMaxRows = std::int64_t{1} << 24;  // queries or keys of an image
// As few keys without a mask, such as those of self-attention, take less time in one pass than in a second kernel.
constexpr std::int64_t kFewKeys = 1024;
constexpr int kMostResident = 3;
// The work is divided among no more of them, so that the workspace of an engine that was built on one GPU suffices on another
// of its kind with more of them.
constexpr int kMostMultiprocessors = 192;

void check_sizes(AttentionSizes const& sizes) {
    require(sizes.batch >= 0 && sizes.batch <= 65535, "attention: batch is ", sizes.batch, "; expected 0 to 65535");
    require(
        sizes.queries >= 0 && sizes.queries <= kMaxRows, "attention: ", sizes.queries, " queries; expected 0 to ", kMaxRows);
    require(sizes.keys >= 1 && sizes.keys <= kMaxRows, "attention: ", sizes.keys, " keys; expected 1 to ", kMaxRows);
    require(
        sizes.heads >= 1 && sizes.heads <= kMaxHeads, "attention: ", sizes.heads, " heads; expected 1 to ", kMaxHeads);
    require(
        sizes.dim == 8 || sizes.dim == 16 || sizes.dim == 32 || sizes.dim == 64, "attention: ", sizes.dim,
        " channels a head; expected 8, 16, 32 or 64");
    require(
        sizes.mask_dim >= 0 && sizes.mask_dim <= kMaxMaskDim && sizes.mask_dim % kMaskDimStep == 0,
        "attention: mask_dim is ", sizes.mask_dim, "; expected a multiple of ", kMaskDimStep, " up to ", kMaxMaskDim);
}

void check_stride(std::int64_t stride, AttentionSizes const& sizes, char const* name) {
    require(
        stride >= sizes.heads * sizes.dim && stride % 8 == 0 && stride <= INT32_MAX, "attention: rows of ", name, " are ",
        stride, " elements apart; expected a multiple of 8 that is at least ", sizes.heads * sizes.dim);
}

std::int64_t some_stride(std::int64_t keys) { return divide_up(divide_up(keys, kTileKeys * kMaskWarps), 16) * 16; }

template <typename T, int kBlocks>
void launch_mask(MaskProblem const& problem, std::int64_t batch, Device const& on, cudaStream_t stream) {
    static std::atomic<int> opened[kMaxDevices];
    int const bytes = mask_shared_bytes(kBlocks, problem.channels);
    open_shared(mask_kernel<T, kBlocks, true>, bytes, on, opened);
    std::int64_t const rows = divide_up(problem.rows, kBlocks * kBlockRows);
    std::int64_t const blocks = mask_grid(problem.tiles, kMaskWarps, rows * batch, on.multiprocessors);
    mask_kernel<T, kBlocks, true>
        <<<dim3(count(blocks), count(rows), count(batch)), kMaskWarps * 32, bytes, stream>>>(problem);
    check_cuda(cudaGetLastError(), "attention: the mask");
}

template <typename T>
void find_allowed(MaskProblem const& problem, std::int64_t batch, Device const& on, cudaStream_t stream) {
    bool const four =
        mask_blocks(batch, problem.queries, problem.keys, kMaskWarps, on.multiprocessors) == 4 &&
        mask_shared_bytes(4, problem.channels) <= on.shared_bytes;
    four ? launch_mask<T, 4>(problem, batch, on, stream) : launch_mask<T, 2>(problem, batch, on, stream);
}

template <typename T>
void combine(
    AttentionProblem const& problem, AttentionPlan const& plan, std::int64_t batch, std::int64_t dim, Device const& on,
    cudaStream_t stream) {
    static std::atomic<int> opened[kMaxDevices];
    int const bytes = kCombineThreads * static_cast<int>(sizeof(float4)) +
                      static_cast<int>(plan.combine_heads * (plan.splits + 1) * sizeof(float));
    open_shared(combine_kernel<T>, bytes, on, opened);
    dim3 const grid(count(problem.queries), count(problem.heads / plan.combine_heads), count(batch));
    combine_kernel<T><<<grid, kCombineThreads, bytes, stream>>>(
        problem, static_cast<int>(dim), static_cast<int>(plan.combine_heads));
    check_cuda(cudaGetLastError(), "attention: combining");
}

template <typename T, int D, bool kMasked>
void launch(
    AttentionProblem problem, AttentionTensors const& tensors, std::int64_t batch, std::int32_t mask_dim, Device const& on,
    cudaStream_t stream) {
    using Blocks = Shape<D, kMasked>;
    AttentionPlan const plan = plan_attention(
        batch, problem.queries, problem.keys, problem.heads, Blocks::kWarps * Blocks::kBlocks * kBlockRows,
        kMasked || problem.keys > kFewKeys,
        std::int64_t{std::min(on.multiprocessors, kMostMultiprocessors)} * Blocks::kResident);
    require(
        plan.groups * problem.heads <= 65535, "attention: ", problem.queries, " queries of ", problem.heads,
        " heads are too many");
    problem.tiles = static_cast<std::int32_t>(plan.tiles);
    problem.tiles_per_split = static_cast<std::int32_t>(plan.tiles_per_split);
    problem.splits = static_cast<std::int32_t>(plan.splits);
    auto* workspace = static_cast<unsigned char*>(tensors.workspace);
    if (kMasked || plan.splits > 1) {
        require_aligned(reinterpret_cast<std::uintptr_t>(workspace), 16, "attention: workspace");
    }
    if (kMasked) {
        MaskProblem mask{};
        mask.embed = tensors.mask_embed;
        mask.features = tensors.features;
        mask.allowed = reinterpret_cast<std::uint32_t*>(workspace);
        workspace += batch * plan.tiles * problem.rows * static_cast<std::int64_t>(sizeof(std::uint32_t));
        mask.some = workspace;
        workspace += batch * problem.rows * problem.some_stride;
        mask.queries = problem.queries;
        mask.rows = problem.rows;
        mask.keys = problem.keys;
        mask.channels = mask_dim;
        mask.tiles = problem.tiles;
        mask.some_stride = problem.some_stride;
        find_allowed<T>(mask, batch, on, stream);
        problem.allowed = mask.allowed;
        problem.some = mask.some;
    }
    problem.partial = reinterpret_cast<float*>(workspace);
    problem.stats = reinterpret_cast<float2*>(problem.partial + batch * problem.queries * plan.splits * problem.heads * D);
    static std::atomic<int> opened[kMaxDevices];
    int const bytes = kStages * Tile<D>::kBytes;
    open_shared(attention_kernel<T, D, kMasked>, bytes, on, opened);
    dim3 const grid(count(plan.splits), count(plan.groups * problem.heads), count(batch));
    attention_kernel<T, D, kMasked><<<grid, Blocks::kWarps * 32, bytes, stream>>>(problem);
    check_cuda(cudaGetLastError(), "attention");
    if (plan.splits > 1) combine<T>(problem, plan, batch, D, on, stream);
}

template <typename T, int D>
void launch_masked(
    AttentionProblem const& problem, AttentionTensors const& tensors, std::int64_t batch, std::int32_t mask_dim,
    Device const& on, cudaStream_t stream) {
    auto* const chosen = mask_dim > 0 ? &launch<T, D, true> : &launch<T, D, false>;
    chosen(problem, tensors, batch, mask_dim, on, stream);
}

template <typename T>
void launch_dim(
    AttentionSizes const& sizes, AttentionProblem const& problem, AttentionTensors const& tensors, Device const& on,
    cudaStream_t stream) {
    auto const pick = [&] {
        switch (sizes.dim) {
            case 8: return &launch_masked<T, 8>;
            case 16: return &launch_masked<T, 16>;
            case 32: return &launch_masked<T, 32>;
            default: return &launch_masked<T, 64>;
        }
    };
    pick()(problem, tensors, sizes.batch, static_cast<std::int32_t>(sizes.mask_dim), on, stream);
}

std::int64_t rows_of(AttentionSizes const& sizes) { return divide_up(sizes.queries, kMaskRows) * kMaskRows; }

std::int64_t floats_of_a_split(AttentionSizes const& sizes) { return sizes.heads * sizes.dim + 2 * sizes.heads; }

}  // namespace

std::size_t attention_workspace(AttentionSizes const& sizes) {
    check_sizes(sizes);
    check_device(device(), "attention");
    bool const masked = sizes.mask_dim > 0;
    if (!masked && sizes.keys <= kFewKeys) return 0;
    // In words of four bytes: of the mask, and of the splits' sums.
    std::int64_t const row = divide_up(sizes.keys, kTileKeys) + some_stride(sizes.keys) / 4;
    std::int64_t const mask = masked ? sizes.batch * rows_of(sizes) * row : 0;
    // As many blocks at once as any of the kernels has on any GPU.
    constexpr std::int64_t slots = std::int64_t{kMostMultiprocessors} * kMostResident;
    std::int64_t const splits = most_splits(sizes.batch, sizes.keys, sizes.heads, slots);
    return static_cast<std::size_t>(mask + splits * sizes.queries * floats_of_a_split(sizes)) * sizeof(float);
}

void attention(AttentionTensors const& tensors, AttentionSizes const& sizes, cudaStream_t stream) {
    check_sizes(sizes);
    check_stride(sizes.q_stride, sizes, "q");
    check_stride(sizes.k_stride, sizes, "k");
    check_stride(sizes.v_stride, sizes, "v");
    bool const positions = tensors.q_pos != nullptr || tensors.k_pos != nullptr;
    if (positions) check_stride(sizes.pos_stride, sizes, "positions");
    require(
        tensors.k_pos == nullptr || sizes.mask_dim == 0, "attention: positions of keys with a mask; add them to the keys");
    bool const half = tensors.type == DType::kFloat16 || tensors.type == DType::kBFloat16;
    require(half, "attention: q, k and v are float32; expected float16 or bfloat16");
    if (sizes.batch == 0 || sizes.queries == 0) return;
    auto const address = [](void const* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
    require_aligned(address(tensors.q), 16, "attention: q");
    require_aligned(address(tensors.k), 16, "attention: k");
    require_aligned(address(tensors.v), 16, "attention: v");
    require_aligned(address(tensors.out), 16, "attention: out");
    if (tensors.q_pos != nullptr) require_aligned(address(tensors.q_pos), 16, "attention: q_pos");
    if (tensors.k_pos != nullptr) require_aligned(address(tensors.k_pos), 16, "attention: k_pos");
    if (sizes.mask_dim > 0) {
        require_aligned(address(tensors.mask_embed), 16, "attention: mask_embed");
        require_aligned(address(tensors.features), 16, "attention: features");
        require_aligned(address(tensors.workspace), 16, "attention: workspace");
    }
    Device const& on = device();
    check_device(on, "attention");
    AttentionProblem problem{};
    problem.q = tensors.q;
    problem.k = tensors.k;
    problem.v = tensors.v;
    problem.q_pos = tensors.q_pos;
    problem.k_pos = tensors.k_pos;
    problem.pos_stride = sizes.pos_stride;
    problem.out = tensors.out;
    problem.queries = static_cast<std::int32_t>(sizes.queries);
    problem.rows = static_cast<std::int32_t>(rows_of(sizes));
    problem.keys = static_cast<std::int32_t>(sizes.keys);
    problem.heads = static_cast<std::int32_t>(sizes.heads);
    problem.some_stride = static_cast<std::int32_t>(some_stride(sizes.keys));
    problem.q_stride = sizes.q_stride;
    problem.k_stride = sizes.k_stride;
    problem.v_stride = sizes.v_stride;
    problem.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(sizes.dim)));
    auto* const run = tensors.type == DType::kFloat16 ? &launch_dim<Half> : &launch_dim<BFloat16>;
    run(sizes, problem, tensors, on, stream);
}

}  // namespace d2_trt
