// Forward and reverse Kullback-Leibler divergence, weighted: by constants (FKL, RKL, WSD), or row by row (BDKD, AKL).
#pragma once

#include "math.h"

namespace abkd {

// forward KL(p, q) + reverse KL(q, p), each with the difference of the probabilities that makes its terms positive:
// sum p log(p / q) - p + q, and the same with p and q exchanged.
template <typename T>
struct WeightedKL {
  static constexpr bool has_teacher = true, adapts = false;
  T forward, reverse;

  ABKD_INLINE_MEMBER WeightedKL(double forward, double reverse) : forward(T(forward)), reverse(T(reverse)) {}

  ABKD_INLINE_MEMBER Term<T> operator()(T a, T b, T d) const {
    const Anchored<T> x(a, b, d);
    const T risen = rise(x.magnitude, x.lost), fallen = fall(x.magnitude, x.lost, x.decay);
    Term<T> term;
    term.value = x.top * (x.falling ? forward * risen + reverse * fallen : forward * fallen + reverse * risen);
    term.slope = forward * x.difference() + reverse * x.student() * d;
    return term;
  }

  ABKD_INLINE_MEMBER T slope(T a, T b, T d) const { return (*this)(a, b, d).slope; }
};

// BDKD: the direction from the distribution with more entropy counts three times.
template <typename T>
struct BalancedKL {
  static constexpr bool has_teacher = true, adapts = true;

  // The weights. KL(q, p), whose mean is over q, gains where the student is the less certain one.
  template <typename Row>
  ABKD_INLINE_MEMBER Pair<double> state(const Row& row) const {
    const auto entropy = row.sum([](T a, T b, T) { return Pair<T>{-a * exponential(a), -b * exponential(b)}; });
    return {entropy.first > entropy.second ? 3.0 : 1.0, entropy.second > entropy.first ? 3.0 : 1.0};
  }

  ABKD_INLINE_MEMBER WeightedKL<T> at(Pair<double> weights) const { return {weights.first, weights.second}; }
};

// AKL: the teacher's likely tokens (the head: the most whose probabilities sum to mu or less, and at least one) and the
// others share the weights of KL(p, q) and KL(q, p) as they share sum |p - q|. Tokens as likely as the first that
// would exceed mu are in the tail; the weights are constants for the gradient.
template <typename T>
struct AdaptiveKL {
  static constexpr bool has_teacher = true, adapts = true;
  T mu;

  ABKD_INLINE_MEMBER explicit AdaptiveKL(double mu) : mu(T(mu)) {}

  template <typename Row>
  ABKD_INLINE_MEMBER Pair<double> state(const Row& row) const {
    const T least = threshold(row);
    const auto gap = row.sum([least](T a, T b, T d) {
      const Anchored<T> x(a, b, d);
      const T difference = x.top * x.lost;
      return Pair<T>{a >= least ? difference : T(0), difference};
    });
    const double head = gap.second > 0 ? double(gap.first) / double(gap.second) : 0.5;
    return {head, 1.0 - head};
  }

  ABKD_INLINE_MEMBER WeightedKL<T> at(Pair<double> weights) const { return {weights.first, weights.second}; }

 private:
  // The smallest log p of the head, by bisection: a few masked sums instead of a sort.
  template <typename Row>
  ABKD_INLINE_MEMBER T threshold(const Row& row) const {
    // All tokens below `low` together have less than 1 - mu. Invariant: the tokens from `high` on fit under mu,
    // those from `low` on don't.
    T low = logarithm((T(1) - mu) / T(row.vocab)), high = T(0.5);
    const auto likely = row.likely(low);
    double between = double(row.vocab);  // at most this many tokens lie from low to high
    while (between > 1) {
      const T middle = low + (high - low) * T(0.5);
      if (middle <= low || middle >= high) break;  // neighbors: tokens between them are equally likely
      const auto above = likely.sum([middle, high](T a) {
        return Pair<T>{a >= middle ? exponential(a) : T(0), a >= middle && a < high ? T(1) : T(0)};
      });
      if (above.first <= mu) {
        high = middle;
        between -= above.second;
      } else {
        low = middle;
        between = above.second;
      }
    }
    return upper(high, row.largest_log_p());
  }
};

}  // namespace abkd
