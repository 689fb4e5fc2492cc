// Class scores of each pixel: (classes, queries) class probabilities times (queries, pixels) mask probabilities, which
// are interpolated on the way into shared memory; or only each pixel's best class.
#include "postprocess/dispatch.cuh"
#include "postprocess/launch.cuh"

namespace d2_trt::postprocess {
namespace {

constexpr int kTile = 128;       // pixels of a block, in row-major order
constexpr int kLanePixels = 4;   // a warp covers the tile; its lanes hold 4 pixels by kClasses classes
constexpr int kMaxWarps = 10;      // 160 classes at once; two such blocks fit a multiprocessor
constexpr int kMaxChunk = 32;    // queries in shared memory

// Mask probabilities of `chunk` queries from `first` on; each group of kTile threads takes every groups-th query.
template <typename T>
__device__ void sample_chunk(SemanticArgs const& args, T const* __restrict__ masks, int pixel, int first, int chunk,
                             float* probs) {
    int const groups = blockDim.x / kTile, group = threadIdx.x / kTile, place = threadIdx.x % kTile;
    if (group >= groups) return;
    Geometry const& g = args.geometry;
    int const y = pixel / g.out_w, x = pixel % g.out_w;
    with_steps(g, [&](auto pads, auto resizes) {
        constexpr bool kPads = decltype(pads)::value, kResizes = decltype(resizes)::value;
        AxisTaps const columns = column_taps<kPads, kResizes>(g, x);
        AxisTaps rows = row_taps<kPads, kResizes>(g, y);
        scale_places(rows, g.mask_w);
#pragma unroll 1
        for (int q = group; q < chunk; q += groups) {
            float logit = sample<kPads, kResizes>(masks + (first + q) * args.masks.query_stride, rows, columns);
            probs[q * kTile + place] = sigmoid(logit);
        }
    });
}

template <typename T, int kClasses>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    semantic_kernel(SemanticArgs const args, T const* __restrict__ masks, int const chunk_size) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int const pixels = args.geometry.out_h * args.geometry.out_w;
    int const tile_start = static_cast<int>(blockIdx.x) * kTile;
    int const round_classes = warps * kClasses;
    float* probs = dynamic_shared<float>();         // (chunk, kTile)
    float* weights = probs + chunk_size * kTile;    // (chunk, round_classes)
    int own = tile_start + static_cast<int>(threadIdx.x) % kTile;
    own = own < pixels ? own : pixels - 1;
    float best = -1.0f;  // of the thread's own pixel, the first kTile threads
    int best_class = 0;

