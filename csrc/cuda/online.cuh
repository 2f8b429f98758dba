// Divergences whose value and sum of slopes are closed forms of a few sums over the row. One pass takes these sums
// together with the log-normalizers, because powers of the normalizers factor out of them. With log2 of p = y - Y and
// of q = z - Z, where y and z are logits in units of log 2, and s = alpha + beta:
//     sum p^s = 2^(-s Y) sum 2^(s y),    sum p^alpha q^beta = 2^(-alpha Y - beta Z) sum 2^(alpha y + beta z).
//
// Alpha-beta with positive alpha and beta, AlphaNet likewise, and weighted or balanced KL divergences allow that. AKL,
// mixtures and the total variation don't: their terms are no products of powers.
//
// The sums have a relative error of about 2^-20. A difference of them loses digits where student and teacher agree. So
// a row is accepted only if its divergence is at least kLeast of the sums: then the value has a relative error below
// 2^-20 / kLeast = 1e-3, and its part in the gradient's one below 1e-4, a twentieth of the rounding of a gradient of 16
// bits. The exact passes measure every other row. NaN and infinite sums are never accepted.
#pragma once

#include "../divergence/families.h"
#include "token.cuh"

namespace abkd::cuda {

constexpr float kLeast = 1.0f / 1024, kMostValue = 1e4f;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// What one pass finds out about a row.
struct Measured {
  bool accepted;
  float value, slope;  // the divergence, and the sum of its slopes
  double state[2];
};

// The log-normalizers of a row in units of log 2, over its maxima.
struct Normalizers {
  float student, teacher;
};

// The sums of alpha-beta divergences. kTerms: how many (alpha, beta); kPowers: whether alpha + beta is not 1.
template <int kTerms, bool kPowers>
struct PowerSums {
  static constexpr int kCount = 2 + kTerms + (kPowers ? 2 : 0);
  float alpha[kTerms], beta[kTerms], sum;
  float sums[kCount] = {};  // of 2^z, 2^y, the mixed powers, 2^(s z), 2^(s y)

  __device__ __forceinline__ void add(float z, float y) {
    sums[0] += power_of_2(z);
    sums[1] += power_of_2(y);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) sums[2 + i] += power_of_2(alpha[i] * y + beta[i] * z);
    if constexpr (kPowers) {
      sums[2 + kTerms] += power_of_2(sum * z);
      sums[3 + kTerms] += power_of_2(sum * y);
    }
  }

  // The maxima have grown by so much.
  __device__ __forceinline__ void rescale(float z, float y) {
    sums[0] *= power_of_2(-z);
    sums[1] *= power_of_2(-y);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) sums[2 + i] *= power_of_2(-alpha[i] * y - beta[i] * z);
    if constexpr (kPowers) {
      sums[2 + kTerms] *= power_of_2(-sum * z);
      sums[3 + kTerms] *= power_of_2(-sum * y);
    }
  }
};

// The sums of Kullback-Leibler divergences and entropies.
struct LogSums {
  static constexpr int kCount = 8;
  float sums[kCount] = {};  // of 2^z, 2^y, 2^z (z - y), 2^y (y - z), their absolute terms, 2^z z, 2^y y

  __device__ __forceinline__ void add(float z, float y) {
    z = lower(z, -1e6f);  // 0 times this is 0
    y = lower(y, -1e6f);
    const float q = power_of_2(z), p = power_of_2(y), d = z - y, size = absolute(d);
    sums[0] += q;
    sums[1] += p;
    sums[2] += q * d;
    sums[3] -= p * d;
    sums[4] += q * size;
    sums[5] += p * size;
    sums[6] += q * z;
    sums[7] += p * y;
  }

  __device__ __forceinline__ void rescale(float z, float y) {
    // The first maxima replace the floor, and the sums are 0.
    const float q = power_of_2(-z), p = power_of_2(-y), d = lower(z - y, -1e6f);
    const float shift = upper(d, 1e6f);
    sums[2] = q * (sums[2] - sums[0] * shift);
    sums[3] = p * (sums[3] + sums[1] * shift);
    sums[4] = q * (sums[4] + sums[0] * absolute(shift));
    sums[5] = p * (sums[5] + sums[1] * absolute(shift));
    sums[6] = q * (sums[6] - sums[0] * upper(z, 1e6f));
    sums[7] = p * (sums[7] - sums[1] * upper(y, 1e6f));
    sums[0] *= q;
    sums[1] *= p;
  }
};

// (P alpha / s + Q beta / s - M) / (alpha beta) and the sum of slopes (Q - M) / alpha.
__device__ __forceinline__ Measured alpha_beta(float alpha, float beta, float p, float q, float m) {
  const float s = alpha + beta, share = alpha / s;
  const float ends = share * p + (1.0f - share) * q, difference = ends - m;
  const float value = difference / (alpha * beta);
  return {difference >= kLeast * (ends + m) && value < kMostValue, value, (q - m) / alpha, {0.0, 0.0}};
}

// How a divergence is measured in one pass: its Sums, what they come to, and a token's part of the gradient.
template <typename Divergence>
struct OnePass {
  static constexpr bool possible = false;
};

template <>
struct OnePass<AlphaBeta<float>> {
  static constexpr bool possible = true;
  using Sums = PowerSums<1, true>;
  float alpha, beta;

