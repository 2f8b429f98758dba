// How a block of threads reads and writes a row of logits: in packs of 16 bytes, and single elements at both ends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace abkd::cuda {

constexpr int kThreads = 512;

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

// Up to 16 bytes of consecutive logits. An aligned address moves them in one instruction.
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

// The parts of a row: `head` single elements up to the student's first 16-byte boundary, whole packs, single elements.
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

  // Calls body(width, index). The threads of a block together cover [0, vocab) once. The type of `width` has its value.
  template <typename Body>
  __device__ __forceinline__ void visit(Body body) const {
    const int thread = int(threadIdx.x), tail = head + packs * kWidth;
    for (int pack = thread; pack < packs; pack += kThreads) body(Width<kWidth>{}, head + pack * kWidth);
    const int single = thread < head ? thread : tail + (thread - head);
    if (single < vocab) body(Width<1>{}, single);
  }
};

}  // namespace abkd::cuda
