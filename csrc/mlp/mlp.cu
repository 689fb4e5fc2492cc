#include "mlp/mlp.h"

#include "attention/launch.cuh"
#include "mlp/kernel.cuh"
#include "mlp/projection.cuh"

namespace d2_trt {
namespace {

static_assert(kMlpColumns == kMaxMlpNormAfter);

constexpr std::int64_t kMaxRows = std::int64_t{1} << 24;

// kQuads: of a projection's lane, see there; 0: the kernel of chains.
template <typename O, int kBlocks, int kQuads>
__global__ void __launch_bounds__(kMlpWarps * 32) mlp_kernel(__grid_constant__ MlpProblem const p) {
    if constexpr (kQuads > 0) {
        projection_block<O, kBlocks, kQuads>(p);
    } else {
        mlp_block<O, kBlocks>(p);
    }
}

MlpChain chain_of(MlpSizes const& sizes, DType type) {
    MlpChain chain{};
    chain.layers = sizes.layers;
    for (int i = 0; i <= sizes.layers; ++i) chain.widths[i] = sizes.widths[i];
    chain.after = sizes.after;
    chain.bytes = type == DType::kFloat32 ? Operands<Split>::kBytes : Operands<Half>::kBytes;
    chain.chunk = type == DType::kFloat32 ? Operands<Split>::kChunk : Operands<Half>::kChunk;
    return chain;
}

template <typename O, int kBlocks, int kQuads>
void open(int bytes, Device const& on) {
    static std::atomic<int> opened[kMaxDevices];
    open_shared(mlp_kernel<O, kBlocks, kQuads>, bytes, on, opened);
}

#if CUDART_VERSION >= 12010
// A launch of clusters. It refers to itself.
struct ClusterLaunch {
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};

    ClusterLaunch(unsigned grid, int parts, int bytes, cudaStream_t stream) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(parts);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.gridDim = dim3(grid);
        config.blockDim = dim3(kMlpWarps * 32);
        config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    ClusterLaunch(ClusterLaunch const&) = delete;
    ClusterLaunch& operator=(ClusterLaunch const&) = delete;
};
#endif

// Blocks of the largest cluster that runs here, whatever shared memory they have. A kernel that was compiled for an older GPU
// knows none, and a part of a GPU may be too small for one.
template <typename O>
int ask_parts(Device const& on) {
#if CUDART_VERSION >= 12010
    cudaFuncAttributes attributes{};
    auto* const kernel = mlp_kernel<O, 1, 0>;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "mlp: attributes of the kernel");
    if (on.major < 9 || attributes.ptxVersion < 90 || attributes.binaryVersion < 90) return 1;
    open<O, 1, 0>(on.shared_bytes, on);
    for (int parts = kMaxMlpParts; parts > 1; parts /= 2) {
        ClusterLaunch const launch(static_cast<unsigned>(parts), parts, on.shared_bytes, nullptr);
        int clusters = 0;
        check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config), "mlp: clusters");
        if (clusters > 0) return parts;
    }
#endif
    return 1;
}

template <typename O>
int parts_of(MlpChain const& chain, Device const& on) {
    static std::atomic<int> known[kMaxDevices];
    int parts = known[on.index].load(std::memory_order_relaxed);
    if (parts == 0) {
        parts = ask_parts<O>(on);
        known[on.index].store(parts, std::memory_order_relaxed);
    }
    if (CUDART_VERSION < 12010 && mlp_is_projection(chain)) return 1;  // no mailboxes, see cluster.cuh
    while (!mlp_divides(chain, parts)) parts /= 2;
    return parts;
}

template <typename O, int kBlocks, int kQuads>
void launch(MlpProblem const& p, Device const& on, cudaStream_t stream) {
    auto* const kernel = mlp_kernel<O, kBlocks, kQuads>;
    open<O, kBlocks, kQuads>(p.plan.bytes, on);
    unsigned const grid = count(std::int64_t{p.plan.tiles} * p.plan.parts);
#if CUDART_VERSION >= 12010
    if (p.plan.parts > 1) {
        ClusterLaunch const clusters(grid, p.plan.parts, p.plan.bytes, stream);
        check_cuda(cudaLaunchKernelEx(&clusters.config, kernel, p), "mlp");
        return;
    }
#endif
    kernel<<<grid, kMlpWarps * 32, p.plan.bytes, stream>>>(p);
    check_cuda(cudaGetLastError(), "mlp");
}

