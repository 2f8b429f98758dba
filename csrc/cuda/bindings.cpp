// The operator's CUDA kernel. A shared object of its own: its stream symbol exists only in CUDA builds of PyTorch.
#define USE_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../pack.h"
#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor row_losses_cuda(const Tensor& student, std::optional<Tensor> teacher, std::optional<Tensor> labels,
                       int64_t family, std::vector<double> parameters, double temperature, double hard_weight,
                       std::optional<Tensor> gradient) {
  STD_TORCH_CHECK(student.scalar_type() != ScalarType::Double, "float64 logits have no CUDA kernel");
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  auto losses = torch::stable::new_empty(student, {student.size(0)}, ScalarType::Float);
  const abkd::Rows rows =
      abkd::pack(student, teacher, labels, family, parameters, temperature, hard_weight, gradient, losses);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(student.get_device_index(), &stream) == 0, "no CUDA stream");
  const char* error = abkd::cuda::launch(rows, stream);
  STD_TORCH_CHECK(!error, "row kernel: ", error ? error : "");
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(abkd_fast, CUDA, library) { library.impl("row_losses", TORCH_BOX(&row_losses_cuda)); }
