#include <cuda_runtime.h>

#include "rows.cuh"
#include "rows.h"

namespace abkd::cuda {
namespace {

template <typename Logit, typename Divergence>
cudaError_t launch_kernel(const Rows& rows, const Divergence& divergence, cudaStream_t stream) {
  int device = 0, limit = 0;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  const int64_t kept = row_bytes<Logit>(rows.vocab) * (Divergence::has_teacher ? 2 : 1);
  const auto blocks = static_cast<unsigned>(rows.count);
  if (kept + int64_t(kWarps * sizeof(float2)) <= limit) {
    const auto kernel = row_kernel<Logit, Divergence, true>;
    if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kept))) return error;
    kernel<<<blocks, kThreads, size_t(kept), stream>>>(rows, divergence);
  } else {
    row_kernel<Logit, Divergence, false><<<blocks, kThreads, 0, stream>>>(rows, divergence);
  }
  return cudaGetLastError();
}

template <typename Logit>
cudaError_t select_family(const Rows& rows, cudaStream_t stream) {
  switch (rows.family) {
    case Family::cross_entropy:
      return launch_kernel<Logit>(rows, CrossEntropy{}, stream);
    case Family::alpha_beta:
      return launch_kernel<Logit>(rows, AlphaBeta<float>(rows.parameters[0], rows.parameters[1]), stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t select_dtype(const Rows& rows, cudaStream_t stream) {
  switch (rows.dtype) {
    case DType::float32:
      return select_family<float>(rows, stream);
    case DType::bfloat16:
      return select_family<__nv_bfloat16>(rows, stream);
    case DType::float16:
      return select_family<__half>(rows, stream);
    case DType::float64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* launch(const Rows& rows, void* stream) {
  if (rows.count == 0) return nullptr;
  const cudaError_t error = select_dtype(rows, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace abkd::cuda
