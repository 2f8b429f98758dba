// Weighted forward and reverse Kullback-Leibler divergence. The weights are constants (FKL, RKL, WSD), or are decided
// for each row (BDKD, AKL).
#pragma once

#include "math.h"

namespace abkd {

// forward KL(p, q) + reverse KL(q, p). Each direction has the difference of the probabilities added, which is 0 in sum
// and makes every term positive: sum p log(p / q) - p + q, and the same with p and q exchanged.
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

  // The weights of both directions. KL(q, p), a mean over q, gets the larger one if the student is less certain.
  template <typename Row>
  ABKD_INLINE_MEMBER Pair<double> state(const Row& row) const {
    const auto entropy = row.sum([](T a, T b, T) { return Pair<T>{-a * exponential(a), -b * exponential(b)}; });
    return {entropy.first > entropy.second ? 3.0 : 1.0, entropy.second > entropy.first ? 3.0 : 1.0};
  }

  ABKD_INLINE_MEMBER WeightedKL<T> at(Pair<double> weights) const { return {weights.first, weights.second}; }
};

// AKL: the weights of KL(p, q) and KL(q, p) are the shares of head and tail in sum |p - q|. The head holds the
// teacher's likeliest tokens: as many as have mu or less together, and at least one. The first token that would exceed
// mu is in the tail, with all tokens that are as likely. The weights are constants for the gradient.
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
  // Finds the smallest log p of the head by bisection: a few masked sums are faster than a sort.
  template <typename Row>
  ABKD_INLINE_MEMBER T threshold(const Row& row) const {
    // All tokens below `low` have less than 1 - mu together. Invariant: the tokens from `high` up fit under mu, the
    // tokens from `low` up do not.
    T low = logarithm((T(1) - mu) / T(row.vocab)), high = T(0.5);
    const auto likely = row.likely(low);
    double between = double(row.vocab);  // the most tokens that can lie between low and high
    while (between > 1) {
      const T middle = low + (high - low) * T(0.5);
      if (middle <= low || middle >= high) break;  // neighboring numbers: all tokens between them are equally likely
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
    // The likeliest token belongs to the head, though a loop may round its log p in another way than largest_log_p.
    const T top = row.largest_log_p();
    return upper(high, top - Limits<T>::rounding * (absolute(top) + absolute(row.log_p.high)));
  }
};

}  // namespace abkd
