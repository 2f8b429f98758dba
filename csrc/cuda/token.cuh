// One token of a launch: it visits the packs of its rows, keeps rows in shared memory, and writes gradient and loss.
#pragma once

#include "reduce.cuh"

namespace abkd::cuda {

// log of the softmax, in the units of `scale`.
struct LogSoftmax {
  float scale, high, low;  // the log-normalizer, and the rest that rounding to float takes from it
  __device__ LogSoftmax(float scale, double lse) : scale(scale), high(float(lse)), low(float(lse - double(high))) {}
  __device__ __forceinline__ float operator()(float logit) const { return logit * scale - high - low; }
};

// One token: where its logits are and where its gradient goes.
template <bool kHasTeacher>
struct Token {
  const Rows& rows;
  int64_t row, label;
  Cut cut;
  Source student, teacher;
  Scratch& scratch;

  // `kept` is the number of rows that stay in shared memory between the passes: 0, 1 (the student's) or 2 (both).
  __device__ Token(const Rows& rows, int64_t row, int kept, Scratch& scratch)
      : rows(rows),
        row(row),
        label(rows.labels ? rows.labels[row] : 0),
        cut(rows, row),
        student(rows.student, row, cut, kept > 0 ? 0 : -1),
        teacher(kHasTeacher ? rows.teacher : rows.student, row, cut,
                kept > 1 ? int(row_bytes(rows.vocab, rows.student.dtype)) : -1),
        scratch(scratch) {}

  // Calls body(v, z, y) for all packs of the row, with numbers as they are in memory. The next pack is loaded before
  // the body runs, so that memory and arithmetic overlap.
  template <typename Body>
  __device__ __forceinline__ void visit(Body body) const {
    Numbers<kPack> next_z, next_y;
    for (int pack = int(threadIdx.x) - kThreads; pack < cut.packs; pack += kThreads) {
      const Numbers<kPack> z = next_z, y = next_y;
      if (pack + kThreads < cut.packs) {
        const int v = cut.head + (pack + kThreads) * kPack;
        next_z = student.template raw<kPack>(v);
        if constexpr (kHasTeacher) next_y = teacher.template raw<kPack>(v);
      }
      if (pack >= 0) body(cut.head + pack * kPack, z, y);
    }
    for (int i = int(threadIdx.x); i < cut.vocab - cut.packs * kPack; i += kThreads) {
      const int v = cut.single(i);
      Numbers<1> y{};
      if constexpr (kHasTeacher) y = teacher.template raw<1>(v);
      body(v, student.template raw<1>(v), y);
    }
  }

  // The same as `visit`, with capped logits. `first` says whether the copies in shared memory have to be made.
  template <typename Body>
  __device__ __forceinline__ void visit_capped(bool first, Body body) const {
    visit([&](int v, const auto& z, const auto& y) {
      if (first) {
        student.keep(v, z);
        if constexpr (kHasTeacher) teacher.keep(v, y);
      }
      body(student.capped(z), teacher.capped(y));
    });
  }

  __device__ __forceinline__ void next_pass(bool is_last) {
    student.next_pass(is_last);
    teacher.next_pass(is_last);
  }

  // Writes the gradient that derive(z, y) gives for each capped pair of logits, times the slope of the student's
  // map. The cross-entropy's part is added here.
  template <typename Derive>
  __device__ __forceinline__ void write_gradient(Derive derive) const {
    const float upstream = rows.upstream ? static_cast<const float*>(rows.upstream)[row] : 1.0f;
    const float map_scale = float(rows.student.map.scale);
    const float weight = upstream * float((1.0 - rows.hard_weight) / rows.temperature) * map_scale;
    const float hard_weight = upstream * float(rows.hard_weight) * map_scale;
    const LogSoftmax plain(student.scale, scratch.statistics.plain_lse);
    visit([&](int v, const auto& raw, const auto& raw_y) {
      constexpr int kWidth = sizeof(raw) / sizeof(float);
      const auto z = student.capped(raw), y = teacher.capped(raw_y);
      Numbers<kWidth> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        out.values[i] = 0.0f;
        if constexpr (kHasTeacher) out.values[i] = weight * derive(z.values[i], y.values[i]);
      }
      if (hard_weight != 0.0f) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          out.values[i] += hard_weight * (exponential(plain(z.values[i])) - (v + i == label ? 1.0f : 0.0f));
      }
      if (student.cap != 0.0f) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) out.values[i] *= Tanh<float>(student.inner * raw.values[i]).slope;
      }
      put(v, out);
    });
  }

  template <int kWidth>
  __device__ __forceinline__ void put(int v, const Numbers<kWidth>& gradient) const {
    with_type(rows.gradient_dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* to = static_cast<T*>(rows.gradient) + row * rows.gradient_stride + v;
      if (kWidth == 1 || reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        store<T, kWidth>(to, gradient, true);
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) store<T, 1>(to + i, Numbers<1>{gradient.values[i]}, true);
      }
    });
  }

  __device__ void ignore() const {
    if (threadIdx.x == 0 && rows.losses) {
      static_cast<float*>(rows.losses)[row] = 0.0f;
      if (rows.statistics) rows.statistics[row] = Statistics{};
    }
    if (!rows.gradient) return;
    for (int pack = int(threadIdx.x); pack < cut.packs; pack += kThreads)
      put(cut.head + pack * kPack, Numbers<kPack>{});
    for (int i = int(threadIdx.x); i < cut.vocab - cut.packs * kPack; i += kThreads) put(cut.single(i), Numbers<1>{});
  }

  // Thread 0 writes the loss of the row, and its statistics.
  __device__ void write_loss(double value) const {
    if (threadIdx.x == 0) {
      double hard = 0.0;
      if (rows.hard_weight != 0.0) hard = rows.hard_weight * (scratch.statistics.plain_lse - double(scratch.target));
      static_cast<float*>(rows.losses)[row] = float((1.0 - rows.hard_weight) * value + hard);
      if (rows.statistics) rows.statistics[row] = scratch.statistics;
    }
    __syncthreads();
  }
};

}  // namespace abkd::cuda
