// Class scores of each pixel: (classes, queries) class probabilities times (queries, pixels) mask probabilities, which
// are interpolated on the way into shared memory; or only each pixel's best class. On tensor cores, with each factor as
// the sum of two float16 numbers: their products but the smallest, in float32, are as exact as float32 factors.
#include "postprocess/checks.h"
#include "postprocess/dispatch.cuh"
#include "postprocess/launch.cuh"

namespace d2_trt::postprocess {
namespace {

constexpr int kTileWidth = 32;   // pixels of a block: a lane's column in sampling
constexpr int kTileHeight = 4;
constexpr int kTile = kTileWidth * kTileHeight;
constexpr int kShares = 3;       // of the classes: a warp has a row of the tile and a share
constexpr int kWarps = kTileHeight * kShares;
constexpr int kThreads = 32 * kWarps;
constexpr int kFragment = 16;    // classes and queries of a product of matrices
constexpr int kChunk = 48;       // queries in shared memory
constexpr int kWarpQueries = kChunk / kWarps;
constexpr int kStride = kChunk / 2 + 4;  // words of a pixel in shared memory
constexpr int kPixelTiles = kTileWidth / 8;
static_assert(kWarpQueries % 2 == 0 && kWarpQueries * kWarps == kChunk);

// Factors are scaled up so that the second of their numbers stays within float16's normal ones.
constexpr float kScale = 1024.0f;

struct Split {
    unsigned high, low;  // two float16 numbers each
};

__device__ Split split(float first, float second) {
    __half2 const high = __floats2half2_rn(first, second);
    float2 const rounded = __half22float2(high);
    __half2 const low = __floats2half2_rn(first - rounded.x, second - rounded.y);
    return {*reinterpret_cast<unsigned const*>(&high), *reinterpret_cast<unsigned const*>(&low)};
}

// sum += A B; fragments as in the PTX ISA under mma.m16n8k16.
__device__ void multiply(float (&sum)[4], uint4 const& a, unsigned b0, unsigned b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#endif
}

// Class probabilities as fragments of A: for 16 classes by 16 queries, each lane's high numbers, then its low ones.
__global__ void weights_kernel(float const* __restrict__ probs, int queries, int classes, int query_tiles, uint4* out) {
    int const lane = threadIdx.x, group = lane / 4, member = lane % 4;
    int const first_class = static_cast<int>(blockIdx.y) * kFragment, first_query = static_cast<int>(blockIdx.x) * kFragment;
    auto probability = [&](int c, int q) {
        return c < classes && q < queries ? kScale * probs[static_cast<std::int64_t>(q) * (classes + 1) + c] : 0.0f;
    };
    unsigned high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int const c = first_class + group + i % 2 * 8, q = first_query + 2 * member + i / 2 * 8;
        Split const two = split(probability(c, q), probability(c, q + 1));
        high[i] = two.high;
        low[i] = two.low;
    }
    uint4* to = out + ((static_cast<std::int64_t>(blockIdx.y) * query_tiles + blockIdx.x) * 32 + lane) * 2;
    to[0] = make_uint4(high[0], high[1], high[2], high[3]);
    to[1] = make_uint4(low[0], low[1], low[2], low[3]);
}

// Mask probabilities in shared memory: for each pixel the queries of a chunk.
struct ChunkProbs {
    __half high[kTile * kStride * 2];
    __half low[kTile * kStride * 2];

    // Where a pixel's first query is: neither a warp's stores, of one query at 32 pixels, nor its loads, of 8 queries at 8
    // pixels, meet in a bank.
    __device__ static int at(int pixel) { return (pixel * kStride + pixel / 8 % 4) * 2; }
};
static_assert(kStride % 8 == 4 && kStride >= kChunk / 2 + 3);

// Rows of a tile, as sampling reads them.
struct TileRows {
    AxisTaps taps[kTileHeight];
    RowWindow<4> window;
    bool fit;  // taps are in the window
};

// The warp's queries of a chunk, each at the column of pixels that is the lane's.
template <typename T, bool kPads, bool kResizes>
__device__ void sample_chunk(SemanticArgs const& args, T const* __restrict__ masks, AxisTaps const& columns,
                             TileRows const& rows, int first, ChunkProbs& probs) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto const keep = [&](int i, int r, float prob) {
        __half const high = __float2half_rn(kScale * prob);
        int const at = ChunkProbs::at(r * kTileWidth + lane) + i;
        probs.high[at] = high;
        probs.low[at] = __float2half_rn(kScale * prob - __half2float(high));
    };
#pragma unroll 1
    for (int i = warp * kWarpQueries; i < (warp + 1) * kWarpQueries; ++i) {
        int const q = first + i;
        T const* plane = masks + q * args.masks.query_stride;
        if (q >= args.queries) {
            for (int r = 0; r < kTileHeight; ++r) keep(i, r, 0.0f);
        } else if (rows.fit) {
            ColumnSampler<T, kPads, kResizes, 4> const mask(plane, columns, rows.window);
#pragma unroll 2
            for (int r = 0; r < kTileHeight; ++r) keep(i, r, sigmoid(mask.at(rows.taps[r])));
        } else {
#pragma unroll 1
            for (int r = 0; r < kTileHeight; ++r) {
                keep(i, r, sigmoid(sample<kPads, kResizes>(plane, rows.taps[r], columns)));
            }
        }
    }
}

