// The alpha-beta divergence of ABKD (ICML 2025) between the teacher p and the student q, for all real alpha and beta.
//
// With a = log p, b = log q, d = b - a, the term of one token is an exact integral over the log-ratio,
//     D = p^(alpha+beta) Int_0^d e^(beta t) (e^(alpha t) - 1) / alpha dt,
// which is the second divided difference of x -> p^(alpha+beta) e^(x d) at the nodes 0, beta and alpha + beta. Its
// derivative by log q is the first divided difference over (beta, alpha + beta):
//     u = p^alpha q^beta (e^(alpha d) - 1) / alpha.
// The nodes stand for P = p^(alpha+beta), M = p^alpha q^beta and Q = q^(alpha+beta). If the nodes are sorted, the two
// gaps have the same sign. All exponentials of gaps then decay, the largest power is taken directly, and nothing
// overflows or cancels. Forward KL (1, 0), reverse KL (0, 1), alpha + beta = 0, (0, 0) and all points near them take
// the same code path.
#pragma once

#include "math.h"

namespace abkd {

template <typename T>
struct AlphaBeta {
  static constexpr bool has_teacher = true, adapts = false;

  struct Parts {
    Term<T> term;
    T mixed;  // M if alpha, beta > 0
  };

  // The powers at both ends of the sorted chain first -> middle -> last have the logarithms
  // (alpha + beta) a + first_d d and (alpha + beta) b + last_d d.
  T first_d, last_d;
  T gap1, gap;     // middle - first, last - first: they and last - middle have the same sign
  T rate1, rate2;  // |middle - first|, |last - middle|; in place of 0 a number so small that it makes no difference
  T inverse_gap, inverse_rate1, inverse_rate2;
  T alpha, sum;  // sum = alpha + beta
  T inverse_alpha;
  T slope_gap1, slope_gap2;  // u is this combination of the two first differences

  ABKD_INLINE_MEMBER AlphaBeta(double alpha, double beta)
      : alpha(T(alpha)), sum(T(alpha + beta)), inverse_alpha(T(1) / rate_of(T(alpha))) {
    double node[3] = {0.0, beta, alpha + beta};  // P, M, Q
    int order[3] = {0, 1, 2};
    if (alpha * beta < 0.0) {  // the middle node is P if |alpha| >= |beta|, else Q
      const bool p_is_middle = absolute(alpha) >= absolute(beta);
      order[0] = p_is_middle ? 1 : 0;
      order[1] = p_is_middle ? 0 : 2;
      order[2] = p_is_middle ? 2 : 1;
    }
    const double x0 = node[order[0]], x1 = node[order[1]], x2 = node[order[2]];
    // With s = alpha + beta, log P = s a, log Q = s b and log M = s a + beta d = s b - alpha d.
    first_d = order[0] == 1 ? T(beta) : T(0);
    last_d = order[2] == 1 ? T(-alpha) : T(0);
    gap1 = T(x1 - x0);
    gap = T(x2 - x0);
    rate1 = rate_of(T(x1 - x0));
    rate2 = rate_of(T(x2 - x1));
    inverse_gap = absolute(gap) < Limits<T>::least_rate ? T(0) : T(1.0 / (x2 - x0));  // 0 is never used
    inverse_rate1 = T(1) / rate1;
    inverse_rate2 = T(1) / rate2;
    // (M, Q) is the whole chain if P is in the middle, else the second gap.
    const bool whole = order[1] == 0;
    slope_gap1 = whole ? T((x1 - x0) / (x2 - x0)) : T(0);
    slope_gap2 = whole ? T((x2 - x1) / (x2 - x0)) : T(1);
  }

  ABKD_INLINE_MEMBER Term<T> operator()(T a, T b, T d) const { return parts(a, b, d).term; }

  ABKD_INLINE_MEMBER Parts parts(T a, T b, T d) const {
    const T magnitude = absolute(d);
    const bool rising = gap * d > T(0);  // the last node carries the largest power
    const Decay<T> decay1 = decaying(rate1 * magnitude), decay2 = decaying(rate2 * magnitude);
    const T power = sum * (rising ? b : a) + (rising ? last_d : first_d) * d;
    const T top = exponential(upper(power, Limits<T>::max_exponent));

    // The first divided differences, each made from the larger of its two powers: top * Int_0^|d| e^(-rate t) dt.
    const T signed_top = d < T(0) ? -top : top;
    const T top1 = rising ? signed_top * decay2.decay : signed_top;
    const T top2 = rising ? signed_top : signed_top * decay1.decay;
    const T difference1 = top1 * decay1.lost * inverse_rate1;
    const T difference2 = top2 * decay2.lost * inverse_rate2;

    Parts made;
    made.mixed = top * (rising ? decay2.decay : decay1.decay);
    made.term.slope = slope_gap1 * difference1 + slope_gap2 * difference2;
    const T direct = (difference2 - difference1) * inverse_gap;
    const T bottom = top * (rising ? decay1.decay * decay2.decay : T(1));  // the power at the first node
    made.term.value = absolute(gap * d) < Limits<T>::series_below ? bottom * series(d) : direct;
    return made;
  }

  ABKD_INLINE_MEMBER T slope(T a, T b, T d) const { return slope_and_mixed(b, d).first; }

  // The slope alone takes fewer exponentials: M and Q differ by the larger of them times (1 - e^-|alpha d|).
  ABKD_INLINE_MEMBER Pair<T> slope_and_mixed(T b, T d) const {
    const T excess = lower(-alpha * d, T(0));  // log(M / Q) if M is larger, else 0
    const T top = exponential(upper(sum * b + excess, Limits<T>::max_exponent));
    const Decay<T> decayed = decaying(rate_of(alpha) * absolute(d));
    const T size = top * decayed.lost * inverse_alpha;
    return {d < T(0) ? -size : size, d < T(0) ? top : top * decayed.decay};
  }

