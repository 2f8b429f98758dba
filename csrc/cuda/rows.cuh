// Device code of the row kernel: one thread block per token, three passes over the vocabulary.
//
//   (A) log-normalisers of both rows, online: one read of device memory, 2 exponentials an element
//   (B) sums of values and slopes, 3 exponentials
//   (C) gradient, 4 exponentials (the slope is computed again: cheaper than keeping it)
//
// Where both rows fit into shared memory (on an H100 up to 58,000 logits of 16 bits, 29,000 of 32) they stay there
// between the passes and device memory is read once; else the passes read again, mostly from the second-level cache.
// Bytes an element: 2 reads and 1 write of a logit. Nothing here includes a PyTorch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../divergence/alpha_beta.h"
#include "../divergence/cross_entropy.h"
#include "../rows.h"

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
  int64_t vocab, head, packs;
  bool teacher_aligned, gradient_aligned;  // whether their packs also start on 16-byte boundaries

  __device__ Cut(const Logit* student, const Logit* teacher, const Logit* gradient, int64_t vocab) : vocab(vocab) {
    const int64_t offset = reinterpret_cast<uintptr_t>(student) / sizeof(Logit) % kWidth;
    head = (kWidth - offset) % kWidth;
    if (head > vocab) head = vocab;
    packs = (vocab - head) / kWidth;
    teacher_aligned = reinterpret_cast<uintptr_t>(teacher + head) % 16 == 0;
    gradient_aligned = reinterpret_cast<uintptr_t>(gradient + head) % 16 == 0;
  }

  // Calls body(width, index) so that the block's threads together cover [0, vocab) once; width is a type.
  template <typename Body>
  __device__ __forceinline__ void visit(Body body) const {
    for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) body(Width<kWidth>{}, head + pack * kWidth);
    const int64_t tail = head + packs * kWidth;
    const int64_t single = threadIdx.x < head ? threadIdx.x : tail + (threadIdx.x - head);
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

struct LogNormalizer {
  float scale, max, log_sum;
  __device__ __forceinline__ float operator()(float logit) const {
    return lower(logit * scale - max - log_sum, kLogFloor);
  }
};

// log q - log p, straight from the logits: see the CPU driver.
struct LogRatio {
  float scale, shift;
  __device__ __forceinline__ LogRatio(const LogNormalizer& student, const LogNormalizer& teacher)
      : scale(student.scale), shift((student.max - teacher.max) + (student.log_sum - teacher.log_sum)) {}

  __device__ __forceinline__ float operator()(float teacher, float student, float a, float b) const {
    const float d = lower(student * scale, kLogFloor) - lower(teacher * scale, kLogFloor) - shift;
    return a + b == 2.0f * kLogFloor ? 0.0f : d;
  }
};

// All threads of the block receive the result; `scratch` is shared, kWarps long, and free again when this returns.
__device__ __forceinline__ LogNormalizer reduce(OnlineSum online, float scale, float2* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    online.merge(__shfl_xor_sync(0xffffffffu, online.max, offset), __shfl_xor_sync(0xffffffffu, online.sum, offset));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = make_float2(online.max, online.sum);
  __syncthreads();
  OnlineSum total;
  for (int warp = 0; warp < kWarps; ++warp) total.merge(scratch[warp].x, scratch[warp].y);
  __syncthreads();
  return {scale, total.max, total.sum == 0.0f ? 0.0f : logf(total.sum)};
}

__device__ __forceinline__ float2 reduce(float2 sums, float2* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    sums.x += __shfl_xor_sync(0xffffffffu, sums.x, offset);
    sums.y += __shfl_xor_sync(0xffffffffu, sums.y, offset);
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sums;
  __syncthreads();
  float2 total = make_float2(0.0f, 0.0f);
  for (int warp = 0; warp < kWarps; ++warp) {
    total.x += scratch[warp].x;
    total.y += scratch[warp].y;
  }
  __syncthreads();
  return total;
}

// Shared memory of a block that keeps both rows: room for the packs to start on a 16-byte boundary.
template <typename Logit>
__host__ __device__ constexpr int64_t row_bytes(int64_t vocab) {
  return (vocab * int64_t(sizeof(Logit)) + 16 + 15) / 16 * 16;
}

