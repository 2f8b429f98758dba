// The operators' schemas, the operators on CPU tensors, and the Python module, which says how it was built.
//
// The operators use only the stable ABI of PyTorch (2.10 and later), so one build serves every later release.
#pragma push_macro("TORCH_TARGET_VERSION")  // the pybind11 in torch 2.10 to 2.12 refuses to be beside it
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#pragma pop_macro("TORCH_TARGET_VERSION")
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/launch.h"
#include "ops.h"

namespace {

void launch_on_threads(const abkd::Rows& rows, const torch::stable::Tensor&) {
  for (int64_t row = 0; rows.labels && rows.hard_weight != 0.0 && row < rows.count; ++row) {
    const int64_t label = rows.labels[row];
    STD_TORCH_CHECK(
        label == abkd::kIgnored || (0 <= label && label < rows.vocab) || (label == abkd::kElsewhere && !rows.losses),
        "labels[", row, "] is ", label, ", expected -100 or 0 to ", rows.vocab - 1);
  }
  static const auto choice = abkd::cpu::choose();
  torch::stable::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) { choice.drive(rows, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY(abkd_fast, library) {
  library.def(
      "row_losses(Tensor student, Tensor? teacher, Tensor? labels, int family, float[] parameters, float temperature, "
      "float hard_weight, float[] maps, Tensor(a!)? gradient, Tensor(b!)? statistics, Tensor? upstream) -> Tensor");
  library.def(
      "row_gradients(Tensor student, Tensor? teacher, Tensor? labels, int family, float[] parameters, "
      "float temperature, float hard_weight, float[] maps, Tensor statistics, Tensor upstream, Tensor(a!) gradient) -> "
      "()");
  library.def(
      "row_normalizers(Tensor student, Tensor? teacher, float temperature, float hard_weight, float[] maps, Tensor(a!) "
      "statistics) "
      "-> ()");
  library.def(
      "row_sums(Tensor student, Tensor teacher, int family, float[] parameters, float temperature, "
      "float[] maps, Tensor(a!) statistics) -> Tensor");
  library.def("scale_known_later_(Tensor(a!) values, Tensor factor) -> ()");  // on CUDA tensors only
}

STABLE_TORCH_LIBRARY_IMPL(abkd_fast, CPU, library) { abkd::RowOps<launch_on_threads>::implement(library); }

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
