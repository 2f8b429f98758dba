// The row driver for CPUs. One source, driver.h, is compiled for several instruction sets; one is chosen at run time.
#pragma once

#include "../row_call.h"

namespace abkd::cpu {

// Processes rows [begin, end). Many threads may call it at once, on disjoint ranges.
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

// The best instruction set that this CPU has. The environment variable ABKD_SIMD can only choose a lesser one.
// Throws std::invalid_argument for a variable that names none.
Choice choose();

}  // namespace abkd::cpu
