// Divergences whose value and sum of slopes are closed forms of a few sums over the row. One pass takes these sums
// together with the log-normalizers, because powers of the normalizers factor out of them. With log2 of p = y - Y and
// of q = z - Z, where y and z are logits in units of log 2, and s = alpha + beta:
//     sum p^s = 2^(-s Y) sum 2^(s y),    sum p^alpha q^beta = 2^(-alpha Y - beta Z) sum 2^(alpha y + beta z).
//
// Alpha-beta with positive alpha and beta, AlphaNet likewise, and weighted or balanced KL divergences allow that. AKL,
// mixtures and the total variation don't: their terms are no products of powers.
//
// The sums have a relative error of about 2^-20. A difference of them loses digits where student and teacher agree. So
// a row is accepted only if its divergence is at least kLeast of the sums, and of 1 for KL divergences, whose
// normalizers have that size. Then the value has a relative error below 2^-20 / kLeast = 1e-3. The gradient's error is
// below 1e-4 of the larger of its norm and 0.01, a twentieth of the rounding to 16 bits: where the student is sure of a
// token the gradient is smaller than the terms that it is made of. The exact passes measure every other row. NaN and
// infinite sums are never accepted.
#pragma once

#include "../divergence/families.h"
#include "token.cuh"

namespace abkd::cuda {

constexpr float kLeast = 1.0f / 1024, kMostValue = 1e4f;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// What one pass finds out about a row.
struct Measured {
  bool accepted;
  float value, slope;  // the divergence, and the sum of the slopes that OnePass makes
  float state[2];
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
    // A token that one model masks makes the divergence so large that the row is refused, unless the other model has no
    // mass there either.
    z = lower(z, kLogFloor);
    y = lower(y, kLogFloor);
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
    const float q = power_of_2(-z), p = power_of_2(-y), shift = z - y;
    sums[2] = q * (sums[2] - sums[0] * shift);
    sums[3] = p * (sums[3] + sums[1] * shift);
    sums[4] = q * (sums[4] + sums[0] * absolute(shift));
    sums[5] = p * (sums[5] + sums[1] * absolute(shift));
    sums[6] = q * (sums[6] - sums[0] * z);
    sums[7] = p * (sums[7] - sums[1] * y);
    sums[0] *= q;
    sums[1] *= p;
  }
};

// One alpha-beta divergence, for positive alpha and beta: (P alpha / s + Q beta / s - M) / (alpha beta). A slope is
// (q^s - p^alpha q^beta) / alpha. For s = 1 it is centered: the part q / alpha is left out.
template <bool kCentered>
struct AlphaBetaTerm {
  float alpha, beta, inverse_alpha;

  __device__ AlphaBetaTerm(double alpha, double beta)
      : alpha(float(alpha)), beta(float(beta)), inverse_alpha(1.0f / float(alpha)) {}

  __device__ bool allowed() const {
    return alpha > 0.0f && beta > 0.0f && alpha * beta >= 1.0f / 64 && alpha + beta <= 4.0f;
  }

  __device__ Measured measure(float p, float q, float m) const {
    const float share = alpha / (alpha + beta), ends = share * p + (1.0f - share) * q, difference = ends - m;
    const float value = difference * inverse_alpha / beta;
    const bool accepted = difference >= kLeast * (ends + m) && value < kMostValue;
    return {accepted, value, (of_q(q) - m) * inverse_alpha, {kCentered ? 1.0f : 0.0f, 0.0f}};
  }

  // From log2 p, log2 q and q^s.
  __device__ __forceinline__ float slope(float a, float b, float power) const {
    return (of_q(power) - power_of_2(alpha * a + beta * b)) * inverse_alpha;
  }

 private:
  __device__ static float of_q(float power) { return kCentered ? 0.0f : power; }
};

// How a divergence is measured in one pass: its Sums, what they come to, and a token's part of the gradient.
template <typename Divergence>
struct OnePass {
  static constexpr bool possible = false;
};

