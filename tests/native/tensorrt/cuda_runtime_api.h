// What csrc/trt_plugin and the headers of the kernels it runs use of CUDA's runtime, so that they compile without its toolkit.
#pragma once

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0 };
char const* cudaGetErrorName(cudaError_t error);
char const* cudaGetErrorString(cudaError_t error);
