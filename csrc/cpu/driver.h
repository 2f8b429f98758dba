// The row driver for CPUs. A translation unit sets the instruction set, defines ABKD_ISA and includes this file. All
// definitions lie in namespace abkd::cpu::ABKD_ISA.
//
// A row takes three passes, in blocks that stay in the first-level cache: (A) log-normalizers, (B) values and slopes,
// (C) gradient. If one call makes B and C, it keeps the slopes of the row between them, and computes no exponential
// twice. Sums over the vocabulary are in float64, except the sums of values and slopes within a block. All tokens share
// the rounding error of a log-normalizer, so it would add up; the errors of values and slopes are independent.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../divergence/families.h"
#include "launch.h"

namespace abkd::cpu::ABKD_ISA {
namespace {

constexpr int64_t kBlock = 512;

// log sum exp of scale * logits. A NaN logit does not change the maximum, but makes the sum NaN.
template <typename T>
double log_sum_exp(const T* logits, int64_t vocab, T scale) {
  T shift = T(kLogFloor);
  double sum = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    T max = T(kLogFloor);
#pragma omp simd reduction(max : max)
    for (int64_t v = begin; v < end; ++v) max = max < logits[v] * scale ? logits[v] * scale : max;
    if (max > shift) {
      sum *= double(exponential(shift - max));
      shift = max;
    }
    double partial = 0.0;
#pragma omp simd reduction(+ : partial)
    for (int64_t v = begin; v < end; ++v) partial += double(exponential(logits[v] * scale - shift));
    sum += partial;
  }
  return double(shift) + (sum == 0.0 ? 0.0 : ::log(sum));  // 0: every logit is -inf
}

template <typename T>
struct LogSoftmax {
  T scale, high, low;  // the log-normalizer, and the rest that rounding to T takes from it

  LogSoftmax(T scale, double lse) : scale(scale), high(T(lse)), low(T(lse - double(high))) {}
  ABKD_INLINE_MEMBER T operator()(T logit) const { return logit * scale - high - low; }
};

template <typename T>
struct Likely {
  std::vector<T> log_p;
  int64_t count;

  template <typename Functor>
  ABKD_INLINE_MEMBER Pair<double> sum(const Functor& functor) const {
    const T* begin = log_p.data();
    double first = 0.0, second = 0.0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t i = 0; i < count; ++i) {
      const Pair<T> terms = functor(begin[i]);
      first += double(terms.first);
      second += double(terms.second);
    }
    return {first, second};
  }
};

// Both distributions of one token.
template <typename T>
struct Row {
  const T *student, *teacher;  // [vocab]
  int64_t vocab;
  LogSoftmax<T> log_q, log_p;
  T shift;  // difference of the log-normalizers

  Row(const T* student, const T* teacher, int64_t vocab, T scale, const Statistics& statistics)
      : student(student),
        teacher(teacher),
        vocab(vocab),
        log_q(scale, statistics.student_lse),
        log_p(scale, statistics.teacher_lse),
        shift(T(statistics.student_lse - statistics.teacher_lse)) {}

  // functor(log p, log q, log q - log p) for token v. The difference is made from the logits, because log-probabilities
  // near -35 have few digits left: if alpha + beta = 0 every token counts the same, and the rounding errors that the
  // tokens share would add up. Two masked logits differ by 0.
  template <typename Functor>
  ABKD_INLINE_MEMBER auto apply(const Functor& functor, int64_t v) const {
    const T z = lower(student[v] * log_q.scale, T(kLogFloor)), y = lower(teacher[v] * log_p.scale, T(kLogFloor));
    const T a = y - log_p.high - log_p.low, b = z - log_q.high - log_q.low;
    return functor(a, b, z + y == T(2 * kLogFloor) ? T(0) : z - y - shift);
  }

