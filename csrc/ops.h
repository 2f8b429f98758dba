// The operators on rows of logits, for any device.
//
// A device is a function `launch` that runs one packed call where the student's logits are. It raises for calls that
// its kernel can't run. The schemas of the operators are in bindings.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "pack.h"

namespace abkd {

using torch::stable::Tensor;

template <void (*launch)(const Rows& rows, const Tensor& student)>
struct RowOps {
  static Tensor row_losses(const Tensor& student, std::optional<Tensor> teacher, std::optional<Tensor> labels,
                           int64_t family, std::vector<double> parameters, double temperature, double hard_weight,
                           std::vector<double> maps, std::optional<Tensor> gradient, std::optional<Tensor> statistics,
                           std::optional<Tensor> upstream) {
    auto losses = torch::stable::new_empty(student, {student.size(0)}, loss_type(student));
    auto rows =
        pack({student, teacher, labels, gradient, statistics}, {family, parameters, temperature, hard_weight, maps});
    rows.losses = losses.data_ptr();
    rows.normalizes = true;
    if (upstream) rows.upstream = pack_upstream(*upstream, student);
    launch(rows, student);
    return losses;
  }

  static void row_gradients(const Tensor& student, std::optional<Tensor> teacher, std::optional<Tensor> labels,
                            int64_t family, std::vector<double> parameters, double temperature, double hard_weight,
                            std::vector<double> maps, const Tensor& statistics, const Tensor& upstream,
                            const Tensor& gradient) {
    auto rows =
        pack({student, teacher, labels, gradient, statistics}, {family, parameters, temperature, hard_weight, maps});
    rows.upstream = pack_upstream(upstream, student);
    launch(rows, student);
  }

  static void row_normalizers(const Tensor& student, std::optional<Tensor> teacher, double temperature,
                              double hard_weight, std::vector<double> maps, const Tensor& statistics) {
    launch(pack_normalizers(student, teacher, temperature, hard_weight, maps, statistics), student);
  }

  static Tensor row_sums(const Tensor& student, const Tensor& teacher, int64_t family, std::vector<double> parameters,
                         double temperature, std::vector<double> maps, const Tensor& statistics) {
    auto values = torch::stable::new_empty(student, {student.size(0)}, loss_type(student));
    auto rows =
        pack({student, teacher, std::nullopt, std::nullopt, statistics}, {family, parameters, temperature, 0.0, maps});
    rows.losses = values.data_ptr();
    launch(rows, student);
    return values;
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("row_losses", TORCH_BOX(&row_losses));
    library.impl("row_gradients", TORCH_BOX(&row_gradients));
    library.impl("row_normalizers", TORCH_BOX(&row_normalizers));
    library.impl("row_sums", TORCH_BOX(&row_sums));
  }
};

}  // namespace abkd
