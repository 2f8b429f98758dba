// Scalar building blocks of all divergences and drivers, on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ABKD_INLINE __host__ __device__ __forceinline__
#define ABKD_INLINE_MEMBER __host__ __device__ __forceinline__
#define ABKD_UNROLL _Pragma("unroll")
#else
// Internal linkage matters: the CPU driver compiles these functions once per instruction set, and the linker must
// never put an AVX-512 copy into code that runs on an older CPU.
#define ABKD_INLINE static inline __attribute__((always_inline))
#define ABKD_INLINE_MEMBER inline __attribute__((always_inline))
// Unrolled, because a loop that contains a short loop is not vectorized.
#define ABKD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace abkd {

// Log-probabilities stay above this floor, so that a masked logit (-inf) becomes a number. Two masked logits then
// differ by exactly 0 and contribute nothing.
constexpr float kLogFloor = -1e30f;

// One token's share of a divergence D between the teacher p and the student q. Every divergence is a functor that makes
// the share from a = log p, b = log q and d = b - a, and has a member `slope` that makes only the slope. Values are
// never negative, and are 0 if d is 0.
template <typename T>
struct Term {
  T value;
  T slope;  // dD / d log q; the gradient by the student's logits is slope - q * (sum of slopes)
};

template <typename T>
struct Pair {
  T first, second;
};

template <typename T>
struct Limits;

template <>
struct Limits<float> {
  static constexpr float max_exponent =
      64.0f;  // a term saturates at e^64, so that the sum over a row still fits into float32
  static constexpr float series_below = 0.25f;
  static constexpr float least_rate = 1e-20f;
  static constexpr float rounding = 2.4e-7f;  // twice that of one operation
  static constexpr int series_terms = 6;      // (k + 1) 0.25^k / (k + 2)! < 2^-24 for k = 6
};

template <>
struct Limits<double> {
  static constexpr double max_exponent = 640.0;
  static constexpr double series_below = 0.25;
  static constexpr double least_rate = 1e-20;
  static constexpr double rounding = 4.5e-16;
  static constexpr int series_terms = 13;  // the same bound for 2^-53
};

// x, but not below (above) the bound. NaN passes through, so that a NaN logit reaches the loss.
template <typename T>
ABKD_INLINE T lower(T x, T bound) {
  return x < bound ? bound : x;
}

template <typename T>
ABKD_INLINE T upper(T x, T bound) {
  return x > bound ? bound : x;
}

#if defined(__CUDA_ARCH__)
// One instruction each. A comparison and a selection would be two, a dozen times per element.
__device__ __forceinline__ float lower(float x, float bound) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(bound));
  return larger;
}

__device__ __forceinline__ float upper(float x, float bound) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(x), "f"(bound));
  return smaller;
}
#endif

ABKD_INLINE float absolute(float x) { return ::fabsf(x); }
ABKD_INLINE double absolute(double x) { return ::fabs(x); }

// ABKD_DEVICE is defined if device code is compiled: by nvcc, or by the tests' emulator, which has its own power_of_2.
#if defined(__CUDA_ARCH__)
#define ABKD_DEVICE
#endif
#if defined(__CUDACC__)
// One instruction of the special-function unit. Subnormal results become 0.
__device__ __forceinline__ float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
#endif

ABKD_INLINE double exponential(double x) { return ::exp(x); }

// x = n ln 2 + rest with |rest| <= ln(2) / 2, and scale = 2^n. For x below -88.03 scale is 0.
struct ReducedExponent {
  float rest, scale;
};

ABKD_INLINE ReducedExponent reduce_exponent(float x) {
  constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(t) in the low mantissa bits
  x = lower(x, -88.0296919f);                      // -127 ln 2, where the scale becomes exactly 0
  const float shifted = x * log2e + round_to_integer;
  const float n = shifted - round_to_integer;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  ReducedExponent reduced;
  std::memcpy(&reduced.scale, &bits, sizeof(bits));
  reduced.rest = (x - n * ln2_high) - n * ln2_low;
  return reduced;
}

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: a minimax fit with an error of 3.6e-9, relative to e^r.
ABKD_INLINE float exponential_series(float r) {
  float p = 1.38145e-3f;
  p = p * r + 8.36875e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  return p * r + 4.9999994e-1f;
}