  // Sums the pairs that functor makes. With kKeep, `seconds` [vocab] receives the second number of each pair.
  template <bool kKeep = false, typename Functor>
  ABKD_INLINE_MEMBER Pair<double> sum(const Functor& functor, T* seconds = nullptr) const {
    Pair<double> total{};
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
      const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
      T first = T(0), second = T(0);
#pragma omp simd reduction(+ : first, second)
      for (int64_t v = begin; v < end; ++v) {
        const Pair<T> terms = apply(functor, v);
        first += terms.first;
        second += terms.second;
        if constexpr (kKeep) seconds[v] = terms.second;
      }
      total.first += double(first);
      total.second += double(second);
    }
    return total;
  }

  T largest_log_p() const {
    T max = T(kLogFloor);
#pragma omp simd reduction(max : max)
    for (int64_t v = 0; v < vocab; ++v) max = max < log_p(teacher[v]) ? log_p(teacher[v]) : max;
    return max;
  }

  // functor(log p, log q, log q - log p) for the student's likeliest token, the first if there are several.
  template <typename Functor>
  auto at_likeliest(const Functor& functor) const {
    T largest = T(kLogFloor);
    int64_t block = 0;
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
      const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
      T max = largest;
#pragma omp simd reduction(max : max)
      for (int64_t v = begin; v < end; ++v) max = max < student[v] ? student[v] : max;
      if (max > largest) block = begin;
      largest = max;
    }
    int64_t v = block;
    while (v + 1 < vocab && student[v] < largest) ++v;
    return apply(functor, v);
  }

  // Gathers the log p that are at least `least`. They are few, and many sums over them follow.
  Likely<T> likely(T least) const {
    std::vector<T> gathered(vocab);
    int64_t count = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      gathered[count] = log_p(teacher[v]);
      count += gathered[count] >= least;
    }
    return {std::move(gathered), count};
  }
};

// The divergence as it is on this row. `state` is written if `measure` is true, else read.
template <typename T, typename Divergence>
ABKD_INLINE auto adapt(const Divergence& divergence, const Row<T>& row, bool measure, double (&state)[2]) {
  if constexpr (Divergence::adapts) {
    if (measure) {
      const Pair<double> measured = divergence.state(row);
      state[0] = measured.first;
      state[1] = measured.second;
    }
    return divergence.at({state[0], state[1]});
  } else {
    return divergence;
  }
}

// The sum of slopes over the divergence, where that is a constant: an alpha-divergence is (1 - M) / (alpha beta) with
// M = sum p^alpha q^beta, and its slopes have the sum (1 - M) / alpha. Then values alone are summed.
template <typename Divergence>
std::optional<double> slope_ratio(const Divergence&) {
  return std::nullopt;
}
template <typename T>
std::optional<double> slope_ratio(const AlphaBeta<T>& divergence) {
  return divergence.sum == T(1) ? std::optional(1.0 - double(divergence.alpha)) : std::nullopt;
}
template <typename T>
std::optional<double> slope_ratio(const AlphaDivergenceTerm<T>& divergence) {
  return divergence.of_mixed == T(0) ? slope_ratio(divergence.plain) : std::nullopt;
}

// Pass A: fills the log-normalizers of `statistics`.
template <typename T, typename Divergence>
void normalize(const Rows& rows, const T* student, const T* teacher, Statistics& statistics) {
  const bool hard = rows.hard_weight != 0.0;
  const T scale = T(1.0 / rows.temperature);
  if (hard) statistics.plain_lse = log_sum_exp(student, rows.vocab, T(1));
  if constexpr (Divergence::has_teacher) {
    const bool same = hard && scale == T(1);
    statistics.student_lse = same ? statistics.plain_lse : log_sum_exp(student, rows.vocab, scale);
    statistics.teacher_lse = log_sum_exp(teacher, rows.vocab, scale);
  }
}

