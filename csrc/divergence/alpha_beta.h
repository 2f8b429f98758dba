// The alpha-beta divergence of ABKD (ICML 2025) between the teacher p and the student q, for every real alpha, beta.
//
// With a = log p, b = log q, d = b - a, the term of one token is an exact integral over the log-ratio,
//     D = p^(alpha+beta) Int_0^d e^(beta t) (e^(alpha t) - 1) / alpha dt,
// which is the second divided difference of x -> p^(alpha+beta) e^(x d) at the nodes 0, beta and alpha + beta. Its
// derivative by log q is the first divided difference over (beta, alpha + beta):
//     u = p^alpha q^beta (e^(alpha d) - 1) / alpha.
// The nodes stand for P = p^(alpha+beta), M = p^alpha q^beta and Q = q^(alpha+beta). Sorted, the two gaps have one
// sign, so all exponentials of gaps decay, the largest power is taken directly, and nothing overflows or cancels:
// forward KL (1, 0), reverse KL (0, 1), alpha + beta = 0, (0, 0) and every neighbour of them are one code path.
#pragma once

#include "math.h"

namespace abkd {

template <typename T>
struct AlphaBeta {
  static constexpr bool has_teacher = true;

  struct Term {
    T value;  // D
    T slope;  // u = dD / d log q
  };

  struct Exponent {
    T a, b, d;  // coefficients
  };

  Exponent first, last;  // of the powers at both ends of the sorted chain first -> middle -> last
  T gap1, gap2, gap;     // middle - first, last - middle, last - first: all of one sign
  T rate1, rate2;        // |gap1|, |gap2|
  T inverse_gap, inverse_rate1, inverse_rate2;  // 0 where there is no gap; never used there
  T slope_gap1, slope_gap2;                     // u is this combination of the two first differences

  ABKD_INLINE_MEMBER AlphaBeta(double alpha, double beta) {
    double node[3] = {0.0, beta, alpha + beta};  // P, M, Q
    int order[3] = {0, 1, 2};
    if (alpha * beta < 0.0) {  // the middle node is P if |alpha| >= |beta|, else Q
      const bool p_is_middle = absolute(alpha) >= absolute(beta);
      order[0] = p_is_middle ? 1 : 0;
      order[1] = p_is_middle ? 0 : 2;
      order[2] = p_is_middle ? 2 : 1;
    }
    const double x0 = node[order[0]], x1 = node[order[1]], x2 = node[order[2]];
    // log P = s a, log M = s a + beta d, log Q = s b with s = alpha + beta: each in the form that rounds least where it
    // is the largest.
    const Exponent exponent[3] = {{T(node[2]), T(0), T(0)}, {T(node[2]), T(0), T(beta)}, {T(0), T(node[2]), T(0)}};
    first = exponent[order[0]];
    last = exponent[order[2]];
    gap1 = T(x1 - x0);
    gap2 = T(x2 - x1);
    gap = T(x2 - x0);
    rate1 = absolute(gap1);
    rate2 = absolute(gap2);
    inverse_gap = gap == T(0) ? T(0) : T(1.0 / (x2 - x0));
    inverse_rate1 = rate1 == T(0) ? T(0) : T(1) / rate1;
    inverse_rate2 = rate2 == T(0) ? T(0) : T(1) / rate2;
    // Only with P in the middle is (M, Q) the whole chain; elsewhere it is the second gap.
    const bool whole = order[1] == 0;
    slope_gap1 = whole ? T((x1 - x0) / (x2 - x0)) : T(0);
    slope_gap2 = whole ? T((x2 - x1) / (x2 - x0)) : T(1);
  }

  ABKD_INLINE_MEMBER Term operator()(T a, T b, T d) const {
    const T magnitude = absolute(d);
    const bool rising = gap * d > T(0);  // the last node carries the largest power
    const T decay1 = exponential(-rate1 * magnitude);
    const T decay2 = exponential(-rate2 * magnitude);
    // Three selects and no reference: a compiler vectorises the former only.
    const T end_a = rising ? last.a : first.a, end_b = rising ? last.b : first.b, end_d = rising ? last.d : first.d;
    const T top = exponential(upper(end_a * a + end_b * b + end_d * d, Limits<T>::max_exponent));

    // First divided differences, each anchored at the larger of its two powers.
    const T signed_top = d < T(0) ? -top : top;
    const T top1 = rising ? signed_top * decay2 : signed_top;
    const T top2 = rising ? signed_top : signed_top * decay1;
    const T difference1 = top1 * decaying_integral(magnitude, rate1, inverse_rate1, decay1);
    const T difference2 = top2 * decaying_integral(magnitude, rate2, inverse_rate2, decay2);

    Term term;
    term.slope = slope_gap1 * difference1 + slope_gap2 * difference2;
    const T direct = (difference2 - difference1) * inverse_gap;
    const T bottom = top * (rising ? decay1 * decay2 : T(1));  // the power at the first node
    term.value = absolute(gap * d) < Limits<T>::series_below ? bottom * series(d) : direct;
    return term;
  }

 private:
  // d^2 sum_k h_k / (k + 2)!, where h_k is the complete homogeneous symmetric polynomial in gap1 d and gap d.
  ABKD_INLINE_MEMBER T series(T d) const {
    const T x = gap1 * d, y = gap * d;
    T h = T(1), power = T(1), factorial = T(0.5);
    T total = factorial;
    for (int k = 1; k < Limits<T>::series_terms; ++k) {
      power *= y;
      h = h * x + power;
      factorial *= T(1.0 / (k + 2));
      total += h * factorial;
    }
    return d * d * total;
  }
};

}  // namespace abkd
