// Row driver for processors. A translation unit sets the instruction set, defines ABKD_ISA and includes this file; all
// it defines lies in namespace abkd::cpu::ABKD_ISA.
//
// Three passes over a row, in blocks that stay in the first-level cache: (A) log-normalisers, (B) values and slopes,
// (C) gradient. The slopes u of one row are kept between B and C, so that no exponential is computed twice.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "../divergence/alpha_beta.h"
#include "../divergence/cross_entropy.h"
#include "rows.h"

namespace abkd::cpu::ABKD_ISA {
namespace {

constexpr int64_t kBlock = 1024;

template <typename T>
struct LogNormalizer {
  T scale = T(1), max = T(kLogFloor);
  // log sum e^(x - max), as a number and the rest that it rounds away: an error common to all tokens would add up in
  // the sums over the vocabulary.
  T log_sum = T(0), log_sum_rest = T(0);

  // log softmax, with the maximum taken off first: exact for the likely tokens, where it matters
  ABKD_INLINE_MEMBER T operator()(T logit) const {
    return lower(logit * scale - max - log_sum - log_sum_rest, T(kLogFloor));
  }
  ABKD_INLINE_MEMBER double value() const { return double(max) + double(log_sum) + double(log_sum_rest); }
};

// A NaN logit does not show in `max`, but in the sum, and from there in the loss.
template <typename T>
LogNormalizer<T> log_normalizer(const T* logits, int64_t vocab, T scale) {
  LogNormalizer<T> normalizer;
  normalizer.scale = scale;
  double sum = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    T max = T(kLogFloor);
#pragma omp simd reduction(max : max)
    for (int64_t v = begin; v < end; ++v) max = max < logits[v] * scale ? logits[v] * scale : max;
    if (max > normalizer.max) {
      sum *= double(exponential(normalizer.max - max));
      normalizer.max = max;
    }
    const T shift = normalizer.max;
    double partial = 0.0;
#pragma omp simd reduction(+ : partial)
    for (int64_t v = begin; v < end; ++v)
      partial += double(exponential(lower(logits[v] * scale - shift, T(kLogFloor))));
    sum += partial;
  }
  const double log_sum = sum == 0.0 ? 0.0 : ::log(sum);  // 0: every logit is -inf
  normalizer.log_sum = T(log_sum);
  normalizer.log_sum_rest = T(log_sum - double(normalizer.log_sum));
  return normalizer;
}

// log q - log p. Straight from the logits, so that it is not rounded to the grid of log-probabilities near -35: where
// alpha + beta = 0 every token counts alike, and roundings that they share would add up.
template <typename T>
struct LogRatio {
  T scale, shift;
  LogRatio(const LogNormalizer<T>& student, const LogNormalizer<T>& teacher)
      : scale(student.scale), shift(T(student.value() - teacher.value())) {}

  ABKD_INLINE_MEMBER T operator()(T teacher, T student, T a, T b) const {
    const T d = bounded(student) - bounded(teacher) - shift;
    return a + b == T(2 * kLogFloor) ? T(0) : d;
  }

 private:
  ABKD_INLINE_MEMBER T bounded(T logit) const { return lower(logit * scale, T(kLogFloor)); }
};

template <typename T>
struct Sums {
  double value = 0.0, slope = 0.0;
};

template <bool kGradient, typename T, typename Divergence>
Sums<T> sum_terms(const Divergence& divergence, const T* student, const T* teacher, int64_t vocab,
                  LogNormalizer<T> student_norm, LogNormalizer<T> teacher_norm, T* slopes) {
  Sums<T> sums;
  const LogRatio<T> ratio(student_norm, teacher_norm);
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    double value = 0.0, slope = 0.0;
#pragma omp simd reduction(+ : value, slope)
    for (int64_t v = begin; v < end; ++v) {
      const T a = teacher_norm(teacher[v]), b = student_norm(student[v]);
      const auto term = divergence(a, b, ratio(teacher[v], student[v], a, b));
      value += double(term.value);
      slope += double(term.slope);
      if constexpr (kGradient) slopes[v] = term.slope;
    }
    sums.value += value;
    sums.slope += slope;
  }
  return sums;
}