// kTiles: tiles of 16 classes for each warp at a time.
template <typename T, int kTiles, bool kPads, bool kResizes>
__global__ void __launch_bounds__(kThreads, kTiles > 3 ? 1 : 2)
    semantic_kernel(SemanticArgs const args, T const* __restrict__ masks, int const query_tiles) {
    __shared__ __align__(16) ChunkProbs probs;
    __shared__ TileRows rows;
    __shared__ float share_best[kShares][kTile];
    __shared__ int share_class[kShares][kTile];
    Geometry const& g = args.geometry;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, member = lane % 4;
    int const row = warp % kTileHeight, share = warp / kTileHeight;
    int const tiles_across = (g.out_w + kTileWidth - 1) / kTileWidth;
    int const x0 = static_cast<int>(blockIdx.x) % tiles_across * kTileWidth;
    int const y0 = static_cast<int>(blockIdx.x) / tiles_across * kTileHeight;
    std::int64_t const pixels = static_cast<std::int64_t>(g.out_h) * g.out_w;
    int const class_tiles = (args.classes + kFragment - 1) / kFragment;
    AxisTaps const columns = column_taps<kPads, kResizes>(g, min(x0 + lane, g.out_w - 1));
    if (threadIdx.x < kTileHeight) {
        AxisTaps taps = row_taps<kPads, kResizes>(g, min(y0 + static_cast<int>(threadIdx.x), g.out_h - 1));
        scale_places(taps, g.mask_w);
        rows.taps[threadIdx.x] = taps;
    }
    __syncthreads();
    if (threadIdx.x == 0) rows.fit = rows.window.template fit<kPads>(rows.taps, kTileHeight, g.mask_h, g.mask_w);
    float best = -1.0f;  // of the thread's own pixel, the first kTile threads
    int best_class = 0;

    for (int first_tile = 0; first_tile < class_tiles; first_tile += kShares * kTiles) {
        int const own_tile = first_tile + share * kTiles;
        float sum[kTiles][kPixelTiles][4] = {};
        for (int first = 0; first < args.queries; first += kChunk) {
            __syncthreads();  // the last chunk's readers are done
            sample_chunk<T, kPads, kResizes>(args, masks, columns, rows, first, probs);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kChunk / kFragment; ++k) {
                int const query_tile = first / kFragment + k;
                if (query_tile >= query_tiles) continue;
                unsigned high[kPixelTiles][2], low[kPixelTiles][2];
#pragma unroll
                for (int n = 0; n < kPixelTiles; ++n) {
                    int const at = ChunkProbs::at(row * kTileWidth + n * 8 + group) + k * kFragment + 2 * member;
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        high[n][i] = *reinterpret_cast<unsigned const*>(probs.high + at + 8 * i);
                        low[n][i] = *reinterpret_cast<unsigned const*>(probs.low + at + 8 * i);
                    }
                }
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
                    if (own_tile + m >= class_tiles) continue;
                    uint4 const* from =
                        args.weights + ((static_cast<std::int64_t>(own_tile + m) * query_tiles + query_tile) * 32 + lane) * 2;
                    uint4 const a_high = __ldg(from), a_low = __ldg(from + 1);
#pragma unroll
                    for (int n = 0; n < kPixelTiles; ++n) {
                        multiply(sum[m][n], a_low, high[n][0], high[n][1]);
                        multiply(sum[m][n], a_high, low[n][0], low[n][1]);
                        multiply(sum[m][n], a_high, high[n][0], high[n][1]);
                    }
                }
            }
        }
        if (args.scores != nullptr) {
            int const y = y0 + row;
            bool const pairs = g.out_w % 2 == 0;  // then two neighbouring scores are aligned in every row and class
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int const c = (own_tile + m) * kFragment + group + half * 8;
                    if (c >= args.classes || y >= g.out_h) continue;
                    float* out = args.scores + c * pixels + static_cast<std::int64_t>(y) * g.out_w;
#pragma unroll
                    for (int n = 0; n < kPixelTiles; ++n) {
                        int const x = x0 + n * 8 + 2 * member;
                        float const first = sum[m][n][2 * half] * (1.0f / kScale / kScale);
                        float const second = sum[m][n][2 * half + 1] * (1.0f / kScale / kScale);
                        if (pairs && x < g.out_w) {
                            *reinterpret_cast<float2*>(out + x) = make_float2(first, second);
                        } else {
                            if (x < g.out_w) out[x] = first;
                            if (x + 1 < g.out_w) out[x + 1] = second;
                        }
                    }
                }
            }
            continue;
        }
        // Labels: the best of a lane's classes, of the lanes that share a pixel, then of the shares; the first of equals.
