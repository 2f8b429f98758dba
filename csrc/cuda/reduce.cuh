// Sums and maxima over the threads of a block, in an order that depends on nothing: results have the same bits always.
#pragma once

#include "packs.cuh"

namespace abkd::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kMostSums = 8;

// What the threads of a block share. After every reduction `warps` is free again.
struct Scratch {
  float warps[kWarps][kMostSums];
  double lse[3];
  Statistics statistics;  // statistics of the row; thread 0 writes them
  float target;           // the student's mapped logit of the label; thread 0 writes it
};

struct Add {
  static constexpr float identity = 0.0f;
  __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};

struct Max {
  static constexpr float identity = kLogFloor;
  __device__ __forceinline__ float operator()(float x, float y) const { return x < y ? y : x; }
};

// Every thread gives n numbers, and gets those of the whole block.
template <typename Operation, int n>
__device__ __forceinline__ void reduce(float (&numbers)[n], Scratch& scratch, Operation operation) {
  static_assert(n <= kMostSums && kWarps <= 32);
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      numbers[i] = operation(numbers[i], __shfl_xor_sync(0xffffffffu, numbers[i], offset));
  }
  const int lane = int(threadIdx.x) % 32;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) scratch.warps[threadIdx.x / 32][i] = numbers[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    numbers[i] = lane < kWarps ? scratch.warps[lane][i] : Operation::identity;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      numbers[i] = operation(numbers[i], __shfl_xor_sync(0xffffffffu, numbers[i], offset));
  }
  __syncthreads();
}

}  // namespace abkd::cuda
