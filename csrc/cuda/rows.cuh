// Device code of the row kernel. It includes no PyTorch header.
//
// A block of 512 threads takes one token. It makes up to three passes over the vocabulary: (A) the log-normalizers of
// both rows, online, (B) sums of values and slopes, (C) the gradient. Rows that fit into shared memory stay there
// between the passes. On an H100 both rows fit up to 58,000 logits of 16 bits or 29,000 of 32 bits, one row up to twice
// that. Other rows are read again, from the second-level cache as long as 132 of them fit into it.
//
// Estimated time for an H100 and the alpha-beta divergence, in ps per logit:
//   - device memory at 3 TB/s: 2.0 for 6 bytes (16-bit logits), 4.0 for 12 bytes (float32), 9.3 for 28 bytes (float32
//     rows of 151,936)
//   - special functions: 1.5 for 2.5 + 1 + 2 in the three passes
//   - issue slots: 6.8 for 37 + 104 + 60 instructions of the code for sm_90. This is the limit.
// A decay by a polynomial takes as many instructions as ex2 with a series, and keeps its digits. One block per
// multiprocessor (up to 128 registers a thread) has 16 KB of loads in flight, enough for 3 TB/s. A cluster would pay
// only for float32 rows beyond 58,000: 6.8 in place of 9.3, where the products around the kernel take about 29.
#pragma once

#include <type_traits>

#include "../divergence/families.h"
#include "packs.cuh"

namespace abkd::cuda {

constexpr int kWarps = kThreads / 32;

// Running maximum of x, and sum of e^(x - max). It starts at the floor, so that a row of -inf alone stays finite.
struct OnlineSum {
  float max = kLogFloor, sum = 0.0f;

  __device__ __forceinline__ void merge(float other_max, float other_sum) {
    const float larger = max < other_max ? other_max : max;
    sum = sum * exponential(max - larger) + other_sum * exponential(other_max - larger);
    max = larger;
  }

  template <int kWidth>
  __device__ __forceinline__ void add(const float (&x)[kWidth]) {
    float larger = max;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) larger = larger < x[i] ? x[i] : larger;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total += exponential(lower(x[i] - larger, kLogFloor));
    sum = sum * exponential(max - larger) + total;
    max = larger;
  }
};

template <typename Packed>
__device__ __forceinline__ void add(OnlineSum& online, const Packed& logits, float scale) {
  constexpr int kWidth = sizeof(logits.values) / sizeof(logits.values[0]);
  float x[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = to_float(logits.values[i]) * scale;
  online.add(x);
}

struct LogSoftmax {
  float scale, high, low;  // the log-normalizer, and the rest that rounding to float takes from it
  __device__ LogSoftmax(float scale, double lse) : scale(scale), high(float(lse)), low(float(lse - double(high))) {}
  __device__ __forceinline__ float operator()(float logit) const { return logit * scale - high - low; }
};

// What the threads of a block share. After every reduction `warps` and `lse` are free again.
struct Scratch {
  float2 warps[kWarps];
  double lse;
  Statistics statistics;  // statistics of the row; thread 0 writes them
  float target;           // the student's logit of the label; thread 0 writes it
};

// The maximum and the log sum exp of the row, known to all threads of the block.
struct Normalizer {
  float max;
  double lse;
};

__device__ __forceinline__ Normalizer reduce(OnlineSum online, Scratch& scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    online.merge(__shfl_xor_sync(0xffffffffu, online.max, offset), __shfl_xor_sync(0xffffffffu, online.sum, offset));
  if (threadIdx.x % 32 == 0) scratch.warps[threadIdx.x / 32] = make_float2(online.max, online.sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    OnlineSum total;
    for (int warp = 0; warp < kWarps; ++warp) total.merge(scratch.warps[warp].x, scratch.warps[warp].y);
    // In float64, because all tokens share the error of the log-normalizer.
    scratch.lse = double(total.max) + (total.sum == 0.0f ? 0.0 : log(double(total.sum)));
    scratch.warps[0].x = total.max;
  }
  __syncthreads();
  const Normalizer result{scratch.warps[0].x, scratch.lse};
  __syncthreads();
  return result;
}

__device__ __forceinline__ Pair<float> reduce(Pair<float> sums, Scratch& scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    sums.first += __shfl_xor_sync(0xffffffffu, sums.first, offset);
    sums.second += __shfl_xor_sync(0xffffffffu, sums.second, offset);
  }
  if (threadIdx.x % 32 == 0) scratch.warps[threadIdx.x / 32] = make_float2(sums.first, sums.second);
  __syncthreads();
  Pair<float> total{};
  for (int warp = 0; warp < kWarps; ++warp) {
    total.first += scratch.warps[warp].x;
    total.second += scratch.warps[warp].y;
  }
  __syncthreads();
  return total;
}

