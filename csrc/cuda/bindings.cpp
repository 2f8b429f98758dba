// The operators on CUDA tensors. A shared object of its own: its stream symbol exists only in CUDA builds of PyTorch.
#define USE_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../ops.h"
#include "launch.h"

namespace {

using torch::stable::Tensor;

// Calls launch(stream) on the current stream of the tensor's device. It returns the text of an error, or null.
template <typename Launch>
void on_stream(const Tensor& tensor, Launch launch) {
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no CUDA stream");
  const char* error = launch(stream);
  STD_TORCH_CHECK(!error, "CUDA kernel: ", error ? error : "");
}

void launch_on_stream(const abkd::Rows& rows, const Tensor& student) {
  STD_TORCH_CHECK(rows.student.dtype != abkd::DType::float64, "float64 logits have no CUDA kernel");
  on_stream(student, [&](void* stream) { return abkd::cuda::launch(rows, stream); });
}

void scale_(const Tensor& values, const Tensor& factor) {
  const auto is_float = [](const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; };
  STD_TORCH_CHECK(is_float(values) && values.is_contiguous(), "values must be contiguous float32");
  STD_TORCH_CHECK(is_float(factor) && factor.numel() == 1 && factor.device() == values.device(),
                  "factor must be one float32 on the device of values");
  on_stream(values, [&](void* stream) {
    return abkd::cuda::scale(static_cast<float*>(values.data_ptr()), values.numel(),
                             static_cast<const float*>(factor.data_ptr()), stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(abkd_fast, CUDA, library) {
  abkd::RowOps<launch_on_stream>::implement(library);
  library.impl("scale_known_later_", TORCH_BOX(&scale_));
}
