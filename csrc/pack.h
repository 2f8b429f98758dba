// Checks the tensors of a call, and packs them into the plain description that the drivers take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "divergence/families.h"
#include "row_call.h"

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

// The tensors of one call. A tensor that the call does not have is empty.
struct Operands {
  const torch::stable::Tensor& student;
  const std::optional<torch::stable::Tensor>& teacher;
  const std::optional<torch::stable::Tensor>& labels;
  const std::optional<torch::stable::Tensor>& gradient;
  const std::optional<torch::stable::Tensor>& statistics;
};

struct Loss {
  int64_t family;
  const std::vector<double>& parameters;
  double temperature, hard_weight;
  const std::vector<double>& maps;  // scale and cap of the student's logits, then of the teacher's; or empty
};

// Raises unless teacher and gradient have the shape [N, V] of student, with unit column stride, labels are int64 [N],
// and statistics are float64 [N, 6]. If one of student, teacher and gradient is float64, all must be. The caller sets
// `losses`, `upstream` and `normalizes`.
inline Rows pack(const Operands& operands, const Loss& loss) {
  const auto& [student, teacher, labels, gradient, statistics] = operands;
  STD_TORCH_CHECK(student.dim() == 2, "logits must be [N, V], got ", student.dim(), " dimensions");
  const auto check = [&](const torch::stable::Tensor& logits, const char* name) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == student.size(0) && logits.size(1) == student.size(1), name,
                    " must have the shape of student, [", student.size(0), ", ", student.size(1), "]");
    STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, name,
                    " must have rows without gaps (stride(1) == 1)");
    STD_TORCH_CHECK((dtype_of(logits) == DType::float64) == (dtype_of(student) == DType::float64), name,
                    " must be float64 if student is, and only then");
    STD_TORCH_CHECK(logits.device() == student.device(), name, " must be on the device of student");
  };
  check(student, "student");
  Rows rows{};
  rows.count = student.size(0);
  rows.vocab = student.size(1);
  STD_TORCH_CHECK(loss.maps.empty() || loss.maps.size() == 4, "maps must have 4 numbers, got ", loss.maps.size());
  const auto map = [&](size_t i) { return loss.maps.empty() ? Map{} : Map{loss.maps[i], loss.maps[i + 1]}; };
  rows.student = {student.data_ptr(), student.stride(0), dtype_of(student), map(0)};
  if (teacher) {
    check(*teacher, "teacher");
    rows.teacher = {teacher->data_ptr(), teacher->stride(0), dtype_of(*teacher), map(2)};
  }
  if (gradient) {
    check(*gradient, "gradient");
    rows.gradient = gradient->data_ptr();
    rows.gradient_stride = gradient->stride(0);
    rows.gradient_dtype = dtype_of(*gradient);
    STD_TORCH_CHECK(rows.gradient != rows.student.data || rows.gradient_dtype == rows.student.dtype,
                    "a gradient in place of the logits must have their dtype");
  }
  rows.family = static_cast<Family>(loss.family);
  const int expected = parameter_count(rows.family);
  STD_TORCH_CHECK(expected >= 0, "unknown family ", loss.family);
  STD_TORCH_CHECK(expected <= kParameters, "kParameters in row_call.h is too small for family ", loss.family);
  STD_TORCH_CHECK(teacher.has_value() || rows.family == Family::cross_entropy, "this divergence needs teacher logits");
  STD_TORCH_CHECK(int(loss.parameters.size()) == expected, "family ", loss.family, " has ", expected,
                  " parameters, got ", loss.parameters.size());
  for (int i = 0; i < expected; ++i) rows.parameters[i] = loss.parameters[i];
  STD_TORCH_CHECK(loss.temperature > 0.0, "temperature must be positive, got ", loss.temperature);
  rows.temperature = loss.temperature;
  rows.hard_weight = loss.hard_weight;
  if (labels) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows.count &&
                        (rows.count <= 1 || labels->stride(0) == 1) &&
                        labels->scalar_type() == torch::headeronly::ScalarType::Long,
                    "labels must be contiguous int64 [", rows.count, "]");
    STD_TORCH_CHECK(labels->device() == student.device(), "labels must be on the device of student");
    rows.labels = static_cast<const int64_t*>(labels->data_ptr());
  }
  STD_TORCH_CHECK(labels.has_value() || loss.hard_weight == 0.0, "hard_weight needs labels");
  if (statistics) {
    STD_TORCH_CHECK(
        statistics->dim() == 2 && statistics->size(0) == rows.count &&
            statistics->size(1) * int64_t(sizeof(double)) == int64_t(sizeof(Statistics)) &&
            statistics->is_contiguous() && statistics->scalar_type() == torch::headeronly::ScalarType::Double,
        "statistics must be contiguous float64 [", rows.count, ", ", sizeof(Statistics) / sizeof(double), "]");
    STD_TORCH_CHECK(statistics->device() == student.device(), "statistics must be on the device of student");
    rows.statistics = static_cast<Statistics*>(statistics->data_ptr());
  }
  return rows;
}

// Packs a call that makes only the log-normalizers.
inline Rows pack_normalizers(const torch::stable::Tensor& student, const std::optional<torch::stable::Tensor>& teacher,
                             double temperature, double hard_weight, const std::vector<double>& maps,
                             const torch::stable::Tensor& statistics) {
  // Any divergence between two distributions will do: they all need the same log-normalizers.
  const Family family = teacher ? Family::total_variation : Family::cross_entropy;
  Rows rows =
      pack({student, teacher, std::nullopt, std::nullopt, statistics}, {int64_t(family), {}, temperature, 0.0, maps});
  rows.hard_weight = hard_weight;
  rows.normalizes = true;
  return rows;
}

// The type of the losses, and of the factors of the gradients.
inline torch::headeronly::ScalarType loss_type(const torch::stable::Tensor& student) {
  using torch::headeronly::ScalarType;
  return student.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Raises unless upstream [N] has the type of the losses.
inline const void* pack_upstream(const torch::stable::Tensor& upstream, const torch::stable::Tensor& student) {
  STD_TORCH_CHECK(upstream.dim() == 1 && upstream.size(0) == student.size(0) && upstream.is_contiguous() &&
                      upstream.scalar_type() == loss_type(student) && upstream.device() == student.device(),
                  "upstream must be contiguous [", student.size(0), "] in the type of the losses");
  return upstream.data_ptr();
}

}  // namespace abkd
