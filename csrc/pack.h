// From tensors to the plain description that the row drivers take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "rows.h"

namespace abkd {

inline DType dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "logits must be float32, float64, bfloat16 or float16");
  }
}

// Raises unless teacher and gradient look like student [N, V] with unit column stride, and labels are int64 [N].
inline Rows pack(const torch::stable::Tensor& student, const std::optional<torch::stable::Tensor>& teacher,
                 const std::optional<torch::stable::Tensor>& labels, int64_t family,
                 const std::vector<double>& parameters, double temperature, double hard_weight,
                 const std::optional<torch::stable::Tensor>& gradient, const torch::stable::Tensor& losses) {
  STD_TORCH_CHECK(student.dim() == 2, "logits must be [N, V], got ", student.dim(), " dimensions");
  const auto check = [&](const torch::stable::Tensor& logits, const char* name) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == student.size(0) && logits.size(1) == student.size(1), name,
                    " must have the shape of student, [", student.size(0), ", ", student.size(1), "]");
    STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, name,
                    " must have rows without gaps (stride(1) == 1)");
    STD_TORCH_CHECK(logits.scalar_type() == student.scalar_type(), name, " must have the dtype of student");
    STD_TORCH_CHECK(logits.device() == student.device(), name, " must be on the device of student");
  };
  check(student, "student");
  Rows rows{};
  rows.dtype = dtype_of(student);
  rows.count = student.size(0);
  rows.vocab = student.size(1);
  rows.student = student.data_ptr();
  rows.student_stride = student.stride(0);
  if (teacher) {
    check(*teacher, "teacher");
    rows.teacher = teacher->data_ptr();
    rows.teacher_stride = teacher->stride(0);
  }
  if (gradient) {
    check(*gradient, "gradient");
    rows.gradient = gradient->data_ptr();
    rows.gradient_stride = gradient->stride(0);
  }
  rows.family = static_cast<Family>(family);
  STD_TORCH_CHECK(rows.family == Family::cross_entropy || rows.family == Family::alpha_beta, "unknown family ", family);
  STD_TORCH_CHECK(teacher.has_value() || rows.family == Family::cross_entropy, "this divergence needs teacher logits");
  STD_TORCH_CHECK(parameters.size() == (rows.family == Family::alpha_beta ? 2 : 0),
                  "wrong number of parameters: ", parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) rows.parameters[i] = parameters[i];
  STD_TORCH_CHECK(temperature > 0.0, "temperature must be positive, got ", temperature);
  rows.temperature = temperature;
  rows.hard_weight = hard_weight;
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows.count &&
                        (rows.count <= 1 || labels->stride(0) == 1) &&
                        labels->scalar_type() == torch::headeronly::ScalarType::Long,
                    "labels must be contiguous int64 [", rows.count, "]");
    STD_TORCH_CHECK(labels->device() == student.device(), "labels must be on the device of student");
    rows.labels = static_cast<const int64_t*>(labels->data_ptr());
  }
  STD_TORCH_CHECK(labels.has_value() || hard_weight == 0.0, "hard_weight needs labels");
  rows.losses = losses.data_ptr();
  return rows;
}

}  // namespace abkd
