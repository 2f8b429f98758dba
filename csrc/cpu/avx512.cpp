#if defined(__x86_64__)
#include "target_headers.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#define ABKD_ISA avx512
#include "driver.h"
#endif
