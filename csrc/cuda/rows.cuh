// Device code of the row kernel. It includes no PyTorch header.
//
// A block takes one token. It makes up to three passes over the vocabulary: (A) the log-normalizers of both rows,
// online, (B) sums of values and slopes, (C) the gradient. Where a gradient of 16 bits is wanted, and the divergence
// allows it, one pass takes the place of A and B, and C gets by with the digits that 16 bits keep (online.cuh).
//
// Rows that fit into shared memory stay there between the passes. On an H100 both rows fit up to 58,000 logits of 16
// bits or 29,000 of 32 bits, one row up to twice that. Other rows are read again, from the second-level cache as long
// as 132 of them fit into it.
//
// docs/performance.md has bytes and instructions per logit, and what they come to on an H100. A decay by a polynomial
// takes as many instructions as ex2 with a series, and keeps its digits.
#pragma once

#include "online.cuh"

namespace abkd::cuda {

// Running maximum of x, and sum of e^(x - max). It starts at the floor, so that a row of -inf alone stays finite.
struct OnlineSum {
  float max = kLogFloor, sum = 0.0f;

  __device__ __forceinline__ void rescale(float larger) {
    sum *= exponential(max - larger);
    max = larger;
  }

  template <int kWidth>
  __device__ __forceinline__ void add(const Numbers<kWidth>& logits, float scale) {
    float larger = max;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) larger = Max{}(larger, logits.values[i] * scale);
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total += exponential(lower(logits.values[i] * scale - larger, kLogFloor));
    sum = sum * exponential(max - larger) + total;
    max = larger;
  }
};

// Both distributions of one token, for the exact passes.
struct Row {
  const Token<true>& token;
  LogSoftmax log_q, log_p;
  float shift;      // difference of the log-normalizers
  float max_log_p;  // only known if this call makes the log-normalizers
  int vocab;

  // functor(log p, log q, log q - log p) of capped logits. The CPU driver says why the difference is made from logits.
  template <typename Functor>
  __device__ __forceinline__ auto apply(const Functor& functor, float z, float y) const {
    z = lower(z * log_q.scale, kLogFloor);
    y = lower(y * log_p.scale, kLogFloor);
    const float a = y - log_p.high - log_p.low, b = z - log_q.high - log_q.low;
    return functor(a, b, z + y == 2.0f * kLogFloor ? 0.0f : z - y - shift);
  }

  template <typename Functor>
  __device__ __forceinline__ Pair<float> sum(const Functor& functor) const {
    float total[2] = {};
    token.visit_capped(false, [&](const auto& z, const auto& y) {
#pragma unroll
      for (int i = 0; i < int(sizeof(z) / sizeof(float)); ++i) {
        const Pair<float> terms = apply(functor, z.values[i], y.values[i]);
        total[0] += terms.first;
        total[1] += terms.second;
      }
    });
    reduce(total, token.scratch, Add{});
    return {total[0], total[1]};
  }

  __device__ __forceinline__ float largest_log_p() const { return max_log_p; }

  // functor(log p, log q, log q - log p) for the student's likeliest token. Of several the mean log p counts.
  template <typename Functor>
  __device__ __forceinline__ auto at_likeliest(const Functor& functor) const {
    float largest[1] = {kLogFloor};
    float found[2] = {};  // the sum of log q - log p over the tokens with this logit, and their number
    token.visit_capped(false, [&](const auto& z, const auto& y) {
#pragma unroll
      for (int i = 0; i < int(sizeof(z) / sizeof(float)); ++i) {
        const float logit = z.values[i] * log_q.scale;
        if (logit < largest[0]) continue;
        const bool is_first = logit > largest[0];
        const float d = apply([](float, float, float d) { return d; }, z.values[i], y.values[i]);
        largest[0] = logit;
        found[0] = is_first ? d : found[0] + d;
        found[1] = is_first ? 1.0f : found[1] + 1.0f;
      }
    });
    const float own = largest[0];
    reduce(largest, token.scratch, Max{});
    if (own < largest[0]) found[0] = found[1] = 0.0f;
    reduce(found, token.scratch, Add{});
    const float b = largest[0] - log_q.high - log_q.low, d = found[0] / found[1];
    return functor(b - d, b, d);
  }

  // Sums over log p alone. A block has no memory to gather the likely tokens; each other token costs a comparison.
  struct Likely {
    const Row& row;
    template <typename Functor>
    __device__ __forceinline__ Pair<float> sum(const Functor& functor) const {
      return row.sum([&functor](float a, float, float) { return functor(a); });
    }
  };
  __device__ __forceinline__ Likely likely(float) const { return {*this}; }
};