// e^x for x <= 88, and 0 below -88. The error is under 1.5 ulp.
ABKD_INLINE float exponential(float x) {
#if defined(ABKD_DEVICE)
  constexpr float log2e = 1.44269504f;
  x = lower(x, -200.0f);  // e^-200 is 0, and -inf would leave inf - inf below
  // The power of 2 is good to 2 ulp. The rounding of x * log2e would cost |x| ulp; it is put back to first order.
  const float t = x * log2e;
  const float lost = fmaf(x, log2e, -t) + x * 1.92596303e-8f;
  return power_of_2(t) * fmaf(lost, 0.693147181f, 1.0f);
#else
  const ReducedExponent y = reduce_exponent(x);
  return (exponential_series(y.rest) * (y.rest * y.rest) + y.rest + 1.0f) * y.scale;
#endif
}

// decay = e^-t and lost = 1 - e^-t for t >= 0, both without cancellation.
template <typename T>
struct Decay {
  T decay, lost;
};

ABKD_INLINE Decay<double> decaying(double t) { return {::exp(-t), -::expm1(-t)}; }

// The same polynomial on every device: it gives both numbers at once, and a GPU's special-function unit is busy with
// the other exponentials.
ABKD_INLINE Decay<float> decaying(float t) {
  const ReducedExponent x = reduce_exponent(-t);
  const float rest = x.scale * (exponential_series(x.rest) * (x.rest * x.rest) + x.rest);
  return {x.scale + rest, (1.0f - x.scale) - rest};
}

// log x for normal positive x. The error is under 2^-23, and relative to the result near x = 1.
ABKD_INLINE float logarithm(float x) {
#if defined(ABKD_DEVICE)
  return logf(x);
#else
  constexpr uint32_t root_half = 0x3f3504f3u;  // sqrt(1 / 2)
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t shifted = bits - root_half;  // x = 2^n m with m from sqrt(1 / 2) to sqrt(2)
  const float n = float(int32_t(shifted) >> 23);
  bits = (shifted & 0x007fffffu) + root_half;
  float m;
  std::memcpy(&m, &bits, sizeof(m));
  const float t = m - 1.0f;
  // Minimax fit of (log(1 + t) - t + t^2 / 2) / t^3, relative to log(1 + t): error 3.2e-8.
  float p = 8.70043486e-2f;
  p = p * t - 1.42674863e-1f;
  p = p * t + 1.49147689e-1f;
  p = p * t - 1.65775850e-1f;
  p = p * t + 1.99630633e-1f;
  p = p * t - 2.50013381e-1f;
  p = p * t + 3.33339095e-1f;
  return t + (n * 0.693147181f + t * t * (p * t - 0.5f));
#endif
}

ABKD_INLINE double logarithm(double x) { return ::log(x); }

// tanh x and its derivative, both without cancellation.
template <typename T>
struct Tanh {
  T value, slope;

  ABKD_INLINE_MEMBER explicit Tanh(T x) {
    const Decay<T> decayed = decaying(T(2) * absolute(x));
    const T inverse = T(1) / (T(1) + decayed.decay), size = decayed.lost * inverse;
    value = x < T(0) ? -size : size;
    slope = T(4) * decayed.decay * inverse * inverse;
  }
};

// t - (1 - e^-t) for t >= 0, given lost = 1 - e^-t, without cancellation.
template <typename T>
ABKD_INLINE T rise(T t, T lost) {
  T series = T(1);
  ABKD_UNROLL
  for (int k = Limits<T>::series_terms + 2; k > 2; --k) series = T(1) - t * T(1.0 / k) * series;
  return t < Limits<T>::series_below ? T(0.5) * t * t * series : t - lost;
}

// whole ((1 - e^-t) - t e^-t) for t >= 0, given decay = whole e^-t and lost = whole - decay, without cancellation.
template <typename T>
ABKD_INLINE T fall(T t, T lost, T decay, T whole = T(1)) {
  T series = T(1);
  ABKD_UNROLL
  for (int k = Limits<T>::series_terms; k > 0; --k) series = T(1) - t * T((k + 1.0) / (k * (k + 2.0))) * series;
  return t < Limits<T>::series_below ? T(0.5) * t * t * series * whole : lost - t * decay;
}

// p and q as multiples of the larger of them, so that nothing overflows and their difference keeps its digits.
template <typename T>
struct Anchored {
  bool falling;   // q < p
  T magnitude;    // |d|
  T top;          // max(p, q)
  T decay, lost;  // min / max and 1 - min / max

  ABKD_INLINE_MEMBER Anchored(T a, T b, T d) : falling(d < T(0)), magnitude(absolute(d)) {
    const Decay<T> decayed = decaying(magnitude);
    top = exponential(falling ? a : b);
    decay = decayed.decay;
    lost = decayed.lost;
  }

  ABKD_INLINE_MEMBER T student() const { return falling ? top * decay : top; }
  ABKD_INLINE_MEMBER T difference() const { return falling ? -top * lost : top * lost; }  // q - p
};

}  // namespace abkd
