// Scalar building blocks that every divergence and every row driver share, on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ABKD_INLINE __host__ __device__ __forceinline__
#define ABKD_INLINE_MEMBER __host__ __device__ __forceinline__
#else
// Internal linkage matters: the CPU driver compiles these functions once per instruction set, and the linker must
// never merge an AVX-512 copy into code that runs on an older processor.
#define ABKD_INLINE static inline __attribute__((always_inline))
#define ABKD_INLINE_MEMBER inline __attribute__((always_inline))
#endif

namespace abkd {

// Log-probabilities are kept above this floor, so that a masked logit (-inf) stays a number: two masked logits then
// differ by exactly 0 and contribute nothing.
constexpr float kLogFloor = -1e30f;

template <typename T>
struct Limits;

template <>
struct Limits<float> {
  static constexpr float max_exponent = 64.0f;  // beyond e^64 a term saturates; a row's sum of them still fits in fp32
  static constexpr float series_below = 0.25f;
  static constexpr int series_terms = 6;  // (k + 1) 0.25^k / (k + 2)! < 2^-24 for k = 6
};

template <>
struct Limits<double> {
  static constexpr double max_exponent = 640.0;
  static constexpr double series_below = 0.25;
  static constexpr int series_terms = 13;  // the same bound for 2^-53
};

// NaN passes through `lower` and `upper` (both comparisons are false), so a NaN logit reaches the loss.
template <typename T>
ABKD_INLINE T lower(T x, T bound) {
  return x < bound ? bound : x;
}

template <typename T>
ABKD_INLINE T upper(T x, T bound) {
  return x > bound ? bound : x;
}

template <typename T>
ABKD_INLINE T absolute(T x) {
  return x < T(0) ? -x : x;
}

ABKD_INLINE double exponential(double x) { return ::exp(x); }

// e^x for x <= 88, flushed to 0 below -88; error under 1.5 ulp.
ABKD_INLINE float exponential(float x) {
  constexpr float log2e = 1.44269504f;
#if defined(__CUDA_ARCH__)
  x = lower(x, -200.0f);  // e^-200 is 0, and -inf would leave inf - inf below
  // ex2.approx is good to 2 ulp; the rounding of x * log2e, which would cost |x| ulp, is put back to first order.
  const float t = x * log2e;
  const float lost = fmaf(x, log2e, -t) + x * 1.92596303e-8f;
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  return power * fmaf(lost, 0.693147181f, 1.0f);
#else
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(t) in the low mantissa bits
  constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  x = lower(x, -88.0296919f);  // -127 ln 2, where the scale below becomes exactly 0
  const float shifted = x * log2e + round_to_integer;
  const float n = shifted - round_to_integer;
  const float r = (x - n * ln2_high) - n * ln2_low;  // |r| <= ln(2) / 2
  // Minimax fit of (e^r - 1 - r) / r^2, relative to e^r: error 3.6e-9.
  float p = 1.38145e-3f;
  p = p * r + 8.36875e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
#endif
}

// Int_0^length e^(-rate t) dt = (1 - decay) / rate for rate >= 0, given decay = e^(-rate length) and 1 / rate (any
// finite number where rate is 0). Without cancellation, and equal to length where rate is 0.
ABKD_INLINE float decaying_integral(float length, float rate, float inverse_rate, float decay) {
  const float t = rate * length;
  const float series = 1.0f - t * (1.0f / 2 - t * (1.0f / 6 - t * (1.0f / 24 - t * (1.0f / 120 - t * (1.0f / 720)))));
  return t < Limits<float>::series_below ? length * series : (1.0f - decay) * inverse_rate;
}

ABKD_INLINE double decaying_integral(double length, double rate, double inverse_rate, double) {
  return rate < 1e-60 ? length : -::expm1(-rate * length) * inverse_rate;
}

}  // namespace abkd
