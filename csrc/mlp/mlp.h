// A chain of linear layers with ReLU between them on few rows, with the LayerNorm before it or with residual and LayerNorm
// after it, in one kernel.
//
//     before:  out = L_n(relu(... relu(L_1(norm(x)))))
//     after:   out = norm(residual + L_n(relu(... relu(L_1(x))))), where the residual is x or another tensor
//
// Rows are few and weights are many: what takes the time is to bring the weights to the multiprocessors. Sixteen to sixty-four
// rows are the work of a cluster of up to eight blocks, each of which reads its part of every layer's weights and nothing
// else, and exchanges activations (a single layer's: statistics of rows) with the others through distributed shared memory. GPUs without clusters have one block in
// a cluster's place: right, and slower (mlp_cuda.pays says when an engine does better with TensorRT's own layers).
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/dtype.h"
#include "mlp/plan.h"

namespace d2_trt {

constexpr int kMlpWidthStep = 32;    // all widths are multiples of it
constexpr int kMaxMlpWidth = 8192;
constexpr int kMaxMlpNormBefore = 512;  // channels
constexpr int kMaxMlpNormAfter = 256;
// What a block may have on any GPU from 8.0 on.
constexpr int kMlpSharedBytes = 99 << 10;

struct MlpSizes {
    std::int64_t rows = 0;
    std::int32_t layers = 0;
    std::array<std::int32_t, kMaxMlpLayers + 1> widths{};  // channels of x, then of what each layer gives
    bool after = false;
};

// All in device memory, C-contiguous, aligned to 16 bytes, none overlapping `out` or `normed`.
//
// Weights (out, in) of a layer are made of blocks of 512 bytes for 8 output channels and 32 input channels (16 where `type`
// is float32), output channels first; in a block lane 4 g + t has 16 bytes: the output channel g's 8 (4) input channels from
// 8 t (4 t) on. A float32 weight is the sum of two bfloat16: four high parts, then four low ones.
struct MlpTensors {
    void const* x = nullptr;           // (rows, widths[0])
    void const* weights = nullptr;     // the layers' one after another
    float const* biases = nullptr;     // the layers' one after another
    float const* norm = nullptr;       // (2, C): weight, then bias
    void const* residual = nullptr;    // (rows, widths[layers]), with `after` only; or nullptr: x
    void* out = nullptr;               // (rows, widths[layers])
    void* normed = nullptr;            // (rows, widths[0]): norm(x), without `after` only; or nullptr
    DType type = DType::kFloat16;      // of the products; float32: of bfloat16 parts, about 16 bits
    DType x_type = DType::kFloat16;
    DType residual_type = DType::kFloat16;
    DType out_type = DType::kFloat16;
    DType normed_type = DType::kFloat32;
};

// Whether there is code for these sizes, whatever the rows.
bool mlp_takes(MlpSizes const& sizes, DType type);

// Bytes of all weights, and number of all biases.
std::int64_t mlp_weight_bytes(MlpSizes const& sizes, DType type);
std::int64_t mlp_biases(MlpSizes const& sizes);

// Throws std::invalid_argument where sizes, types or alignments are not allowed, std::runtime_error where CUDA refuses.
void mlp(MlpTensors const& tensors, MlpSizes const& sizes, float epsilon, cudaStream_t stream);

}  // namespace d2_trt