// The divergence as it is on this row, as a reference to constant or shared memory, which spares registers.
template <typename Divergence>
__device__ __forceinline__ decltype(auto) adapt(const Divergence& divergence, const Row& row, bool measure,
                                                double (&state)[2]) {
  if constexpr (Divergence::adapts) {
    using Adapted = std::decay_t<decltype(divergence.at({}))>;
    __shared__ __align__(16) unsigned char storage[sizeof(Adapted)];
    auto& adapted = *reinterpret_cast<Adapted*>(storage);
    const Pair<double> decided = measure ? divergence.state(row) : Pair<double>{state[0], state[1]};
    if (threadIdx.x == 0) {
      adapted = divergence.at(decided);
      if (measure) {
        state[0] = decided.first;
        state[1] = decided.second;
      }
    }
    __syncthreads();
    return static_cast<const Adapted&>(adapted);
  } else {
    return (divergence);
  }
}

// Passes A and B in one, where the row allows it; then also the gradient. Returns whether all is done. Rows that are
// kept are in shared memory afterwards.
template <typename Divergence>
__device__ __forceinline__ bool process_online(Token<true>& token, float scale) {
  const OnePass<Divergence> one_pass(token.rows);
  if (!one_pass.allowed()) return false;
  auto sums = one_pass.sums();
  const bool hard = token.rows.hard_weight != 0.0;
  const float z_scale = token.student.scale * scale * kLog2e, y_scale = token.teacher.scale * scale * kLog2e;
  OnlineSum plain_sum;
  float maxima[3] = {kLogFloor, kLogFloor, kLogFloor};
  token.visit_capped(true, [&](const auto& z, const auto& y) {
    constexpr int kWidth = sizeof(z) / sizeof(float);
    float z_max = maxima[0], y_max = maxima[1];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      z_max = Max{}(z_max, z.values[i] * z_scale);
      y_max = Max{}(y_max, y.values[i] * y_scale);
    }
    if (z_max > maxima[0] || y_max > maxima[1]) {  // rare, after the first packs
      sums.rescale(z_max - maxima[0], y_max - maxima[1]);
      maxima[0] = z_max;
      maxima[1] = y_max;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums.add(z.values[i] * z_scale - z_max, y.values[i] * y_scale - y_max);
    if (hard) plain_sum.add(z, token.student.scale);
  });
  maxima[2] = plain_sum.max;
  float all[3] = {maxima[0], maxima[1], maxima[2]};
  reduce(all, token.scratch, Max{});
  sums.rescale(all[0] - maxima[0], all[1] - maxima[1]);
  plain_sum.rescale(all[2]);
  reduce(sums.sums, token.scratch, Add{});
  float plain[1] = {plain_sum.sum};
  if (hard) reduce(plain, token.scratch, Add{});

  const Normalizers normalizers{log2f(sums.sums[0]), log2f(sums.sums[1])};
  const Measured measured = one_pass.measure(sums, normalizers);
  token.next_pass(measured.accepted);
  if (!measured.accepted) return false;
  const double z_lse = double(all[0]) + double(normalizers.student);  // in units of log 2
  const double y_lse = double(all[1]) + double(normalizers.teacher);
  if (threadIdx.x == 0) {
    constexpr double kExactLn2 = 0.693147180559945309;
    const double plain_lse = hard ? double(all[2]) + double(logf(plain[0])) : 0.0;
    token.scratch.statistics = {z_lse * kExactLn2,
                                y_lse * kExactLn2,
                                plain_lse,
                                double(measured.slope),
                                {measured.state[0], measured.state[1]}};
  }
  token.write_loss(measured.value);
  if (!token.rows.gradient) return true;
  const LogSoftmax log_q(z_scale, z_lse), log_p(y_scale, y_lse);
  token.write_gradient([&](float z, float y) {
    const float b = log_q(z), q = power_of_2(b);
    return one_pass.slope(measured, log_p(y), b, q) - q * measured.slope;
  });
  return true;
}

// Pass A.
template <bool kHasTeacher>
__device__ __forceinline__ void normalize(const Token<kHasTeacher>& token, float scale, bool first, float& max_log_p) {
  const bool hard = token.rows.hard_weight != 0.0, plain = hard && (!kHasTeacher || scale != 1.0f);
  OnlineSum online[3];  // of the student, the teacher, and the student without temperature
  token.visit_capped(first, [&](const auto& z, const auto& y) {
    if (plain) online[2].add(z, token.student.scale);
    if constexpr (kHasTeacher) {
      online[0].add(z, token.student.scale * scale);
      online[1].add(y, token.teacher.scale * scale);
    }
  });
  float maxima[3] = {online[0].max, online[1].max, online[2].max}, sums[3];
  reduce(maxima, token.scratch, Max{});
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    online[i].rescale(maxima[i]);
    sums[i] = online[i].sum;
  }
  reduce(sums, token.scratch, Add{});
  // In float64, because all tokens share the error of a log-normalizer.
  const int i = int(threadIdx.x);
  if (i < 3) {
    const float max = i == 0 ? maxima[0] : i == 1 ? maxima[1] : maxima[2];
    const float sum = i == 0 ? sums[0] : i == 1 ? sums[1] : sums[2];
    token.scratch.lse[i] = double(max) + (sum == 0.0f ? 0.0 : log(double(sum)));
  }
  __syncthreads();
  const double *lse = token.scratch.lse, student_lse = kHasTeacher ? lse[0] : 0.0;
  const double teacher_lse = kHasTeacher ? lse[1] : 0.0;
  max_log_p = float(double(maxima[1]) - teacher_lse);
  if (threadIdx.x == 0)
    token.scratch.statistics = {student_lse, teacher_lse, !hard ? 0.0 : plain ? lse[2] : student_lse, 0.0, {0.0, 0.0}};
  __syncthreads();
}

