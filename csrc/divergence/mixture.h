// Kullback-Leibler divergences from a mixture m = (1 - w) p + w q of teacher and student:
//     from_student KL(q, m) + from_teacher KL(p, m).
// Jensen-Shannon has from_student = w and from_teacher = 1 - w, skew forward KL (0, 1), skew reverse KL (1, 0).
#pragma once

#include "math.h"

namespace abkd {

template <typename T>
struct Mixture {
  static constexpr bool has_teacher = true, adapts = false;
  T weight, rest;  // w and 1 - w, strictly between 0 and 1
  T from_student, from_teacher;

  ABKD_INLINE_MEMBER Mixture(double weight, double from_student, double from_teacher)
      : weight(T(weight)), rest(T(1.0 - weight)), from_student(T(from_student)), from_teacher(T(from_teacher)) {}

  ABKD_INLINE_MEMBER Term<T> operator()(T a, T b, T d) const {
    const Anchored<T> x(a, b, d);
    const T of_bottom = x.falling ? weight : rest, of_top = x.falling ? rest : weight;
    const T m = of_top + of_bottom * x.decay;  // the mixture over max(p, q), at most 1
    const T inverse = T(1) / m;
    const T short_of_1 = of_bottom * x.lost;  // 1 - m
    // -log m. Near m = 1 this puts back what the rounding of m lost.
    T to_top = -logarithm(m);
    to_top = m > T(0.5) ? to_top + (short_of_1 + (m - T(1))) : to_top;
    to_top = lower(to_top, T(0));
    const T to_bottom = lower(x.magnitude - to_top, T(0));  // log m - log(min(p, q) / max(p, q))
    const T over_top = short_of_1 * inverse;                // max(p, q) / mixture - 1
    const T over_bottom = of_top * x.lost * inverse;        // 1 - min(p, q) / mixture

    const T weight_of_top = x.falling ? from_teacher : from_student;
    const T weight_of_bottom = x.falling ? from_student : from_teacher;
    Term<T> term;
    term.value = x.top * (weight_of_top * rise(to_top, short_of_1) +
                          weight_of_bottom * m * fall(to_bottom, over_bottom, x.decay * inverse));
    const T log_ratio = x.falling ? -to_bottom : to_top;           // log(q / m)
    const T student_excess = x.falling ? over_bottom : -over_top;  // 1 - q / m
    const T teacher_excess = x.falling ? -over_top : over_bottom;  // 1 - p / m
    term.slope =
        x.student() * (from_student * (log_ratio + weight * student_excess) + from_teacher * weight * teacher_excess);
    return term;
  }

  ABKD_INLINE_MEMBER T slope(T a, T b, T d) const { return (*this)(a, b, d).slope; }
};

}  // namespace abkd