    for (int first_class = 0; first_class < args.classes; first_class += round_classes) {
        float sum[kClasses][kLanePixels] = {};
        for (int first = 0; first < args.queries; first += chunk_size) {
            int const chunk = min(chunk_size, args.queries - first);
            __syncthreads();  // the last chunk's readers are done
            for (int i = threadIdx.x; i < chunk * round_classes; i += blockDim.x) {
                int q = i / round_classes, c = first_class + i % round_classes;
                weights[i] = c < args.classes
                                 ? args.probs[static_cast<std::int64_t>(first + q) * (args.classes + 1) + c]
                                 : 0.0f;
            }
            sample_chunk(args, masks, own, first, chunk, probs);
            __syncthreads();
#pragma unroll 2
            for (int q = 0; q < chunk; ++q) {
                float4 const p = *reinterpret_cast<float4 const*>(probs + q * kTile + kLanePixels * lane);
                float const* w = weights + q * round_classes + warp * kClasses;
#pragma unroll
                for (int c = 0; c < kClasses; c += 4) {
                    float4 const w4 = *reinterpret_cast<float4 const*>(w + c);
                    float const by_class[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        sum[c + i][0] = fused_multiply_add(by_class[i], p.x, sum[c + i][0]);
                        sum[c + i][1] = fused_multiply_add(by_class[i], p.y, sum[c + i][1]);
                        sum[c + i][2] = fused_multiply_add(by_class[i], p.z, sum[c + i][2]);
                        sum[c + i][3] = fused_multiply_add(by_class[i], p.w, sum[c + i][3]);
                    }
                }
            }
        }
        int const warp_class = first_class + warp * kClasses;
        if (args.scores != nullptr) {
            int const p = tile_start + kLanePixels * lane;
            bool const whole = p + kLanePixels <= pixels && pixels % kLanePixels == 0;  // aligned in every class
#pragma unroll
            for (int c = 0; c < kClasses; ++c) {
                if (warp_class + c >= args.classes) continue;
                float* out = args.scores + static_cast<std::int64_t>(warp_class + c) * pixels + p;
                if (whole) {
                    *reinterpret_cast<float4*>(out) = make_float4(sum[c][0], sum[c][1], sum[c][2], sum[c][3]);
                } else {
#pragma unroll
                    for (int i = 0; i < kLanePixels; ++i) {
                        if (p + i < pixels) out[i] = sum[c][i];
                    }
                }
            }
            continue;
        }
        // Labels: the best of each warp's classes, then of the warps', the first of equals each time. The chunks' memory
        // is free for it.
        __syncthreads();
        float* warp_best = dynamic_shared<float>();                                  // (warps, kTile)
        int* warp_label = reinterpret_cast<int*>(warp_best + warps * kTile);         // (warps, kTile)
#pragma unroll
        for (int i = 0; i < kLanePixels; ++i) {
            float high = -1.0f;
            int label = 0;
#pragma unroll
            for (int c = 0; c < kClasses; ++c) {
                if (warp_class + c < args.classes && sum[c][i] > high) {
                    high = sum[c][i];
                    label = warp_class + c;
                }
            }
            warp_best[warp * kTile + kLanePixels * lane + i] = high;
            warp_label[warp * kTile + kLanePixels * lane + i] = label;
        }
        __syncthreads();
        if (threadIdx.x < kTile) {
            for (int w = 0; w < warps; ++w) {
                if (warp_best[w * kTile + threadIdx.x] > best) {
                    best = warp_best[w * kTile + threadIdx.x];
                    best_class = warp_label[w * kTile + threadIdx.x];
                }
            }
        }
    }
    if (args.labels != nullptr && threadIdx.x < kTile && tile_start + static_cast<int>(threadIdx.x) < pixels) {
        args.labels[tile_start + threadIdx.x] = best_class;
    }
}

template <typename T, int kClasses>
void launch_semantic(SemanticArgs const& args, T const* masks, cudaStream_t stream) {
    // As few rounds over the classes as the largest block allows, then no more warps than they need; at least as many as
    // one group of sampling threads has.
    int const groups = static_cast<int>(ceil_div(args.classes, kClasses));
    int const rounds = static_cast<int>(ceil_div(groups, kMaxWarps));
    int const needed = static_cast<int>(ceil_div(groups, rounds));
    int const warps = needed < kTile / 32 ? kTile / 32 : needed;
    int const chunks = static_cast<int>(ceil_div(args.queries, kMaxChunk));
    int const chunk = static_cast<int>(ceil_div(args.queries, chunks));
    std::size_t floats = static_cast<std::size_t>(chunk) * (kTile + warps * kClasses);
    std::size_t const for_labels = 2 * static_cast<std::size_t>(warps) * kTile;
    if (args.labels != nullptr && floats < for_labels) floats = for_labels;
    unsigned const tiles = ceil_div(static_cast<long long>(args.geometry.out_h) * args.geometry.out_w, kTile);
    launch("semantic", semantic_kernel<T, kClasses>, tiles, 32 * warps, floats * sizeof(float), stream, args, masks,
           chunk);
}

}  // namespace

void semantic(SemanticArgs const& args, cudaStream_t stream) {
    check_geometry(args.geometry);
    require(args.queries >= 1 && args.classes >= 1, args.queries, " queries and ", args.classes,
            " classes; there must be some of both");
    require((args.scores == nullptr) != (args.labels == nullptr), "either scores or labels, not both");
    if (args.scores != nullptr) {
        require_aligned(reinterpret_cast<std::uintptr_t>(args.scores), sizeof(float4), "scores");
    }
    with_element_type(args.masks, [&](auto const* masks) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(masks)>>;
        // Few classes are dealt out in small shares, so that there are warps enough.
        if (args.classes > 64) {
            launch_semantic<T, 16>(args, masks, stream);
        } else if (args.classes > 32) {
            launch_semantic<T, 8>(args, masks, stream);
        } else {
            launch_semantic<T, 4>(args, masks, stream);
        }
    });
}

}  // namespace d2_trt::postprocess