template <>
struct OnePass<AlphaBeta<float>> {
  static constexpr bool possible = true;
  using Sums = PowerSums<1, true>;
  AlphaBetaTerm<false> term;

  __device__ OnePass(const Rows& rows) : term(rows.parameters[0], rows.parameters[1]) {}
  __device__ bool allowed() const { return term.allowed(); }
  __device__ Sums sums() const { return {{term.alpha}, {term.beta}, term.alpha + term.beta}; }

  __device__ Measured measure(const Sums& x, const Normalizers& n) const {
    const float p = x.sums[4] * power_of_2(-x.sum * n.teacher), q = x.sums[3] * power_of_2(-x.sum * n.student);
    return term.measure(p, q, x.sums[2] * power_of_2(-term.alpha * n.teacher - term.beta * n.student));
  }

  __device__ __forceinline__ float slope(const Measured&, float a, float b, float) const {
    return term.slope(a, b, power_of_2((term.alpha + term.beta) * b));
  }
};

template <>
struct OnePass<AlphaDivergence<float>> {
  static constexpr bool possible = true;
  using Sums = PowerSums<1, false>;
  AlphaBetaTerm<true> term;

  __device__ OnePass(const Rows& rows) : term(rows.parameters[0], rows.parameters[1]) {}
  __device__ bool allowed() const { return term.allowed(); }
  __device__ Sums sums() const { return {{term.alpha}, {term.beta}, 1.0f}; }

  __device__ Measured measure(const Sums& x, const Normalizers& n) const {
    return term.measure(1.0f, 1.0f, x.sums[2] * power_of_2(-term.alpha * n.teacher - term.beta * n.student));
  }

  __device__ __forceinline__ float slope(const Measured&, float a, float b, float q) const {
    return term.slope(a, b, q);
  }
};

template <>
struct OnePass<AlphaNet<float>> {
  static constexpr bool possible = true;
  using Sums = PowerSums<2, false>;
  AlphaBetaTerm<true> first, second;

  __device__ OnePass(const Rows& rows)
      : first(rows.parameters[0], 1.0 - rows.parameters[0]), second(rows.parameters[1], 1.0 - rows.parameters[1]) {}
  __device__ bool allowed() const { return first.allowed() && second.allowed(); }
  __device__ Sums sums() const { return {{first.alpha, second.alpha}, {first.beta, second.beta}, 1.0f}; }

  __device__ Measured measure(const Sums& x, const Normalizers& n) const {
    const auto branch = [&](const AlphaBetaTerm<true>& term, float sum) {
      return term.measure(1.0f, 1.0f, sum * power_of_2(-term.alpha * n.teacher - term.beta * n.student));
    };
    const Measured left = branch(first, x.sums[2]), right = branch(second, x.sums[3]);
    Measured chosen = left.value < right.value ? right : left;
    // Two branches that are about equal are left to the exact passes.
    chosen.accepted =
        left.accepted && right.accepted && absolute(left.value - right.value) >= 2.0f * kLeast * chosen.value;
    chosen.state[1] = left.value < right.value ? 1.0f : 0.0f;
    return chosen;
  }

  __device__ __forceinline__ float slope(const Measured& measured, float a, float b, float q) const {
    // Chosen number by number: a choice between the structs would put them into local memory.
    const bool left = measured.state[1] == 0.0f;
    AlphaBetaTerm<true> term = first;
    term.alpha = left ? first.alpha : second.alpha;
    term.beta = left ? first.beta : second.beta;
    term.inverse_alpha = left ? first.inverse_alpha : second.inverse_alpha;
    return term.slope(a, b, q);
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
    const bool accepted = value >= kLeast * (1.0f + kLn2 * size) && value < kMostValue;
    return {accepted, value, kLn2 * reverse * of_q, {forward, reverse}};
  }

  __device__ __forceinline__ float slope_of(float forward, float reverse, float a, float b, float q) const {
    const float d = lower(b, kLogFloor) - lower(a, kLogFloor);  // 0 for two masked logits
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
    return slope_of(measured.state[0], measured.state[1], a, b, q);
  }
};

}  // namespace abkd::cuda
