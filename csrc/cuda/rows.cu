#include <cuda_runtime.h>

#include <atomic>
#include <limits>

#include "launch.h"
#include "rows.cuh"

namespace abkd::cuda {
namespace {

constexpr int kDevices = 64;

// The dynamic shared memory that blocks of this kernel may have on the current device.
template <typename Divergence>
cudaError_t find_room(int* room) {
  static std::atomic<int> known[kDevices];  // 0 until asked
  int device = 0;
  if (auto error = cudaGetDevice(&device)) return error;
  if (device >= kDevices) return cudaErrorInvalidDevice;
  if ((*room = known[device])) return cudaSuccess;
  const auto kernel = row_kernel<Divergence>;
  cudaFuncAttributes attributes;
  if (auto error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  if (auto error = cudaDeviceGetAttribute(room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  *room -= int(attributes.sharedSizeBytes);
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, *room)) return error;
  known[device] = *room;
  return cudaSuccess;
}

template <typename Divergence>
cudaError_t launch_kernel(const Rows& rows, const Divergence& divergence, cudaStream_t stream) {
  int room = 0;
  if (auto error = find_room<Divergence>(&room)) return error;
  // A call that makes only normalizers, or reads statistics, takes one pass: it has nothing to keep.
  const int wanted = rows.normalizes && rows.losses ? (Divergence::has_teacher ? 2 : 1) : 0;
  int kept = 0;
  for (int64_t bytes = kept_bytes(rows, kept + 1); kept < wanted && bytes <= room; bytes = kept_bytes(rows, kept + 1))
    ++kept;
  const size_t bytes = size_t(kept_bytes(rows, kept));
  row_kernel<Divergence><<<static_cast<unsigned>(rows.count), kThreads, bytes, stream>>>(rows, divergence, kept);
  return cudaGetLastError();
}

}  // namespace

const char* launch(const Rows& rows, void* stream) {
  if (rows.count == 0) return nullptr;
  if (rows.vocab > std::numeric_limits<int>::max()) return "the vocabulary has more than 2^31 - 1 entries";
  const cudaError_t error = with_divergence<float>(
      rows, [&](const auto& divergence) { return launch_kernel(rows, divergence, static_cast<cudaStream_t>(stream)); });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace abkd::cuda