template <typename O, int kQuads>
void launch_blocks(MlpProblem const& p, Device const& on, cudaStream_t stream) {
    switch (p.plan.blocks) {
        case 1: return launch<O, 1, kQuads>(p, on, stream);
        case 2: return launch<O, 2, kQuads>(p, on, stream);
        default: return launch<O, 4, kQuads>(p, on, stream);
    }
}

template <typename O>
void launch_plan(MlpProblem& p, Device const& on, cudaStream_t stream) {
    int const parts = parts_of<O>(p.chain, on);
    p.plan = mlp_plan(p.chain, p.rows, parts, on.multiprocessors, on.shared_bytes);
    if (!mlp_is_projection(p.chain)) return launch_blocks<O, 0>(p, on, stream);
    return p.plan.layers[0].columns <= kMlpNarrow ? launch_blocks<O, 1>(p, on, stream) : launch_blocks<O, 2>(p, on, stream);
}

}  // namespace

bool mlp_takes(MlpSizes const& sizes, DType type) {
    if (sizes.layers < 1 || sizes.layers > kMaxMlpLayers) return false;
    for (int i = 0; i <= sizes.layers; ++i) {
        if (sizes.widths[i] < 1 || sizes.widths[i] > kMaxMlpWidth || sizes.widths[i] % kMlpWidthStep != 0) return false;
    }
    std::int32_t const first = sizes.widths[0], last = sizes.widths[sizes.layers];
    if (sizes.after && (first != last || last > kMaxMlpNormAfter)) return false;
    if (!sizes.after && first > kMaxMlpNormBefore) return false;
    return mlp_plan(chain_of(sizes, type), 1, 1, 1, kMlpSharedBytes).bytes <= kMlpSharedBytes;
}

std::int64_t mlp_weight_bytes(MlpSizes const& sizes, DType type) {
    std::int64_t weights = 0;
    for (int i = 0; i < sizes.layers; ++i) weights += std::int64_t{sizes.widths[i]} * sizes.widths[i + 1];
    return weights * static_cast<std::int64_t>(size_of(type));
}

std::int64_t mlp_biases(MlpSizes const& sizes) {
    std::int64_t biases = 0;
    for (int i = 0; i < sizes.layers; ++i) biases += sizes.widths[i + 1];
    return biases;
}

void mlp(MlpTensors const& t, MlpSizes const& sizes, float epsilon, cudaStream_t stream) {
    require(mlp_takes(sizes, t.type), "mlp: no code for these widths of ", sizes.layers, " layers");
    require(sizes.rows >= 0 && sizes.rows <= kMaxRows, "mlp: ", sizes.rows, " rows; expected 0 to ", kMaxRows);
    require(epsilon >= 0.0F, "mlp: epsilon is ", epsilon, "; expected at least 0");
    require(t.normed == nullptr || !sizes.after, "mlp: normed rows are asked for where LayerNorm is after the layers");
    require(t.residual == nullptr || sizes.after, "mlp: a residual is given where LayerNorm is before the layers");
    if (sizes.rows == 0) return;
    auto const address = [](void const* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
    require_aligned(address(t.x), 16, "mlp: x");
    require_aligned(address(t.weights), 16, "mlp: weights");
    require_aligned(address(t.biases), 16, "mlp: biases");
    require_aligned(address(t.norm), 16, "mlp: norm");
    if (t.residual != nullptr) require_aligned(address(t.residual), 16, "mlp: residual");
    require_aligned(address(t.out), 16, "mlp: out");
    if (t.normed != nullptr) require_aligned(address(t.normed), 16, "mlp: normed");
    Device const& on = device();
    check_device(on, "mlp");
    MlpProblem p{};
    p.chain = chain_of(sizes, t.type);
    p.x = t.x;
    p.residual = t.residual != nullptr ? t.residual : t.x;
    p.weights = static_cast<uint4 const*>(t.weights);
    p.biases = t.biases;
    p.norm = t.norm;
    p.out = t.out;
    p.normed = t.normed;
    p.rows = sizes.rows;
    p.x_type = static_cast<std::int32_t>(t.x_type);
    p.residual_type = static_cast<std::int32_t>(t.residual != nullptr ? t.residual_type : t.x_type);
    p.out_type = static_cast<std::int32_t>(t.out_type);
    p.normed_type = static_cast<std::int32_t>(t.normed_type);
    p.epsilon = epsilon;
    switch (t.type) {
        case DType::kFloat32: return launch_plan<Operands<Split>>(p, on, stream);
        case DType::kFloat16: return launch_plan<Operands<Half>>(p, on, stream);
        default: return launch_plan<Operands<BFloat16>>(p, on, stream);
    }
}

}  // namespace d2_trt
