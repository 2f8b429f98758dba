#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "launch.h"
#include "rows.cuh"

namespace abkd::cuda {
namespace {

template <typename Logit, typename Divergence>
cudaError_t launch_kernel(const Rows& rows, const Divergence& divergence, cudaStream_t stream) {
  int device = 0, limit = 0;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  // A call that makes only normalizers, or reads statistics, takes one pass: it has nothing to keep.
  const int64_t bytes = row_bytes<Logit>(rows.vocab), room = limit - int64_t(sizeof(Scratch));
  const int wanted = rows.normalizes && rows.losses ? (Divergence::has_teacher ? 2 : 1) : 0;
  const int kept = bytes > room ? 0 : 2 * bytes > room ? std::min(wanted, 1) : wanted;
  const auto kernel = row_kernel<Logit, Divergence>;
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kept * bytes)))
    return error;
  kernel<<<static_cast<unsigned>(rows.count), kThreads, size_t(kept * bytes), stream>>>(rows, divergence, kept);
  return cudaGetLastError();
}

template <typename Logit>
cudaError_t select_family(const Rows& rows, cudaStream_t stream) {
  return with_divergence<float>(rows,
                                [&](const auto& divergence) { return launch_kernel<Logit>(rows, divergence, stream); });
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
  if (rows.vocab > std::numeric_limits<int>::max()) return "the vocabulary has more than 2^31 - 1 entries";
  const cudaError_t error = select_dtype(rows, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace abkd::cuda
