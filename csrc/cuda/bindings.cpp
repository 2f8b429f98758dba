// The operators on CUDA tensors. A shared object of its own: its stream symbol exists only in CUDA builds of PyTorch.
#define USE_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../ops.h"
#include "launch.h"

namespace {

void launch_on_stream(const abkd::Rows& rows, const torch::stable::Tensor& student) {
  STD_TORCH_CHECK(rows.student.dtype != abkd::DType::float64, "float64 logits have no CUDA kernel");
  const int32_t device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no CUDA stream");
  const char* error = abkd::cuda::launch(rows, stream);
  STD_TORCH_CHECK(!error, "row kernel: ", error ? error : "");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(abkd_fast, CUDA, library) { abkd::RowOps<launch_on_stream>::implement(library); }
