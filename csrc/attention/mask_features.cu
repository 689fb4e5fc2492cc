#include "attention/mask_features.h"

#include "attention/attention.h"
#include "attention/launch.cuh"
#include "attention/mask.cuh"
#include "attention/plan.h"
#include "attention/resize.cuh"

namespace d2_trt {
namespace {

void check_half(DType type, char const* what) {
    require(type != DType::kFloat32, what, ": features are float32; expected float16 or bfloat16");
}

template <typename T, int kBlocks>
void launch_blocks(MaskProblem const& problem, std::int64_t batch, Device const& on, cudaStream_t stream) {
    static std::atomic<int> opened[kMaxDevices];
    int const bytes = mask_shared_bytes(kBlocks, problem.channels);
    open_shared(mask_kernel<T, kBlocks, false>, bytes, on, opened);
    std::int64_t const rows = divide_up(problem.queries, kBlocks * kBlockRows);
    std::int64_t const blocks = mask_grid(problem.tiles, kMaskWarps, rows * batch, on.multiprocessors);
    mask_kernel<T, kBlocks, false>
        <<<dim3(count(blocks), count(rows), count(batch)), kMaskWarps * 32, bytes, stream>>>(problem);
    check_cuda(cudaGetLastError(), "mask_product");
}

template <typename T>
void launch_product(MaskProblem const& problem, std::int64_t batch, Device const& on, cudaStream_t stream) {
    bool const four = mask_shared_bytes(4, problem.channels) <= on.shared_bytes;
    four ? launch_blocks<T, 4>(problem, batch, on, stream) : launch_blocks<T, 2>(problem, batch, on, stream);
}

}  // namespace

void mask_product(
    float const* embed, void const* features, float* logits, DType type, std::int64_t batch, std::int64_t queries,
    std::int64_t pixels, std::int64_t channels, cudaStream_t stream) {
    constexpr std::int64_t kMost = std::int64_t{1} << 28;
    check_half(type, "mask_product");
    require(
        batch >= 0 && batch <= 65535 && queries >= 0 && queries <= 65535 && pixels >= 0 && pixels <= kMost,
        "mask_product: batch ", batch, ", ", queries, " queries, ", pixels, " pixels; expected 0 to 65535, 65535 and ",
        kMost);
    require(
        channels >= kMaskDimStep && channels <= kMaxMaskDim && channels % kMaskDimStep == 0, "mask_product: ", channels,
        " channels; expected a multiple of ", kMaskDimStep, " up to ", kMaxMaskDim);
    if (batch == 0 || queries == 0 || pixels == 0) return;
    require_aligned(reinterpret_cast<std::uintptr_t>(embed), 16, "mask_product: embed");
    require_aligned(reinterpret_cast<std::uintptr_t>(features), 16, "mask_product: features");
    require_aligned(reinterpret_cast<std::uintptr_t>(logits), 16, "mask_product: logits");
    Device const& on = device();
    check_device(on, "mask_product");
    MaskProblem problem{};
    problem.embed = embed;
    problem.features = features;
    problem.logits = logits;
    problem.queries = static_cast<std::int32_t>(queries);
    problem.keys = static_cast<std::int32_t>(pixels);
    problem.channels = static_cast<std::int32_t>(channels);
    problem.tiles = static_cast<std::int32_t>(divide_up(pixels, kTileKeys));
    auto* const run = type == DType::kFloat16 ? &launch_product<Half> : &launch_product<BFloat16>;
    run(problem, batch, on, stream);
}

void resize_mask_features(
    void const* features, void* out, DType type, ResizeSizes const& sizes, cudaStream_t stream) {
    constexpr std::int64_t kMost = std::int64_t{1} << 28;
    char const* const what = "resize_mask_features";
    check_half(type, what);
    auto const check_side = [&](char const* name, std::int64_t height, std::int64_t width) {
        require(
            height > 0 && width > 0 && height <= kMost / width, what, ": ", name, " are ", height, "x", width,
            "; expected 1 to ", kMost, " pixels");
    };
    check_side("features", sizes.height, sizes.width);
    check_side("results", sizes.out_height, sizes.out_width);
    require(sizes.batch >= 0 && sizes.batch <= 65535, what, ": batch is ", sizes.batch, "; expected 0 to 65535");
    require(
        sizes.channels > 0 && sizes.channels <= kMost && sizes.channels % 8 == 0, what, ": ", sizes.channels,
        " channels; expected a multiple of 8");
    if (sizes.batch == 0) return;
    require_aligned(reinterpret_cast<std::uintptr_t>(features), 16, "resize_mask_features: features");
    require_aligned(reinterpret_cast<std::uintptr_t>(out), 16, "resize_mask_features: out");
    auto const narrow = [](std::int64_t n) { return static_cast<std::int32_t>(n); };
    ResizeProblem const problem{
        features, out, narrow(sizes.height), narrow(sizes.width), narrow(sizes.out_height), narrow(sizes.out_width),
        narrow(sizes.channels)};
    dim3 const grid(count(divide_up(sizes.out_height * sizes.out_width, kResizeThreads / 32)), count(sizes.batch));
    auto* const kernel = type == DType::kFloat16 ? &resize_kernel<Half> : &resize_kernel<BFloat16>;
    kernel<<<grid, kResizeThreads, 0, stream>>>(problem);
    check_cuda(cudaGetLastError(), what);
}

}  // namespace d2_trt
