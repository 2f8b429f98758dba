// The row driver for processors: one source (driver.h), compiled for several instruction sets, chosen at run time.
#pragma once

#include "../row_call.h"

namespace abkd::cpu {

// Processes rows [begin, end); safe to call from many threads at once on disjoint ranges.
using RowDriver = void (*)(const Rows& rows, int64_t begin, int64_t end);

namespace baseline {
void drive(const Rows& rows, int64_t begin, int64_t end);
}
namespace avx2 {
void drive(const Rows& rows, int64_t begin, int64_t end);
}
namespace avx512 {
void drive(const Rows& rows, int64_t begin, int64_t end);
}

struct Choice {
  const char* name;  // "avx512", "avx2" or "baseline"
  RowDriver drive;
};

// The best this processor runs; the environment variable ABKD_SIMD names a lesser one.
Choice choose();

}  // namespace abkd::cpu
