// How a block of threads reads and writes a row of logits: in packs of 8, and single elements at both ends. Logits of
// any type become float; a branch that all threads take alike chooses the type once for each pack.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../divergence/math.h"
#include "../row_call.h"

namespace abkd::cuda {

#if !defined(ABKD_THREADS)
#define ABKD_THREADS 512
#endif
constexpr int kThreads = ABKD_THREADS;
static_assert(kThreads % 32 == 0 && kThreads <= 1024, "ABKD_THREADS must be a multiple of 32, at most 1024");
constexpr int kPack = 8;

// The shared memory of a block beyond its fixed part: rows that stay there between the passes.
extern __shared__ __align__(16) unsigned char shared_rows[];

template <int kWidth>
struct Numbers {
  float values[kWidth];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Two numbers are converted in one instruction.
__device__ __forceinline__ void from_floats(float x, float y, float (&pair)[2]) {
  pair[0] = x;
  pair[1] = y;
}
__device__ __forceinline__ void from_floats(float x, float y, __nv_bfloat16 (&pair)[2]) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  pair[0] = both.x;
  pair[1] = both.y;
}
__device__ __forceinline__ void from_floats(float x, float y, __half (&pair)[2]) {
  const __half2 both = __floats2half2_rn(x, y);
  pair[0] = both.x;
  pair[1] = both.y;
}

// A pack starts on a 16-byte boundary. `streaming`: the cache need not keep the bytes.
template <typename T, int kWidth>
__device__ __forceinline__ Numbers<kWidth> load(const T* from, bool streaming) {
  alignas(16) T values[kWidth];
  if constexpr (kWidth == 1) {
    values[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < int(sizeof(values) / 16); ++i) {
      const uint4* word = reinterpret_cast<const uint4*>(from) + i;
      reinterpret_cast<uint4*>(values)[i] = streaming ? __ldcs(word) : *word;
    }
  }
  Numbers<kWidth> numbers;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) numbers.values[i] = to_float(values[i]);
  return numbers;
}

template <typename T, int kWidth>
__device__ __forceinline__ void store(T* to, const Numbers<kWidth>& numbers, bool streaming) {
  alignas(16) T values[kWidth + kWidth % 2];
#pragma unroll
  for (int i = 0; i < kWidth; i += 2) {
    T pair[2];
    from_floats(numbers.values[i], i + 1 < kWidth ? numbers.values[i + 1] : 0.0f, pair);
    values[i] = pair[0];
    values[i + 1] = pair[1];
  }
  if constexpr (kWidth == 1) {
    *to = values[0];
  } else {
#pragma unroll
    for (int i = 0; i < int(sizeof(values) / 16); ++i) {
      const uint4 word = reinterpret_cast<const uint4*>(values)[i];
      uint4* target = reinterpret_cast<uint4*>(to) + i;
      if (streaming)
        __stcs(target, word);
      else
        *target = word;
    }
  }
}

__host__ __device__ constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Calls run with a pointer of the type of the logits.
template <typename Run>
__device__ __forceinline__ auto with_type(DType dtype, Run run) {
  if (dtype == DType::bfloat16) return run(static_cast<__nv_bfloat16*>(nullptr));
  if (dtype == DType::float16) return run(static_cast<__half*>(nullptr));
  return run(static_cast<float*>(nullptr));
}

// The shared memory of one row, with room for its packs to start on a 16-byte boundary.
__host__ __device__ inline int64_t row_bytes(int64_t vocab, DType dtype) {
  return ((vocab + kPack) * size_of(dtype) + 15) / 16 * 16;
}

// The shared memory that the first `kept` of a token's rows take: the student's, then the teacher's.
__host__ __device__ inline int64_t kept_bytes(const Rows& rows, int kept) {
  return (kept > 0 ? row_bytes(rows.vocab, rows.student.dtype) : 0) +
         (kept > 1 ? row_bytes(rows.vocab, rows.teacher.dtype) : 0);
}

template <typename T>
__device__ __forceinline__ T* element(T* rows, int64_t index, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
  return static_cast<Byte*>(rows) + index * size_of(dtype);
}

// How many elements there are before the next 16-byte boundary.
__device__ __forceinline__ int elements_to_boundary(const void* at, DType dtype) {
  return int(-reinterpret_cast<uintptr_t>(at) % 16 / size_of(dtype));
}

// The parts of a row: `head` single elements up to the first 16-byte boundary, whole packs, single elements. Where
// student and teacher don't reach a boundary at the same element, all elements are single. The gradient has no say:
// sums are the same wherever it goes.
struct Cut {
  int vocab, head, packs;

  __device__ Cut(const Rows& rows, int64_t row) : vocab(int(rows.vocab)), head(0), packs(0) {
    const void* student = element(rows.student.data, row * rows.student.stride, rows.student.dtype);
    const int to_boundary = elements_to_boundary(student, rows.student.dtype);
    const void* teacher = element(rows.teacher.data, row * rows.teacher.stride + to_boundary, rows.teacher.dtype);
    const bool together = !rows.teacher.data || elements_to_boundary(teacher, rows.teacher.dtype) == 0;
    if (to_boundary < vocab && together) {
      head = to_boundary;
      packs = (vocab - head) / kPack;
    }
  }

  // The place of the i-th single element.
  __device__ int single(int i) const { return i < head ? i : i + packs * kPack; }
};

// A row of one model's logits in device memory, and its copy in shared memory if it is kept.
struct Source {
  const unsigned char* data;
  DType dtype;
  bool streaming;
  int kept;          // where the copy starts in shared_rows, or -1
  bool reads_kept;   // whether the copy has been written
  float scale;       // of the logits; 1 if there is a cap
  float inner, cap;  // with a cap, logits become cap tanh(inner x)

  __device__ Source(const Logits& logits, int64_t row, const Cut& cut, int kept)
      : data(static_cast<const unsigned char*>(logits.data) + row * logits.stride * size_of(logits.dtype)),
        dtype(logits.dtype),
        streaming(kept >= 0),
        kept(kept),
        reads_kept(false),
        scale(logits.map.cap == 0.0 ? float(logits.map.scale) : 1.0f),
        inner(logits.map.cap == 0.0 ? 0.0f : float(logits.map.scale / logits.map.cap)),
        cap(float(logits.map.cap)) {
    // The copy is shifted, so that its packs are aligned for any alignment of the row.
    if (kept >= 0) this->kept += int((kPack - cut.head % kPack) % kPack * size_of(dtype));
  }

  template <int kWidth>
  __device__ __forceinline__ Numbers<kWidth> raw(int v) const {
    return with_type(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (reads_kept) return load<T, kWidth>(reinterpret_cast<const T*>(shared_rows + kept) + v, false);
      return load<T, kWidth>(reinterpret_cast<const T*>(data) + v, streaming);
    });
  }

  template <int kWidth>
  __device__ __forceinline__ void keep(int v, const Numbers<kWidth>& numbers) const {
    if (kept < 0) return;
    with_type(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      store<T, kWidth>(reinterpret_cast<T*>(shared_rows + kept) + v, numbers, false);
    });
  }

  // The logits before `scale`.
  template <int kWidth>
  __device__ __forceinline__ Numbers<kWidth> capped(Numbers<kWidth> numbers) const {
    if (cap != 0.0f) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) numbers.values[i] = cap * Tanh<float>(inner * numbers.values[i]).value;
    }
    return numbers;
  }

  // The next pass over a row that is not kept is the last one: the cache need not hold it any longer.
  __device__ void next_pass(bool is_last) {
    reads_kept = kept >= 0;
    streaming = is_last;
  }
};

}  // namespace abkd::cuda
