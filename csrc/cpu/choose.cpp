#include <cstdlib>
#include <string_view>

#include "launch.h"

namespace abkd::cpu {

Choice choose() {
#if defined(__x86_64__)
  const char* requested = std::getenv("ABKD_SIMD");
  const std::string_view limit = requested ? requested : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit == "avx512") return {"avx512", avx512::drive};
  if (has_avx2 && limit != "baseline") return {"avx2", avx2::drive};
#endif
  return {"baseline", baseline::drive};
}

}  // namespace abkd::cpu