  __device__ OnePass(const Rows& rows) : alpha(float(rows.parameters[0])), beta(float(rows.parameters[1])) {}
  __device__ bool allowed() const {
    return alpha > 0.0f && beta > 0.0f && alpha * beta >= 1.0f / 64 && alpha + beta <= 4.0f;
  }
  __device__ Sums sums() const { return {{alpha}, {beta}, alpha + beta}; }

  __device__ Measured measure(const Sums& x, const Normalizers& n) const {
    const float p = x.sums[4] * power_of_2(-x.sum * n.teacher), q = x.sums[3] * power_of_2(-x.sum * n.student);
    return alpha_beta(alpha, beta, p, q, x.sums[2] * power_of_2(-alpha * n.teacher - beta * n.student));
  }

  // q^s - p^alpha q^beta over alpha, from log2 of p and of q.
  __device__ __forceinline__ float slope(const Measured&, float a, float b, float) const {
    return (power_of_2((alpha + beta) * b) - power_of_2(alpha * a + beta * b)) / alpha;
  }
};

template <>
struct OnePass<AlphaNet<float>> {
  static constexpr bool possible = true;
  using Sums = PowerSums<2, false>;
  float alpha[2];

  __device__ OnePass(const Rows& rows) : alpha{float(rows.parameters[0]), float(rows.parameters[1])} {}
  __device__ bool allowed() const {
    return lower(alpha[0], alpha[1]) <= 63.0f / 64 && upper(alpha[0], alpha[1]) >= 1.0f / 64;
  }
  __device__ Sums sums() const { return {{alpha[0], alpha[1]}, {1.0f - alpha[0], 1.0f - alpha[1]}, 1.0f}; }

  __device__ Measured measure(const Sums& x, const Normalizers& n) const {
    Measured branches[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float beta = 1.0f - alpha[i];
      branches[i] =
          alpha_beta(alpha[i], beta, 1.0f, 1.0f, x.sums[2 + i] * power_of_2(-alpha[i] * n.teacher - beta * n.student));
    }
    const bool second = branches[0].value < branches[1].value;
    Measured chosen = second ? branches[1] : branches[0];
    // Two branches that are about equal are left to the exact passes.
    chosen.accepted = branches[0].accepted && branches[1].accepted &&
                      absolute(branches[0].value - branches[1].value) >= 2.0f * kLeast * chosen.value;
    chosen.state[0] = second ? 1.0 : 0.0;
    return chosen;
  }

  __device__ __forceinline__ float slope(const Measured& measured, float a, float b, float q) const {
    const float x = measured.state[0] == 0.0 ? alpha[0] : alpha[1];
    return (q - power_of_2(x * a + (1.0f - x) * b)) / x;
  }
};

// forward KL(p, q) + reverse KL(q, p).
struct OnePassKL {
  static constexpr bool possible = true;
  using Sums = LogSums;

  __device__ bool allowed() const { return true; }
  __device__ Sums sums() const { return {}; }

  __device__ Measured weighted(const Sums& x, const Normalizers& n, float forward, float reverse) const {
    const float lost = n.student - n.teacher;
    const float of_q = x.sums[2] / x.sums[0] - lost, of_p = x.sums[3] / x.sums[1] + lost;  // both KL, over log 2
    const float size =
        forward * (x.sums[5] / x.sums[1] + absolute(lost)) + reverse * (x.sums[4] / x.sums[0] + absolute(lost));
    const float value = kLn2 * (forward * of_p + reverse * of_q);
    return {value >= kLeast * kLn2 * size && value < kMostValue, value, kLn2 * reverse * of_q, {forward, reverse}};
  }

  __device__ __forceinline__ float slope_of(float forward, float reverse, float a, float b, float q) const {
    const float d = lower(b, -1e6f) - lower(a, -1e6f);  // 0 for two masked logits
    return forward * (q - power_of_2(a)) + reverse * kLn2 * q * d;
  }
};

template <>
struct OnePass<WeightedKL<float>> : OnePassKL {
  float forward, reverse;

  __device__ OnePass(const Rows& rows) : forward(float(rows.parameters[0])), reverse(float(rows.parameters[1])) {}
  __device__ Measured measure(const Sums& x, const Normalizers& n) const { return weighted(x, n, forward, reverse); }
  __device__ __forceinline__ float slope(const Measured&, float a, float b, float q) const {
    return slope_of(forward, reverse, a, b, q);
  }
};

template <>
struct OnePass<BalancedKL<float>> : OnePassKL {
  __device__ OnePass(const Rows&) {}
  __device__ Measured measure(const Sums& x, const Normalizers& n) const {
    const float student = n.student - x.sums[6] / x.sums[0], teacher = n.teacher - x.sums[7] / x.sums[1];  // entropies
    Measured measured = weighted(x, n, teacher > student ? 3.0f : 1.0f, student > teacher ? 3.0f : 1.0f);
    measured.accepted &= absolute(student - teacher) >= kLeast * (student + teacher);
    return measured;
  }
  __device__ __forceinline__ float slope(const Measured& measured, float a, float b, float q) const {
    return slope_of(float(measured.state[0]), float(measured.state[1]), a, b, q);
  }
};

}  // namespace abkd::cuda