// Passes B and C, exactly.
template <typename Divergence>
__device__ __forceinline__ void measure_and_differentiate(Token<true>& token, const Divergence& divergence, float scale,
                                                          float max_log_p) {
  const Rows& rows = token.rows;
  Statistics& statistics = token.scratch.statistics;
  const Row row{token,
                LogSoftmax(token.student.scale * scale, statistics.student_lse),
                LogSoftmax(token.teacher.scale * scale, statistics.teacher_lse),
                float(statistics.student_lse - statistics.teacher_lse),
                max_log_p,
                token.cut.vocab};
  if constexpr (std::is_same_v<Divergence, AlphaNet<float>>) {
    if (!rows.normalizes && rows.losses && statistics.state[0] == kBothBranches) {
      const Pair<double> values = divergence.values(row);
      if (threadIdx.x == 0) statistics.slope = values.second;
      return token.write_loss(values.first);
    }
  }
  const auto& adapted = adapt(divergence, row, rows.normalizes, statistics.state);
  if (rows.losses) {
    const Pair<float> sums = row.sum([&adapted](float a, float b, float d) {
      const Term<float> term = adapted(a, b, d);
      return Pair<float>{term.value, term.slope};
    });
    if (threadIdx.x == 0) statistics.slope = sums.second;
    token.write_loss(sums.first);
  }
  if (!rows.gradient) return;
  token.next_pass(true);
  const float slope = float(statistics.slope);
  token.write_gradient([&](float z, float y) {
    const auto slope_of = [&adapted](float a, float b, float d) { return adapted.slope(a, b, d); };
    return row.apply(slope_of, z, y) - exponential(row.log_q(z)) * slope;
  });
}

// Whether results have 16 bits: the gradient, or the logits where only losses are wanted.
__device__ __forceinline__ bool is_narrow(const Rows& rows) {
  return (rows.gradient ? rows.gradient_dtype : rows.student.dtype) != DType::float32;
}

template <typename Divergence>
__global__ void __launch_bounds__(kThreads, 1) row_kernel(Rows rows, Divergence divergence, int kept) {
  constexpr bool kHasTeacher = Divergence::has_teacher;
  __shared__ Scratch scratch;
  // The last rows come first: the matrix product before this kernel left them in the second-level cache.
  Token<kHasTeacher> token(rows, rows.count - 1 - int64_t(blockIdx.x), kept, scratch);
  if (token.label == kIgnored) return token.ignore();
  const float scale = float(1.0 / rows.temperature);
  // The label's logit is read before any gradient is written, because gradient may be student. An impossible label
  // makes the loss NaN.
  if (threadIdx.x == 0 && rows.hard_weight != 0.0) {
    const bool valid = 0 <= token.label && token.label < rows.vocab;
    scratch.target =
        valid ? token.student.capped(token.student.template raw<1>(int(token.label))).values[0] * token.student.scale
              : nanf("");
  }
  bool first = true;
  if constexpr (OnePass<Divergence>::possible) {
    if (rows.normalizes && rows.losses && is_narrow(rows)) {
      if (process_online<Divergence>(token, scale)) return;
      first = !OnePass<Divergence>(rows).allowed();
    }
  }
  float max_log_p = 0.0f;
  if (rows.normalizes) {
    normalize(token, scale, first, max_log_p);
    if (!rows.losses) {
      if (threadIdx.x == 0) rows.statistics[token.row] = scratch.statistics;
      return;
    }
    token.next_pass(false);
  } else {
    if (threadIdx.x == 0) scratch.statistics = rows.statistics[token.row];
    __syncthreads();
  }
  if constexpr (kHasTeacher) {
    measure_and_differentiate(token, divergence, scale, max_log_p);
  } else {
    if (rows.losses) token.write_loss(0.0);
    token.next_pass(true);
    if (rows.gradient) token.write_gradient([](float, float) { return 0.0f; });
  }
}

}  // namespace abkd::cuda