 private:
  ABKD_INLINE_MEMBER static T rate_of(T gap) { return lower(absolute(gap), Limits<T>::least_rate); }

  // d^2 sum_k h_k / (k + 2)!; h_k is the complete homogeneous symmetric polynomial in gap1 d and gap d.
  ABKD_INLINE_MEMBER T series(T d) const {
    const T x = gap1 * d, y = gap * d;
    T h = T(1), power = T(1), factorial = T(0.5);
    T total = factorial;
    ABKD_UNROLL
    for (int k = 1; k < Limits<T>::series_terms; ++k) {
      power *= y;
      h = h * x + power;
      factorial *= T(1.0 / (k + 2));
      total += h * factorial;
    }
    return d * d * total;
  }
};

// Alpha-divergence (alpha, 1 - alpha), with slopes (q - M) / alpha or, if they are centered, -M / alpha.
template <typename T>
struct AlphaDivergenceTerm {
  static constexpr bool adapts = false;
  AlphaBeta<T> plain;
  T of_slope, of_mixed;

  ABKD_INLINE_MEMBER AlphaDivergenceTerm(const AlphaBeta<T>& plain, bool centered)
      : plain(plain), of_slope(centered ? T(0) : T(1)), of_mixed(centered ? -plain.inverse_alpha : T(0)) {}

  ABKD_INLINE_MEMBER Term<T> operator()(T a, T b, T d) const {
    const auto parts = plain.parts(a, b, d);
    return {parts.term.value, of_slope * parts.term.slope + of_mixed * parts.mixed};
  }

  ABKD_INLINE_MEMBER T slope(T, T b, T d) const {
    const Pair<T> made = plain.slope_and_mixed(b, d);
    return of_slope * made.first + of_mixed * made.second;
  }
};

// Whether a row's slopes are centered: where the student's likeliest token has M < q / 2. struct Mixture says why.
template <typename T, typename Row>
ABKD_INLINE bool is_centered(const Row& row, T alpha) {
  constexpr T log_2 = T(0.693147180559945309);
  const bool bounded = alpha > T(0) && alpha < T(1);
  return bounded && row.at_likeliest([alpha, log_2](T, T, T d) { return alpha * d > log_2; });
}

// For alpha between 0 and 1. Any other has no bound, and is an AlphaBeta.
template <typename T>
struct AlphaDivergence {
  static constexpr bool has_teacher = true, adapts = true;
  AlphaBeta<T> plain;

  ABKD_INLINE_MEMBER AlphaDivergence(double alpha, double beta) : plain(alpha, beta) {}

  // (1, 0) if the row's slopes are centered.
  template <typename Row>
  ABKD_INLINE_MEMBER Pair<double> state(const Row& row) const {
    return {is_centered(row, plain.alpha) ? 1.0 : 0.0, 0.0};
  }

  ABKD_INLINE_MEMBER AlphaDivergenceTerm<T> at(Pair<double> state) const { return {plain, state.first != 0.0}; }
};

// AlphaNet: in each row the larger of two alpha-divergences, (alpha, 1 - alpha) and (beta, 1 - beta).
template <typename T>
struct AlphaNet {
  static constexpr bool has_teacher = true, adapts = true;
  AlphaBeta<T> first, second;

  ABKD_INLINE_MEMBER AlphaNet(double alpha, double beta) : first(alpha, 1.0 - alpha), second(beta, 1.0 - beta) {}

  // The divergences of both branches. Each is (1 - M) / (alpha (1 - alpha)) with M = sum p^alpha q^(1 - alpha), which
  // is good to about 5e-7: where 1 - M is large enough, that costs no digit that counts.
  template <typename Row>
  ABKD_INLINE_MEMBER Pair<double> values(const Row& row) const {
    constexpr double least = 1.0 / 16;
    const T x = first.alpha, y = second.alpha;
    const auto mixed = row.sum([x, y](T a, T b, T) {
      return Pair<T>{exponential(x * a + (T(1) - x) * b), exponential(y * a + (T(1) - y) * b)};
    });
    const double left = 1.0 - double(mixed.first), right = 1.0 - double(mixed.second);
    const bool bounded = T(0) < x && x < T(1) && T(0) < y && y < T(1);
    if (bounded && left >= least && right >= least) return {left / (x * (1.0 - x)), right / (y * (1.0 - y))};
    // One branch after the other: a loop with both is not vectorized, and takes more registers than a GPU's thread has.
    const auto of_first = row.sum([z = first](T a, T b, T d) { return Pair<T>{z(a, b, d).value, T(0)}; });
    const auto of_second = row.sum([z = second](T a, T b, T d) { return Pair<T>{z(a, b, d).value, T(0)}; });
    return {double(of_first.first), double(of_second.first)};
  }

  // Whether the row's slopes are centered, and its branch: 0 for the first, 1 for the second.
  template <typename Row>
  ABKD_INLINE_MEMBER Pair<double> state(const Row& row) const {
    const Pair<double> made = values(row);
    const bool takes_first = made.first >= made.second;
    const bool centered = is_centered(row, takes_first ? first.alpha : second.alpha);
    return {centered ? 1.0 : 0.0, takes_first ? 0.0 : 1.0};
  }

  ABKD_INLINE_MEMBER AlphaDivergenceTerm<T> at(Pair<double> state) const {
    return {state.second == 0.0 ? first : second, state.first != 0.0};
  }
};

}  // namespace abkd
