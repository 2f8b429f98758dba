// Device code of the row kernel: one block of 512 threads per token, up to three passes over the vocabulary: (A) the
// log-normalizers of both rows, online, (B) sums of values and slopes, (C) the gradient. Rows that fit into shared
// memory stay there between the passes (H100: both up to 58,000 logits of 16 bits or 29,000 of 32, one up to twice
// that); the others are read again, from the second-level cache while 132 of them fit into it. No PyTorch header.
//
// Estimate for an H100 and the alpha-beta divergence, per logit, in ps: device memory at 3 TB/s, 6 or 12 bytes: 2.0 or
// 4.0 (28 bytes, 9.3, for float32 rows of 151,936). Special functions, 2.5 + 1 + 2: 1.5. Issue slots, 37 + 104 + 60
// instructions in the code for sm_90: 6.8, the limit; a decay takes as many as a polynomial as by ex2 with a series,
// and keeps its digits. One block a processor (up to 128 registers a thread) has 16 KB of loads in flight, enough for 3
// TB/s. A cluster would pay for float32 rows beyond 58,000 alone: 9.3 to 6.8, of about 29 for the products around the
// kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../divergence/families.h"

namespace abkd::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename Logit>
__device__ __forceinline__ Logit from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Up to 16 bytes of consecutive logits, moved in one instruction where the address allows it.
template <typename Logit, int kWidth>
struct alignas(sizeof(Logit) * kWidth) Pack {
  Logit values[kWidth];

  __device__ __forceinline__ static Pack load(const Logit* from, bool aligned) {
    if (aligned) return *reinterpret_cast<const Pack*>(from);
    Pack pack;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) pack.values[i] = from[i];
    return pack;
  }

  __device__ __forceinline__ void store(Logit* to, bool aligned) const {
    if (aligned) {
      *reinterpret_cast<Pack*>(to) = *this;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) to[i] = values[i];
    }
  }
};

template <int n>
struct Width {
  static constexpr int value = n;
};

// How a row is cut: `head` single elements up to the student's first 16-byte boundary, whole packs, single elements.
template <typename Logit>
struct Cut {
  static constexpr int kWidth = 16 / sizeof(Logit);
  int vocab, head, packs;
  bool teacher_aligned, gradient_aligned;  // whether their packs also start on 16-byte boundaries

  __device__ Cut(const Logit* student, const Logit* teacher, const Logit* gradient, int64_t vocab) : vocab(int(vocab)) {
    const int offset = int(reinterpret_cast<uintptr_t>(student) / sizeof(Logit) % kWidth);
    head = (kWidth - offset) % kWidth;
    if (head > this->vocab) head = this->vocab;
    packs = (this->vocab - head) / kWidth;
    teacher_aligned = reinterpret_cast<uintptr_t>(teacher + head) % 16 == 0;
    gradient_aligned = reinterpret_cast<uintptr_t>(gradient + head) % 16 == 0;
  }

  // Calls body(width, index) so that the block's threads together cover [0, vocab) once; width is a type.
  template <typename Body>
  __device__ __forceinline__ void visit(Body body) const {
    const int thread = int(threadIdx.x), tail = head + packs * kWidth;
    for (int pack = thread; pack < packs; pack += kThreads) body(Width<kWidth>{}, head + pack * kWidth);
    const int single = thread < head ? thread : tail + (thread - head);
    if (single < vocab) body(Width<1>{}, single);
  }
};

// Running maximum of x and sum of e^(x - max). Starts at the floor, so a row of nothing but -inf stays finite.
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
  float scale, high, low;  // the log-normalizer as a number and the rest that it rounds away
  __device__ LogSoftmax(float scale, double lse) : scale(scale), high(float(lse)), low(float(lse - double(high))) {}
  __device__ __forceinline__ float operator()(float logit) const { return logit * scale - high - low; }
};

// What a block's threads share; every reduction leaves it free again.
struct Scratch {
  float2 warps[kWarps];
  double lse;
  Statistics statistics;  // of the row; written by thread 0, as is
  float target;           // the student's logit of the label
};

// The maximum and log sum exp of the row, to all threads of the block.
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
    // In float64: an error of the log-normalizer is common to all tokens.
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
  float shift;  // difference of the log-normalizers
  float top;    // the largest log p
  Scratch& scratch;
  int vocab;

  // functor(log p, log q, log q - log p); why the difference comes from the logits: see the CPU driver
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

  // Sums over log p alone; a block has nowhere to gather the likely tokens, and the others cost it a comparison.
  struct Likely {
    const Row& row;
    template <typename Functor>
    __device__ __forceinline__ Pair<float> sum(const Functor& functor) const {
      return row.sum([&functor](float a, float, float) { return functor(a); });
    }
  };
  __device__ __forceinline__ Likely likely(float) const { return {*this}; }
};

// What the divergence does on this row: by reference, to constant or shared memory, which spares registers.
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

// Shared memory that one row takes: room for its packs to start on a 16-byte boundary.
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

// `kept` rows of a token stay in shared memory between the passes: none, the student's, or both.
template <typename Logit, typename Divergence>
__global__ void __launch_bounds__(kThreads, 1) row_kernel(Rows rows, Divergence divergence, int kept) {
  __shared__ Scratch scratch;
  extern __shared__ __align__(16) unsigned char shared_rows[];

  // The last rows first: they are what the matrix product before this kernel left in the second-level cache.
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
  // Read before any gradient is written: gradient may be student. An impossible label makes the loss NaN.
  if (threadIdx.x == 0 && hard) {
    const bool valid = 0 <= label && label < rows.vocab;
    scratch.target = valid ? to_float(student[label]) : nanf("");
  }

  Statistics& statistics = scratch.statistics;
  double student_lse = 0.0, teacher_lse = 0.0;
  float top = 0.0f;
  if (rows.normalizes) {
    // Shared copies are shifted so that their packs are aligned whatever the alignment of the rows themselves.
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
      student_lse = reduce(student_sum, scratch).lse;
      const Normalizer normalizer = reduce(teacher_sum, scratch);
      teacher_lse = normalizer.lse;
      top = float(double(normalizer.max) - teacher_lse);
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
