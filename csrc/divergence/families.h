// The list of all divergences: turns the family and the parameters of a call into the functor that the drivers run.
#pragma once

#include "../row_call.h"
#include "alpha_beta.h"
#include "cross_entropy.h"
#include "kullback_leibler.h"
#include "mixture.h"
#include "total_variation.h"

namespace abkd {

// The number of Rows::parameters that a family has, or -1 if there is no such family.
static inline int parameter_count(Family family) {
  switch (family) {
    case Family::cross_entropy:
    case Family::balanced_kl:
    case Family::total_variation:
      return 0;
    case Family::adaptive_kl:
      return 1;
    case Family::alpha_beta:
    case Family::alpha_net:
    case Family::weighted_kl:
      return 2;
    case Family::mixture:
      return 3;
  }
  return -1;
}

// Returns run(divergence). T is the type of the arithmetic.
template <typename T, typename Run>
static auto with_divergence(const Rows& rows, Run run) {
  const double* x = rows.parameters;
  switch (rows.family) {
    case Family::alpha_beta:
      if (x[0] > 0.0 && x[1] > 0.0 && x[0] + x[1] == 1.0) return run(AlphaDivergence<T>(x[0], x[1]));
      return run(AlphaBeta<T>(x[0], x[1]));
    case Family::alpha_net:
      return run(AlphaNet<T>(x[0], x[1]));
    case Family::weighted_kl:
      return run(WeightedKL<T>(x[0], x[1]));
    case Family::balanced_kl:
      return run(BalancedKL<T>{});
    case Family::adaptive_kl:
      return run(AdaptiveKL<T>(x[0]));
    case Family::mixture:
      return run(Mixture<T>(x[0], x[1], x[2]));
    case Family::total_variation:
      return run(TotalVariation<T>{});
    case Family::cross_entropy:
      break;
  }
  return run(CrossEntropy{});
}

}  // namespace abkd
