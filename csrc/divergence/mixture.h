// Kullback-Leibler divergences from a mixture m = (1 - w) p + w q of teacher and student:
//     from_student KL(q, m) + from_teacher KL(p, m).
// Jensen-Shannon has from_student = w and from_teacher = 1 - w, skew forward KL (0, 1), skew reverse KL (1, 0).
#pragma once

#include "math.h"

namespace abkd {

// A token's term, with slopes that are `centered` or not; struct Mixture says when.
//
// With k = from_student - from_teacher w / (1 - w) the slope is q times
//     from_student log(q / m) + k w (1 - q / m),
// which is 0 where p = q. The centered slope is q times
//     from_student log(w q / m) + k (1 - w q / m),
// which is 0 where p = 0. The two differ by a multiple of q.
template <typename T>
struct MixtureTerm {
  static constexpr bool adapts = false;
  T weight, rest;  // w and 1 - w
  T from_student, from_teacher;
  T unit, log_unit;             // 1 / w and its logarithm if centered, else 1 and 0
  T of_lost, of_decay;          // 1 - unit m is this combination of 1 - m and p, where q > p and q is the unit
  T of_difference, of_teacher;  // what k multiplies, times k m, is this combination of q - p and p

  ABKD_INLINE_MEMBER MixtureTerm(double w, double from_student, double from_teacher, bool centered)
      : weight(T(w)),
        rest(T(1.0 - w)),
        from_student(T(from_student)),
        from_teacher(T(from_teacher)),
        unit(centered ? T(1.0 / w) : T(1)),
        log_unit(centered ? -logarithm(T(w)) : T(0)),
        of_lost(centered ? T(0) : T(1)),
        of_decay(centered ? T((w - 1.0) / w) : T(0)) {
    const double excess = from_student * (1.0 - w) - from_teacher * w;  // k (1 - w)
    of_difference = centered ? T(0) : T(-w * excess);
    of_teacher = centered ? T(excess) : T(0);
  }

  // No condition on the mode: a loop that has one is not vectorized.
  ABKD_INLINE_MEMBER Term<T> operator()(T a, T b, T d) const {
    const Anchored<T> x(a, b, d);
    const T of_bottom = x.falling ? weight : rest, of_top = x.falling ? rest : weight;
    const T m = of_top + of_bottom * x.decay;  // the mixture over max(p, q), at most 1
    const T lost = of_bottom * x.lost;         // 1 - m
    const T scaled = x.falling ? m : m * unit;
    const T short_of_1 = x.falling ? lost : of_lost * lost + of_decay * x.decay;
    // -log scaled. Near 1 this puts back what rounding lost.
    const T beyond_1 = scaled - T(1);
    T to_scaled = -logarithm(scaled);
    to_scaled = absolute(beyond_1) < T(0.5) ? to_scaled + (short_of_1 + beyond_1) : to_scaled;
    const T to_top = x.falling ? to_scaled : to_scaled + log_unit;  // -log m
    const T to_bottom = x.magnitude - to_top;                       // log m - log(min(p, q) / max(p, q))

    const T from_top = x.falling ? from_teacher : from_student;
    const T from_bottom = x.falling ? from_student : from_teacher;
    Term<T> term;
    term.value = x.top * (from_top * rise(to_top, lost) + from_bottom * fall(to_bottom, of_top * x.lost, x.decay, m));
    const T log_ratio = x.falling ? -log_unit - to_bottom : to_scaled;  // log(q / m), or log(w q / m)
    const T teacher = x.falling ? T(1) : x.decay, difference = x.falling ? -x.lost : x.lost;  // p and q - p
    term.slope = x.student() * (from_student * log_ratio + (of_difference * difference + of_teacher * teacher) / m);
    return term;
  }

  ABKD_INLINE_MEMBER T slope(T a, T b, T d) const { return (*this)(a, b, d).slope; }
};

// Where the likeliest tokens of the student have next to no p, all their slopes are nearly the same multiple of q.
// This multiple makes no difference to the gradient, slope - q * (sum of slopes), but it takes the digits of what
// remains. In such rows the slopes are centered: they are made without it.
template <typename T>
struct Mixture {
  static constexpr bool has_teacher = true, adapts = true;
  double weight, from_student, from_teacher;  // weight is w, strictly between 0 and 1

  ABKD_INLINE_MEMBER Mixture(double weight, double from_student, double from_teacher)
      : weight(weight), from_student(from_student), from_teacher(from_teacher) {}

  // (1, 0) if the row's slopes are centered.
  template <typename Row>
  ABKD_INLINE_MEMBER Pair<double> state(const Row& row) const {
    const double multiple = from_student * (weight - 1.0 - double(logarithm(T(weight)))) + from_teacher * weight;
    const T half = T(0.5 * multiple);
    const bool apart =
        row.at_likeliest([half, x = at({})](T a, T b, T d) { return x.slope(a, b, d) > half * exponential(b); });
    return {apart ? 1.0 : 0.0, 0.0};
  }

  ABKD_INLINE_MEMBER MixtureTerm<T> at(Pair<double> state) const {
    return {weight, from_student, from_teacher, state.first != 0.0};
  }
};

}  // namespace abkd