// One row; `slopes` has room for vocab numbers. Reads all of `student` before it writes any of `gradient`.
template <typename T, typename Divergence>
double process_row(const Rows& rows, const Divergence& divergence, const T* student, const T* teacher, T* gradient,
                   int64_t label, T* slopes) {
  const int64_t vocab = rows.vocab;
  const bool hard = rows.hard_weight != 0.0;
  const T scale = T(1.0 / rows.temperature);
  LogNormalizer<T> plain;
  if (hard) plain = log_normalizer(student, vocab, T(1));
  const double target = hard ? double(student[label]) : 0.0;
  double loss = hard ? rows.hard_weight * (plain.value() - target) : 0.0;

  const T hard_weight = T(rows.hard_weight);
  if constexpr (Divergence::has_teacher) {
    const auto student_norm = hard && scale == T(1) ? plain : log_normalizer(student, vocab, scale);
    const auto teacher_norm = log_normalizer(teacher, vocab, scale);
    if (!gradient) {
      const auto sums = sum_terms<false>(divergence, student, teacher, vocab, student_norm, teacher_norm, slopes);
      return loss + (1.0 - rows.hard_weight) * sums.value;
    }
    const auto sums = sum_terms<true>(divergence, student, teacher, vocab, student_norm, teacher_norm, slopes);
    loss += (1.0 - rows.hard_weight) * sums.value;
    const T weight = T((1.0 - rows.hard_weight) / rows.temperature), total = T(sums.slope);
    if (hard) {
#pragma omp simd
      for (int64_t v = 0; v < vocab; ++v) {
        gradient[v] = weight * (slopes[v] - exponential(student_norm(student[v])) * total) +
                      hard_weight * exponential(plain(student[v]));
      }
    } else {
#pragma omp simd
      for (int64_t v = 0; v < vocab; ++v)
        gradient[v] = weight * (slopes[v] - exponential(student_norm(student[v])) * total);
    }
  } else if (gradient) {
#pragma omp simd
    for (int64_t v = 0; v < vocab; ++v) gradient[v] = hard_weight * exponential(plain(student[v]));
  }
  if (hard && gradient) gradient[label] -= hard_weight;
  return loss;
}

template <typename T, typename Logit>
const T* widen(const Logit* row, int64_t vocab, T* buffer) {
  if constexpr (std::is_same_v<T, Logit>) {
    return row;
  } else {
    for (int64_t v = 0; v < vocab; ++v) buffer[v] = T(row[v]);
    return buffer;
  }
}

template <typename Logit, typename T, typename Divergence>
void process_rows(const Rows& rows, const Divergence& divergence, int64_t begin, int64_t end) {
  const int64_t vocab = rows.vocab;
  constexpr bool wide = std::is_same_v<T, Logit>;
  std::vector<T> slopes(vocab), student_row(wide ? 0 : vocab), teacher_row(wide ? 0 : vocab);
  for (int64_t row = begin; row < end; ++row) {
    auto* gradient = static_cast<Logit*>(rows.gradient);
    if (gradient) gradient += row * rows.gradient_stride;
    const int64_t label = rows.labels ? rows.labels[row] : 0;
    double loss = 0.0;
    if (label == kIgnored) {
      for (int64_t v = 0; gradient && v < vocab; ++v) gradient[v] = Logit(0);
    } else {
      const auto* student = static_cast<const Logit*>(rows.student) + row * rows.student_stride;
      const T* z = widen<T>(student, vocab, student_row.data());
      const T* y = nullptr;
      if constexpr (Divergence::has_teacher)
        y = widen<T>(static_cast<const Logit*>(rows.teacher) + row * rows.teacher_stride, vocab, teacher_row.data());
      if constexpr (wide) {
        loss = process_row(rows, divergence, z, y, gradient, label, slopes.data());
      } else {
        T* wide_gradient = gradient ? student_row.data() : nullptr;
        loss = process_row(rows, divergence, z, y, wide_gradient, label, slopes.data());
        for (int64_t v = 0; gradient && v < vocab; ++v) gradient[v] = Logit(wide_gradient[v]);
      }
    }
    if constexpr (std::is_same_v<T, double>)
      static_cast<double*>(rows.losses)[row] = loss;
    else
      static_cast<float*>(rows.losses)[row] = float(loss);
  }
}

template <typename Logit, typename T>
void select_family(const Rows& rows, int64_t begin, int64_t end) {
  switch (rows.family) {
    case Family::cross_entropy:
      return process_rows<Logit, T>(rows, CrossEntropy{}, begin, end);
    case Family::alpha_beta:
      return process_rows<Logit, T>(rows, AlphaBeta<T>(rows.parameters[0], rows.parameters[1]), begin, end);
  }
}

}  // namespace

void drive(const Rows& rows, int64_t begin, int64_t end) {
  switch (rows.dtype) {
    case DType::float32:
      return select_family<float, float>(rows, begin, end);
    case DType::float64:
      return select_family<double, double>(rows, begin, end);
    case DType::bfloat16:
      return select_family<torch::headeronly::BFloat16, float>(rows, begin, end);
    case DType::float16:
      return select_family<torch::headeronly::Half, float>(rows, begin, end);
  }
}

}  // namespace abkd::cpu::ABKD_ISA