// Pass B: returns the loss, and fills the rest of `statistics` and, if not null, `slopes` [vocab].
template <typename T, typename Divergence>
double measure(const Rows& rows, const Divergence& divergence, const T* student, const T* teacher, int64_t label,
               Statistics& statistics, T* slopes) {
  double loss = 0.0;
  if (rows.hard_weight != 0.0) loss = rows.hard_weight * (statistics.plain_lse - double(student[label]));
  if constexpr (Divergence::has_teacher) {
    const Row<T> row(student, teacher, rows.vocab, T(1.0 / rows.temperature), statistics);
    if constexpr (std::is_same_v<Divergence, AlphaNet<T>>) {
      if (!rows.normalizes && statistics.state[0] == kBothBranches) {
        const Pair<double> values = divergence.values(row);
        statistics.slope = values.second;
        return values.first;
      }
    }
    const auto adapted = adapt(divergence, row, rows.normalizes, statistics.state);
    const auto both = [&adapted](T a, T b, T d) {
      const Term<T> term = adapted(a, b, d);
      return Pair<T>{term.value, term.slope};
    };
    Pair<double> sums;
    if (slopes) {
      sums = row.template sum<true>(both, slopes);
    } else if (const std::optional<double> ratio = slope_ratio(adapted)) {
      sums.first = row.sum([&adapted](T a, T b, T d) { return Pair<T>{adapted(a, b, d).value, T(0)}; }).first;
      sums.second = *ratio * sums.first;
    } else {
      sums = row.sum(both);
    }
    statistics.slope = sums.second;
    loss += (1.0 - rows.hard_weight) * sums.first;
  }
  return loss;
}

// Pass C: fills `gradient` [vocab], which may be `student`. `slopes` [vocab] come from `measure`, or are null.
template <typename T, typename Divergence>
void differentiate(const Rows& rows, const Divergence& divergence, const T* student, const T* teacher, int64_t label,
                   Statistics& statistics, const T* slopes, double upstream, T* gradient) {
  const bool hard = rows.hard_weight != 0.0;
  const T scale = T(1.0 / rows.temperature), total = T(statistics.slope);
  const T weight = T(upstream * (1.0 - rows.hard_weight) / rows.temperature);
  const T hard_weight = T(upstream * rows.hard_weight);
  const LogSoftmax<T> plain(T(1), statistics.plain_lse);
  const Row<T> row(student, teacher, rows.vocab, scale, statistics);
  const auto adapted = adapt(divergence, row, false, statistics.state);
  for (int64_t begin = 0; begin < rows.vocab; begin += kBlock) {
    const int64_t size = rows.vocab - begin < kBlock ? rows.vocab - begin : kBlock;
    T block[kBlock] = {};
    if constexpr (Divergence::has_teacher) {
      if (slopes) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) block[i] = slopes[begin + i];
      } else {
        const auto slope = [adapted](T a, T b, T d) { return adapted.slope(a, b, d); };
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) block[i] = row.apply(slope, begin + i);
      }
#pragma omp simd
      for (int64_t i = 0; i < size; ++i)
        block[i] = weight * (block[i] - exponential(row.log_q(student[begin + i])) * total);
    }
    if (hard) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) block[i] += hard_weight * exponential(plain(student[begin + i]));
    }
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) gradient[begin + i] = block[i];
  }
  if (hard && label != kElsewhere) gradient[label] -= hard_weight;
}

// Calls run with a null pointer to the type.
template <typename Run>
auto with_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::float64:
      return run(static_cast<double*>(nullptr));
    case DType::bfloat16:
      return run(static_cast<torch::headeronly::BFloat16*>(nullptr));
    case DType::float16:
      return run(static_cast<torch::headeronly::Half*>(nullptr));
    case DType::float32:
      break;
  }
  return run(static_cast<float*>(nullptr));
}

template <typename T>
constexpr DType kDType = std::is_same_v<T, double> ? DType::float64 : DType::float32;

// Row i as numbers of type T, in the memory of the tensor if that has this type, else in `buffer`.
template <typename T>
const T* read(const Logits& logits, int64_t i, int64_t vocab, std::vector<T>& buffer) {
  return with_dtype(logits.dtype, [&](auto* type) -> const T* {
    using Logit = std::remove_pointer_t<decltype(type)>;
    const Logit* row = static_cast<const Logit*>(logits.data) + i * logits.stride;
    if constexpr (std::is_same_v<T, Logit>) {
      return row;
    } else {
      buffer.resize(vocab);
      for (int64_t v = 0; v < vocab; ++v) buffer[v] = T(row[v]);
      return buffer.data();
    }
  });
}