// Both distributions of one token, wherever their logits are.
template <typename Logit>
struct Row {
  const Cut<Logit>& cut;
  const Logit *student, *teacher;
  bool teacher_aligned;
  LogSoftmax log_q, log_p;
  float shift;    // difference of the log-normalizers
  float top;      // the largest log p
  float largest;  // the largest of the student's logits, scaled
  Scratch& scratch;
  int vocab;

  // functor(log p, log q, log q - log p). The CPU driver says why the difference is made from the logits.
  template <typename Functor>
  __device__ __forceinline__ auto apply(const Functor& functor, float z, float y) const {
    z = lower(z * log_q.scale, kLogFloor);
    y = lower(y * log_p.scale, kLogFloor);
    const float a = y - log_p.high - log_p.low, b = z - log_q.high - log_q.low;
    return functor(a, b, z + y == 2.0f * kLogFloor ? 0.0f : z - y - shift);
  }

  // Calls body(width, v, student logits, teacher logits) for all packs of the row.
  template <typename Body>
  __device__ __forceinline__ void visit(Body body) const {
    cut.visit([&](auto width, int v) {
      constexpr int kWidth = decltype(width)::value;
      const auto z = Pack<Logit, kWidth>::load(student + v, kWidth > 1);
      const auto y = Pack<Logit, kWidth>::load(teacher + v, kWidth > 1 && teacher_aligned);
      body(width, v, z, y);
    });
  }

  template <typename Functor>
  __device__ __forceinline__ Pair<float> sum(const Functor& functor) const {
    Pair<float> total{};
    visit([&](auto width, int, const auto& z, const auto& y) {
#pragma unroll
      for (int i = 0; i < decltype(width)::value; ++i) {
        const Pair<float> terms = apply(functor, to_float(z.values[i]), to_float(y.values[i]));
        total.first += terms.first;
        total.second += terms.second;
      }
    });
    return reduce(total, scratch);
  }

  __device__ __forceinline__ float largest_log_p() const { return top; }

