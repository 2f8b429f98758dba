#include <cstdlib>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace abkd::cpu {

Choice choose() {
  const char* requested = std::getenv("ABKD_SIMD");
  const std::string limit = requested && *requested ? requested : "avx512";
  if (limit != "avx512" && limit != "avx2" && limit != "baseline") {
    throw std::invalid_argument("ABKD_SIMD is \"" + limit + "\", expected avx512, avx2 or baseline");
  }
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit == "avx512") return {"avx512", avx512::drive};
  if (has_avx2 && limit != "baseline") return {"avx2", avx2::drive};
#endif
  return {"baseline", baseline::drive};
}

}  // namespace abkd::cpu
