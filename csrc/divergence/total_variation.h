// Half the sum of |p - q|.
#pragma once

#include "math.h"

namespace abkd {

template <typename T>
struct TotalVariationTerm {
  static constexpr bool adapts = false;
  T center;  // what slopes are made without, as a multiple of q

  ABKD_INLINE_MEMBER Term<T> operator()(T a, T b, T d) const {
    const Anchored<T> x(a, b, d);
    const T sign = d > T(0) ? T(0.5) : d < T(0) ? T(-0.5) : T(0);
    return {T(0.5) * x.top * x.lost, (sign - center) * x.student()};
  }

  ABKD_INLINE_MEMBER T slope(T a, T b, T d) const { return (*this)(a, b, d).slope; }
};

// The slopes are centered, with the state (1, 0), where the student's likeliest token has q > p; struct Mixture says
// why.
template <typename T>
struct TotalVariation {
  static constexpr bool has_teacher = true, adapts = true;

  template <typename Row>
  ABKD_INLINE_MEMBER Pair<double> state(const Row& row) const {
    return {row.at_likeliest([](T, T, T d) { return d > T(0); }) ? 1.0 : 0.0, 0.0};
  }

  ABKD_INLINE_MEMBER TotalVariationTerm<T> at(Pair<double> state) const { return {T(0.5 * state.first)}; }
};

}  // namespace abkd