  // functor(log p, log q, log q - log p) for the student's likeliest token. Of several the mean log p counts.
  template <typename Functor>
  __device__ __forceinline__ auto at_likeliest(const Functor& functor) const {
    Pair<float> found{};
    cut.visit([&](auto width, int v) {
      constexpr int kWidth = decltype(width)::value;
      const auto z = Pack<Logit, kWidth>::load(student + v, kWidth > 1);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float logit = to_float(z.values[i]);
        if (logit * log_q.scale != largest) continue;
        found.first += apply([](float, float, float d) { return d; }, logit, to_float(teacher[v + i]));
        found.second += 1.0f;
      }
    });
    found = reduce(found, scratch);
    const float b = largest - log_q.high - log_q.low, d = found.first / found.second;
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
template <typename Logit, typename Divergence>
__device__ __forceinline__ decltype(auto) adapt(const Divergence& divergence, const Row<Logit>& row, bool measure,
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

// The shared memory of one row, with room for its packs to start on a 16-byte boundary.
template <typename Logit>
__host__ __device__ constexpr int64_t row_bytes(int64_t vocab) {
  return (vocab * int64_t(sizeof(Logit)) + 16 + 15) / 16 * 16;
}

template <typename Logit>
__device__ __forceinline__ void ignore_row(const Cut<Logit>& cut, Logit* gradient) {
  if (!gradient) return;
  cut.visit([&](auto width, int v) {
    constexpr int kWidth = decltype(width)::value;
    Pack<Logit, kWidth> zero;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) zero.values[i] = from_float<Logit>(0.0f);
    zero.store(gradient + v, kWidth > 1 && cut.gradient_aligned);
  });
}

// `kept` is the number of rows that stay in shared memory between the passes: 0, 1 (the student's) or 2 (both).
template <typename Logit, typename Divergence>
__global__ void __launch_bounds__(kThreads, 1) row_kernel(Rows rows, Divergence divergence, int kept) {
  __shared__ Scratch scratch;
  extern __shared__ __align__(16) unsigned char shared_rows[];

  // The last rows come first: the matrix product before this kernel left them in the second-level cache.
  const int64_t row = rows.count - 1 - int64_t(blockIdx.x);
  const auto* student = static_cast<const Logit*>(rows.student) + row * rows.student_stride;
  const auto* teacher = static_cast<const Logit*>(rows.teacher);
  if constexpr (Divergence::has_teacher) teacher += row * rows.teacher_stride;
  auto* gradient = static_cast<Logit*>(rows.gradient);
  if (gradient) gradient += row * rows.gradient_stride;
  auto* loss = rows.losses ? static_cast<float*>(rows.losses) + row : nullptr;
  const Cut<Logit> cut(student, teacher, gradient, rows.vocab);

  const int64_t label = rows.labels ? rows.labels[row] : 0;
  if (label == kIgnored) {
    ignore_row(cut, gradient);
    if (threadIdx.x == 0 && loss) *loss = 0.0f;
    if (threadIdx.x == 0 && loss && rows.statistics) rows.statistics[row] = Statistics{};
    return;
  }

  const float scale = float(1.0 / rows.temperature);
  const bool hard = rows.hard_weight != 0.0;
  // The label's logit is read before any gradient is written, because gradient may be student. An impossible label
  // makes the loss NaN.
  if (threadIdx.x == 0 && hard) {
    const bool valid = 0 <= label && label < rows.vocab;
    scratch.target = valid ? to_float(student[label]) : nanf("");
  }

  Statistics& statistics = scratch.statistics;
  double student_lse = 0.0, teacher_lse = 0.0;
  float top = 0.0f, largest = 0.0f;
  if (rows.normalizes) {
    // The copies in shared memory are shifted, so that their packs are aligned for any alignment of the rows.
    const int64_t shift = (Cut<Logit>::kWidth - cut.head % Cut<Logit>::kWidth) % Cut<Logit>::kWidth;
    auto* kept_student = kept > 0 ? reinterpret_cast<Logit*>(shared_rows) + shift : nullptr;
    auto* kept_teacher =
        kept > 1 ? reinterpret_cast<Logit*>(shared_rows + row_bytes<Logit>(rows.vocab)) + shift : nullptr;
    OnlineSum plain_sum, student_sum, teacher_sum;
    const bool plain = hard && (!Divergence::has_teacher || scale != 1.0f);
    cut.visit([&](auto width, int v) {
      constexpr int kWidth = decltype(width)::value;
      const auto z = Pack<Logit, kWidth>::load(student + v, kWidth > 1);
      if (kept_student) z.store(kept_student + v, kWidth > 1);
      if (plain) add(plain_sum, z, 1.0f);
      if constexpr (Divergence::has_teacher) {
        const auto y = Pack<Logit, kWidth>::load(teacher + v, kWidth > 1 && cut.teacher_aligned);
        if (kept_teacher) y.store(kept_teacher + v, kWidth > 1);
        add(student_sum, z, scale);
        add(teacher_sum, y, scale);
      }
    });
    if constexpr (Divergence::has_teacher) {
      const Normalizer of_student = reduce(student_sum, scratch), of_teacher = reduce(teacher_sum, scratch);
      student_lse = of_student.lse;
      teacher_lse = of_teacher.lse;
      largest = of_student.max;
      top = float(double(of_teacher.max) - teacher_lse);
    }
    const double plain_lse = !hard ? 0.0 : plain ? reduce(plain_sum, scratch).lse : student_lse;
    if (threadIdx.x == 0) statistics = {student_lse, teacher_lse, plain_lse, 0.0, {0.0, 0.0}};
    if (!loss) {
      if (threadIdx.x == 0) rows.statistics[row] = statistics;
      return;
    }
    if (kept_student) student = kept_student;
    if (kept_teacher) teacher = kept_teacher;
    __syncthreads();
  } else {
    if (threadIdx.x == 0) statistics = rows.statistics[row];
    __syncthreads();
    student_lse = statistics.student_lse;
    teacher_lse = statistics.teacher_lse;
  }

  const bool y_aligned = cut.teacher_aligned || kept > 1;
  const Row<Logit> both{cut,
                        student,
                        teacher,
                        y_aligned,
                        LogSoftmax(scale, student_lse),
                        LogSoftmax(scale, teacher_lse),
                        float(student_lse - teacher_lse),
                        top,
                        largest,
                        scratch,
                        cut.vocab};
  const auto& adapted = adapt(divergence, both, rows.normalizes, statistics.state);
  if (loss) {
    Pair<float> sums{};
    if constexpr (Divergence::has_teacher) {
      sums = both.sum([&adapted](float a, float b, float d) {
        const Term<float> term = adapted(a, b, d);
        return Pair<float>{term.value, term.slope};
      });
    }
    if (threadIdx.x == 0) {
      const double hard_loss = hard ? rows.hard_weight * (statistics.plain_lse - double(scratch.target)) : 0.0;
      *loss = float((1.0 - rows.hard_weight) * double(sums.first) + hard_loss);
      statistics.slope = sums.second;
      if (rows.statistics) rows.statistics[row] = statistics;
    }
    __syncthreads();
  }
  if (!gradient) return;

  const float upstream = rows.upstream ? static_cast<const float*>(rows.upstream)[row] : 1.0f;
  const float weight = upstream * float(1.0 - rows.hard_weight) * scale;
  const float hard_weight = upstream * float(rows.hard_weight);
  const float slope = float(statistics.slope);
  const LogSoftmax plain_norm(1.0f, statistics.plain_lse);
  const auto differentiate = [&](auto width, int v, const auto& z, const auto& y) {
    constexpr int kWidth = decltype(width)::value;
    Pack<Logit, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float logit = to_float(z.values[i]);
      float g = 0.0f;
      if constexpr (Divergence::has_teacher) {
        const auto slope_of = [&adapted](float a, float b, float d) { return adapted.slope(a, b, d); };
        const float term = both.apply(slope_of, logit, to_float(y.values[i]));
        g = weight * (term - exponential(both.log_q(logit)) * slope);
      }
      if (hard) g += hard_weight * (exponential(plain_norm(logit)) - (v + i == label ? 1.0f : 0.0f));
      out.values[i] = from_float<Logit>(g);
    }
    out.store(gradient + v, kWidth > 1 && cut.gradient_aligned);
  };
  if constexpr (Divergence::has_teacher) {
    both.visit(differentiate);
  } else {
    cut.visit([&](auto width, int v) {
      constexpr int kWidth = decltype(width)::value;
      const auto z = Pack<Logit, kWidth>::load(student + v, kWidth > 1);
      differentiate(width, v, z, z);
    });
  }
}

}  // namespace abkd::cuda