// The row that `read` gives, as the model's map changes it.
template <typename T>
const T* read_mapped(const Logits& logits, int64_t i, int64_t vocab, std::vector<T>& buffer) {
  const T* row = read(logits, i, vocab, buffer);
  if (logits.map.is_identity()) return row;
  buffer.resize(vocab);
  T* mapped = buffer.data();
  const T scale = T(logits.map.scale), cap = T(logits.map.cap), inner = cap == T(0) ? T(0) : scale / cap;
#pragma omp simd
  for (int64_t v = 0; v < vocab; ++v) mapped[v] = cap == T(0) ? scale * row[v] : cap * Tanh<T>(inner * row[v]).value;
  return mapped;
}

// Writes row i of the gradient from `by_mapped`, the gradient by the mapped logits; their scale is in it already.
template <typename T>
void write_gradient(const Rows& rows, int64_t i, T* by_mapped, std::vector<T>& buffer) {
  if (rows.student.map.cap != 0.0) {
    const T* row = read(rows.student, i, rows.vocab, buffer);
    const T inner = T(rows.student.map.scale / rows.student.map.cap);
#pragma omp simd
    for (int64_t v = 0; v < rows.vocab; ++v) by_mapped[v] *= Tanh<T>(inner * row[v]).slope;
  }
  with_dtype(rows.gradient_dtype, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    Out* gradient = static_cast<Out*>(rows.gradient) + i * rows.gradient_stride;
    for (int64_t v = 0; v < rows.vocab; ++v) gradient[v] = Out(by_mapped[v]);
  });
}

void ignore_row(const Rows& rows, int64_t i) {
  if (rows.losses && rows.statistics) rows.statistics[i] = Statistics{};
  if (!rows.gradient) return;
  with_dtype(rows.gradient_dtype, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    std::fill_n(static_cast<Out*>(rows.gradient) + i * rows.gradient_stride, rows.vocab, Out(0.0f));
  });
}

template <typename T, typename Divergence>
void process_rows(const Rows& rows, const Divergence& divergence, int64_t begin, int64_t end) {
  const int64_t vocab = rows.vocab;
  const bool direct = rows.gradient_dtype == kDType<T> && rows.student.map.cap == 0.0;
  std::vector<T> slopes(rows.losses && rows.gradient ? vocab : 0), gradient_row(rows.gradient && !direct ? vocab : 0);
  std::vector<T> student_row, teacher_row;
  T* const kept = slopes.empty() ? nullptr : slopes.data();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t label = rows.labels ? rows.labels[i] : 0;
    if (label == kIgnored) {
      if (rows.losses) static_cast<T*>(rows.losses)[i] = T(0);
      ignore_row(rows, i);
      continue;
    }
    const T *student = read_mapped(rows.student, i, vocab, student_row), *teacher = nullptr;
    if constexpr (Divergence::has_teacher) teacher = read_mapped(rows.teacher, i, vocab, teacher_row);
    Statistics statistics = rows.normalizes ? Statistics{} : rows.statistics[i];
    if (rows.normalizes) normalize<T, Divergence>(rows, student, teacher, statistics);
    if (rows.losses)
      static_cast<T*>(rows.losses)[i] = T(measure(rows, divergence, student, teacher, label, statistics, kept));
    if (rows.statistics && (rows.normalizes || rows.losses)) rows.statistics[i] = statistics;
    if (!rows.gradient) continue;
    const double factor = rows.upstream ? double(static_cast<const T*>(rows.upstream)[i]) : 1.0;
    const double upstream = factor * rows.student.map.scale;
    T* gradient = direct ? static_cast<T*>(rows.gradient) + i * rows.gradient_stride : gradient_row.data();
    differentiate(rows, divergence, student, teacher, label, statistics, kept, upstream, gradient);
    if (!direct) write_gradient(rows, i, gradient, student_row);
  }
}

template <typename T>
void drive_family(const Rows& rows, int64_t begin, int64_t end) {
  with_divergence<T>(rows, [&](const auto& divergence) { process_rows<T>(rows, divergence, begin, end); });
}

}  // namespace

void drive(const Rows& rows, int64_t begin, int64_t end) {
  rows.student.dtype == DType::float64 ? drive_family<double>(rows, begin, end) : drive_family<float>(rows, begin, end);
}

}  // namespace abkd::cpu::ABKD_ISA