#pragma unroll
        for (int n = 0; n < kPixelTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float high = -1.0f;
                int label = 0;
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        int const c = (own_tile + m) * kFragment + group + half * 8;
                        if (c < args.classes && sum[m][n][2 * half + i] > high) {
                            high = sum[m][n][2 * half + i];
                            label = c;
                        }
                    }
                }
#pragma unroll
                for (int step = 4; step < 32; step *= 2) {
                    float const other = __shfl_xor_sync(kAllLanes, high, step);
                    int const other_label = __shfl_xor_sync(kAllLanes, label, step);
                    if (other > high || (other == high && other_label < label)) {
                        high = other;
                        label = other_label;
                    }
                }
                if (group == 0) {
                    share_best[share][row * kTileWidth + n * 8 + 2 * member + i] = high;
                    share_class[share][row * kTileWidth + n * 8 + 2 * member + i] = label;
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < kTile) {
            for (int s = 0; s < kShares; ++s) {
                if (share_best[s][threadIdx.x] > best) {
                    best = share_best[s][threadIdx.x];
                    best_class = share_class[s][threadIdx.x];
                }
            }
        }
    }
    int const x = x0 + static_cast<int>(threadIdx.x) % kTileWidth, y = y0 + static_cast<int>(threadIdx.x) / kTileWidth;
    if (args.labels != nullptr && threadIdx.x < kTile && x < g.out_w && y < g.out_h) {
        args.labels[static_cast<std::int64_t>(y) * g.out_w + x] = best_class;
    }
}

int query_tiles_of(int queries) { return static_cast<int>(ceil_div(queries, kFragment)); }
int class_tiles_of(int classes) { return static_cast<int>(ceil_div(classes, kFragment)); }

template <typename T, int kTiles>
void launch_semantic(SemanticArgs const& args, T const* masks, cudaStream_t stream) {
    unsigned const grid = ceil_div(args.geometry.out_w, kTileWidth) * ceil_div(args.geometry.out_h, kTileHeight);
    with_steps(args.geometry, [&](auto pads, auto resizes) {
        launch("semantic", semantic_kernel<T, kTiles, decltype(pads)::value, decltype(resizes)::value>, grid, kThreads, 0,
               stream, args, masks, query_tiles_of(args.queries));
    });
}

}  // namespace

std::int64_t semantic_weights_bytes(int queries, int classes) {
    check_queries("semantic_weights_bytes", queries);
    check_classes("semantic_weights_bytes", classes);
    return 32ll * 2 * sizeof(uint4) * query_tiles_of(queries) * class_tiles_of(classes);
}

void semantic(SemanticArgs const& args, cudaStream_t stream) {
    check_geometry("semantic", args.geometry);
    check_queries("semantic", args.queries);
    check_classes("semantic", args.classes);
    check_masks("semantic", args.masks);
    check_pointer("semantic", "probs", args.probs);
    require(
        (args.scores == nullptr) != (args.labels == nullptr), "semantic: scores and labels are ",
        args.scores == nullptr ? "both null pointers" : "both given", "; expected one of them");
    if (args.scores != nullptr) check_pointer("semantic", "scores", args.scores, sizeof(float2));
    if (args.labels != nullptr) check_pointer("semantic", "labels", args.labels);
    check_pointer("semantic", "weights", args.weights);
    dim3 const tiles(query_tiles_of(args.queries), class_tiles_of(args.classes));
    launch("semantic weights", weights_kernel, tiles, 32, 0, stream, args.probs, args.queries, args.classes,
           static_cast<int>(tiles.x), args.weights);
    with_element_type(args.masks, [&](auto const* masks) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(masks)>>;
        // Two blocks fit a multiprocessor with up to 144 classes at once, one with up to 192.
        if (tiles.y > 3 * kShares) {
            launch_semantic<T, 4>(args, masks, stream);
        } else {
            launch_semantic<T, 3>(args, masks, stream);
        }
    });
}

}  // namespace d2_trt::postprocess
