// One call of the row kernel, in plain C++. The bindings fill it in; the driver of a device runs it.
//
// A row is one token: student logits z[V], teacher logits y[V] and a label. With p = softmax(y / temperature) and
// q = softmax(z / temperature) the loss of a row is
//     (1 - hard_weight) D(p, q) + hard_weight (log sum exp z - z[label]).
// Models may scale their logits and bound them (`Map`): z and y are the results, the gradient is by what was read. It
// is not divided by any row count, and may overwrite the student's logits if it has their type. A row with label -100
// has loss and gradient 0.
#pragma once

#include <cstdint>

namespace abkd {

enum class DType { float32, float64, bfloat16, float16 };

// The numbers are the same as in the catalog, abkd_fast/losses/divergences.py.
enum class Family : int64_t {
  cross_entropy = 0,
  alpha_beta = 1,
  alpha_net = 2,
  weighted_kl = 3,
  balanced_kl = 4,
  adaptive_kl = 5,
  mixture = 6,
  total_variation = 7,
};

constexpr int64_t kIgnored = -100;
constexpr int64_t kElsewhere = -1;      // another shard has the label; only for calls that make no losses
constexpr double kBothBranches = -1.0;  // as Statistics::state[0], for AlphaNet
constexpr int kParameters = 3;

// What a model does to the products of its output projection: x becomes cap tanh(scale x / cap), or scale x if cap is
// 0.
struct Map {
  double scale = 1.0, cap = 0.0;
  bool is_identity() const { return scale == 1.0 && cap == 0.0; }
};

// The logits of one model: [count, vocab], rows `stride` elements apart.
struct Logits {
  const void* data;
  int64_t stride;
  DType dtype;
  Map map;
};

// What the gradient of a row needs besides the logits.
struct Statistics {
  double student_lse, teacher_lse;  // log sum exp of logits / temperature
  double plain_lse;                 // log sum exp of the student's logits; only if hard_weight is not 0
  double slope;                     // sum of dD / d log q over the vocabulary
  // What the divergence decided for this row: two weights; or whether its slopes are centered, and a branch.
  double state[2];
};

// A call makes
//   - the log-normalizers, if `normalizes` is true,
//   - the losses, if `losses` is set,
//   - the gradient, if `gradient` is set.
// It writes to `statistics` what it makes, and reads from there what it needs and does not make. A call that makes the
// losses decides the state if it makes the normalizers too. Where AlphaNet's state is kBothBranches, the loss is the
// first branch's value, and the slope the second's. If the vocabulary is spread over devices, each device makes three
// calls on its own columns, and the results are merged in between.
struct Rows {
  int64_t count, vocab;
  Logits student;
  Logits teacher;  // its data are null for cross_entropy
  void* gradient;  // [count, vocab], rows gradient_stride apart, or null; may be the student's data
  int64_t gradient_stride;
  DType gradient_dtype;
  const int64_t* labels;   // [count], or null if no row is ignored and hard_weight is 0
  void* losses;            // [count], float64 for float64 logits of the student, else float32; or null
  Statistics* statistics;  // [count], or null
  const void* upstream;    // [count], factors of the gradients, in the type of the losses; or null for 1
  Family family;
  double parameters[kParameters];
  double temperature, hard_weight;
  bool normalizes;
};

}  // namespace abkd
