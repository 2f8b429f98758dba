// The operator's schema, its CPU kernel, and the Python module that imports it and says how it was built.
//
// Only the stable ABI of PyTorch (2.10 and later) is used for operators, so one build serves every later release.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/launch.h"
#include "pack.h"

namespace {

using torch::stable::Tensor;

void drive(const abkd::Rows& rows) {
  for (int64_t row = 0; rows.labels && rows.hard_weight != 0.0 && row < rows.count; ++row) {
    const int64_t label = rows.labels[row];
    STD_TORCH_CHECK(
        label == abkd::kIgnored || (0 <= label && label < rows.vocab) || (label == abkd::kElsewhere && !rows.losses),
        "labels[", row, "] is ", label, ", expected -100 or 0 to ", rows.vocab - 1);
  }
  static const auto choice = abkd::cpu::choose();
  torch::stable::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) { choice.drive(rows, begin, end); });
}

Tensor row_losses_cpu(const Tensor& student, std::optional<Tensor> teacher, std::optional<Tensor> labels,
                      int64_t family, std::vector<double> parameters, double temperature, double hard_weight,
                      std::optional<Tensor> gradient, std::optional<Tensor> statistics,
                      std::optional<Tensor> upstream) {
  auto losses = torch::stable::new_empty(student, {student.size(0)}, abkd::loss_type(student));
  auto rows =
      abkd::pack({student, teacher, labels, gradient, statistics}, {family, parameters, temperature, hard_weight});
  rows.losses = losses.data_ptr();
  rows.normalizes = true;
  if (upstream) rows.upstream = abkd::pack_upstream(*upstream, student);
  drive(rows);
  return losses;
}

void row_gradients_cpu(const Tensor& student, std::optional<Tensor> teacher, std::optional<Tensor> labels,
                       int64_t family, std::vector<double> parameters, double temperature, double hard_weight,
                       const Tensor& statistics, const Tensor& upstream, const Tensor& gradient) {
  auto rows =
      abkd::pack({student, teacher, labels, gradient, statistics}, {family, parameters, temperature, hard_weight});
  rows.upstream = abkd::pack_upstream(upstream, student);
  drive(rows);
}

void row_normalizers_cpu(const Tensor& student, std::optional<Tensor> teacher, double temperature, double hard_weight,
                         const Tensor& statistics) {
  drive(abkd::pack_normalizers(student, teacher, temperature, hard_weight, statistics));
}

Tensor row_sums_cpu(const Tensor& student, const Tensor& teacher, int64_t family, std::vector<double> parameters,
                    double temperature, const Tensor& statistics) {
  auto values = torch::stable::new_empty(student, {student.size(0)}, abkd::loss_type(student));
  auto rows =
      abkd::pack({student, teacher, std::nullopt, std::nullopt, statistics}, {family, parameters, temperature, 0.0});
  rows.losses = values.data_ptr();
  drive(rows);
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY(abkd_fast, library) {
  library.def(
      "row_losses(Tensor student, Tensor? teacher, Tensor? labels, int family, float[] parameters, float temperature, "
      "float hard_weight, Tensor(a!)? gradient, Tensor(b!)? statistics, Tensor? upstream) -> Tensor");
  library.def(
      "row_gradients(Tensor student, Tensor? teacher, Tensor? labels, int family, float[] parameters, "
      "float temperature, float hard_weight, Tensor statistics, Tensor upstream, Tensor(a!) gradient) -> ()");
  library.def(
      "row_normalizers(Tensor student, Tensor? teacher, float temperature, float hard_weight, Tensor(a!) statistics) "
      "-> ()");
  library.def(
      "row_sums(Tensor student, Tensor teacher, int family, float[] parameters, float temperature, "
      "Tensor(a!) statistics) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(abkd_fast, CPU, library) {
  library.impl("row_losses", TORCH_BOX(&row_losses_cpu));
  library.impl("row_gradients", TORCH_BOX(&row_gradients_cpu));
  library.impl("row_normalizers", TORCH_BOX(&row_normalizers_cpu));
  library.impl("row_sums", TORCH_BOX(&row_sums_cpu));
}

PYBIND11_MODULE(_C, module) {
  // Fresh memory of many megabytes costs more time in page faults than in arithmetic.
  module.def("advise_huge_pages", [](uintptr_t address, size_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 4096, begin = (address + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(begin), bytes - (begin - address), MADV_HUGEPAGE);
#endif
  });
  module.def("build_info", [] {
    pybind11::dict info;
    info["cuda"] = ABKD_CUDA_VERSION[0] ? pybind11::object(pybind11::str(ABKD_CUDA_VERSION)) : pybind11::none();
    info["cuda_archs"] = pybind11::str(ABKD_CUDA_ARCHS).attr("split")();
    info["simd"] = abkd::cpu::choose().name;
    info["compiler"] = ABKD_COMPILER;
    return info;
  });
}
