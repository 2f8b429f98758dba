// The operator's CUDA kernel. A shared object of its own: its stream symbol exists only in CUDA builds of PyTorch.
#define USE_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../pack.h"
#include "launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void launch(const abkd::Rows& rows, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no CUDA stream");
  const char* error = abkd::cuda::launch(rows, stream);
  STD_TORCH_CHECK(!error, "row kernel: ", error ? error : "");
}

Tensor row_losses_cuda(const Tensor& student, std::optional<Tensor> teacher, std::optional<Tensor> labels,
                       int64_t family, std::vector<double> parameters, double temperature, double hard_weight,
                       std::optional<Tensor> gradient, std::optional<Tensor> statistics,
                       std::optional<Tensor> upstream) {
  STD_TORCH_CHECK(student.scalar_type() != ScalarType::Double, "float64 logits have no CUDA kernel");
  auto losses = torch::stable::new_empty(student, {student.size(0)}, ScalarType::Float);
  auto rows =
      abkd::pack({student, teacher, labels, gradient, statistics}, {family, parameters, temperature, hard_weight});
  rows.losses = losses.data_ptr();
  rows.normalizes = true;
  if (upstream) rows.upstream = abkd::pack_upstream(*upstream, student);
  launch(rows, student.get_device_index());
  return losses;
}

void row_gradients_cuda(const Tensor& student, std::optional<Tensor> teacher, std::optional<Tensor> labels,
                        int64_t family, std::vector<double> parameters, double temperature, double hard_weight,
                        const Tensor& statistics, const Tensor& upstream, const Tensor& gradient) {
  STD_TORCH_CHECK(student.scalar_type() != ScalarType::Double, "float64 logits have no CUDA kernel");
  auto rows =
      abkd::pack({student, teacher, labels, gradient, statistics}, {family, parameters, temperature, hard_weight});
  rows.upstream = abkd::pack_upstream(upstream, student);
  launch(rows, student.get_device_index());
}

void row_normalizers_cuda(const Tensor& student, std::optional<Tensor> teacher, double temperature, double hard_weight,
                          const Tensor& statistics) {
  STD_TORCH_CHECK(student.scalar_type() != ScalarType::Double, "float64 logits have no CUDA kernel");
  launch(abkd::pack_normalizers(student, teacher, temperature, hard_weight, statistics), student.get_device_index());
}

Tensor row_sums_cuda(const Tensor& student, const Tensor& teacher, int64_t family, std::vector<double> parameters,
                     double temperature, const Tensor& statistics) {
  STD_TORCH_CHECK(student.scalar_type() != ScalarType::Double, "float64 logits have no CUDA kernel");
  auto values = torch::stable::new_empty(student, {student.size(0)}, ScalarType::Float);
  auto rows =
      abkd::pack({student, teacher, std::nullopt, std::nullopt, statistics}, {family, parameters, temperature, 0.0});
  rows.losses = values.data_ptr();
  launch(rows, student.get_device_index());
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(abkd_fast, CUDA, library) {
  library.impl("row_losses", TORCH_BOX(&row_losses_cuda));
  library.impl("row_gradients", TORCH_BOX(&row_gradients_cuda));
  library.impl("row_normalizers", TORCH_BOX(&row_normalizers_cuda));
  library.impl("row_sums", TORCH_BOX(&row_sums_cuda));
}