template <typename Logit, typename Divergence, bool kOnChip>
__global__ void __launch_bounds__(kThreads, 1) row_kernel(Rows rows, Divergence divergence) {
  __shared__ float2 scratch[kWarps];
  extern __shared__ __align__(16) unsigned char shared_rows[];

  // The last rows first: they are what the matrix product before this kernel left in the second-level cache.
  const int64_t row = rows.count - 1 - int64_t(blockIdx.x);
  const auto* student = static_cast<const Logit*>(rows.student) + row * rows.student_stride;
  const auto* teacher = static_cast<const Logit*>(rows.teacher);
  if constexpr (Divergence::has_teacher) teacher += row * rows.teacher_stride;
  auto* gradient = static_cast<Logit*>(rows.gradient);
  if (gradient) gradient += row * rows.gradient_stride;
  auto* loss = static_cast<float*>(rows.losses) + row;
  const Cut<Logit> cut(student, teacher, gradient, rows.vocab);

  const int64_t label = rows.labels ? rows.labels[row] : 0;
  if (label == kIgnored) {
    if (threadIdx.x == 0) *loss = 0.0f;
    if (gradient) {
      cut.visit([&](auto width, int64_t v) {
        constexpr int kWidth = decltype(width)::value;
        Pack<Logit, kWidth> zero;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) zero.values[i] = from_float<Logit>(0.0f);
        zero.store(gradient + v, kWidth > 1 && cut.gradient_aligned);
      });
    }
    return;
  }

  const float scale = float(1.0 / rows.temperature);
  const float hard_weight = float(rows.hard_weight);
  const bool hard = hard_weight != 0.0f;
  // Read before any gradient is written: gradient may be student. An impossible label makes the loss NaN.
  const bool valid = 0 <= label && label < rows.vocab;
  const float target = !hard ? 0.0f : valid ? to_float(student[label]) : nanf("");

  // Shared copies are shifted so that their packs are aligned whatever the alignment of the rows themselves.
  const int64_t shift = (Cut<Logit>::kWidth - cut.head % Cut<Logit>::kWidth) % Cut<Logit>::kWidth;
  auto* kept_student = reinterpret_cast<Logit*>(shared_rows) + shift;
  auto* kept_teacher = reinterpret_cast<Logit*>(shared_rows + row_bytes<Logit>(rows.vocab)) + shift;

  OnlineSum plain_sum, student_sum, teacher_sum;
  cut.visit([&](auto width, int64_t v) {
    constexpr int kWidth = decltype(width)::value;
    const auto z = Pack<Logit, kWidth>::load(student + v, kWidth > 1);
    if constexpr (kOnChip) z.store(kept_student + v, kWidth > 1);
    float x[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = to_float(z.values[i]);
    if (hard) plain_sum.add(x);
    if constexpr (Divergence::has_teacher) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] *= scale;
      student_sum.add(x);
      const auto y = Pack<Logit, kWidth>::load(teacher + v, kWidth > 1 && cut.teacher_aligned);
      if constexpr (kOnChip) y.store(kept_teacher + v, kWidth > 1);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = to_float(y.values[i]) * scale;
      teacher_sum.add(x);
    }
  });
  LogNormalizer plain{}, student_norm{}, teacher_norm{};
  if (hard) plain = reduce(plain_sum, 1.0f, scratch);
  if constexpr (Divergence::has_teacher) {
    student_norm = reduce(student_sum, scale, scratch);
    teacher_norm = reduce(teacher_sum, scale, scratch);
  }
  const LogRatio ratio(student_norm, teacher_norm);
  if constexpr (kOnChip) __syncthreads();

  const Logit* z_row = kOnChip ? kept_student : student;
  const Logit* y_row = kOnChip ? kept_teacher : teacher;
  const bool y_aligned = kOnChip || cut.teacher_aligned;

  float2 sums = make_float2(0.0f, 0.0f);  // value, slope
  if constexpr (Divergence::has_teacher) {
    cut.visit([&](auto width, int64_t v) {
      constexpr int kWidth = decltype(width)::value;
      const auto z = Pack<Logit, kWidth>::load(z_row + v, kWidth > 1);
      const auto y = Pack<Logit, kWidth>::load(y_row + v, kWidth > 1 && y_aligned);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float student_logit = to_float(z.values[i]), teacher_logit = to_float(y.values[i]);
        const float a = teacher_norm(teacher_logit), b = student_norm(student_logit);
        const auto term = divergence(a, b, ratio(teacher_logit, student_logit, a, b));
        sums.x += term.value;
        sums.y += term.slope;
      }
    });
    sums = reduce(sums, scratch);
  }
  if (threadIdx.x == 0) {
    const float hard_loss = hard ? hard_weight * (plain.max + plain.log_sum - target) : 0.0f;
    *loss = (1.0f - hard_weight) * sums.x + hard_loss;
  }
  if (!gradient) return;

  const float weight = (1.0f - hard_weight) * scale;
  cut.visit([&](auto width, int64_t v) {
    constexpr int kWidth = decltype(width)::value;
    const auto z = Pack<Logit, kWidth>::load(z_row + v, kWidth > 1);
    Pack<Logit, kWidth> y{}, out;
    if constexpr (Divergence::has_teacher) y = Pack<Logit, kWidth>::load(y_row + v, kWidth > 1 && y_aligned);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float logit = to_float(z.values[i]);
      float g = 0.0f;
      if constexpr (Divergence::has_teacher) {
        const float teacher_logit = to_float(y.values[i]);
        const float a = teacher_norm(teacher_logit), b = student_norm(logit);
        g = weight * (divergence(a, b, ratio(teacher_logit, logit, a, b)).slope - exponential(b) * sums.y);
      }
      if (hard) g += hard_weight * (exponential(plain(logit)) - (v + i == label ? 1.0f : 0.0f));
      out.values[i] = from_float<Logit>(g);
    }
    out.store(gradient + v, kWidth > 1 && cut.gradient_aligned);
  });
}

}  // namespace abkd::cuda
