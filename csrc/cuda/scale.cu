// Multiplies a gradient by the upstream gradient, which the host does not know. It usually is 1: then nothing is moved.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.h"

namespace abkd::cuda {
namespace {

constexpr int kScaleThreads = 256, kMostBlocks = 2048;

__global__ void scale_kernel(float* values, int64_t count, const float* factor) {
  const float x = *factor;
  if (x == 1.0f) return;
  const int64_t step = int64_t(gridDim.x) * kScaleThreads;
  for (int64_t i = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x; i < count; i += step) values[i] *= x;
}

}  // namespace

const char* scale(float* values, int64_t count, const float* factor, void* stream) {
  if (count == 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((count + kScaleThreads - 1) / kScaleThreads, kMostBlocks);
  scale_kernel<<<static_cast<unsigned>(blocks), kScaleThreads, 0, static_cast<cudaStream_t>(stream)>>>(values, count,
                                                                                                       factor);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace abkd::cuda
