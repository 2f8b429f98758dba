// Half the sum of |p - q|.
#pragma once

#include "math.h"

namespace abkd {

template <typename T>
struct TotalVariation {
  static constexpr bool has_teacher = true, adapts = false;

  ABKD_INLINE_MEMBER Term<T> operator()(T a, T b, T d) const {
    const Anchored<T> x(a, b, d);
    const T sign = d > T(0) ? T(0.5) : d < T(0) ? T(-0.5) : T(0);
    return {T(0.5) * x.top * x.lost, sign * x.student()};
  }

  ABKD_INLINE_MEMBER T slope(T a, T b, T d) const { return (*this)(a, b, d).slope; }
};

}  // namespace abkd
